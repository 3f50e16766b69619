"""Folders of ModelWriter, loaded by plain transformers."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import tiny_models
import torch
from oracles import nearest_values
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

from lwquant import ops
from lwquant.codebooks import CODEBOOKS
from lwquant.errors import CheckpointError, OutputError
from lwquant.export import load
from lwquant.export.save import ModelWriter
from lwquant.model.checkpoint import Checkpoint
from lwquant.model.structure import block_linears, features_of, find_blocks, get_weight
from lwquant.nn.linear import QuantizedLinear
from lwquant.quantizers.grid import storable_scale
from lwquant.scheme import QuantScheme
from lwquant.types import LinearSpec, Outliers, QuantizedWeight, plan_bpw

# 100 and 48 leave a shorter last group in most of the tiny models' linears.
MENU = (
    QuantScheme(2, 32),
    QuantScheme(3, 48, scale_bits=8),
    QuantScheme(4, 64, symmetric=True),
    QuantScheme(5, 100),
    QuantScheme(16),
    QuantScheme(6, 16),
    QuantScheme(8, 4096),
    QuantScheme(4, 32, codebook="nf4"),
    QuantScheme(3, 32, scale_bits=8),
    QuantScheme(2, 48, fine_zeros=True),
    QuantScheme(3, 48, outliers=20),
)
SHARD_BYTES = 40_000
EIGHT = asdict(QuantScheme(8, 64))
TOKENS = torch.arange(3, 49).view(2, 23)  # fewer than AMX takes in bf16


@dataclass(frozen=True)
class Folders:
    source: Path
    output: Path
    schemes: dict[str, QuantScheme]
    weights: dict[str, Tensor]  # what the linears should compute with, (out, in) float32


def rounded(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Round to the nearest of evenly spaced values over each group's range, or of a codebook."""
    codes, scales, zeros = [], [], []
    for part in weight.split(scheme.group_size, dim=1):
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        middle = torch.full_like(low, 2 ** (scheme.bits - 1))
        if scheme.codebook:
            scale, zero = storable_scale(torch.maximum(-low, high), scheme), middle
            nearest = nearest_values(part / scale[:, None], CODEBOOKS[scheme.codebook])
        elif scheme.symmetric:
            scale = storable_scale(torch.maximum(-low, high) / middle, scheme)
            zero = middle
        else:
            scale = storable_scale((high - low) / scheme.max_code, scheme)
            zero = (-low / scale / scheme.zero_step).round().clamp(0, scheme.max_zero)
            zero *= scheme.zero_step
        steps = (part / scale[:, None] + zero[:, None]).round()
        codes.append((nearest if scheme.codebook else steps.clamp(0, scheme.max_code)).byte())
        scales.append(scale.half())
        zeros.append((zero / scheme.zero_step).byte())
    parts = torch.cat(codes, 1), torch.stack(scales, 1), torch.stack(zeros, 1)
    on_grid = QuantizedWeight(scheme.without_outliers, *parts)
    if not scheme.outliers:
        return on_grid
    missed = weight - on_grid.dequantize()
    outliers = Outliers.largest(missed, scheme.n_outliers(*weight.shape))
    return replace(on_grid, scheme=scheme, outliers=outliers)


class Original:
    """A float model, its projections, and its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = Checkpoint.open(folder)
        self.model = from_pretrained(folder, dtype=torch.float32)
        path, blocks = find_blocks(self.model)
        self.linears = tuple(
            LinearSpec(f"{path}.{index}.{name}", index, *features_of(module), 0)
            for index, block in enumerate(blocks)
            for name, module in block_linears(block).items()
        )

    def key_of(self, parameter: str) -> str | None:
        bare = parameter.removeprefix(f"{self.model.base_model_prefix}.")
        in_gpt_neox = parameter.replace("lm_head", "embed_out")
        found = {parameter, bare, in_gpt_neox} & set(self.checkpoint.names())
        return found.pop() if found else None

    def weight(self, name: str) -> Tensor:
        """(out_features, in_features) float32."""
        return get_weight(self.model.get_submodule(name)).detach()

    def writer(self, output: Path) -> ModelWriter:
        output.mkdir(parents=True)
        return ModelWriter(
            output, self.checkpoint, self.linears, self.model, self.key_of, SHARD_BYTES
        )


def quantize(source: Path, output: Path) -> Folders:
    original = Original(source)
    schemes = {
        spec.name: scheme
        for spec, scheme in zip(original.linears, itertools.cycle(MENU), strict=False)
    }
    writer = original.writer(output)
    weights = {}
    for spec in original.linears:
        weight = original.weight(spec.name)
        if schemes[spec.name].is_float:
            writer.linear(spec, weight.half())
            weights[spec.name] = weight.half().float()
        else:
            quantized = rounded(weight, schemes[spec.name])
            writer.linear(spec, quantized)
            weights[spec.name] = quantized.dequantize()
    n_bytes = writer.finish(schemes, plan_bpw(schemes, original.linears), source)
    assert n_bytes == sum(file.stat().st_size for file in output.glob("*.safetensors"))
    return Folders(source, output, schemes, weights)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def save_as_one_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def from_pretrained(folder: Path, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def edited_copy(folders: Folders, target: Path) -> Path:
    target.mkdir()
    for file in folders.output.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit_quantization(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def logits(model, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens).logits.float()


@torch.no_grad()
def dequantized_model(folders: Folders):
    """A plain float32 model that holds the dequantized weights."""
    model = from_pretrained(folders.source, dtype=torch.float32)
    for name, weight in folders.weights.items():
        module = model.get_submodule(name)
        module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
    return model


@pytest.fixture(scope="module")
def folders_of(tmp_path_factory):
    @functools.cache
    def make(kind: str) -> Folders:
        folder = tmp_path_factory.mktemp(kind)
        (folder / "source").mkdir()
        tiny_models.random_model(kind, folder / "source")
        return quantize(folder / "source", folder / "output")

    return make


@pytest.fixture(scope="module")
def loaded_of(folders_of):
    """The float32 model of each kind; tests only look at it."""
    return functools.cache(lambda kind: from_pretrained(folders_of(kind).output))


@pytest.fixture
def llama(folders_of) -> Folders:
    return folders_of("llama")


every_kind = pytest.mark.parametrize("kind", tiny_models.KINDS)


@every_kind
def test_logits_are_those_of_the_dequantized_weights(kind, folders_of, loaded_of):
    folders, model = folders_of(kind), loaded_of(kind)
    expected = logits(dequantized_model(folders))
    # The kernels round inputs to 2⁻¹⁶ of their largest, which is some four times a usual one.
    error = (logits(model) - expected).norm() / expected.norm()
    assert error < len(folders.weights) * 4 * 2**-16


@every_kind
def test_a_loaded_model_holds_packed_linears_and_no_dequantized_weight(kind, folders_of, loaded_of):
    folders, model = folders_of(kind), loaded_of(kind)
    for name, scheme in folders.schemes.items():
        module = model.get_submodule(name)
        assert isinstance(module, QuantizedLinear) == (not scheme.is_float)
        if not scheme.is_float:
            shape = folders.weights[name].shape
            as_stored = [t for t in module.buffers() if t.dtype == torch.int32 and t.dim() == 2]
            assert (not as_stored) == bool(ops.tiles_bytes(scheme, *shape))
            held = module.state_dict().values()
            bias = 0 if module.bias is None else module.bias.nbytes
            bits = scheme.stored_bits(*shape)
            assert 8 * (sum(tensor.nbytes for tensor in held) - bias) == bits


@every_kind
def test_saving_a_loaded_model_writes_the_same_packed_tensors_and_config(
    kind, folders_of, loaded_of, tmp_path
):
    folders, model = folders_of(kind), loaded_of(kind)
    model.save_pretrained(tmp_path)
    again, first = tensors_in(tmp_path), tensors_in(folders.output)
    packed = [n for n in first if n.endswith((".qweight", ".scales", ".zeros"))]
    assert packed and set(packed) <= set(again)
    assert all(torch.equal(again[n], first[n]) and again[n].dtype == first[n].dtype for n in packed)
    configs = [json.loads((f / "config.json").read_text()) for f in (tmp_path, folders.output)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


@every_kind
def test_bfloat16_reaches_everything_but_the_scales_and_stays_near(kind, folders_of):
    folders = folders_of(kind)
    model = from_pretrained(folders.output, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    scales = {t.dtype for name, t in model.state_dict().items() if name.endswith(".scales")}
    assert scales == {torch.float16, torch.uint8}
    plain = dequantized_model(folders)
    exact = logits(plain)
    plain_error = (logits(plain.bfloat16()) - exact).norm()
    assert (logits(model) - exact).norm() < 2 * plain_error


@every_kind
def test_every_other_tensor_is_stored_unchanged_under_its_module_name(kind, folders_of):
    folders = folders_of(kind)
    original, output = Original(folders.source), tensors_in(folders.output)
    source = original.checkpoint
    linears = {f"{name}.weight" for name in folders.schemes}
    for name in original.model.state_dict():
        key = original.key_of(name)
        if key is not None and name not in linears:
            assert torch.equal(output[name], source.read(key))
            assert output[name].dtype == source.dtype(key)
    for name, scheme in folders.schemes.items():
        assert (f"{name}.weight" in output) == scheme.is_float


@every_kind
def test_generate_works_and_follows_the_logits(kind, loaded_of):
    model = loaded_of(kind)
    prompt = TOKENS[:1, :8]
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )
    assert made.shape[1] > prompt.shape[1]
    with torch.no_grad():
        assert made[0, prompt.shape[1]] == model(prompt).logits[0, -1].argmax()


def test_the_model_is_sharded_and_loads_the_same_from_one_file(llama, loaded_of, tmp_path):
    assert len(list(llama.output.glob("model-*.safetensors"))) > 1
    single = edited_copy(llama, tmp_path / "single")
    save_as_one_file(single, tensors_in(llama.output))
    assert torch.equal(logits(from_pretrained(single)), logits(loaded_of("llama")))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_device_map_gives_the_same_model(llama, loaded_of, device_map):
    pytest.importorskip("accelerate")
    mapped = from_pretrained(llama.output, device_map=device_map)
    assert torch.equal(logits(mapped), logits(loaded_of("llama")))


@every_kind
def test_tied_embeddings_stay_tied_and_untied_ones_apart(kind, loaded_of):
    model = loaded_of(kind)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == bool(model.config.get_text_config().tie_word_embeddings)


def test_a_checkpoint_without_the_base_prefix_is_stored_with_it(folders_of, tmp_path):
    """As gpt2 on the hub: h.0.attn.c_attn.weight."""
    gpt2 = folders_of("gpt2")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "generation_config.json"):
        (source / name).write_bytes((gpt2.source / name).read_bytes())
    bare = {
        name.removeprefix("transformer."): t
        for name, t in tensors_in(gpt2.source).items()
        if name != "lm_head.weight"
    }
    assert "h.0.attn.c_attn.weight" in bare
    save_as_one_file(source, bare)
    output = quantize(source, tmp_path / "output").output
    # The reference's own file may or may not carry a copy of the tied head.
    ours, expected = tensors_in(output), tensors_in(gpt2.output)
    expected.pop("lm_head.weight", None)
    assert ours.keys() == expected.keys()
    for dtype in (torch.float32, torch.bfloat16):
        got = logits(from_pretrained(output, dtype=dtype))
        assert torch.equal(got, logits(from_pretrained(gpt2.output, dtype=dtype)))


def test_names_that_transformers_translates_are_not_missing(folders_of, loaded_of, tmp_path):
    folder = edited_copy(folders_of("gpt_neox"), tmp_path / "edited")
    tensors = tensors_in(folder)
    tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    tensors["embed_in.weight"] = tensors.pop("gpt_neox.embed_in.weight")
    save_as_one_file(folder, tensors)
    assert torch.equal(logits(from_pretrained(folder)), logits(loaded_of("gpt_neox")))


def test_dtype_auto_is_the_checkpoints_even_where_its_config_names_none(llama, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((llama.source / "config.json").read_text())
    config.pop("dtype", None)
    (source / "config.json").write_text(json.dumps(config))
    tensors = {n: t.bfloat16() for n, t in tensors_in(llama.source).items()}
    save_as_one_file(source, tensors)
    model = from_pretrained(quantize(source, tmp_path / "output").output, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_scales_stay_float16_where_an_architecture_keeps_modules_in_float32(llama, monkeypatch):
    before = logits(from_pretrained(llama.output, dtype=torch.bfloat16))
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"q_proj", "down_proj"})
    model = from_pretrained(llama.output, dtype=torch.bfloat16)
    scales = {t.dtype for name, t in model.state_dict().items() if name.endswith(".scales")}
    assert scales == {torch.float16, torch.uint8}
    assert torch.equal(logits(model), before)


def test_buffers_that_are_not_stored_are_computed_beside_packed_linears(llama, monkeypatch):
    make, fill = LlamaMLP.__init__, LlamaPreTrainedModel._init_weights

    def make_with_table(self, config):
        make(self, config)
        self.register_buffer("table", torch.zeros(3), persistent=False)

    def fill_table(self, module):
        fill(self, module)
        if isinstance(module, LlamaMLP):
            module.table.fill_(7)

    monkeypatch.setattr(LlamaMLP, "__init__", make_with_table)
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", fill_table)
    model = from_pretrained(llama.output)
    assert [b.tolist() for n, b in model.named_buffers() if n.endswith("table")] == [[7] * 3] * 2


def test_only_tokenizer_and_generation_files_are_carried_along(folders_of, tmp_path):
    llama = folders_of("llama")
    source = edited_copy(Folders(llama.source, llama.source, {}, {}), tmp_path / "source")
    carried = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt"]
    carried += ["vocab.json", "tokenizer.model", "chat_template.jinja", "generation_config.json"]
    left = ["modeling.py", "pytorch_model.bin", "optimizer.pt", "notes.txt", "rng_state.pth"]
    for name in (*carried, *left):
        (source / name).write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    output = quantize(source, tmp_path / "output").output
    names = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    weights = {name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))}
    templates = {"additional_chat_templates/rag.jinja"}
    assert names - weights == {"config.json", *carried, *templates}


def test_a_tokenizer_file_that_links_out_of_the_folder_is_refused(llama, tmp_path):
    source = edited_copy(Folders(llama.source, llama.source, {}, {}), tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*outside"):
        quantize(source, tmp_path / "output")


@pytest.mark.parametrize("leaf", ["qweight", "scales", "zeros", "weight", "bias"])
def test_a_missing_tensor_is_an_error_that_names_it(leaf, folders_of, tmp_path):
    folders = folders_of("qwen2")
    folder = edited_copy(folders, tmp_path / "edited")
    tensors = tensors_in(folder)
    gone = next(n for n in tensors if n.endswith(f"proj.{leaf}"))
    del tensors[gone]
    save_as_one_file(folder, tensors)
    with pytest.raises(CheckpointError, match=f"'{gone}' is missing"):
        from_pretrained(folder)


def test_a_missing_norm_is_an_error_too(llama, tmp_path):
    folder = edited_copy(llama, tmp_path / "edited")
    tensors = tensors_in(folder)
    del tensors["model.norm.weight"]
    save_as_one_file(folder, tensors)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is missing"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("leaf", "change"),
    [
        ("qweight", lambda t: t[:, :-1].contiguous()),
        ("scales", lambda t: t[:-1].contiguous()),
        ("scales", lambda t: t.float()),
        ("zeros", lambda t: t.T.contiguous()),
        ("outlier_values", lambda t: t[:-1].contiguous()),
        ("outlier_columns", lambda t: t.int()),
        ("qweight", lambda t: t.long()),
    ],
)
def test_a_packed_tensor_of_another_shape_or_dtype_is_an_error_that_names_it(
    leaf, change, llama, tmp_path
):
    folder = edited_copy(llama, tmp_path / "edited")
    tensors = tensors_in(folder)
    name = next(n for n in tensors if n.endswith(leaf))
    tensors[name] = change(tensors[name])
    save_as_one_file(folder, tensors)
    with pytest.raises(CheckpointError, match=f"'{name}' is .*the model needs"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("outlier_columns", lambda t: torch.full_like(t, 30_000), "is in none of the"),
        ("outlier_columns", lambda t: torch.full_like(t, -1), "is in none of the"),  # 65535
        ("outlier_rows", lambda t: t.flip(0), "do not rise from 0"),
        ("outlier_rows", lambda t: t + 1, "do not rise from 0"),
        ("outlier_rows", lambda t: torch.cat([t[:1], t[2:3] + 9, t[2:]]), "do not rise from 0"),
    ],
)
def test_outliers_outside_their_linear_are_refused_by_its_name(
    leaf, change, message, llama, tmp_path
):
    folder = edited_copy(llama, tmp_path / "edited")
    tensors = tensors_in(folder)
    name = next(n for n in tensors if n.endswith(leaf))
    tensors[name] = change(tensors[name])
    save_as_one_file(folder, tensors)
    with pytest.raises(CheckpointError, match=f"^{name.removesuffix('.' + leaf)}.*{message}"):
        from_pretrained(folder)


def test_a_truncated_shard_is_an_error_that_names_the_file(llama, tmp_path):
    folder = edited_copy(llama, tmp_path / "edited")
    shard = max(folder.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"{shard.name}.*truncated"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(version=2), "version=2 is not one"),
        (lambda q: q["linears"].update({"model.nope": EIGHT}), "no module 'model.nope'"),
        (lambda q: q["linears"].update({"model.norm": EIGHT}), "'model.norm' is a .*Norm, not"),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused(change, message, llama, tmp_path):
    folder = edited_copy(llama, tmp_path / "edited")
    edit_quantization(folder, change)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder)


def test_a_linear_tied_to_the_embedding_cannot_be_packed(folders_of, tmp_path):
    gpt2 = folders_of("gpt2")
    folder = edited_copy(gpt2, tmp_path / "edited")
    edit_quantization(folder, lambda q: q["linears"].update({"lm_head": EIGHT}))
    with pytest.raises(CheckpointError, match="'lm_head' shares its weight"):
        from_pretrained(folder)


def test_a_float_model_cannot_be_quantized_by_passing_a_config_to_from_pretrained(llama):
    config = load.LwquantConfig(llama.schemes, 4.0)
    with pytest.raises(ValueError, match="pre-quantized"):
        from_pretrained(llama.source, quantization_config=config)


def test_registering_again_changes_nothing(llama):
    before = dict(load.AUTO_QUANTIZER_MAPPING)
    load.register()
    assert before == load.AUTO_QUANTIZER_MAPPING


def test_a_loaded_model_is_not_trainable_and_keeps_its_config(llama, loaded_of):
    model = loaded_of("llama")
    assert not model.hf_quantizer.is_trainable
    config = model.config.quantization_config
    assert (config.schemes, config.quant_method) == (llama.schemes, "lwquant")


def test_the_writer_refuses_unfinished_and_doubled_linears(llama, tmp_path):
    original = Original(llama.source)
    writer = original.writer(tmp_path / "output")
    first, second = original.linears[:2]
    writer.linear(first, rounded(original.weight(first.name), MENU[0]))
    with pytest.raises(OutputError, match=f"'{first.name}' is already written"):
        writer.linear(first, rounded(original.weight(first.name), MENU[0]))
    with pytest.raises(OutputError, match=f"{len(original.linears) - 1} linears were not written"):
        writer.finish(llama.schemes, 4.0, llama.source)
    with pytest.raises(ValueError, match=f"{second.name}: weight is"):
        writer.linear(second, torch.zeros(3, 5).half())
    with pytest.raises(ValueError, match=f"{second.name}: torch.float32 is not"):
        writer.linear(second, original.weight(second.name))


def test_the_writer_refuses_a_plan_that_says_other_than_what_was_written(llama, tmp_path):
    original = Original(llama.source)
    writer = original.writer(tmp_path / "output")
    for spec in original.linears:
        writer.linear(spec, rounded(original.weight(spec.name), MENU[0]))
    name = original.linears[3].name
    schemes = {spec.name: MENU[0] for spec in original.linears} | {name: MENU[1]}
    with pytest.raises(OutputError, match=f"'{name}' is planned as .*bits=3.*written as .*bits=2"):
        writer.finish(schemes, 4.0, llama.source)
