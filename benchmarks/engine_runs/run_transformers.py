"""transformers with compressed-tensors: `run_transformers.py FOLDER REFERENCE.npz`."""

import sys

import torch
from shared import compare
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])


@torch.no_grad()
def logits_of(ids):
    return model(torch.from_numpy(ids)).logits[0].float().numpy()


compare(logits_of)
