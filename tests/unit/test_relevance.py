"""The rules against relevance written out by hand, and the metric against a whole model."""

import pytest
import torch
from tiny_models import random_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder
from lwquant.quantizers import rtn
from lwquant.scheme import QuantScheme
from lwquant.sensitivity import output_error, relevance
from lwquant.sensitivity.relevance_rules import RelevanceRules

SCHEMES = (QuantScheme(2, 32), QuantScheme(4, 32), QuantScheme(16))


def test_a_gated_block_passes_on_exactly_the_relevance_it_gets():
    x = torch.randn(5, 8, requires_grad=True)
    gate, up, down = torch.randn(12, 8), torch.randn(12, 8), torch.randn(8, 12)
    coming = torch.randn(5, 8)

    def block(x):
        normed = torch.randn(8).mul(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        return x + (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T

    torch.manual_seed(1)
    plain = block(x)
    torch.manual_seed(1)
    with RelevanceRules():
        ruled = block(x)
    torch.testing.assert_close(ruled, plain)
    (gradient,) = torch.autograd.grad(ruled, [x], coming)
    torch.testing.assert_close((gradient * x).sum(-1), (coming * ruled).sum(-1))
    (gradient,) = torch.autograd.grad(plain, [x], coming)
    assert not torch.allclose((gradient * x).sum(-1), (coming * plain).sum(-1), rtol=0.05)


def test_layer_norm_and_nonlinearities_are_constant_gains():
    x = torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(6)
    for function in (F.gelu, F.relu, torch.tanh, lambda x: F.layer_norm(x, (6,), weight, None)):
        with RelevanceRules():
            y = function(x)
        torch.testing.assert_close(y, function(x))
        (gradient,) = torch.autograd.grad(y, [x], torch.ones_like(y))
        torch.testing.assert_close((gradient * x).sum(), y.sum())


def test_attention_gives_half_to_values_and_a_quarter_each_to_queries_and_keys():
    query, key, value = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    coming = torch.randn(1, 2, 5, 4)
    factors = (query, key, value)
    plain = F.scaled_dot_product_attention(*factors, is_causal=True)
    mask = torch.ones(5, 5).tril().log()
    with RelevanceRules():
        fused = F.scaled_dot_product_attention(query, key, value=value, is_causal=True)
        written = torch.matmul((query @ key.transpose(2, 3) / 2 + mask).softmax(-1), value)
    torch.testing.assert_close(fused, plain)
    wanted = torch.autograd.grad(plain, factors, coming)
    for output in (fused, written):
        got = torch.autograd.grad(output, factors, coming)
        for part, share, whole in zip(got, (0.25, 0.25, 0.5), wanted, strict=True):
            torch.testing.assert_close(part, share * whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_cost_is_the_share_of_relevance_times_the_output_error(kind, tmp_path):
    random_model(kind, tmp_path)
    decoder = Decoder.open(open_checkpoint(tmp_path))
    tokens = torch.randint(2, decoder.vocab_size, (3, 16))
    costs = relevance(decoder, tokens, SCHEMES, rtn).costs
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model.requires_grad_(False)  # weights are constants, so that products with them are linear
    model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_(True))
    outputs = {}

    def record(name):
        def hook(module, args, output):
            output.retain_grad()
            outputs[name] = (output, 0 if module.bias is None else module.bias)

        return hook

    for spec in decoder.linears:
        model.get_submodule(spec.name).register_forward_hook(record(spec.name))
    with RelevanceRules():
        logits = model(tokens).logits
    logits.gather(-1, logits.argmax(-1, keepdim=True)).sum().backward()
    totals = torch.stack(
        [
            (outputs[spec.name][0].grad * (outputs[spec.name][0] - outputs[spec.name][1]))
            .abs()
            .sum()
            .double()
            for spec in decoder.linears
        ]
    )
    wanted = output_error(decoder, tokens, SCHEMES, rtn).costs * (totals / totals.sum())[:, None]
    torch.testing.assert_close(costs, wanted, rtol=1e-3, atol=1e-9)
