"""transformers with compressed-tensors: `run_transformers.py FOLDER REFERENCE.npz`."""

import sys

from shared import compare_torch
from transformers import AutoModelForCausalLM

compare_torch(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
