"""The README's example runs as written, on the tiny model."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_ten_lines_run(tiny_folder, heldout_text, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for line in block.splitlines() if "push_to_hub" not in line]
    assert len(lines) == len(block.splitlines()) - 1
    code = "\n".join(lines).replace("path-or-hub-id", str(tiny_folder))
    # The shipped model has 256 positions; everything else is the default.
    code = code.replace(", bpw=", ", seq_len=96, n_samples=8, sensitivity_samples=4, bpw=")
    code = code.replace('reference="', 'seq_len=96, reference="')
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text(heldout_text[:8000], encoding="utf-8")
    names = {}
    exec(code, names)
    assert names["result"].bpw <= 3.5
    assert names["model"].num_parameters() > 0
    assert Path("sweep/sweep.png").exists() and Path("out/config.json").exists()
