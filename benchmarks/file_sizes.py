"""The best model in a file of a given size: `--size` beside llama.cpp's files of that size.

    python benchmarks/file_sizes.py        # SmolLM2-135M: every size that peers.csv knows a file of
    python benchmarks/file_sizes.py --sizes 60 75        # megabytes

lwquant's rows are what `lwquant.quantize(MODEL, size=..)`, calibrated on C4 and Wikipedia, writes,
loaded and run: with embedding, head and activations as they are in the file. The KL of llama.cpp's
rows is that of its linears (peers.py): the 8.5 bits that its files have for embedding and head
(Q8_0) count in their size, but not in their loss. Windows are those of peers.py.
"""

from __future__ import annotations

import argparse
import csv
import shutil

from peers import CSV, PEERS_WORK, SEQ_LEN, WINDOWS, model_of
from rows import commit, machine

import lwquant
from lwquant.export.record import read_run
from lwquant.prepare import open_model
from lwquant.progress import StderrProgress
from lwquant.sensitivity.report import read_report, write_report

Q8_0_BITS = 8.5  # a weight of an embedding whose rows are no whole number of 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=float, nargs="*", help="megabytes")
    wanted = parser.parse_args().sizes
    model = model_of("smollm2")
    peers = files_of_llamacpp(model.folder)
    rows = [] if wanted else peers
    sizes = wanted or sorted({round(size, 1) for size, *_ in peers})
    settings = {"sources": tuple(map(str, model.calibration)), "held_out": 2}
    costs = PEERS_WORK / "out" / f"file-sizes-costs-{commit()}.json"
    if not costs.exists():
        costs.parent.mkdir(parents=True, exist_ok=True)
        write_report(lwquant.measure_model(model.folder, **settings), costs)
    report = read_report(costs)
    for size in sizes:
        folder = PEERS_WORK / "out" / "file-size"
        shutil.rmtree(folder, ignore_errors=True)
        made = lwquant.quantize(
            model.folder, size=f"{size}MB", report=report, output=folder, **settings
        )
        losses = [
            lwquant.evaluate(
                folder,
                text=text,
                reference=model.folder,
                seq_len=SEQ_LEN,
                windows=WINDOWS,
                progress=StderrProgress(),
            ).kl_divergence
            for text in model.tests.values()
        ]
        bits = read_run(folder).embedding_bits or "as it is"
        rows.append((made.size_bytes / 1e6, "**lwquant**", made.bpw, bits, *losses))
        print(*made.notes, sep="\n", flush=True)
    print(f"{machine()}, {commit()}")
    print("| MB | what | bits of linears | of embedding | KL | KL on code |")
    print("|---|---|---|---|---|---|")
    for megabytes, what, bpw, bits, loss, code in sorted(rows, key=lambda row: (row[0], row[1])):
        print(f"| {megabytes:.1f} | {what} | {bpw:.2f} | {bits} | {loss:.4f} | {code:.4f} |")


def files_of_llamacpp(folder) -> list[tuple[float, str, float, str, float, float]]:
    """Size in megabytes, name, bits of linears and embedding, losses on both texts."""
    opened = open_model(folder)
    decoder = opened.decoder
    table = decoder.model.get_input_embeddings().weight.numel()
    norms = sum(p.numel() for p in decoder.model.parameters()) - table - opened.n_weights
    with CSV.open(newline="") as file:
        found = [
            row
            for row in csv.DictReader(file)
            if row["model"] == "smollm2" and row["name"].startswith("llamacpp/")
        ]
    files = []
    for row in found:
        bpw = float(row["bpw"])
        size = (bpw * opened.n_weights + Q8_0_BITS * table + 32 * norms) / 8e6
        name = row["name"].replace("llamacpp/", "llama.cpp ").replace("-imatrix", ", imatrix")
        losses = float(row["kl_divergence"]), float(row["code_kl_divergence"])
        files.append((size, name, bpw, "8.5", *losses))
    return files


if __name__ == "__main__":
    main()
