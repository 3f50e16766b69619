"""Which norms, linears and attention heads touch the residual stream, found by running blocks.

A rotation of the stream is exact where everything that reads the stream is a linear behind an
RMSNorm and everything that writes it is a linear added to it as it is. That is a matter of the
architecture, so it is looked for with random activations and linears: trained ones may be zero, or
too small to be told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lwquant.errors import TransformError
from lwquant.model.decoder import Decoder
from lwquant.model.residual import residual_writers
from lwquant.model.structure import block_linears, features_of, set_weight
from lwquant.transforms.hadamard import Rotation, random_rotation

PROBE_TOKENS = 16
TOLERANCE = 1e-5  # relative, in the Frobenius norm; a wrong guess is off by about one
LARGE = 100.0  # root mean square of what norms are tried on: their epsilon is nothing beside it


@dataclass(frozen=True)
class StreamNorm:
    """An RMSNorm of the stream: y = gain · x / rms(x)."""

    name: str  # of the module
    readers: tuple[str, ...]  # the linears that read its output
    offset: float | None  # gain = offset + weight; None where it has no weight


@dataclass(frozen=True)
class Heads:
    """Attention heads whose values reach `output` head by head, mixed only over tokens."""

    value: str  # the linear that makes the values
    first_row: int  # of the values among its outputs; they are its last ones
    output: str  # the linear that reads them
    size: int  # of one head


@dataclass(frozen=True)
class BlockWiring:
    """How one block is connected to the stream; names are those inside the block."""

    norms: tuple[StreamNorm, ...]
    writers: tuple[str, ...]
    heads: Heads | None


def block_wirings(decoder: Decoder) -> list[BlockWiring]:
    """The wiring of every block. Blocks of equal structure are run once.

    Raises TransformError naming what reads or writes the stream in another way.
    """
    width = decoder.embed(torch.zeros(1, 1, dtype=torch.long, device=decoder.device)).shape[-1]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, PROBE_TOKENS, width, generator=generator).to(decoder.device)
    known: dict[tuple[object, ...], BlockWiring] = {}
    wirings = []
    for index, block in enumerate(decoder.blocks):
        shapes = ((name, tuple(p.shape)) for name, p in block.named_parameters())
        signature = (type(block), *shapes)
        if signature not in known:
            with decoder.loaded(index) as real, torch.no_grad():
                for module in block_linears(real).values():
                    outputs, inputs = features_of(module)
                    weight = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
                    set_weight(module, weight.to(decoder.device))
                run = partial(decoder.run, index, real, hidden)
                known[signature] = _wiring(decoder, index, real, hidden, run)
        wirings.append(known[signature])
    return wirings


def _wiring(
    decoder: Decoder, index: int, block: nn.Module, hidden: Tensor, run: Callable[[], Tensor]
) -> BlockWiring:
    where = f"block {index}"
    linears = block_linears(block)
    writers = tuple(residual_writers(block, hidden, run))
    norms = [
        norm
        for norm in stream_norms(block, linears, hidden.shape, run, where)
        if not set(norm.readers) <= set(writers)  # it is the writer's own, off the stream
    ]
    if not norms:
        raise TransformError(f"{where}: no linear reads the residual stream through a norm")
    if any(isinstance(module, Conv1D) for module in linears.values()):
        raise TransformError(f"{where}: Conv1D linears are not supported by transforms")
    readers = {name for norm in norms for name in norm.readers}
    for name, module in linears.items():
        ends_in_stream = features_of(module)[0] == hidden.shape[-1] and name not in readers
        if ends_in_stream and name not in writers:
            raise TransformError(
                f"{where}: the output of {name!r} is not added to the residual stream as it is: "
                "a norm or a factor lies between"
            )
    return BlockWiring(tuple(norms), writers, _heads(decoder, block, writers, run))


def final_norm(decoder: Decoder, head: str) -> StreamNorm:
    """The RMSNorm between the last block and the linear named `head`, or TransformError."""
    size = features_of(decoder.model.get_submodule(head))[1]
    hidden = _noise(1, 2, size).to(decoder.device)
    with torch.no_grad():
        run = partial(decoder.head, hidden)
        linears = {head: decoder.model.get_submodule(head)}
        norms = stream_norms(decoder.model, linears, hidden.shape, run, "the end of the model")
    if len(norms) != 1:
        raise TransformError(f"{head!r} reads {len(norms)} norms, one is needed")
    return norms[0]


def stream_norms(
    root: nn.Module,
    linears: Mapping[str, nn.Module],
    shape: torch.Size,
    run: Callable[[], Any],
    where: str,
) -> list[StreamNorm]:
    """The norms inside `root` of tensors of this shape that linears read, in order of use.

    Raises TransformError for one that is no RMSNorm.
    """
    outputs: dict[int, str] = {}  # address -> norm; kept alive below, so that none is used again
    alive: list[Tensor] = []
    readers: dict[str, list[str]] = {}

    def note_output(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor) and output.shape == shape:
                alive.append(output)
                outputs[output.data_ptr()] = name

        return hook

    def note_input(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[object, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].data_ptr() in outputs:
                readers.setdefault(outputs[args[0].data_ptr()], []).append(name)

        return hook

    candidates = {n: m for n, m in root.named_modules() if _looks_like_norm(m, shape[-1])}
    handles = [m.register_forward_hook(note_output(n)) for n, m in candidates.items()]
    handles += [m.register_forward_pre_hook(note_input(n)) for n, m in linears.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [
        StreamNorm(name, tuple(names), _offset(candidates[name], shape[-1], f"{where}: {name!r}"))
        for name, names in readers.items()
    ]


def _looks_like_norm(module: nn.Module, size: int) -> bool:
    if isinstance(module, nn.Linear | nn.Embedding | Conv1D) or any(module.children()):
        return False
    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
    return (size,) in shapes or (not shapes and "norm" in type(module).__name__.lower())


def _offset(norm: nn.Module, size: int, where: str) -> float | None:
    """What the norm adds to its weight for its gain; TransformError where it is no RMSNorm."""
    parameters = dict(norm.named_parameters())
    weight = parameters.pop("weight", None)
    if parameters:
        raise TransformError(f"{where} has {', '.join(parameters)} beside its weight: no RMSNorm")
    device = weight.device if weight is not None else torch.device("cpu")
    gain = norm(torch.full((1, size), LARGE, device=device))[0]
    noise = _noise(4, size).to(device)
    wanted = gain * noise / noise.square().mean(-1, keepdim=True).sqrt()
    if not _close(norm(LARGE * noise), wanted) or not gain.any():
        raise TransformError(f"{where} is no RMSNorm (it may subtract the mean)")
    if weight is None:
        if not _close(gain, torch.ones_like(gain)):
            raise TransformError(f"{where} has a gain that is not its weight")
        return None
    for offset in (0.0, 1.0):
        if _close(gain, offset + weight):
            return offset
    raise TransformError(f"{where} has a gain that is neither its weight nor 1 + its weight")


def _heads(
    decoder: Decoder, block: nn.Module, writers: tuple[str, ...], run: Callable[[], Any]
) -> Heads | None:
    """The heads of the block's attention, None where they are not wired as such.

    Tried out: when the values of every head are rotated, so must be what `output` reads.
    """
    config: Any = decoder.model.config
    n_heads = getattr(config, "num_attention_heads", 0)
    if not n_heads:
        return None
    n_values = getattr(config, "num_key_value_heads", None) or n_heads
    linears = block_linears(block)
    for output in writers:
        width = features_of(linears[output])[1]
        size = getattr(config, "head_dim", None) or width // n_heads
        if size * n_heads != width:
            continue
        rows = size * n_values
        for value, module in linears.items():
            out_features = features_of(module)[0]
            fused = out_features == width + 2 * rows
            if value == output or not (out_features == rows or fused):
                continue
            heads = Heads(value, out_features - rows, output, size)
            if _rotates_through(block, heads, run):
                return heads
    return None


def _rotates_through(block: nn.Module, heads: Heads, run: Callable[[], Any]) -> bool:
    rotation = random_rotation(heads.size, 0)
    turn, turn_values = per_head(rotation), per_head(rotation, heads.first_row)
    value, output = block.get_submodule(heads.value), block.get_submodule(heads.output)
    seen: list[Tensor] = []
    catch = output.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        run()
        change = value.register_forward_hook(lambda _, args, out: turn_values(out.cpu()).to(out))
        try:
            run()
        finally:
            change.remove()
    finally:
        catch.remove()
    before, after = seen
    return bool(before.any()) and _close(after.cpu().double(), turn(before.cpu()))


def per_head(rotation: Rotation, start: int = 0) -> Callable[[Tensor], Tensor]:
    """The rotation of every head of the last dimension, from `start` on; float64."""

    def apply(values: Tensor) -> Tensor:
        kept, heads = values.double().split([start, values.shape[-1] - start], dim=-1)
        turned = rotation.apply(heads.unflatten(-1, (-1, rotation.size)))
        return torch.cat([kept, turned.flatten(-2)], dim=-1)

    return apply


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _close(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).norm() <= TOLERANCE * wanted.norm())
