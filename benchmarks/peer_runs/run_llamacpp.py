"""llama.cpp's K-quants: ggml's own quantization code, called on every linear.

Settings: kind ("Q3_K_M", ...) and imatrix (true, false). The wheel of xllamacpp holds the code that
quantizes and unpacks a tensor (ggml_quantize_chunk), but neither llama-quantize nor llama-imatrix.
So two things are restated here: which type each tensor of a dense Llama gets (llama-quant.cpp), and
the importance matrix, the mean square of each input channel over the calibration tokens. Rows are
quantized one by one, so the order of the rows of q and k, which GGUF files change, does not matter.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import gguf
import torch
import transformers
import xllamacpp
from shared import LINEAR, hand_back, read_job
from torch import Tensor

Type = gguf.GGMLQuantizationType
BASE = {
    "Q2_K": Type.Q2_K,
    "Q3_K_S": Type.Q3_K,
    "Q3_K_M": Type.Q3_K,
    "Q3_K_L": Type.Q3_K,
    "Q4_K_S": Type.Q4_K,
    "Q4_K_M": Type.Q4_K,
}
# What a tensor gets whose rows are no whole number of 256 weights.
FALLBACK = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}


def type_of(
    kind: str, role: str, layer: int, n_layers: int, n_gqa: float, in_features: int
) -> Type:
    """The type that llama-quantize gives a linear of a dense Llama.

    Args:
        n_gqa: query heads per key head.
    """
    chosen = BASE[kind]
    early = layer < n_layers // 8
    more = early or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2
    if role == "v_proj":
        if kind == "Q2_K":
            chosen = Type.Q4_K if n_gqa >= 4 else Type.Q3_K
        elif kind == "Q3_K_M":
            chosen = Type.Q5_K if layer < 2 else Type.Q4_K
        elif kind == "Q3_K_L" or (kind == "Q4_K_S" and layer < 4):
            chosen = Type.Q5_K
        elif kind == "Q4_K_M" and more:
            chosen = Type.Q6_K
    elif role == "down_proj":
        if kind == "Q2_K":
            chosen = Type.Q3_K
        elif kind == "Q3_K_M":
            chosen = Type.Q5_K if layer < n_layers // 16 else Type.Q4_K
        elif kind == "Q3_K_L" or (kind == "Q4_K_S" and early):
            chosen = Type.Q5_K
        elif kind == "Q4_K_M" and more:
            chosen = Type.Q6_K
    elif role == "o_proj":
        wider = {"Q2_K": Type.Q3_K, "Q3_K_M": Type.Q4_K, "Q3_K_L": Type.Q5_K}
        chosen = wider.get(kind, chosen)
    return chosen if in_features % 256 == 0 else FALLBACK[chosen]


class Ggml:
    """The two functions of ggml that are needed, found in the wheel's extension module."""

    def __init__(self) -> None:
        (file,) = Path(xllamacpp.__file__).parent.glob("*.so")
        self.library = ctypes.CDLL(str(file))
        self.quantize_chunk = self.library.ggml_quantize_chunk
        self.quantize_chunk.restype = ctypes.c_size_t
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        self.quantize_chunk.argtypes = [
            ctypes.c_int, pointer, pointer, whole, whole, whole, pointer
        ]  # fmt: skip

    def quantize(self, weight: Tensor, kind: Type, importance: Tensor | None) -> tuple[Tensor, int]:
        """The dequantized weight (out_features, in_features), and the bits it takes."""
        rows, columns = weight.shape
        block, size = gguf.GGML_QUANT_SIZES[kind]
        stored = torch.empty(rows * columns // block * size, dtype=torch.uint8)
        written = self.quantize_chunk(
            int(kind),
            weight.data_ptr(),
            stored.data_ptr(),
            0,
            rows,
            columns,
            None if importance is None else importance.data_ptr(),
        )
        assert written == stored.numel(), (written, stored.numel())
        back = gguf.quants.dequantize(stored.numpy().reshape(rows, -1), kind)
        return torch.from_numpy(back), 8 * written


@torch.no_grad()
def importance_matrix(model, linears, windows: Tensor) -> dict[str, Tensor]:
    """Linear -> (in_features,), mean over tokens of the squared input."""
    sums = {name: torch.zeros(module.in_features) for name, module in linears.items()}

    def hook(name):
        def add(module, inputs, output):
            sums[name] += inputs[0].flatten(0, -2).square().sum(0)

        return add

    handles = [module.register_forward_hook(hook(name)) for name, module in linears.items()]
    for window in windows:
        model.get_decoder()(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total / windows.numel() for name, total in sums.items()}


def main() -> None:
    job = read_job()
    kind = job.settings["kind"]
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    config = model.config
    linears = {n: m for n, m in model.named_modules() if LINEAR.fullmatch(f"{n}.weight")}
    importance = (
        importance_matrix(model, linears, job.calibration) if job.settings["imatrix"] else {}
    )
    ggml = Ggml()
    weights, bits, used = {}, 0, {}
    for name, module in linears.items():
        chosen = type_of(
            kind,
            name.rsplit(".", 1)[-1],
            int(name.split(".layers.")[1].split(".")[0]),
            config.num_hidden_layers,
            config.num_attention_heads / config.num_key_value_heads,
            module.in_features,
        )
        weights[name], more = ggml.quantize(
            module.weight.detach().contiguous(), chosen, importance.get(name)
        )
        bits += more
        used[chosen.name] = used.get(chosen.name, 0) + 1
    hand_back(
        job,
        weights,
        bits,
        job.seconds(),
        f"xllamacpp {xllamacpp.__version__}",
        note=f"types {json.dumps(used)}".replace('"', ""),
    )


if __name__ == "__main__":
    main()
