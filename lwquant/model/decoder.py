"""A causal LM of transformers, found by structure and run one block at a time.

Only the embeddings, the final norm and the head stay in memory. A block's weights are read from the
checkpoint when the block is entered and dropped when it is left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lwquant.errors import CheckpointError, LwquantError, UnsupportedModelError
from lwquant.model.checkpoint import WeightSource
from lwquant.model.names import parameter_names
from lwquant.model.structure import block_linears, features_of, find_blocks, trace_input_groups
from lwquant.progress import Progress, silent
from lwquant.types import LinearSpec


@dataclass(frozen=True)
class Call:
    """What a block is called with besides the hidden states: masks, positions, rotary tables."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


class _Stop(Exception):
    """Leaves the model's forward once the first block's input is known."""


class Decoder:
    """Blocks, linears and the parts around them of one checkpoint, in float32."""

    def __init__(self, source: WeightSource, model: PreTrainedModel, device: torch.device) -> None:
        self.source = source
        self.device = device
        self.model = model
        self.packed: dict[str, nn.Module] = {}  # embedding and head rounded, by module path
        self.blocks_path, self.blocks = find_blocks(model)
        self._calls: dict[tuple[object, ...], list[Call]] = {}
        self._returns_tuple: bool | None = None
        self._load_outer_parameters()
        try:
            self.linears = self._list_linears()
        except LwquantError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be run block by block: {error}"
            ) from error

    @classmethod
    def open(cls, source: WeightSource, device: str | torch.device = "cpu") -> Decoder:
        """Build the architecture without its blocks' weights.

        Raises UnsupportedModelError for anything but a decoder-only causal LM with one list of
        blocks, CheckpointError where a tensor is missing.
        """
        config = causal_config(source.config)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.eval().requires_grad_(False)
        return cls(source, model, torch.device(device))

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def vocab_size(self) -> int:
        embedding: Any = self.model.get_input_embeddings()
        return int(embedding.weight.shape[0])

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def key_of(self, parameter: str) -> str | None:
        """The checkpoint's name of a model parameter, None where it has none."""
        return self._keys.get(parameter)

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights, float32 on the device, until the context is left."""
        block = self.blocks[index]
        prefix = f"{self.blocks_path}.{index}."
        empty = {name: parameter.data for name, parameter in block.named_parameters()}
        try:
            for name, parameter in block.named_parameters():
                _set_parameter(block, name, self._read(prefix + name, parameter.shape))
            block.to(self.device)  # buffers
            yield block
        finally:
            for name, data in empty.items():
                _set_parameter(block, name, data)

    def block_linears(self, index: int) -> tuple[LinearSpec, ...]:
        return tuple(spec for spec in self.linears if spec.block == index)

    def local_name(self, spec: LinearSpec) -> str:
        """The linear's name inside its block."""
        return spec.name.removeprefix(f"{self.blocks_path}.{spec.block}.")

    @torch.no_grad()
    def embed(self, tokens: Tensor, *, packed: bool = False) -> Tensor:
        """Input of the first block, (n_samples, seq_len, hidden), for tokens (n_samples, seq).

        With `packed`, by the rounded embedding if there is one.
        """
        with self._embeddings_replaced(packed):
            return self._first_call(tokens)[0]

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Output of a loaded block, as its weights are now, for (n_samples, seq_len, hidden)."""
        call = self._calls_for(hidden.shape[0], hidden.shape[1])[index]
        output = block(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def head(self, hidden: Tensor, *, packed: bool = False) -> Tensor:
        """Logits (n_samples, seq_len, vocab) of the last block's output: final norm, head, caps.

        With `packed`, by the rounded head if there is one.
        """
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        with (
            self._embeddings_replaced(packed),
            self._blocks_replaced(lambda index: lambda *args, **kwargs: self._wrap(hidden)),
        ):
            return self.model(input_ids=tokens, use_cache=False).logits

    @contextmanager
    def eager_attention(self) -> Iterator[None]:
        """Inside, attention is computed step by step, and its modules return the probabilities."""
        usual = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(usual)

    @torch.no_grad()
    def last_hidden(
        self, tokens: Tensor, progress: Progress = silent, *, packed: bool = False
    ) -> Tensor:
        """Output of the last block, (n_samples, seq_len, hidden), reading each block once.

        `packed` as for embed(): only the embedding is another then.
        """
        hidden = torch.cat([self.embed(row[None], packed=packed) for row in tokens])
        for index in range(self.n_blocks):
            progress("reference", f"block {index}", index, self.n_blocks)
            with self.loaded(index) as block:
                for row in range(hidden.shape[0]):
                    hidden[row : row + 1] = self.run(index, block, hidden[row : row + 1])
        progress("reference", "done", self.n_blocks, self.n_blocks)
        return hidden

    def _list_linears(self) -> tuple[LinearSpec, ...]:
        """Every projection of every block, with who shares whose input.

        Blocks of equal structure are traced once; tracing runs the block on a few tokens.
        """
        groups: dict[tuple[object, ...], dict[str, int]] = {}
        specs = []
        probe = self.embed(torch.zeros(1, 8, dtype=torch.long, device=self.device))
        self._calls_for(1, 8)  # runs block 0 itself, so it must come before the tracing hooks
        for index, block in enumerate(self.blocks):
            linears = block_linears(block)
            signature = (type(block), *((n, features_of(m)) for n, m in linears.items()))
            if signature not in groups:
                with self.loaded(index) as real, torch.no_grad():
                    run = partial(self.run, index, real, probe)
                    groups[signature] = trace_input_groups(real, run)
            for name, module in linears.items():
                out_features, in_features = features_of(module)
                full = f"{self.blocks_path}.{index}.{name}"
                specs.append(
                    LinearSpec(full, index, out_features, in_features, groups[signature][name])
                )
        return tuple(specs)

    def _load_outer_parameters(self) -> None:
        inside = f"{self.blocks_path}."
        names = parameter_names(self.model, self.source.names())
        self._keys = {name: key for key, name in names.items()}
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(inside) and self.key_of(name) is not None:
                _set_parameter(self.model, name, self._read(name, parameter.shape))
        self.model.tie_weights()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.is_meta and not name.startswith(inside):
                raise CheckpointError(f"{self.source.path}: tensor {name!r} is missing")
        for name, _ in self.model.named_parameters():
            if name.startswith(inside) and self.key_of(name) is None:
                raise CheckpointError(f"{self.source.path}: tensor {name!r} is missing")
        for name, buffer in list(self.model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            if self.key_of(name) is not None:  # a factor per layer, for instance
                buffer = self._read(name, buffer.shape).to(buffer.dtype)
            self.model.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)

    def _read(self, parameter: str, shape: torch.Size) -> Tensor:
        key = self.key_of(parameter)
        if key is None:
            raise CheckpointError(f"{self.source.path}: tensor {parameter!r} is missing")
        tensor = self.source.read(key)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self.source.path}: tensor {key!r} has shape {tuple(tensor.shape)}, "
                f"the config asks for {tuple(shape)}"
            )
        return tensor.to(self.device, torch.float32)

    def _first_call(self, tokens: Tensor) -> tuple[Tensor, Call]:
        caught: list[tuple[Tensor, Call]] = []

        def catch(*args: Any, **kwargs: Any) -> None:
            caught.append(_split_call(args, kwargs))
            raise _Stop

        with self._blocks_replaced(lambda index: catch):
            try:
                self.model(input_ids=tokens.to(self.device), use_cache=False)
            except _Stop:
                pass
        if not caught:
            raise UnsupportedModelError("the model's forward never called its first block")
        return caught[0]

    @torch.no_grad()
    def _calls_for(self, n_samples: int, seq_len: int) -> list[Call]:
        """Arguments of every block for this shape; they depend on positions, not on content."""
        shape = (n_samples, seq_len)
        key = (self.model.config._attn_implementation, *shape)  # masks differ between kernels
        if key not in self._calls:
            tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
            if self._returns_tuple is None:
                hidden, call = self._first_call(tokens[:1, :2])
                with self.loaded(0) as block:
                    output = block(hidden, *call.args, **call.kwargs)
                self._returns_tuple = isinstance(output, tuple)
            calls = self._recorded_calls(tokens)
            if not self._calls:  # what depends on the tokens does so in every shape
                others = self._recorded_calls(tokens + self.vocab_size // 2)
                self._refuse_calls_by_content(calls, others)
            self._calls[key] = calls
        return self._calls[key]

    def _recorded_calls(self, tokens: Tensor) -> list[Call]:
        """What each block is called with for these tokens, without running any."""
        calls: dict[int, Call] = {}

        def record(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, calls[index] = _split_call(args, kwargs)
                return self._wrap(hidden)

            return forward

        with self._blocks_replaced(record):
            self.model(input_ids=tokens, use_cache=False)
        if sorted(calls) != list(range(self.n_blocks)):
            raise UnsupportedModelError(
                f"the forward called blocks {sorted(calls)} of {self.n_blocks} in the list"
            )
        return [calls[index] for index in range(self.n_blocks)]

    def _refuse_calls_by_content(self, calls: list[Call], others: list[Call]) -> None:
        """A block must be a function of its hidden states: calls are recorded once per shape."""
        for index, (call, other) in enumerate(zip(calls, others, strict=True)):
            if not _same(call.args, other.args) or not _same(call.kwargs, other.kwargs):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} hands block {index} tensors that depend on the "
                    "tokens themselves (embeddings per layer); only hidden states may"
                )

    def _wrap(self, hidden: Tensor) -> Any:
        return (hidden,) if self._returns_tuple else hidden

    @contextmanager
    def _embeddings_replaced(self, packed: bool) -> Iterator[None]:
        """Inside, the rounded embedding and head are in place of the model's own."""
        new = self.packed if packed else {}
        old = {name: self.model.get_submodule(name) for name in new}
        try:
            for name, module in new.items():
                self.model.set_submodule(name, module)
            yield
        finally:
            for name, module in old.items():
                self.model.set_submodule(name, module)

    @contextmanager
    def _blocks_replaced(self, forward_of: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Shadow each block's forward; the block itself and its attributes stay in place."""
        try:
            for index, block in enumerate(self.blocks):
                block.forward = forward_of(index)  # type: ignore[method-assign]
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)


def causal_config(config: dict[str, Any]) -> Any:
    """The transformers config of a decoder-only causal LM, or UnsupportedModelError."""
    architectures = config.get("architectures") or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if len(architectures) != 1 or architectures[0] not in known:
        raise UnsupportedModelError(
            f"architectures={architectures} is not a decoder-only causal LM of transformers"
        )
    try:
        fields = json.loads(json.dumps(config), object_hook=_special_float)
        fields.pop("model_type", None)
        parsed = AutoConfig.for_model(config.get("model_type", ""), **fields)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UnsupportedModelError(f"config.json of {architectures[0]}: {error}") from error
    if parsed.is_encoder_decoder:
        raise UnsupportedModelError(f"{architectures[0]} is an encoder-decoder")
    if "BertLMHeadModel" in architectures[0] or not architectures[0].endswith(
        ("ForCausalLM", "LMHeadModel")
    ):
        raise UnsupportedModelError(f"{architectures[0]} is not a decoder-only causal LM")
    return parsed


def _special_float(value: dict[str, Any]) -> Any:
    """transformers writes infinities as {"__float__": "Infinity"}; other objects stay."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Call((), rest)


def _same(first: Any, second: Any) -> bool:
    """Whether two calls hand over equal tensors, in tuples and dicts too; other things pass."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return all(_same(value, second.get(key)) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    return True


def _set_parameter(module: nn.Module, name: str, data: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = nn.Parameter(data, requires_grad=False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside hold meta parameters but real buffers (rotary tables need values)."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
