// The helpers wait for a job, each takes a seat, then tasks by a shared counter. Waking a thread that
// sleeps takes some 100 microseconds on a virtual machine, as long as a whole layer at one token. So
// whoever waits looks for news for a while before it sleeps: as long as the next layer takes to come.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <unistd.h>

namespace lwquant {
namespace {

constexpr std::chrono::microseconds kAwake{200};

// Whether `news` came within kAwake.
template <typename News>
bool comes_soon(News news) {
  const auto until = std::chrono::steady_clock::now() + kAwake;
  do {
    for (int i = 0; i < 32; ++i) {
      if (news()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

class Pool {
 public:
  explicit Pool(pid_t owner) : owner_(owner) {}
  pid_t owner() const { return owner_; }

  // False when another job has the helpers.
  bool run(int n_tasks, int n_threads, Task task, void* context) {
    std::unique_lock<std::mutex> job(job_, std::try_to_lock);
    if (!job) return false;
    grow(n_threads - 1);
    {
      std::lock_guard<std::mutex> lock(state_);
      task_ = task, context_ = context, n_tasks_ = n_tasks;
      next_.store(0, std::memory_order_relaxed);
      n_seats_ = n_threads - 1, next_seat_ = 1;
    }
    for (int i = 1; i < n_threads; ++i) wake_.notify_one();
    work(0);
    {
      std::lock_guard<std::mutex> lock(state_);
      n_seats_ = 0;  // nobody joins any more
    }
    comes_soon([this] { return n_working_ == 0; });
    std::unique_lock<std::mutex> lock(state_);
    done_.wait(lock, [this] { return n_working_ == 0; });
    return true;
  }

 private:
  void grow(int n_helpers) {
    try {
      for (; n_helpers_ < n_helpers; ++n_helpers_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {  // no more threads to be had: the caller does the rest
    }
  }

  void work(int seat) {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_tasks_;) {
      task_(context_, i, seat);
    }
  }

  void help() {
    std::unique_lock<std::mutex> lock(state_, std::defer_lock);
    for (;;) {
      comes_soon([this] { return n_seats_ > 0; });
      lock.lock();
      wake_.wait(lock, [this] { return n_seats_ > 0; });
      --n_seats_, ++n_working_;
      const int seat = next_seat_++;
      lock.unlock();
      work(seat);
      lock.lock();
      if (--n_working_ == 0) done_.notify_one();
      lock.unlock();
    }
  }

  const pid_t owner_;
  std::mutex job_;    // held while a job runs
  std::mutex state_;  // guards all below but next_; n_seats_ and n_working_ are read without it
  std::condition_variable wake_, done_;
  std::atomic<int> n_seats_{0}, n_working_{0};
  int n_helpers_ = 0, next_seat_ = 0;
  int n_tasks_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
  std::atomic<int> next_{0};
};

// Never destroyed: detached helpers may outlive static destructors. A forked child has no helpers
// and perhaps a locked mutex, so it gets a pool of its own.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  const pid_t self = getpid();
  Pool* found = current.load();
  while (!found || found->owner() != self) {
    Pool* fresh = new Pool(self);
    if (current.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

}  // namespace

void run_tasks(int n_tasks, int n_threads, Task task, void* context) {
  if (n_threads > n_tasks) n_threads = n_tasks;
  if (n_threads > 1 && pool().run(n_tasks, n_threads, task, context)) return;
  for (int i = 0; i < n_tasks; ++i) task(context, i, 0);
}

}  // namespace lwquant
