"""GPTQModel on a CPU: `run_gptqmodel.py FOLDER REFERENCE.npz`."""

import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from shared import compare_torch

loaded = GPTQModel.load(sys.argv[1], device="cpu", backend=BACKEND.TORCH, dtype=torch.bfloat16)
compare_torch(loaded.model)
