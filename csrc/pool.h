// A small thread pool: the caller works too, and never waits for a helper that has not started.
#pragma once

namespace lwquant {

// Runs task(context, index, seat) for every index in [0, n_tasks), on at most n_threads threads;
// seat < n_threads is different for threads that run at the same time. Tasks must not throw.
// Safe to call from several threads: while one job uses the helpers, others run in their caller.
using Task = void (*)(void* context, int index, int seat);
void run_tasks(int n_tasks, int n_threads, Task task, void* context);

}  // namespace lwquant
