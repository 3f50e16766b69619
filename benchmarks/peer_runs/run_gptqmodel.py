"""GPTQModel: GPTQ with its defaults but for the settings bits, group_size, symmetric and mse.

`mse` is the norm of its scale search, 0 for none. The weights are decoded from the file it saves.
"""

from __future__ import annotations

import json

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig, __version__
from shared import gptq_weight, hand_back, own_logits, read_job, stored_bits, stored_tensors


def main() -> None:
    job = read_job()
    torch.set_num_threads(1)
    wanted = job.settings
    config = QuantizeConfig(
        bits=wanted["bits"],
        group_size=wanted["group_size"],
        sym=wanted["symmetric"],
        mse=wanted.get("mse", 0.0),
        device="cpu",
    )
    model = GPTQModel.load(str(job.model), config, dtype=torch.float32, trust_remote_code=False)
    windows = [
        {"input_ids": w[None], "attention_mask": torch.ones_like(w)[None]} for w in job.calibration
    ]
    model.quantize(windows, batch_size=1)
    seconds = job.seconds()
    folder = job.output / "saved"
    model.save(str(folder))
    del model
    linears = stored_tensors(folder)
    saved = json.loads((folder / "quantize_config.json").read_text())
    offset = {"gptq": 1, "gptq_v2": 0}[saved["checkpoint_format"]]
    weights = {
        name: gptq_weight(tensors, wanted["bits"], zero_offset=offset)
        for name, tensors in linears.items()
    }
    loaded = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH)
    logits = own_logits(loaded.model.float(), job.probe)
    version = f"gptqmodel {__version__}"
    hand_back(job, weights, stored_bits(linears), seconds, version, logits=logits)


if __name__ == "__main__":
    main()
