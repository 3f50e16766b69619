"""The peers' packages, in a folder of their own beside lwquant's environment."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

# Installed in this order; llama-cpp-python is compiled here, for this machine: ten minutes or so.
PACKAGES = {
    "onnx": "onnx==1.23.2",
    "onnxruntime": "onnxruntime==1.32.0",
    "llama_cpp": "llama-cpp-python==0.3.36",
}


def make_importable(work: Path) -> None:
    """Install what is missing under `work`, behind everything else on the path.

    Raises CalledProcessError with pip's own words on stderr where a package cannot be had.
    """
    folder = work / "packages"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module):
            continue
        print(f"installing {package} into {folder}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade"]
        subprocess.run([*command, "--target", folder, package], check=True)
        importlib.invalidate_caches()
