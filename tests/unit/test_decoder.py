"""The block-by-block decoder against transformers' own forward, for every architecture."""

import json
from math import inf

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, random_model
from transformers import AutoModelForCausalLM, Gemma4TextConfig, RwkvConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lwquant.errors import CheckpointError, UnsupportedModelError
from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder, causal_config

# What reads the same tensor must share a number, what does not must not.
GROUPS = {
    "llama": "q_proj k_proj v_proj | o_proj | gate_proj up_proj | down_proj",
    "phi3": "qkv_proj | o_proj | gate_up_proj | down_proj",
    "gpt2": "c_attn | attn.c_proj | c_fc | mlp.c_proj",
    "opt": "q_proj k_proj v_proj | out_proj | fc1 | fc2",
    "gpt_neox": "query_key_value | attention.dense | dense_h_to_4h | dense_4h_to_h",
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return random_model(request.param, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def test_blocks_one_by_one_give_the_logits_of_the_whole_model(folder):
    tokens = torch.randint(512, (3, 24))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoder = Decoder.open(open_checkpoint(folder))
    got = decoder.head(decoder.last_hidden(tokens))
    torch.testing.assert_close(got, model(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_stored_buffers_are_read_like_parameters(tmp_path, monkeypatch):
    make, run = LlamaDecoderLayer.__init__, LlamaDecoderLayer.forward

    def make_with_factor(self, *args):
        make(self, *args)
        self.register_buffer("factor", torch.ones(1))

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", make_with_factor)
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, *a, **k: self.factor * run(self, *a, **k)
    )
    folder = random_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.model.layers[0].factor.fill_(0.25)
    model.save_pretrained(folder)
    decoder = Decoder.open(open_checkpoint(folder))
    tokens = torch.randint(512, (2, 12))
    got = decoder.head(decoder.last_hidden(tokens))
    torch.testing.assert_close(got, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_every_projection_is_found_and_only_one_block_is_in_memory(folder):
    decoder = Decoder.open(open_checkpoint(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    head = model.get_output_embeddings()
    wanted = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head
    }
    assert {spec.name for spec in decoder.linears} == set(wanted)
    for spec in decoder.linears:
        assert spec.n_weights == wanted[spec.name].weight.numel()
    with decoder.loaded(1) as block:
        assert not any(parameter.is_meta for parameter in block.parameters())
        assert all(parameter.is_meta for parameter in decoder.blocks[0].parameters())
    assert all(parameter.is_meta for parameter in decoder.blocks.parameters())


@pytest.mark.parametrize("kind", GROUPS)
def test_linears_that_read_the_same_tensor_share_an_input_group(kind, tmp_path):
    decoder = Decoder.open(open_checkpoint(random_model(kind, tmp_path)))
    found = {}
    for spec in decoder.block_linears(1):
        found.setdefault(spec.input_group, []).append(spec.name)
    wanted = [group.split() for group in GROUPS[kind].split(" | ")]
    assert len(found) == len(wanted)
    for names, ends in zip((found[g] for g in sorted(found)), wanted, strict=True):
        assert len(names) == len(ends)
        assert all(any(n.endswith(end) for n in names) for end in ends)


def test_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path):
    folder = random_model("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    without = {name: tensor for name, tensor in tensors.items() if name != gone}
    save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=gone):
        Decoder.open(open_checkpoint(folder))
    without[gone] = tensors[gone][:, :-1].contiguous()
    save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
    decoder = Decoder.open(open_checkpoint(folder))
    with pytest.raises(CheckpointError, match="up_proj.*asks for"), decoder.loaded(1):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM"),
        ({"architectures": ["BertLMHeadModel"], "model_type": "bert"}, "not a decoder-only"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "not a decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a decoder-only"),
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"hidden_size": "many"}, "hidden_size"),
    ],
)
def test_anything_but_a_decoder_only_causal_lm_is_refused(tmp_path, changes, message):
    folder = random_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UnsupportedModelError, match=message):
        Decoder.open(open_checkpoint(folder))


def test_blocks_that_see_the_tokens_besides_their_input_are_refused(tmp_path):
    config = Gemma4TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=512,
        num_kv_shared_layers=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="Gemma4.*block 0.*depend on the tokens"):
        Decoder.open(open_checkpoint(tmp_path))


def test_a_model_that_takes_more_than_hidden_states_from_a_block_is_refused(tmp_path):
    config = RwkvConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, context_length=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="Rwkv.*cannot be run block by block"):
        Decoder.open(open_checkpoint(tmp_path))


def test_infinities_in_a_config_are_read_as_transformers_writes_them():
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert causal_config(config | {"rms_norm_eps": {"__float__": "Infinity"}}).rms_norm_eps == inf
