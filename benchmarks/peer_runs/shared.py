"""What every peer's script shares: its job, the bits that its files store, and what it hands back.

Each script runs in the peer's own environment, which need not have lwquant: torch, safetensors and
what the peer brings. The driver is ../peers.py.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = re.compile(r"(.*\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.(\w+)")
SCALE_BITS = 16


@dataclass
class Job:
    """What the driver asked for."""

    model: Path  # float32 safetensors folder
    calibration: Tensor  # (n_samples, seq_len)
    probe: Tensor  # (seq_len,), the window on which the peer's own logits are kept
    settings: dict[str, Any]
    output: Path
    start: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Since the peer's libraries were imported."""
        return time.monotonic() - self.start


def read_job() -> Job:
    """The job of the command line; call it after the imports, when the clock should start."""
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    arguments = parser.parse_args()
    tokens = load_file(arguments.tokens)
    arguments.output.mkdir(parents=True, exist_ok=True)
    return Job(
        arguments.model,
        tokens["calibration"],
        tokens["probe"],
        arguments.settings,
        arguments.output,
    )


def hand_back(
    job: Job,
    weights: Mapping[str, Tensor],
    bits: int,
    seconds: float,
    version: str,
    *,
    logits: Tensor | None = None,
    note: str = "",
    calibration: str | None = None,
) -> None:
    """Write what the driver reads.

    Args:
        weights: dequantized weight (out_features, in_features) of every decoder linear, by the
            linear's name in transformers.
        bits: all that the peer's format stores for these linears.
        seconds: of the quantization, without saving, and without this check.
        logits: (seq_len, vocab) of the peer's own model on the probe, None where it cannot run.
        calibration: hash of the tokens where the peer drew them itself.
    """
    contiguous = {f"{k}.weight": v.detach().float().contiguous() for k, v in weights.items()}
    save_file(contiguous, job.output / "weights.safetensors")
    if logits is not None:
        save_file({"logits": logits.float().contiguous()}, job.output / "logits.safetensors")
    record = {
        "bits": bits,
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "version": version,
        "note": note,
    }
    if calibration is not None:
        record["calibration"] = calibration
    (job.output / "run.json").write_text(json.dumps(record))


@torch.no_grad()
def own_logits(model: Any, probe: Tensor) -> Tensor:
    """(seq_len, vocab) float32 of a torch model on one window (seq_len,)."""
    return model(input_ids=probe[None], use_cache=False).logits[0].float()


def stored_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Linear name -> suffix -> tensor, of all safetensors of a folder, biases aside."""
    found: dict[str, dict[str, Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                match = LINEAR.fullmatch(key)
                if match and match[2] != "bias":
                    found.setdefault(match[1], {})[match[2]] = tensors.get_tensor(key)
    return found


def stored_bits(linears: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bits of all tensors; floating ones count 16 each, as in a 16-bit checkpoint.

    Shapes and other constants of one or two values are no part of a format's cost.

    >>> codes, scales = torch.zeros(54, 576, dtype=torch.int32), torch.zeros(9, 576)
    >>> stored_bits({"a": {"qweight": codes, "scales": scales}}) / 576**2
    3.25
    """
    total = 0
    for tensors in linears.values():
        for tensor in tensors.values():
            width = SCALE_BITS if tensor.is_floating_point() else 8 * tensor.itemsize
            total += width * tensor.numel() if tensor.numel() > 2 else 0
    return total


def unpack(words: Tensor, bits: int, n_codes: int) -> Tensor:
    """Codes (rows, n_codes) of words (rows, n_words) int32: a little-endian stream along each row.

    >>> unpack(torch.tensor([[0b11_01_10]], dtype=torch.int32), 2, 3).tolist()
    [[2, 1, 3]]
    """
    position = torch.arange(32)
    stream = ((words[:, :, None] >> position) & 1).flatten(1)[:, : n_codes * bits]
    weights = 1 << torch.arange(bits)
    return (stream.view(len(words), n_codes, bits) * weights).sum(-1)


def gptq_weight(tensors: Mapping[str, Tensor], bits: int, *, zero_offset: int) -> Tensor:
    """The weight (out_features, in_features) float32 that a linear in GPTQ's layout stands for.

    Args:
        tensors: qweight (in * bits / 32, out) along in, qzeros (n_groups, out * bits / 32) along
            out, scales (n_groups, out) and perhaps g_idx (in,).
        zero_offset: 1 where zeros are stored less one (checkpoint format "gptq"), 0 for v2.
    """
    scales = tensors["scales"].float()
    n_groups, out_features = scales.shape
    in_features = tensors["qweight"].shape[0] * 32 // bits
    codes = unpack(tensors["qweight"].T.contiguous(), bits, in_features)
    zeros = (unpack(tensors["qzeros"], bits, out_features) + zero_offset) & (2**bits - 1)
    group = tensors.get("g_idx")
    if group is None:
        group = torch.arange(in_features) // -(-in_features // n_groups)
    group = group.long()
    return (codes - zeros.T[:, group]).float() * scales.T[:, group]
