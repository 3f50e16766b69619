"""The laws of every transform: the same logits from other weights, or a refusal that says why."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, random_model
from transformers import AutoModelForCausalLM

from lwquant.errors import TransformError
from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder
from lwquant.transforms import TRANSFORMS
from lwquant.transforms.apply import transformed

every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)

# Why each transform refuses an architecture; those not named here must be accepted.
REFUSED = {
    "rotate": {
        "gemma3": "o_proj' is not added to the residual stream as it is",
        "opt": "'self_attn_layer_norm' has bias beside its weight: no RMSNorm",
        "gpt2": "'ln_1' has bias beside its weight: no RMSNorm",
        "gpt_neox": "'input_layernorm' has bias beside its weight: no RMSNorm",
    }
}
PAIRS = [(transform, kind) for transform in TRANSFORMS for kind in KINDS]
ACCEPTED = [pair for pair in PAIRS if pair[1] not in REFUSED[pair[0]]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: random_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def save_unquantized(source, original, folder):
    """The transformed checkpoint as a plain folder, in float32."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(original / name, folder / name)
    (folder / "config.json").write_text(json.dumps(source.config))
    tensors = {name: source.read(name) for name in source.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def logits_of(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(tokens).logits


@pytest.mark.parametrize(("name", "kind"), ACCEPTED)
def test_plain_transformers_computes_the_same_from_the_transformed_weights(
    name, kind, folders, tmp_path
):
    decoder, _ = transformed(Decoder.open(open_checkpoint(folders[kind])), TRANSFORMS[name])
    out = save_unquantized(decoder.source, folders[kind], tmp_path / "out")
    tokens = torch.randint(512, (3, 40))
    wanted, got = logits_of(folders[kind], tokens), logits_of(out, tokens)
    assert (got - wanted).norm() <= 1e-4 * (wanted - wanted.mean(-1, keepdim=True)).norm()
    with torch.no_grad():
        block_wise = decoder.head(decoder.last_hidden(tokens))
    torch.testing.assert_close(block_wise, got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), ACCEPTED)
def test_every_linear_and_the_embedding_really_change(name, kind, folders):
    before = Decoder.open(open_checkpoint(folders[kind]))
    after, _ = transformed(before, TRANSFORMS[name])
    weights = [f"{spec.name}.weight" for spec in before.linears]
    for weight in (*weights, "model.embed_tokens.weight"):
        key = before.key_of(weight)
        old, new = before.source.read(key), after.source.read(key)
        assert old.shape == new.shape and new.dtype == torch.float32
        assert (new - old).norm() > 0.1 * old.norm(), weight


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair not in ACCEPTED])
def test_an_architecture_that_would_change_is_refused_with_the_reason(name, kind, folders):
    with pytest.raises(TransformError, match=REFUSED[name][kind]):
        transformed(Decoder.open(open_checkpoint(folders[kind])), TRANSFORMS[name])


@every_transform
def test_the_shapes_files_and_dtypes_stay_those_of_the_original(transform, folders):
    before = Decoder.open(open_checkpoint(folders["mistral"]))
    after, _ = transformed(before, transform)
    old, new = before.source, after.source
    assert new.names() == old.names() and new.size_bytes == old.size_bytes
    for key in old.names():
        assert new.shape(key) == old.shape(key) == tuple(new.read(key).shape)
        assert new.dtype(key) == old.dtype(key) and new.carried_dtype(key) == torch.float32
    assert after.linears == before.linears
    assert new.fingerprint() != old.fingerprint()  # caches hold hidden states, and they differ


@every_transform
def test_the_same_settings_give_the_same_tensors_and_the_original_is_left_alone(transform, folders):
    decoder = Decoder.open(open_checkpoint(folders["qwen2"]))
    stored = load_file(folders["qwen2"] / "model.safetensors")
    first, second = (transformed(decoder, transform)[0].source for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    for key, tensor in stored.items():
        assert torch.equal(first.read(key), second.read(key))
        assert torch.equal(decoder.source.read(key), tensor)
