"""A second device that is none: its tensors live on the CPU, and mixing them with others fails.

What a GPU run would trip over first are tensors that are not where the others are. Inside
`EmulatedDevice()` tensors may be made on and moved to "cuda"; operators then refuse what CUDA
refuses: tensors of both devices in one call, a generator of the other one, numpy(), the address of
a tensor in a CPU kernel. Results are those of the same operators on the CPU. The bytes that are on
the device at one time are counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
ELSEWHERE = 2**60  # above every address of a process
aten = torch.ops.aten
# What CUDA takes from both devices: copies, and indices on the CPU.
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class DeviceMismatch(RuntimeError):
    """What CUDA says of tensors on two devices."""


class OnDevice(Tensor):
    """A tensor that says it is on the device. C++ takes it for one of the CPU without memory."""

    plain: Tensor

    @staticmethod
    def __new__(cls: type[OnDevice], plain: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            plain.shape,
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            device=CPU,
        )
        made.plain = plain
        return made

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and len(args) == 2 and isinstance(args[1], OnDevice):
            return args[0].to(args[1].device, args[1].dtype)  # C++ would leave it on the CPU
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on the emulated device, outside of EmulatedDevice()")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """C++ would find that it is on the CPU already, and that moving to the device is work."""
        other = next((each for each in args if isinstance(each, Tensor)), None)
        dtype = next((each for each in args if isinstance(each, torch.dtype)), kwargs.get("dtype"))
        device = next(
            (each for each in args if isinstance(each, str | torch.device)), kwargs.get("device")
        )
        if other is not None:
            dtype, device = other.dtype, other.device
        settings = {"dtype": dtype or self.dtype}
        if device is not None and torch.device(device).type != "cuda":
            settings["device"] = torch.device(device)
        elif settings["dtype"] == self.dtype and not kwargs.get("copy", False):
            return self
        return aten._to_copy.default(self, **settings)  # type: ignore[no-any-return]

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def data_ptr(self) -> int:
        """One for each memory, but none that a CPU could read."""
        return self.plain.data_ptr() + ELSEWHERE

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class EmulatedDevice(TorchDispatchMode):
    """Inside, "cuda" is such a device. `peak` and `now` are bytes on it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._seen: set[int] = set()
        self._before: list[tuple[bool, bool]] = []  # entered more than once where it calls itself

    def __enter__(self) -> EmulatedDevice:
        super().__enter__()
        future, lifts = torch.__future__, torch._C._only_lift_cpu_tensors()
        self._before.append((lifts, future.get_overwrite_module_params_on_conversion()))
        # torch.tensor() makes them on the CPU and moves them by an operator, which is seen here.
        torch._C._set_only_lift_cpu_tensors(True)
        # Module.to() makes parameters anew: one of the CPU cannot take the other's inside.
        future.set_overwrite_module_params_on_conversion(True)
        return self

    def __exit__(self, *error: Any) -> None:
        lifts, overwrites = self._before.pop()
        torch._C._set_only_lift_cpu_tensors(lifts)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "lwquant":
            return self._of_ours(func, args, kwargs)
        here, elsewhere = _split(tree_leaves((args, kwargs)))
        asked = kwargs.get("device")
        to_device = bool(here) if asked is None else torch.device(asked).type == "cuda"
        if asked is not None and to_device:
            kwargs["device"] = CPU
        self._check(func, args, kwargs, here, elsewhere, to_device)
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if func is aten.copy_.default:
            return args[0]
        if not to_device:
            return out
        written = {id(t.plain): t for t in here}

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            known = written.get(id(value))
            return self._counted(value) if known is None else known

        return tree_map(wrap, out)

    def _of_ours(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Looked into where it is plain torch on every device; its CPU kernel where it is not."""
        here, elsewhere = _split(tree_leaves((args, kwargs)))
        if not here:
            return func(*args, **kwargs)
        if func.has_kernel_for_dispatch_key(DispatchKey.CompositeExplicitAutograd):
            with self:
                return func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        self._check(func, args, kwargs, here, elsewhere, True)
        return self._counted(func(*tree_map(_plain, args), **tree_map(_plain, kwargs)))

    def _check(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        here: list[OnDevice],
        elsewhere: list[Tensor],
        to_device: bool,
    ) -> None:
        generator = kwargs.get("generator")
        if to_device and generator is not None and generator.device.type == "cpu":
            raise DeviceMismatch(f"{func}: expected a 'cuda' generator, found 'cpu'")
        if func in COPIES or not here:
            return
        if func in INDEXING and isinstance(args[0], OnDevice):
            values = args[2:3]
            elsewhere = [t for t in elsewhere if any(t is value for value in values)]
        if any(t.dim() > 0 for t in elsewhere):  # numbers in tensors may be anywhere
            raise DeviceMismatch(
                f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu"
            )

    def _counted(self, plain: Tensor) -> OnDevice:
        storage = plain.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size)
        return OnDevice(plain)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _split(leaves: Iterable[Any]) -> tuple[list[OnDevice], list[Tensor]]:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    here = [t for t in tensors if isinstance(t, OnDevice)]
    return here, [t for t in tensors if not isinstance(t, OnDevice) and not t.is_meta]


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, OnDevice) else value
