"""Rows of queries and keys that are rounded without clipping, against the inputs themselves."""

from dataclasses import replace

import pytest
import torch
from tiny_models import random_model

import lwquant
from lwquant.errors import LwquantError
from lwquant.massive_channels import check_roles, massive_rows
from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder
from lwquant.quantizers import gptq, quantease
from lwquant.quantizers.grid import fit_grid
from lwquant.recipe import Recipe
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.walk import block_stats
from lwquant.sequential import Streams, quantize_blocks
from lwquant.types import LayerStats

SPARING = pytest.mark.parametrize("quantize", [gptq, quantease])


def make_layer(out_features=24, in_features=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    mixing = torch.randn(in_features, in_features, generator=generator)
    inputs = torch.randn(200, in_features, generator=generator) @ mixing
    return weight, inputs, LayerStats(inputs.T @ inputs, None, len(inputs))


@pytest.mark.parametrize(("share", "n_rows"), [(0.01, 1), (0.1, 3), (0.25, 6), (1.0, 24), (0, 0)])
def test_the_rows_are_those_of_the_largest_outputs(share, n_rows):
    weight, inputs, stats = make_layer()
    squares = (inputs.double() @ weight.double().T).square().mean(0)
    wanted = set(squares.argsort(descending=True)[:n_rows].tolist())
    rows = massive_rows(weight, stats, share)
    assert set(rows.nonzero().flatten().tolist()) == wanted


@SPARING
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_unclipped_rows_have_the_full_range_and_the_others_do_not_notice(quantize, scale_bits):
    weight, _, stats = make_layer()
    scheme = QuantScheme(2, 16, scale_bits=scale_bits)
    rows = torch.zeros(24, dtype=torch.bool)
    rows[[2, 7, 19]] = True
    plain = quantize(weight, stats, scheme)
    spared = quantize(weight, stats, scheme, unclipped=rows)
    full = fit_grid(weight, scheme, search=False)
    assert torch.equal(spared.scales[rows].float(), full.scales[rows])
    assert torch.equal(spared.zeros[rows].float(), full.zeros[rows])
    assert (plain.scales[rows] < spared.scales[rows]).float().mean() > 0.5  # what was clipped
    for part in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(spared, part)[~rows], getattr(plain, part)[~rows])
    assert not torch.equal(spared.codes[rows], plain.codes[rows])


def test_only_queries_and_keys_are_spared_and_by_their_own_statistics(tiny_folder):
    decoder = Decoder.open(open_checkpoint(tiny_folder))
    tokens = torch.randint(0, decoder.vocab_size, (4, 32), generator=torch.Generator())
    scheme = QuantScheme(3, 32)
    schemes = {spec.name: scheme for spec in decoder.linears}

    def first_block(share):
        streams = Streams.start(decoder, tokens, 4)
        results = quantize_blocks(decoder, streams, schemes, gptq, unclipped_qk=share)
        return {r.spec.role: r for r in results if r.spec.block == 0}

    plain, spared = first_block(0.0), first_block(0.1)
    hidden = torch.cat([decoder.embed(row[None]) for row in tokens])
    with decoder.loaded(0) as block:
        stats = block_stats(decoder, 0, block, hidden)
        for role in ("q_proj", "k_proj", "v_proj"):
            result, weight = spared[role], block.get_submodule(f"self_attn.{role}").weight
            changed = (result.weight.scales != plain[role].weight.scales).any(1)
            rows = massive_rows(weight, stats[result.spec.input_group], 0.1)
            assert not (changed & ~rows).any()
            if role == "v_proj":
                assert not changed.any()
            else:
                full = fit_grid(weight.detach(), scheme, search=False).scales
                assert changed.any() and torch.equal(result.weight.scales[rows].float(), full[rows])


def test_it_is_switched_on_by_the_recipe_and_noted(tiny_folder, heldout_text, tmp_path):
    made = lwquant.quantize(
        tiny_folder,
        bpw=3.5,
        output=tmp_path / "out",
        recipe=Recipe(n_samples=4, seq_len=64, held_out=2, group_size=32, unclipped_qk=0.02),
        calibration=[heldout_text[:6000]],
        metric="output_error",
        progress=lambda *_: None,
    )
    assert made.folder.exists()
    assert "2.0% of the rows of queries and keys" in (made.folder / "lwquant.json").read_text()


def test_what_cannot_be_spared_is_refused(tmp_path):
    recipe = Recipe(unclipped_qk=0.02)
    assert recipe.rounding().unclipped_qk == 0.02
    assert replace(recipe, quantizer="gptq", correction="gptaq").rounding().quantizer.func is gptq
    assert replace(recipe, quantizer={"name": "quantease", "sweeps": 2}).rounding()
    for quantizer in ("rtn", "hqq", lambda weight, stats, scheme: None):
        with pytest.raises(LwquantError, match="unclipped_qk=0.02 needs quantizer 'gptq' or"):
            replace(recipe, quantizer=quantizer).rounding()
    with pytest.raises(LwquantError, match=r"unclipped_qk=1.5 must be in \[0, 1\]"):
        Recipe(unclipped_qk=1.5)
    random_model("gpt2", tmp_path / "gpt2")
    decoder = Decoder.open(open_checkpoint(tmp_path / "gpt2"))
    check_roles(decoder.linears, 0.0)
    fused = "unclipped_qk=0.02 needs linears named q_proj and k_proj; the model has c_attn, c_fc"
    with pytest.raises(LwquantError, match=fused):
        lwquant.quantize(tmp_path / "gpt2", bpw=3.5, output=tmp_path / "out", recipe=recipe)
    streams = Streams.start(decoder, torch.zeros(1, 8, dtype=torch.long), 1)
    with pytest.raises(LwquantError, match=fused):
        next(quantize_blocks(decoder, streams, {}, gptq, unclipped_qk=0.02))
