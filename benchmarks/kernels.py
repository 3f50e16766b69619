"""Time the low-bit matmul kernels beside their peers and the machine's roofs, in one run.

    python benchmarks/kernels.py --quick --json FILE   # 4096-class shapes, 1 and 8 tokens
    python benchmarks/kernels.py --json FILE --write FILE   # everything, and a table of times
    python benchmarks/kernels.py --no-peers --tokens 1 --shapes 576x576 --write FILE
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python benchmarks/kernels.py --isa avx512_vnni  # no AMX

--write makes a table of decode times for `lwquant quantize --decode-times FILE`.

Each candidate is checked against a float64 product before it is timed. Rounds are interleaved, and
each call takes the next of a pool of weights larger than the last cache, as a model would.
Bandwidth and int8 rate are probed between the rounds. A time is the best of the rounds, a roof the
best that was seen beside it; roof_fraction is the larger of bytes / bandwidth and operations / int8
rate, over the time. A peer is compared at its own width: Q2_K with 2 bits, Q4_0 and Q4_K with 4;
ratio is its time over ours. onnxruntime has our group size (128 for whole rows), torch's int4 the
largest that fits. Beside the peers there is oneDNN's product of inputs and weights that are int8
before the call, which has nothing to unpack or to round. Activations are 8 bits for weights of up
to 4, else 16, which is what quantizing chooses for 2-bit linears, most 3-bit and about half of the
4-bit ones, and all wider ones. --activation-bits says otherwise: with 8 every width runs in int8
throughout on AMX from 32 tokens on, as after set_activation_bits(model, 8, int8_weights=True).
"""

from __future__ import annotations

# Nothing is imported unless this is run: transformers takes any module of this name for the Hub's
# package `kernels`, and imports it, when a script of this folder imports transformers.
if __name__ == "__main__":
    from kernel_runs.measure import main

    main(__doc__.split("\n")[0])
