"""GPTQModel on a CPU: `run_gptqmodel.py FOLDER REFERENCE.npz`."""

import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from shared import compare

loaded = GPTQModel.load(sys.argv[1], device="cpu", backend=BACKEND.TORCH, dtype=torch.bfloat16)


@torch.no_grad()
def logits_of(ids):
    return loaded.model(torch.from_numpy(ids)).logits[0].float().numpy()


compare(logits_of)
