"""The row stream: plain torch and every compiled path against Python integers, bit by bit."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lwquant import ops
from lwquant.errors import LwquantError
from lwquant.ops.layout import pack_reference, unpack_reference
from lwquant.scheme import WIDTHS, row_words


@pytest.fixture(params=ops.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


def stream_of(codes: Tensor, bits: int) -> list[list[int]]:
    """The definition: one long number per row, cut into signed little-endian 32-bit words."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (k * bits) for k, code in enumerate(row))
        data = number.to_bytes(-(-len(row) * bits // 32) * 4, "little")
        words = [data[i : i + 4] for i in range(0, len(data), 4)]
        rows.append([int.from_bytes(word, "little", signed=True) for word in words])
    return rows


def random_codes(rows: int, n_codes: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, n_codes), generator=generator).to(torch.uint8)


shapes = st.tuples(st.integers(0, 4), st.integers(0, 150), st.sampled_from(WIDTHS))


@given(shapes, st.integers(0, 2**20))
@settings(deadline=None, max_examples=80)
def test_packing_is_the_little_endian_stream_of_the_codes(shape, seed):
    rows, n_codes, bits = shape
    codes = random_codes(rows, n_codes, bits, seed)
    packed = ops.pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (rows, row_words(n_codes, bits))
    assert packed.tolist() == stream_of(codes, bits)
    assert torch.equal(pack_reference(codes, bits), packed)


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpacking_inverts_packing_on_every_instruction_set(isa, bits):
    for n_codes in (0, 1, 5, 31, 32, 33, 63, 64, 65, 100, 129, 576):
        codes = random_codes(3, n_codes, bits, seed=n_codes)
        packed = torch.tensor(stream_of(codes, bits), dtype=torch.int32).reshape(3, -1)
        assert torch.equal(ops.unpack(packed, bits, n_codes), codes), n_codes
        assert torch.equal(unpack_reference(packed, bits, n_codes), codes), n_codes


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_value_survives_at_every_place_of_the_stream(isa, bits):
    places = 96
    for value in (0, 1, 2 ** (bits - 1), 2**bits - 1):
        rest = 2**bits - 1 - value
        codes = torch.full((places, places), rest, dtype=torch.uint8)
        codes.fill_diagonal_(value)
        assert torch.equal(ops.unpack(ops.pack(codes, bits), bits, places), codes)


def test_a_view_with_strides_packs_like_its_copy():
    codes = random_codes(40, 6, 5)
    assert torch.equal(ops.pack(codes.T, 5), ops.pack(codes.T.contiguous(), 5))
    packed = ops.pack(random_codes(8, 64, 5), 5)
    assert torch.equal(ops.unpack(packed[::2], 5, 64), ops.unpack(packed[::2].clone(), 5, 64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.pack(torch.zeros(2, 3), 4), "codes must be .* torch.uint8, got .*float32"),
        (lambda: ops.pack(torch.zeros(3, dtype=torch.uint8), 4), r"codes must be .* got \(3,\)"),
        (lambda: ops.pack(torch.zeros(2, 3, dtype=torch.uint8), 9), "bits=9 is not one of"),
        (
            lambda: ops.pack(torch.full((1, 2), 8, dtype=torch.uint8), 3),
            "code 8 does not fit in 3 bits",
        ),
        (lambda: ops.unpack(torch.zeros(2, 3), 4, 24), "packed must be .* torch.int32"),
        (
            lambda: ops.unpack(torch.zeros(2, 3, dtype=torch.int32), 4, 25),
            "25 codes of 4 bits need 4 words a row, packed has 3",
        ),
    ],
)
def test_wrong_tensors_are_refused_with_what_was_expected(call, message):
    with pytest.raises(LwquantError, match=message):
        call()


def test_an_unknown_instruction_set_is_refused_by_name():
    with pytest.raises(LwquantError, match="'sse9' is not one of"):
        ops.set_isa("sse9")
