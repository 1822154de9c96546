"""Values that no input decides: while a model is traced, Python may ask for them.

`torch.export` traces with tensors that have no values, so a model that reads a number out of a tensor stops it: paddings computed from
integer buffers, image sizes from a mask of ones, "does any token attend globally?" of a mask that the model itself made. None of these
depends on an input or on a floating-point weight. `KnownValues` computes them once more with real numbers beside the trace, and answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

_READS = frozenset(("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__format__"))
_SHAPE_ONLY = frozenset(("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full"))  # of any operand
_UNKNOWN = ("rand", "empty", "new_empty", "bernoulli", "multinomial", "normal", "poisson", "uniform", "exponential", "dropout")
_SIZES = ("size", "output_size", "pad", "view", "reshape", "expand", "zeros", "ones", "full")  # what is given sizes
_COUNTED = ("nonzero", "argwhere", "where", "unique", "masked_select", "bincount", "repeat_interleave")  # shapes depend on values
_COUNTS = ("arange", "multinomial")  # functions whose own arguments are numbers
_INDEXING = ("__getitem__", "__setitem__")
_MONOTONE = ("permute", "transpose", "sum", "greater", "gt", "__gt__", "any", "view", "reshape", "flatten", "squeeze", "unsqueeze")
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_LARGEST = 1 << 20  # elements: masks and tables, not activations


class KnownValues(TorchFunctionMode):
    """Inside, `item`, `tolist` and conversions to Python numbers answer for tensors that depend on constants and integer buffers only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary()  # traced tensor -> its value
        self.places = WeakIdKeyDictionary()  # result of nonzero -> all positions that it may hold
        self.bounds = WeakIdKeyDictionary()  # indices -> the size of the axis that they index
        self.support = WeakIdKeyDictionary()  # what is made of one-hot indices -> where it can be more than zero
        self.assumed = False  # that a loop over all positions does the same as one over those that are not zero
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.buffers = {
            name: buffer.detach().clone()
            for name, buffer in module.named_buffers()
            if not buffer.is_floating_point() and not buffer.is_complex() and not buffer.is_meta and buffer.numel() <= _LARGEST
        }
        self.hook = module.register_forward_pre_hook(self._meet_buffers)

    def _meet_buffers(self, module: nn.Module, args: Any) -> None:
        """Inside the trace, buffers are other tensors."""
        traced = dict(module.named_buffers())
        for name, value in self.buffers.items():
            if name in traced:
                self.known[traced[name]] = value

    def __exit__(self, *why: Any) -> None:
        super().__exit__(*why)
        self.hook.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _READS and isinstance(args[0], Tensor) and args[0] in self.known:
            with _untraced():
                return getattr(self.known[args[0]], name)(*args[1:])
        args = tuple(self._sizes(name, [x])[0] if name in _COUNTS else self._sizes(name, x) for x in args)
        kwargs = {key: self._sizes(name if name in _INDEXING else key, x) for key, x in kwargs.items()}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in ("unbind", "tolist") and isinstance(args[0], Tensor) and args[0] in self.places:
            self.assumed = True
            rows = self.places[args[0]]
            with _untraced():
                rows = rows.tolist() if name == "tolist" else func(rows, *args[1:], **kwargs)
            return pytree.tree_map_only(Tensor, self._as_constant, rows)
        counted = name.startswith(_COUNTED) or (name == "__getitem__" and any(tensor.dtype == torch.bool for tensor in given[1:]))
        if counted and given and all(tensor in self.known for tensor in given):
            return self._constant(func, args, kwargs)
        out = func(*args, **kwargs)
        self._note_places(func, given, out, args, kwargs)
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        computable = all(tensor in self.known for tensor in given[name in _SHAPE_ONLY :])
        computable = computable and not any(isinstance(leaf, _SYMBOLIC) for leaf in pytree.tree_leaves((args, kwargs)))
        if made and computable and not name.startswith(_UNKNOWN) and all(map(_small, made)):
            self._compute(func, args, kwargs, out)
        elif given and (name == "__setitem__" or "out" in kwargs or (name.endswith("_") and not name.endswith("__"))):
            if name == "__setitem__" and computable:
                self._compute(func, args, kwargs, out)
            else:
                self._forget(kwargs.get("out", args[0] if args else None))
        return out

    def _compute(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        """The same call on the values."""

        try:
            result = self._result(func, args, kwargs)
        except Exception:  # a device or a layout that only the trace has: then the value stays unknown
            return
        for traced, real in zip(pytree.tree_leaves(out), pytree.tree_leaves(result)):
            if isinstance(traced, Tensor) and isinstance(real, Tensor):
                self.known[traced] = real

    def _constant(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of a call whose shape depends on values, as constants of the trace."""
        return pytree.tree_map(self._as_constant, self._result(func, args, kwargs))

    def _as_constant(self, value: Tensor) -> Tensor:
        with _untraced():
            rows = value.tolist()
        traced = torch.tensor(rows, dtype=value.dtype, device=self.device).reshape(value.shape)
        self.known[traced] = value
        return traced

    def _note_places(self, func: Callable[..., Any], given: Sequence[Tensor], out: Any, args: Any, kwargs: Any) -> None:
        """Positions where something unknown is not zero: who loops over them may as well loop over all positions.

        That is how mixtures visit the experts that were hit; an expert that was not has no tokens, and adds nothing. The capture compares.
        """
        name = func.__name__
        if name == "topk" and _small(given[0]):
            self.bounds[out[1]] = given[0].shape[kwargs.get("dim", args[2] if len(args) > 2 else -1)]
        if len(given) != 1 or not isinstance(out, Tensor):
            return
        if name == "nonzero" and _small(given[0]) and not kwargs.get("as_tuple") and len(args) == 1:
            with _untraced():
                self.places[out] = self.support.get(given[0], torch.ones(given[0].shape)).nonzero()
        elif name in ("argmax", "argmin", "argsort") and _small(given[0]):
            self.bounds[out] = given[0].shape[kwargs.get("dim", args[1] if len(args) > 1 else -1) or -1]
        elif name == "one_hot" and given[0] in self.bounds:
            with _untraced():
                self.support[out] = (torch.arange(out.shape[-1]) < self.bounds[given[0]]).float().expand(out.shape)
        elif name in _MONOTONE and given[0] in self.support:
            with _untraced():
                self.support[out] = func(self.support[given[0]], *args[1:], **kwargs)

    def _result(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        def value(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return self.known[leaf] if leaf in self.known else torch.empty(leaf.shape, dtype=leaf.dtype)

        with _untraced():
            return func(*pytree.tree_map(value, args), **pytree.tree_map(value, _on_cpu(kwargs)))

    def _sizes(self, name: str, given: Any) -> Any:
        """Known tensors inside a list of numbers are numbers: `interpolate(x, size=(height, width))`, `x[row, column]`."""
        if not isinstance(given, (list, tuple)) or (name in _INDEXING and not all(map(self._is_number, given))):
            return given
        inner = [self._sizes("", item) for item in given]
        if name in (*_SIZES, *_COUNTS, *_INDEXING) or any(isinstance(item, int) for item in inner):
            with _untraced():
                inner = [self.known[x].item() if self._is_number(x) else x for x in inner]
        return type(given)(inner) if type(given) in (list, tuple) else given

    def _is_number(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim == 0 and x.dtype != torch.bool and x in self.known

    def _forget(self, written: Any) -> None:
        """Something unknown was written into a tensor: its views are unknown too."""
        if isinstance(written, Tensor) and written in self.known:
            memory = self.known[written].untyped_storage()._cdata
            for traced in [t for t, value in self.known.items() if value.untyped_storage()._cdata == memory]:
                del self.known[traced]


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Inside, ops run for real."""
    with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing(), _disable_current_modes():
        yield


def _small(tensor: Tensor) -> bool:
    return all(isinstance(n, int) for n in tensor.shape) and tensor.numel() <= _LARGEST


def _on_cpu(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()}
