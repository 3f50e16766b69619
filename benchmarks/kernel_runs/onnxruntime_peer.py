"""onnxruntime's MatMulNBits: 2, 4 and 8 bits, int8 activations where it has them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from kernel_runs.candidate import Call, Candidate, Shape, always, pool_size

WIDTHS = (2, 4, 8)
INT8_ACTIVATIONS = 4  # of its "accuracy levels"
TOLERANCE = 0.03


def candidates(shape: Shape, group: int, threads: int) -> list[Candidate]:
    return [_candidate(shape, bits, group, threads) for bits in WIDTHS]


def _candidate(shape: Shape, bits: int, group: int, threads: int) -> Candidate:
    out_features, in_features = shape
    n_groups = -(-in_features // group)
    random = np.random.default_rng(0)
    codes = random.integers(0, 2**bits, (out_features, n_groups * group), dtype=np.uint8)
    codes[:, in_features:] = 2 ** (bits - 1)
    scales = random.random((out_features, n_groups), dtype=np.float32) + 0.5
    per_byte = 8 // bits
    parts = codes.reshape(out_features, n_groups, group // per_byte, per_byte)
    packed = np.zeros(parts.shape[:3], dtype=np.uint8)
    for i in range(per_byte):
        packed |= parts[..., i] << (bits * i)
    model = _model(shape, bits, group, packed, scales).SerializeToString()
    size = packed.nbytes + scales.nbytes
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    sessions = [
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(pool_size(size))
    ]

    def bind(x: Tensor, n: int) -> list[Call]:
        y = torch.empty(len(x), out_features)
        return [_call(session, x, y) for session in sessions[:n]]

    def dense() -> Tensor:
        wide = np.repeat(scales, group, 1)[:, :in_features]
        steps = codes[:, :in_features].astype(np.float32) - 2 ** (bits - 1)
        return torch.from_numpy(steps * wide)

    name = f"onnxruntime {bits} bits g{group}"
    return Candidate(name, bits, size, bind, dense, always(TOLERANCE))


def _call(session: onnxruntime.InferenceSession, x: Tensor, y: Tensor) -> Call:
    """Inputs and outputs are bound once: a call only runs."""
    binding = session.io_binding()
    kind = np.float32
    binding.bind_input("x", "cpu", 0, kind, tuple(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, kind, tuple(y.shape), y.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return y

    return call


def _model(
    shape: Shape, bits: int, group: int, packed: np.ndarray, scales: np.ndarray
) -> onnx.ModelProto:
    out_features, in_features = shape
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=in_features,
        N=out_features,
        bits=bits,
        block_size=group,
        accuracy_level=INT8_ACTIVATIONS,
    )
    weights = [
        numpy_helper.from_array(packed, "codes"),
        numpy_helper.from_array(scales, "scales"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", size])
        for name, size in (("x", in_features), ("y", out_features))
    ]
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)
