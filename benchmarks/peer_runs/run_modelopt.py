"""ModelOpt: auto_quantize over integer weight-only formats, symmetric, groups of the given size.

Settings: target_bpw of the decoder linears, group_size. ModelOpt's `effective_bits` here count the
scales, and the head, which it keeps at 16 bits: the target is raised by what that takes. ModelOpt
quantizes in simulation; its folded weights are what it computes with. A linear stores its codes and
a 16-bit scale a group. Width 16 is always a choice of its search, and it ties q/k/v and gate/up.
"""

from __future__ import annotations

from importlib.metadata import version

import modelopt.torch.quantization as mtq
import torch
from shared import LINEAR, SCALE_BITS, hand_back, own_logits, read_job
from transformers import AutoModelForCausalLM

WIDTHS = (2, 3, 4, 8)
FLOAT_BITS = 16


def main() -> None:
    job = read_job()
    group_size = job.settings["group_size"]
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    inner = sum(
        m.weight.numel() for n, m in model.named_modules() if LINEAR.fullmatch(f"{n}.weight")
    )
    head = model.get_output_embeddings().weight.numel()
    effective = (job.settings["target_bpw"] * inner + FLOAT_BITS * head) / (inner + head)
    batches = [{"input_ids": part, "labels": part} for part in job.calibration.split(4)]
    model, _ = mtq.auto_quantize(
        model,
        constraints={"effective_bits": effective},
        quantization_formats=[weight_only(bits, group_size) for bits in WIDTHS],
        data_loader=batches,
        forward_step=lambda model, batch: model(**batch),
        loss_func=lambda output, batch: output.loss,
        disabled_layers=["*lm_head*"],
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        method="gradient",
    )
    seconds = job.seconds()
    linears = {n: m for n, m in model.named_modules() if LINEAR.fullmatch(f"{n}.weight")}
    total, counts = 0, {}
    for module in linears.values():
        quantizer, n_weights = module.weight_quantizer, module.weight.numel()
        bits = quantizer.num_bits if quantizer.is_enabled else FLOAT_BITS
        scales = n_weights // group_size if quantizer.is_enabled else 0
        total += bits * n_weights + SCALE_BITS * scales
        counts[bits] = counts.get(bits, 0) + 1
    logits = own_logits(model, job.probe)
    mtq.fold_weight(model)
    hand_back(
        job,
        {name: module.weight for name, module in linears.items()},
        total,
        seconds,
        f"nvidia-modelopt {version('nvidia-modelopt')}",
        logits=logits,
        note=f"linears by width {dict(sorted(counts.items()))}",
    )


def weight_only(bits: int, group_size: int) -> dict:
    """Symmetric integers, the largest weight of a group at the end of the range."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {
                "quantizer_name": "*weight_quantizer",
                "cfg": {"num_bits": bits, "block_sizes": {-1: group_size}},
            },
            {"quantizer_name": "*lm_head*", "enable": False},
        ],
        "algorithm": "max",
        "effective_bits": bits + SCALE_BITS / group_size,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
