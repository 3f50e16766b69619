"""AutoRound: tuned rounding at one width, or the widths of its AutoScheme.

Settings: bits, group_size, symmetric and iterations; or target_bits, the mean of the code bits that
AutoScheme spreads, symmetric and without tuning unless `iterations` says otherwise. Its options are
the widths that its GPTQ packing has: 2, 3, 4 and 8. The weights are decoded from the saved file.
"""

from __future__ import annotations

import copy
import json

import auto_round
import torch
from auto_round import AutoRound, AutoScheme, calib_dataset
from auto_round.auto_scheme import delta_loss
from auto_round.schemes import QuantizationScheme
from shared import Job, gptq_weight, hand_back, own_logits, read_job, stored_bits, stored_tensors
from transformers import AutoTokenizer

OPTIONS = (2, 3, 4, 8)


def main() -> None:
    job = read_job()
    wanted = job.settings

    def scheme(bits: int) -> QuantizationScheme:
        symmetric = wanted.get("symmetric", True)
        return QuantizationScheme(bits=bits, group_size=wanted["group_size"], sym=symmetric)

    if "target_bits" in wanted:
        chosen = AutoScheme(
            avg_bits=wanted["target_bits"],
            options=[scheme(bits) for bits in OPTIONS],
            ignore_scale_zp_bits=True,
        )
        use_our_tokens(job)
        dataset = "pile-10k"  # AutoScheme takes names only; ours come by use_our_tokens()
    else:
        chosen = scheme(wanted["bits"])
        dataset = list(job.calibration[:, None])
    rounding = AutoRound(
        str(job.model),
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        scheme=chosen,
        iters=wanted.get("iterations", 0),
        nsamples=len(job.calibration),
        seqlen=job.calibration.shape[1],
        dataset=dataset,
        device_map="cpu",
        enable_torch_compile=False,
    )
    model, _ = rounding.quantize()
    seconds = job.seconds()
    # Before saving, its linears hold their rounded weights, in bfloat16 as AutoRound loaded them.
    # The saved model cannot be asked: 3 bits have no CPU kernel, and the stand-in does not run.
    logits = own_logits(copy.deepcopy(model).float(), job.probe)
    folder = job.output / "saved"
    rounding.save_quantized(str(folder), format="auto_round:auto_gptq")
    folder = next(folder.rglob("config.json")).parent  # it may add a folder of its own
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if config["packing_format"] != "auto_round:auto_gptq":
        raise SystemExit(f"packing format {config['packing_format']!r} is not the GPTQ layout")
    linears = stored_tensors(folder)
    widths = {name: config["bits"] for name in linears}
    for name, extra in config.get("extra_config", {}).items():
        if name in widths:
            widths[name] = extra.get("bits", config["bits"])
    weights = {
        name: tensors["weight"]
        if "weight" in tensors
        else gptq_weight(tensors, widths[name], zero_offset=1)
        for name, tensors in linears.items()
    }
    note = ""
    if "target_bits" in wanted:
        counts = {bits: list(widths.values()).count(bits) for bits in sorted(set(widths.values()))}
        note = f"linears by width {counts}"
    version = f"auto-round {auto_round.__version__}"
    hand_back(job, weights, stored_bits(linears), seconds, version, logits=logits, note=note)


def use_our_tokens(job: Job) -> None:
    """AutoRound reads texts by name for AutoScheme: hand it our windows, cut to what it asks."""

    def batches(tokenizer, seqlen, dataset_name=None, seed=42, bs=1, nsamples=16, **settings):
        windows = job.calibration[:nsamples, :seqlen]
        return [
            {"input_ids": part, "attention_mask": torch.ones_like(part)}
            for part in windows.split(bs)
        ]

    delta_loss.get_dataloader = calib_dataset.get_dataloader = batches


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
