"""Tuning scales by the model's KL: its gradient against autograd, and what it may change."""

from dataclasses import replace

import pytest
import torch
from tiny_models import random_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import lwquant.finetune as finetune
from lwquant.codebooks import CODEBOOKS
from lwquant.finetune import tune_scales
from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder
from lwquant.quantizers import rtn
from lwquant.scheme import QuantScheme
from lwquant.types import Outliers, QuantizedWeight

SCHEMES = (
    QuantScheme(2, 32),
    QuantScheme(3, 32, fine_zeros=True, outliers=20),
    QuantScheme(16),
    QuantScheme(4, 32, codebook="nf4"),
)


def open_quantized(folder, flip):
    """`flip`: the model's linears store (in_features, out_features)."""
    decoder = Decoder.open(open_checkpoint(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights = {}
    for number, spec in enumerate(decoder.linears):
        weight = model.get_submodule(spec.name).weight.detach()
        weight = weight.T if flip else weight
        scheme = SCHEMES[number % 4]
        weights[spec.name] = weight.half() if scheme.is_float else rounded(weight, scheme)
    return decoder, model, weights


def rounded(weight, scheme):
    plain = rtn(weight, None, scheme.without_outliers)
    if not scheme.outliers:
        return plain
    missed = weight - plain.dequantize()
    outliers = Outliers.largest(missed, scheme.n_outliers(*weight.shape))
    return replace(plain, scheme=scheme, outliers=outliers)


def kl_of(model, weights, tokens, scales=None):
    """Mean KL to the float model, by the whole model at once; `scales` may require gradients."""
    with torch.no_grad():
        target = model(tokens).logits.log_softmax(-1)
    swapped = {}
    for name, kept in weights.items():
        if isinstance(kept, QuantizedWeight):
            expand = torch.arange(kept.codes.shape[1]) // kept.scheme.group_size
            own = kept.scales.float() if scales is None else scales[name]
            steps = kept.codes.float() - kept.zero_points[:, expand]
            if kept.scheme.codebook:
                steps = torch.tensor(CODEBOOKS[kept.scheme.codebook])[kept.codes.long()]
            weight = steps * own[:, expand]
            if kept.outliers is not None:
                weight = kept.outliers.added_to(weight)
        else:
            weight = kept.float()
        flip = isinstance(model.get_submodule(name), Conv1D)
        swapped[f"{name}.weight"] = weight.T if flip else weight
    predicted = torch.func.functional_call(model, swapped, (tokens,)).logits.log_softmax(-1)
    return (target.exp() * (target - predicted)).sum(-1).mean()


@pytest.fixture(params=["llama", "gpt2"])
def quantized(request, tmp_path):
    random_model(request.param, tmp_path)
    return open_quantized(tmp_path, flip=request.param == "gpt2")


def test_the_gradient_is_that_of_autograd_through_the_whole_model(quantized, monkeypatch):
    decoder, model, weights = quantized
    tokens = torch.randint(0, decoder.vocab_size, (3, 12))
    scales = {
        name: kept.scales.float().requires_grad_(True)
        for name, kept in weights.items()
        if isinstance(kept, QuantizedWeight)
    }
    kl_of(model, weights, tokens, scales).backward()
    wanted = {name: (own.grad * own).detach() for name, own in scales.items()}
    found = []
    monkeypatch.setattr(
        finetune._Tuned, "step", lambda self, gradient, rate, number: found.append((self, gradient))
    )
    tune_scales(decoder, weights, tokens, passes=1, batch=3)
    assert len(found) == len(wanted) > 0
    for tuned, gradient in found:
        (name,) = (n for n, kept in weights.items() if kept is tuned.weight)
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6)


def test_the_kl_falls_and_only_scales_of_quantized_linears_change(quantized):
    decoder, model, weights = quantized
    tokens = torch.randint(0, decoder.vocab_size, (8, 12))
    tuned = tune_scales(decoder, weights, tokens, passes=6, batch=4, rate=2e-2)
    assert kl_of(model, tuned, tokens) < 0.95 * kl_of(model, weights, tokens)
    for name, kept in weights.items():
        if isinstance(kept, QuantizedWeight):
            assert torch.equal(tuned[name].codes, kept.codes)
            assert torch.equal(tuned[name].zeros, kept.zeros)
            assert tuned[name].outliers is kept.outliers
            assert tuned[name].scales.dtype == torch.float16
            assert not torch.equal(tuned[name].scales, kept.scales)
            assert (tuned[name].scales > 0).all()
        else:
            assert tuned[name] is kept


def test_steps_are_adams(quantized):
    _, _, weights = quantized
    kept = next(w for w in weights.values() if isinstance(w, QuantizedWeight))
    tuned = finetune._Tuned(kept, torch.zeros_like(kept.scales, dtype=torch.float32))
    parameter = torch.zeros_like(tuned.shift, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=0.01, betas=finetune.DECAYS, eps=1e-12)
    for number in range(1, 4):
        gradient = torch.randn(parameter.shape)
        parameter.grad = gradient
        optimizer.step()
        tuned.step(gradient, 0.01, number)
    torch.testing.assert_close(tuned.shift, parameter.detach())


def test_the_same_seed_gives_the_same_scales(quantized):
    decoder, _, weights = quantized
    tokens = torch.randint(0, decoder.vocab_size, (5, 12))
    runs = [tune_scales(decoder, weights, tokens, passes=1, batch=2, seed=s) for s in (1, 1, 2)]
    for name, kept in runs[0].items():
        if isinstance(kept, QuantizedWeight):
            assert torch.equal(kept.scales, runs[1][name].scales)
    assert any(
        not torch.equal(kept.scales, runs[2][name].scales)
        for name, kept in runs[0].items()
        if isinstance(kept, QuantizedWeight)
    )
