"""Laws of every dialect: what it stores, read by its definition, is the weight that lwquant has."""

import re

import pytest
import torch

from lwquant import ops
from lwquant.export.dialects import DIALECTS, StoredLinear
from lwquant.scheme import WHOLE_ROW, WIDTHS, QuantScheme

SHAPE = 64, 96
SCHEMES = [
    *(QuantScheme(bits, 32) for bits in WIDTHS),
    *(QuantScheme(bits, 32, symmetric=True, scale_bits=8) for bits in WIDTHS),
    QuantScheme(2, 32, fine_zeros=True),
    QuantScheme(3, 96),
    QuantScheme(4, WHOLE_ROW),
    QuantScheme(8, WHOLE_ROW, symmetric=True),
]
NOWHERE = [
    QuantScheme(4, 64, codebook="nf4"),
    QuantScheme(2, 32, outliers=5),
    QuantScheme(4, 64),  # of 96 inputs
    QuantScheme(4, 100),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def stored_linear(scheme):
    generator = torch.Generator().manual_seed(scheme.bits)
    n_groups = scheme.n_groups(SHAPE[1])
    codes = torch.randint(2**scheme.bits, SHAPE, generator=generator).byte()
    zeros = torch.randint(scheme.max_zero + 1, (n_groups, SHAPE[0]), generator=generator).byte()
    zeros[0, :2] = torch.tensor([0, scheme.max_zero])
    scales = (torch.rand(SHAPE[0], n_groups, generator=generator) + 0.01).half()
    stored = zeros if scheme.fine_zeros else ops.pack(zeros, scheme.bits)
    packed = ops.pack(codes, scheme.bits)
    linear = StoredLinear(scheme, *SHAPE, packed, scales, None if scheme.symmetric else stored)
    points = zeros.T.double() * (2.0 ** (scheme.bits - 8) if scheme.fine_zeros else 1)
    if scheme.symmetric:
        points = torch.full_like(points, 2 ** (scheme.bits - 1))
    return linear, codes, points


def numbers(words, bits, n):
    """The first n of a little-endian stream of `bits` each, from 32-bit words, in whole numbers."""
    stream = sum((word % 2**32) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (bits * i)) % 2**bits for i in range(n)]


def rows_of(matrix, bits, n):
    return torch.tensor([numbers(row, bits, n) for row in matrix.tolist()]).double()


def mlx_weight(tensors, entry):
    codes = rows_of(tensors["weight"].view(torch.int32), entry["bits"], SHAPE[1])
    each = torch.arange(SHAPE[1]) // entry["group_size"]
    return codes * tensors["scales"].double()[:, each] + tensors["biases"].double()[:, each]


def gptq_weight(tensors, entry):
    codes = rows_of(tensors["qweight"].T, entry["bits"], SHAPE[1])
    zeros = rows_of(tensors["qzeros"], entry["bits"], SHAPE[0]).T
    each = tensors["g_idx"].long()
    size = SHAPE[1] if entry["group_size"] == -1 else entry["group_size"]
    assert each.tolist() == [i // size for i in range(SHAPE[1])]
    if entry["sym"]:
        assert (zeros == 2 ** (entry["bits"] - 1)).all()
    return (codes - zeros[:, each]) * tensors["scales"].double().T[:, each]


def compressed_weight(tensors, entry):
    assert tensors["weight_shape"].tolist() == list(SHAPE)
    half = 2 ** (entry["num_bits"] - 1)  # stored values are signed ones plus half of their range
    values = rows_of(tensors["weight_packed"], entry["num_bits"], SHAPE[1]) - half
    size = SHAPE[1] if entry["strategy"] == "channel" else entry["group_size"]
    each = torch.arange(SHAPE[1]) // size
    zeros = torch.zeros(tensors["weight_scale"].shape).double()
    assert ("weight_zero_point" in tensors) != entry["symmetric"]
    if not entry["symmetric"]:
        zeros = rows_of(tensors["weight_zero_point"].T, entry["num_bits"], SHAPE[0]).T - half
    return (values - zeros[:, each]) * tensors["weight_scale"].double()[:, each]


def mlx_entry(config, name):
    assert config["quantization"] == config["quantization_config"]
    return config["quantization"][name] or None


def gptq_entry(config, name):
    """GPTQModel looks for the first rule that matches; what begins with a minus is left out."""
    config = config["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"
    for rule, entry in config["dynamic"].items():
        if re.match(rule[2:], name):
            return {**config, **entry} if rule.startswith("+:") else None
    return config


def compressed_entry(config, name):
    config = config["quantization_config"]
    found = [group for group in config["config_groups"].values() if name in group["targets"]]
    assert len(found) + (name in config["ignore"]) == 1
    return found[0]["weights"] if found else None


READERS = {
    "mlx": (mlx_entry, mlx_weight),
    "gptq": (gptq_entry, gptq_weight),
    "compressed-tensors": (compressed_entry, compressed_weight),
}
has = pytest.mark.parametrize("to", DIALECTS)


def test_every_dialect_has_a_reader_here():
    assert READERS.keys() == DIALECTS.keys()


@has
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_what_is_stored_is_the_weight(to, scheme, dtype):
    dialect, name = DIALECTS[to], "model.layers.0.mlp.up_proj"
    if why := dialect.why_not(scheme, *SHAPE):
        assert len(why) > 10
        return
    entry_of, weight_of = READERS[to]
    linear, codes, zeros = stored_linear(scheme)
    stored = dict(dialect.tensors(name, linear, dtype))
    assert all(tensor.is_contiguous() for tensor in stored.values())
    entry = entry_of(dialect.config({}, {name: scheme}, "lm_head"), name)
    tensors = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items()}
    group = torch.arange(SHAPE[1]) // scheme.group_size
    in_file = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    scales = linear.scales.to(in_file).double()
    expected = (codes - zeros[:, group]) * scales[:, group]
    # Only MLX rounds once more: its product of scale and zero.
    unit = torch.finfo(in_file).eps / 2 if to == "mlx" else 0.0
    error = (weight_of(tensors, entry) - expected).abs()
    assert (error <= unit * (scales * zeros)[:, group] + 1e-12).all()


@has
@pytest.mark.parametrize("scheme", NOWHERE, ids=lambda scheme: scheme.label)
def test_what_no_other_format_has_is_refused(to, scheme):
    assert DIALECTS[to].why_not(scheme, *SHAPE)


@pytest.mark.parametrize(
    ("to", "widths"),
    [("mlx", {2, 3, 4, 5, 6, 8}), ("gptq", {2, 3, 4, 8}), ("compressed-tensors", {*WIDTHS})],
)
def test_the_widths_are_the_formats(to, widths):
    found = {bits for bits in WIDTHS if not DIALECTS[to].why_not(QuantScheme(bits, 32), *SHAPE)}
    assert found == widths


def test_gptq_packs_whole_words_only():
    assert DIALECTS["gptq"].why_not(QuantScheme(4, 48), 48, 96)
    assert DIALECTS["gptq"].why_not(QuantScheme(4, 16), 64, 80)


@has
def test_the_config_names_every_linear_by_the_engines_own_rules(to):
    widths = {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 16, "gate_proj": 8, "up_proj": 8}
    schemes = {
        f"model.layers.{i}.self_attn.{role}": QuantScheme(3 if (i, role) == (1, "q_proj") else bits)
        for i in (0, 1, 11)
        for role, bits in widths.items()
    }
    config = DIALECTS[to].config({}, schemes, "lm_head")
    for name, scheme in schemes.items():
        entry = READERS[to][0](config, name)
        if scheme.is_float:
            assert entry is None
        else:
            assert entry.get("bits", entry.get("num_bits")) == scheme.bits
            assert entry["group_size"] == 64


def test_gptq_has_the_rules_of_fused_matrices_that_vllm_asks_for():
    schemes = {
        f"model.layers.{i}.{role}": QuantScheme(8 if i else 4)
        for i in (0, 1, 2)
        for role in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    config = DIALECTS["gptq"].config({}, schemes, "lm_head")
    assert config["quantization_config"]["bits"] == 8
    for fused in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        assert gptq_entry(config, f"model.layers.0.{fused}")["bits"] == 4
        assert gptq_entry(config, f"model.layers.1.{fused}")["bits"] == 8


def test_vllm_users_are_told_which_fused_layers_differ():
    names = [f"model.layers.0.self_attn.{role}_proj" for role in "qkv"]
    tied = {name: QuantScheme(4, symmetric=True) for name in names}
    notes = DIALECTS["compressed-tensors"].notes
    assert not list(notes(tied))
    (told,) = notes({**tied, names[1]: QuantScheme(5, symmetric=True)})
    assert names[1] in told and "tie_fused" in told
    (told,) = notes(dict.fromkeys(names, QuantScheme(4)))
    assert "symmetric" in told
