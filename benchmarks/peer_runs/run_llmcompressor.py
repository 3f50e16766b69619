"""llm-compressor: its GPTQ with activation order "static". Settings: bits, group_size, symmetric.

The weights are decoded from the compressed file (compressed-tensors, "pack-quantized"), with scales
rounded to 16 bits, as they are counted.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from shared import hand_back, own_logits, read_job, stored_bits, stored_tensors, unpack
from torch import Tensor
from transformers import AutoModelForCausalLM


def main() -> None:
    job = read_job()
    bits, group_size = job.settings["bits"], job.settings["group_size"]
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    arguments = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=job.settings["symmetric"],
        strategy="group",
        group_size=group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    windows = job.calibration.tolist()
    data = Dataset.from_dict(
        {"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]}
    )
    oneshot(
        model=model,
        dataset=data,
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(windows),
        max_seq_length=len(windows[0]),
        shuffle_calibration_samples=False,
    )
    seconds = job.seconds()
    logits = own_logits(model, job.probe)
    folder = job.output / "saved"
    model.save_pretrained(folder, save_compressed=True)
    linears = stored_tensors(folder)
    hand_back(
        job,
        {name: weight_of(tensors, bits) for name, tensors in linears.items()},
        stored_bits(linears),
        seconds,
        f"llmcompressor {version('llmcompressor')}",
        logits=logits,
    )


def weight_of(tensors: dict[str, Tensor], bits: int) -> Tensor:
    """(out_features, in_features) of packed codes along in, and zeros along out where there are."""
    out_features, in_features = tensors["weight_shape"].tolist()
    scales = tensors["weight_scale"].half().float()
    codes = unpack(tensors["weight_packed"], bits, in_features)
    if "weight_zero_point" in tensors:
        zeros = unpack(tensors["weight_zero_point"].T.contiguous(), bits, out_features).T
    else:
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.long)
    group = torch.arange(in_features) // (in_features // scales.shape[1])
    return (codes - zeros[:, group]).float() * scales[:, group]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
