"""benchmarks/peer_runs: the files of other tools are counted and unpacked as they are defined."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "peer_runs"))
from shared import LINEAR, gptq_weight, stored_bits, unpack


def packed_column(values, bits):
    """int32 words of one little-endian stream, made with Python's whole numbers."""
    stream = sum(value << (bits * position) for position, value in enumerate(values))
    words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(len(values) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("with_order", [True, False])
def test_gptq_layout_gives_the_weights_that_were_packed(bits, zero_offset, with_order):
    generator = torch.Generator().manual_seed(bits)
    out_features, in_features, group_size = 32, 32, 16
    n_groups = in_features // group_size
    codes = torch.randint(2**bits, (out_features, in_features), generator=generator)
    zeros = torch.randint(2**bits, (out_features, n_groups), generator=generator)
    zeros[0, 0], zeros[1, 0] = 0, 2**bits - 1  # a zero of 0 is stored as all ones when less one
    scales = torch.rand(n_groups, out_features, generator=generator).half()
    group = torch.arange(in_features) // group_size
    if with_order:
        group = group[torch.randperm(in_features, generator=generator)]
    stored = (zeros - zero_offset) % 2**bits
    tensors = {
        "qweight": torch.tensor([packed_column(row.tolist(), bits) for row in codes]).T.int(),
        "qzeros": torch.tensor([packed_column(row.tolist(), bits) for row in stored.T]).int(),
        "scales": scales,
    }
    if with_order:
        tensors["g_idx"] = group.int()
    weight = gptq_weight(tensors, bits, zero_offset=zero_offset).tolist()
    codes, zeros, group = codes.tolist(), zeros.tolist(), group.tolist()
    exact = scales.float().tolist()
    for row in range(out_features):
        for column, g in enumerate(group):
            assert weight[row][column] == (codes[row][column] - zeros[row][g]) * exact[g][row]


def test_unpack_ignores_the_padding_of_a_row():
    words = torch.tensor([packed_column([5, 1, 7] + [0] * 29, 3)]).int()
    assert unpack(words, 3, 3).tolist() == [[5, 1, 7]]


def test_every_stored_bit_counts_and_floats_count_sixteen():
    linear = {
        "qweight": torch.zeros(54, 576, dtype=torch.int32),
        "qzeros": torch.zeros(9, 54, dtype=torch.int32),
        "scales": torch.zeros(9, 576),
        "g_idx": torch.zeros(576, dtype=torch.int32),
        "weight_shape": torch.tensor([576, 576]),
    }
    codes, zeros, scales, order = 576 * 576 * 3, 9 * 576 * 3, 9 * 576 * 16, 576 * 32
    assert stored_bits({"one": linear, "two": linear}) == 2 * (codes + zeros + scales + order)


def test_the_linears_of_the_decoder_are_told_from_the_rest():
    for name in ("model.layers.3.mlp.up_proj", "model.layers.12.self_attn.q_proj"):
        match = LINEAR.fullmatch(f"{name}.qweight")
        assert match and match.groups() == (name, "qweight")
    for other in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.3.input_layernorm"):
        assert not LINEAR.fullmatch(other)
