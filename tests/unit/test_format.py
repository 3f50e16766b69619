"""The config of the on-disk format, and the tensors of one linear."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lwquant.codebooks import CODEBOOKS
from lwquant.errors import CheckpointError
from lwquant.export.format import (
    QuantizationConfig,
    layout_of,
    parse_quantization_config,
    quantization_config,
    tensors_of,
)
from lwquant.quantizers.grid import storable_scale
from lwquant.scheme import WIDTHS, QuantScheme
from lwquant.types import Outliers, QuantizedWeight

SCHEMES = {
    "model.layers.0.q_proj": QuantScheme(3, 64),
    "model.layers.0.k_proj": QuantScheme(4, 128, symmetric=True),
    "model.layers.0.v_proj": QuantScheme(16),
    "model.layers.0.o_proj": QuantScheme(3, 64, scale_bits=8),
    "model.layers.0.up_proj": QuantScheme(2, 64, fine_zeros=True),
    "model.layers.0.down_proj": QuantScheme(3, 64, scale_bits=8, outliers=5),
    "model.layers.0.gate_proj": QuantScheme(4, 64, codebook="nf4"),
}


def entry(bits, group_size, symmetric, scale_bits, fine_zeros=False, outliers=0, codebook=""):
    return {
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "scale_bits": scale_bits,
        "codebook": codebook,
        "fine_zeros": fine_zeros,
        "outliers": outliers,
    }


def random_weight(scheme: QuantScheme, out_features: int, in_features: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(scheme.bits)
    groups = (out_features, scheme.n_groups(in_features))

    def codes(shape: tuple[int, int], most: int = scheme.max_code) -> torch.Tensor:
        return torch.randint(most + 1, shape, generator=generator, dtype=torch.uint8)

    middle = torch.full(groups, 2 ** (scheme.bits - 1), dtype=torch.uint8)
    return QuantizedWeight(
        scheme,
        codes((out_features, in_features)),
        storable_scale(torch.rand(groups, generator=generator) + 0.01, scheme).half(),
        middle if scheme.symmetric else codes(groups, scheme.max_zero),
        outliers=random_outliers(scheme, out_features, in_features) if scheme.outliers else None,
    )


def random_outliers(scheme: QuantScheme, out_features: int, in_features: int) -> Outliers:
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(out_features, in_features, generator=generator)
    return Outliers.largest(dense, scheme.n_outliers(out_features, in_features))


def test_the_config_survives_json_and_parsing():
    config = json.loads(json.dumps(quantization_config(SCHEMES, 3.625)))
    none: frozenset[str] = frozenset()
    assert parse_quantization_config(config) == QuantizationConfig(SCHEMES, 3.625, none, none, {})
    narrow, narrower = (
        {"model.layers.0.up_proj", "model.layers.0.q_proj"},
        {"model.layers.0.q_proj"},
    )
    config = json.loads(json.dumps(quantization_config(SCHEMES, 3.625, narrow, narrower)))
    parsed = parse_quantization_config(config)
    assert (parsed.int8_activations, parsed.int8_weights) == (narrow, narrower)
    tables = {"model.embed_tokens": QuantScheme(8, 64, symmetric=True, scale_bits=8)}
    config = json.loads(json.dumps(quantization_config(SCHEMES, 3.625, embeddings=tables)))
    assert parse_quantization_config(config).embeddings == tables


@pytest.mark.parametrize("version", [4, 5])
def test_configs_of_earlier_versions_lack_what_came_later(version):
    q = "model.layers.0.q_proj"
    config = quantization_config(SCHEMES, 3.5, [q], [q]) | {"version": version}
    del config["embeddings"]
    later = {"embeddings": {}}
    if version == 4:
        del config["int8_weights"]
        later["int8_weights"] = []
    parsed = parse_quantization_config(config)
    assert parsed.int8_activations == {q} and parsed.int8_weights == (
        {q} if version == 5 else set()
    )
    assert parsed.embeddings == {}
    for name, value in later.items():
        with pytest.raises(CheckpointError, match=f"unknown keys: {name}"):
            parse_quantization_config(config | {name: value})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("model.layers.0.q_proj", "is not a list of names"),
        ([3], "is not a list of names"),
        (["model.layers.0.up"], "names 'model.layers.0.up', which is no quantized linear"),
        (["model.layers.0.v_proj"], "names 'model.layers.0.v_proj', which is no quantized linear"),
    ],
)
def test_int8_activations_of_what_is_not_quantized_are_refused(names, message):
    config = quantization_config(SCHEMES, 3.5) | {"int8_activations": names}
    with pytest.raises(CheckpointError, match=message):
        parse_quantization_config(config)


def test_int8_weights_beside_wider_activations_are_refused():
    q, o = "model.layers.0.q_proj", "model.layers.0.o_proj"
    config = quantization_config(SCHEMES, 3.5, [q], [q, o])
    message = f"int8_weights names '{o}', which is no linear with int8 activations"
    with pytest.raises(CheckpointError, match=message):
        parse_quantization_config(config)


def test_the_config_is_spelled_as_version_6():
    assert quantization_config(SCHEMES, 3.5, {"b", "a"}, {"b"}) == {
        "quant_method": "lwquant",
        "version": 6,
        "int8_activations": ["a", "b"],
        "int8_weights": ["b"],
        "embeddings": {},
        "bpw": 3.5,
        "linears": {
            "model.layers.0.q_proj": entry(3, 64, False, 16),
            "model.layers.0.k_proj": entry(4, 128, True, 16),
            "model.layers.0.v_proj": entry(16, 0, False, 16),
            "model.layers.0.o_proj": entry(3, 64, False, 8),
            "model.layers.0.up_proj": entry(2, 64, False, 16, True),
            "model.layers.0.down_proj": entry(3, 64, False, 8, False, 5),
            "model.layers.0.gate_proj": entry(4, 64, True, 16, codebook="nf4"),
        },
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq' is not 'lwquant'"),
        ({"version": 2}, "version=2 is not one"),
        ({"version": True}, "version=True is not one"),
        ({"version": "4"}, "version='4' is not one"),
        ({"desc_act": True}, "unknown keys: desc_act"),
        ({"bpw": "3.5"}, "bpw='3.5' is not a positive number"),
        ({"bpw": float("nan")}, "bpw=nan is not a positive number"),
        ({"bpw": True}, "bpw=True is not a positive number"),
        ({"linears": {}}, "linears names no linear"),
        ({"linears": []}, "linears names no linear"),
    ],
)
def test_a_config_of_no_known_version_or_shape_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        parse_quantization_config(quantization_config(SCHEMES, 3.5) | change)


@pytest.mark.parametrize(
    "key",
    [
        "quant_method",
        "version",
        "bpw",
        "linears",
        "int8_activations",
        "int8_weights",
        "embeddings",
    ],
)
def test_a_config_that_lacks_a_key_is_refused_by_its_name(key):
    config = quantization_config(SCHEMES, 3.5)
    del config[key]
    with pytest.raises(CheckpointError, match=key):
        parse_quantization_config(config)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (4, "is 4, not an object"),
        (
            {"bits": 4, "group_size": 64},
            "lacks codebook, fine_zeros, outliers, scale_bits, symmetric",
        ),
        ({**entry(4, 64, False, 16), "zp": 1}, "unknown keys: zp"),
        (entry(9, 64, False, 16), "bits=9"),
        (entry(1, 64, False, 16), "bits=1"),
        (entry(4, 0, False, 16), "group_size=0"),
        (entry(4, 64, False, 6), "scale_bits=6"),
        (entry(4.0, 64, False, 16), r"bits is 4\.0, not of type int"),
        (entry(4, True, False, 16), "group_size is True, not of type int"),
        (entry(4, 64, 0, 16), "symmetric is 0, not of type bool"),
        (entry(4, 64, False, "8"), "scale_bits is '8', not of type int"),
        (entry(4, 64, False, 16, 1), "fine_zeros is 1, not of type bool"),
        (entry(4, 64, True, 16, True), "a symmetric scheme stores no zeros"),
        (entry(4, 64, False, 16, False, 5.0), r"outliers is 5\.0, not of type int"),
        (entry(4, 64, False, 16, False, 101), "outliers=101 per thousand"),
        (entry(4, 64, False, 16, False, -1), "outliers=-1 per thousand"),
        (entry(16, 0, False, 16, False, 1), "16 bits have no groups"),
        (entry(16, 64, False, 16), "16 bits have no groups"),
        (entry(4, 64, True, 16, codebook="nf5"), "codebook='nf5' is not one of .*nf4"),
        (entry(3, 64, True, 16, codebook="nf4"), "codebook='nf4' needs bits=4, not 3"),
        (entry(16, 0, False, 16, codebook="nf4"), "16 bits have no groups"),
        (entry(4, 64, False, 16, codebook="nf4"), "a codebook has no zeros"),
        (entry(4, 64, True, 16, codebook=None), "codebook is None, not of type str"),
        (entry(16, 0, False, 16, True), "16 bits have no groups"),
    ],
)
def test_a_linear_that_no_scheme_describes_is_refused_by_its_name(entry, message):
    config = quantization_config(SCHEMES, 3.5)
    config["linears"]["model.layers.0.up"] = entry
    with pytest.raises(CheckpointError, match=f"'model.layers.0.up'.*{message}"):
        parse_quantization_config(config)


@pytest.mark.parametrize("zeros", ["whole", "fine", "none"])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("outliers", [0, 7])
def test_tensors_have_the_stated_layout_and_exactly_the_stored_bits(
    bits, zeros, scale_bits, outliers
):
    scheme = QuantScheme(
        bits, 48, zeros == "none", scale_bits, fine_zeros=zeros == "fine", outliers=outliers
    )
    tensors = dict(tensors_of("up", random_weight(scheme, 33, 100)))
    layout = layout_of("up", 33, 100, scheme)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == layout
    assert 8 * sum(t.nbytes for t in tensors.values()) == scheme.stored_bits(33, 100)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_a_codebook_is_stored_as_codes_and_scales_and_nothing_else(codebook, scale_bits):
    scheme = QuantScheme(4, 48, scale_bits=scale_bits, codebook=codebook)
    tensors = dict(tensors_of("up", random_weight(scheme, 33, 100)))
    assert set(tensors) == {"up.qweight", "up.scales"}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == layout_of(
        "up", 33, 100, scheme
    )
    codes = 33 * 13 * 32  # 100 codes of 4 bits fill 12.5 words
    scales = 33 * {16: 3 * 16, 8: (1 + 3) * 8}[scale_bits]
    assert 8 * sum(t.nbytes for t in tensors.values()) == codes + scales
    assert scheme.stored_bits(33, 100) == codes + scales


@pytest.mark.parametrize(
    "label", ["nf4-g64", "fp4-g32-s8", "8b-row-sym", "3b-row-s8", "nf4-row", "4b-g64-sym-s8"]
)
def test_the_label_of_a_scheme_names_it(label):
    scheme = QuantScheme.parse(label)
    assert scheme.label == label
    assert scheme.codebook == (label[:3] if label.startswith(("nf4", "fp4")) else "")
    assert scheme.symmetric == ("sym" in label or bool(scheme.codebook))


@pytest.mark.parametrize(
    "label", ["nf5-g64", "nf4-g64-sym", "nf4", "4nf4-g64", "nf4b-g64", "8b-rows"]
)
def test_what_labels_no_scheme_is_refused(label):
    with pytest.raises(ValueError, match=f"scheme '{label}' is not of the form"):
        QuantScheme.parse(label)


def test_code_k_of_a_row_sits_at_bit_k_times_bits_of_its_little_endian_stream():
    weight = random_weight(QuantScheme(3, 48), 33, 100)
    tensors = dict(tensors_of("up", weight))
    for stored, codes in (("up.qweight", weight.codes), ("up.zeros", weight.zeros.T)):
        stream = int.from_bytes(tensors[stored][1].numpy().tobytes(), "little")
        assert [stream >> 3 * k & 7 for k in range(codes.shape[1])] == codes[1].tolist()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.label)
def test_a_label_names_its_scheme(scheme):
    assert QuantScheme.parse(scheme.label) == scheme
    with pytest.raises(ValueError, match="is not of the form"):
        QuantScheme.parse(f"{scheme.label}-z7")


def test_a_fine_zero_is_the_byte_that_stands_for_it():
    scheme = QuantScheme(3, 48, fine_zeros=True)
    weight = random_weight(scheme, 33, 100)
    stored = dict(tensors_of("up", weight))["up.zeros"]
    assert stored.dtype == torch.uint8 and torch.equal(stored, weight.zeros.T)
    scale, byte = weight.scales[5, 2].item(), int(stored[2, 5])
    assert byte % 32  # between the codes
    expected = (int(weight.codes[5, 99]) - byte / 32) * scale
    assert weight.dequantize()[5, 99].item() == pytest.approx(expected, rel=1e-6)


def test_outliers_are_compressed_rows_and_wide_ones_use_the_unsigned_columns():
    scheme = QuantScheme(3, 48, outliers=1)
    for in_features, dtype in ((2**16, torch.int16), (2**16 + 1, torch.int32)):
        dense = torch.zeros(2, in_features)
        places = [(0, 7), (0, 40_000), (1, 5), (1, in_features - 1)]
        n = scheme.n_outliers(2, in_features)
        for number, place in enumerate(places):
            dense[place] = n + number  # the four largest
        filling = torch.arange(100, 100 + n - 4)
        dense[1, filling] = 1.0
        weight = random_weight(QuantScheme(3, 48), 2, in_features)
        outliers = Outliers.largest(dense, n)
        weight = replace(weight, scheme=scheme, outliers=outliers)
        stored = dict(tensors_of("up", weight))
        rows, columns = stored["up.outlier_rows"], stored["up.outlier_columns"]
        assert columns.dtype == dtype and rows.tolist() == [0, 2, n]
        unsigned = (
            [column % 2**16 for column in columns.tolist()]
            if dtype == torch.int16
            else (columns.tolist())
        )
        assert unsigned == [7, 40_000, 5, *filling.tolist(), in_features - 1]
        total = 8 * sum(tensor.nbytes for tensor in stored.values())
        assert total == scheme.stored_bits(2, in_features)
        plain = replace(weight, outliers=None).dequantize()
        assert torch.equal(weight.dequantize(), plain + dense)


def test_outliers_that_are_not_what_the_scheme_says_are_refused():
    scheme = QuantScheme(3, 48, outliers=5)
    good = random_weight(scheme, 33, 100)
    assert len(dict(tensors_of("up", good))) == 6
    sparse = good.outliers
    for outliers, message in (
        (None, "contradict each other"),
        (Outliers.largest(torch.ones(33, 100), 17), "has 16 outliers, not 17"),
        (replace(sparse, columns=sparse.columns + 100), "in none of the 100 columns"),
        (replace(sparse, rows=sparse.rows.flip(0)), "do not rise from 0 to 16"),
    ):
        with pytest.raises(ValueError, match=message):
            list(tensors_of("up", replace(good, outliers=outliers)))
    with pytest.raises(ValueError, match="contradict each other"):
        list(tensors_of("up", replace(good, scheme=QuantScheme(3, 48))))


def test_a_symmetric_weight_with_a_zero_off_the_middle_is_refused():
    weight = random_weight(QuantScheme(4, 48, symmetric=True), 33, 100)
    weight.zeros[5, 1] = 7
    with pytest.raises(ValueError, match=r"up.*all must be 8"):
        list(tensors_of("up", weight))
