"""What scores are computed from: weights, activations, gradients and randomness of one program, each worked out once and when asked for."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from graphprune.calibration.accumulators import Gradients
from graphprune.calibration.batches import Batch, batches, reread, samples
from graphprune.calibration.taps import Store, all_shards, tapped, timed, working_dtype
from graphprune.errors import InvalidInput
from graphprune.execute.interpreter import run
from graphprune.linear_maps import LinearMap, linear_maps
from graphprune.program import Kind, Program, Reader, Value

Entry = Callable[[Tensor], Tensor]

RUNNING = ("running_mean", "running_var", "input_mean", "input_var")  # arguments that take no gradient: statistics of batch norms


class Statistics:
    """Weights, activations and gradients of a program.

    Args:
        data: calibration data, see `graphprune.calibration.batches`; the example inputs when absent.
        loss: `loss(output)` or `loss(output, batch)` -> scalar; see `default_loss` for what is used when absent.
        seed: of everything random. The global random state is never touched.
        needs: names of `graphprune.calibration.taps.TAPS` that will be asked for: one pass over the data then collects them all.
    """

    def __init__(
        self, program: Program, data: Any = None, loss: Callable[..., Tensor] | None = None, seed: int = 0, needs: Iterable[str] = ()
    ) -> None:
        self.program, self.loss, self.seed, self.needs = program, loss, seed, set(needs)
        self.data = reread(data)
        self._sums: dict[tuple[Any, Value, int], Tensor] = {}
        self._said: set[str] = set()
        self._found: dict[Any, Any] = {}
        self._stores: dict[str, Store] = {}

    def weight(self, value: Value) -> Tensor:
        """A weight to compute with: detached, float32 at least."""
        return weight_of(value, self.program.reader)

    def once(self, what: str) -> bool:
        """True the first time only: for warnings."""
        first = what not in self._said
        self._said.add(what)
        return first

    def remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make()` gives, worked out once for a key."""
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]

    def along(self, entry: Entry, value: Value, axis: int) -> Tensor:
        """(length of the axis,): `entry(weight)`, an elementwise map, summed over all other axes."""
        key = (entry, value, axis)
        if key not in self._sums:
            self._sums[key] = _over_others(entry(self.weight(value)), axis)
        return self._sums[key]

    def observed(self, need: str) -> Store:
        """A statistic of activations by what it is of: weights for "moments" and "gram", additions for "similarity"."""
        if need not in self._stores:
            wanted = ({need} | self.needs) - self._stores.keys()
            self._stores.update(tapped(self.program, self.data, sorted(wanted), working_dtype(self.program)))
        return self._stores[need]

    @cached_property
    def linear(self) -> dict[Value, LinearMap]:
        """How each weight multiplies its input; of a weight with several uses, the first."""
        found: dict[Value, LinearMap] = {}
        for linear in linear_maps(self.program).values():
            found.setdefault(linear.weight, linear)
        return found

    def columns(self, score: Callable[[Tensor, Any], Tensor], need: str, value: Value) -> Tensor | None:
        """(length of the input axis,): `score(matrix (groups, outputs, inputs), statistic) -> (groups, inputs)` of one weight, summed over
        groups and window; None where the weight is no linear map.
        """
        linear, found = self.linear.get(value), self.observed(need).get(value)
        if linear is None or found is None:
            return None
        key = (score, value, -1)
        if key not in self._sums:
            self._sums[key] = linear.along_input(score(linear.matrix(self.weight(value)), found))
        return self._sums[key]

    def gradients(self, value: Value) -> Gradients | None:
        """Mean gradient and mean squared gradient of a weight, one sample at a time; None where no gradient reaches it."""
        return self._gradients.get(value)

    def saliency(self, entry: Callable[[Tensor, Gradients], Tensor], value: Value, axis: int) -> Tensor:
        """(length of the axis,): `entry(weight, gradients)`, elementwise, summed over all other axes; zero where no gradient reaches."""
        key = (entry, value, axis)
        if key not in self._sums:
            found = self.gradients(value)
            weight = self.weight(value)
            self._sums[key] = _over_others(torch.zeros_like(weight) if found is None else entry(weight, found), axis)
        return self._sums[key]

    def first_order(self, value: Value, axis: int) -> Tensor:
        """(batches, length of the axis): weight times gradient of the loss, summed over all other axes; zero for running statistics."""
        found = self._first_order.get((value, axis))
        return torch.zeros(1, (value.shape or ())[axis]) if found is None else found

    def generator(self, name: str) -> torch.Generator:
        """A random generator of its own for every name."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))  # 32 bits are all it takes

    @cached_property
    def _first_order(self) -> Mapping[tuple[Value, int], Tensor]:
        found: dict[tuple[Value, int], list[Tensor]] = {}
        for gradients in self._backward(batches(self.program, self.data)):
            for value, (leaf, gradient) in gradients.items():
                product = torch.zeros_like(leaf) if gradient is None else leaf * gradient
                for axis in range(leaf.dim()):
                    found.setdefault((value, axis), []).append(_over_others(product, axis))
        return {key: torch.stack(rows) for key, rows in found.items()}

    @cached_property
    def _gradients(self) -> dict[Value, Gradients]:
        found: dict[Value, Gradients] = {}
        for gradients in self._backward(samples(self.program, self.data)):
            for value, (_, gradient) in gradients.items():
                if gradient is not None:
                    found.setdefault(value, Gradients()).update(gradient)
        all_shards(found)  # type: ignore[arg-type]
        return found

    def _backward(self, data: Iterable[Batch]) -> Iterator[dict[Value, tuple[Tensor, Tensor | None]]]:
        """Every weight with its gradient of the loss, batch by batch."""
        weights = [v for v in self.program.weights.values() if v.is_weight and v.kind is Kind.PARAMETER and v.uses and not _is_running(v)]
        wide = any(v.dtype in (torch.float16, torch.bfloat16) for v in weights)
        leaves = {v: weight_of(v).clone().requires_grad_() for v in weights}
        for inputs, item in timed(data, self.data, "gradients"):
            with torch.inference_mode(False), torch.enable_grad():
                loss = self._loss(run(self.program, inputs, tensors=leaves, dtype=torch.float32 if wide else None), inputs, item)
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            yield {value: (leaf.detach(), gradient) for (value, leaf), gradient in zip(leaves.items(), gradients)}

    def task_loss(self, output: Any, inputs: list[Any], item: Any) -> Any:
        """The user's loss, else the model's own or that of the next token; None where there is none of them."""
        if self.loss is None:
            return own_loss(output, inputs)
        return self.loss(output, item) if _takes_batch(self.loss) else self.loss(output)

    def _loss(self, outputs: list[Any], inputs: list[Any], item: Any) -> Tensor:
        output = structured(self.program, outputs)
        loss = self.task_loss(output, inputs, item)
        loss = default_loss(output, inputs) if loss is None else loss
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise InvalidInput(f"the loss must be a differentiable scalar tensor computed from the model's output, found {what}")
        if not torch.isfinite(loss):
            raise InvalidInput(f"the loss is {float(loss.detach())} on the calibration data; gradient scores need a finite loss")
        return loss.reshape(())


def _is_running(value: Value) -> bool:
    return any(node.args.get(name) is value for node in value.uses for name in RUNNING)


def weight_of(value: Value, reader: Reader | None = None) -> Tensor:
    """A weight to compute with: detached, float32 at least.

    Raises:
        InvalidInput: it has no data.
    """
    tensor = value.tensor
    if reader is not None and tensor is not None and tensor.device.type == "meta":
        tensor = reader(value)
    if tensor is None or tensor.device.type == "meta":
        raise InvalidInput(f"weight {value.name!r} has no data (meta device) to score; load the weights, or pass importance='random'")
    tensor = tensor.detach()
    return tensor.to(torch.float32) if tensor.dtype.itemsize < 4 else tensor


def _over_others(x: Tensor, axis: int) -> Tensor:
    others = [a for a in range(x.dim()) if a != axis]
    return x.sum(others) if others else x


def structured(program: Program, outputs: list[Any]) -> Any:
    """Flat outputs as the user's model returns them; an ONNX program returns one tensor or a tuple."""
    graph_module = getattr(program.source, "graph_module", None)
    info = getattr(graph_module.graph._codegen, "pytree_info", None) if graph_module is not None else None
    if info is not None and info.out_spec is not None and info.out_spec.num_leaves == len(outputs):
        return pytree.tree_unflatten(outputs, info.out_spec)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def own_loss(output: Any, inputs: list[Any]) -> Tensor | None:
    """The model's own `.loss`; next-token cross-entropy where `.logits` follow integer inputs; None elsewhere."""
    named = output if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else {}
    loss, logits = named.get("loss"), named.get("logits")
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    if isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[1] > 1:
        for ids in inputs:
            if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.shape != logits.shape[:2]:
                continue
            if 1 < int(ids.max()) < logits.shape[-1]:  # not a mask of zeros and ones
                return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().long())
    return None


def default_loss(output: Any, inputs: list[Any]) -> Tensor:
    """`own_loss`; else the mean square of all outputs."""
    loss = own_loss(output, inputs)
    if loss is not None:
        return loss
    floating = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad]
    if not floating:
        raise InvalidInput("no output of the model is a differentiable tensor; pass loss=callable, or a score without gradients")
    return torch.stack([t.float().square().mean() if t.dtype.itemsize < 4 else t.square().mean().float() for t in floating]).sum()


def _takes_batch(loss: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return len(required) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
