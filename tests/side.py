"""Devices beside the CPU, for tests on machines that have none: side:0, side:1, ...

Numbers lie in memory and are computed there, but as on real devices no op takes tensors of two of
them, but for a copy and for a CPU tensor without dims. What a walk does on several devices can so
be run, and held against one on the CPU, to the bit.
"""

from __future__ import annotations

import functools
from collections import Counter

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
COUNT = 4
ran = Counter[tuple[str, str]]()
"""How often each op ran on each device."""


class Side(torch.Tensor):
    """A tensor on one of the devices: `inner` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, device):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        held = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Side)]
        place = _place(func, args, kwargs, held)
        if kwargs.get("device") is not None:
            place, kwargs["device"] = torch.device(kwargs["device"]), torch.device("cpu")
        ran[str(func), str(place)] += 1
        wrapped = {id(leaf.inner): leaf for leaf in held}
        found = func(*pytree.tree_map(_inner, args), **pytree.tree_map(_inner, kwargs))
        if not isinstance(found, torch.Tensor) and not isinstance(found, (list, tuple)):
            return found

        def wrap(value):
            if not isinstance(value, torch.Tensor) or place.type == "cpu":
                return value
            return wrapped.get(id(value)) if id(value) in wrapped else Side(value, place)

        return pytree.tree_map(wrap, found)

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self, *, tensor_contents=None):
        return f"Side({self.inner!r}, {self.device})"


def _inner(value):
    return value.inner if isinstance(value, Side) else value


def _place(func, args, kwargs, held):
    """Where the op runs; RuntimeError where its tensors are on several devices."""
    tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    if func in COPIES:
        return args[0].device
    places = {t.device for t in tensors if t.dim() or t.device.type != "cpu"}
    if len(places) > 1:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {places}")
    return held[0].device


@functools.cache
def devices():
    """Make the devices known to torch; their number."""

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self):
            return torch._C._autograd.DeviceType.PrivateUse1

    class Hooks(torch._C._acc.PrivateUse1Hooks):
        def is_available(self):
            return True

        def has_primary_context(self, index):
            return True

        def is_built(self):
            return True

    class Module:
        is_available = is_initialized = staticmethod(lambda: True)
        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: COUNT)
        _is_in_bad_fork = staticmethod(lambda: False)
        manual_seed_all = staticmethod(lambda seed: None)

    torch.utils.rename_privateuse1_backend("side")
    backend_registration.generate_methods_for_privateuse1_backend()
    torch._register_device_module("side", Module)
    kept = (Guard(), Hooks())
    torch._C._acc.register_python_privateuseone_device_guard(kept[0])
    torch._C._acc.register_python_privateuseone_hook(kept[1])
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    return (*kept, library)


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    inner = torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)
    return Side(inner, device)


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Side(torch.empty_strided(size, stride, dtype=dtype), device)


def _copy_from(source, target, non_blocking=False):
    target.inner.copy_(_inner(source))
    return target
