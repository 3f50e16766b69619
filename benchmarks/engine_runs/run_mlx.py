"""mlx-lm: `run_mlx.py FOLDER REFERENCE.npz`."""

import sys

import mlx.core as mx
import numpy as np
from mlx_lm import load
from shared import compare

model, _ = load(sys.argv[1])
compare(lambda ids: np.array(model(mx.array(ids))[0].astype(mx.float32)))
