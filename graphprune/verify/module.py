"""Is a module the network that an edited graph computes? And if not: from which node on, and which modules are to blame.

The edited graph is right by construction. The module is run on two example inputs and, where the network treats the rows of a batch
alone, on both as one batch; its layers' outputs are compared on the way, so
that the first wrong one is known. Training mode and, for decoders, cached decoding are run too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphprune.execute.interpreter import run
from graphprune.execute.likeness import distance, random_inputs
from graphprune.program import Node, Program

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative to the largest entry
DOUBTFUL = 1e-2  # an error below this is looked at again in float64
DOUBLE_LIMIT = 50_000_000  # parameters

Heard = dict[str, list[list[torch.Tensor]]]  # module path -> per call, the tensors that it returned


@dataclass(frozen=True)
class Failure:
    """What went wrong first."""

    reason: str
    position: int  # nodes of the graph up to here are computed right; the number of nodes if the outputs differ on other inputs only
    suspects: tuple[str, ...] = ()  # paths of modules, the likeliest first


class Reference:
    """What the edited graph computes, to compare modules with.

    Args:
        program: the program before the cut; its module tells which properties the network has at all.
        pruned: the edited program.
    """

    def __init__(self, program: Program, pruned: Program) -> None:
        self.program, self.pruned = program, pruned
        source = program.source
        _, self.spec = pytree.tree_flatten((source.args, dict(source.kwargs)))
        like = program.example_inputs
        other = [x.to(old.dtype) if isinstance(x, torch.Tensor) else x for x, old in zip(random_inputs(program, 7), like)]
        self.inputs = [list(like), other]
        self.dtype = next((v.dtype for v in program.weights.values() if v.is_weight), torch.float32)
        self.expected = [run(pruned, flat) for flat in self.inputs]
        self.tolerance = TOLERANCE.get(self.dtype, 1e-4)  # type: ignore[arg-type]
        self._batched: bool | None = None

    # ---- outputs

    def call(self, module: nn.Module, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs of the module, in evaluation mode, as the graph lists them."""
        args, kwargs = pytree.tree_unflatten(list(flat), self.spec)
        with torch.no_grad(), evaluating(module):
            return [t for t in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(t, torch.Tensor)]

    def failure(self, module: nn.Module) -> Failure | None:
        """None if the module computes what the edited graph computes, else what went wrong first."""
        with self._listening(module) as heard:
            try:
                error = distance(self.call(module, self.inputs[0]), _tensors(self.expected[0]))
            except Exception as exception:  # whatever a module with a wrong size raises
                return self._located(module, heard, f"{type(exception).__name__}: {_line(exception)}", exception)
        if not error <= self.tolerance and not self._agrees_in_double(module, error):
            return self._located(module, heard, f"outputs differ by {error:.1e} of the largest")
        for name, check in (("on other values", self._second), ("on a larger batch", self._larger_batch)):
            try:
                error = check(module)
            except Exception as exception:
                return Failure(f"{name}: {type(exception).__name__}: {_line(exception)}", len(self.pruned.nodes))
            if not error <= max(self.tolerance, DOUBTFUL if self.dtype is torch.float32 and self._loose else 0):
                return Failure(f"{name} outputs differ by {error:.1e} of the largest", len(self.pruned.nodes))
        return None

    _loose = False  # set where float32 proved too coarse and float64 agreed

    def _agrees_in_double(self, module: nn.Module, error: float) -> bool:
        """The same comparison in float64, for networks that amplify rounding."""
        import copy

        if self.dtype is not torch.float32 or not error < DOUBTFUL or sum(p.numel() for p in module.parameters()) > DOUBLE_LIMIT:
            return False
        flat = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in self.inputs[0]]
        try:
            self._loose = distance(self.call(copy.deepcopy(module).double(), flat), run(self.pruned, flat, dtype=torch.float64)) <= 1e-6
        except Exception:  # modules that write float32 by name
            return False
        return self._loose

    def _second(self, module: nn.Module) -> float:
        return distance(self.call(module, self.inputs[1]), _tensors(self.expected[1]))

    def _larger_batch(self, module: nn.Module) -> float:
        """Both inputs as one batch, where the original network treats rows alone."""
        doubled = [self._joined(a, b) for a, b in zip(*self.inputs)]
        if self._batched is None:
            original = self.program.source.module
            try:
                whole = self.call(original, doubled)
                rows = [self._joined(a, b) for a, b in zip(self.call(original, self.inputs[0]), self.call(original, self.inputs[1]))]
                self._batched = distance(whole, rows) <= self.tolerance
            except Exception:
                self._batched = False
        if not self._batched:
            return 0.0
        rows = [self._joined(a, b) for a, b in zip(_tensors(self.expected[0]), _tensors(self.expected[1]))]
        return distance(self.call(module, doubled), rows)

    def _joined(self, a: Any, b: Any) -> Any:
        batch = next((x.shape[0] for x in self.inputs[0] if isinstance(x, torch.Tensor) and x.dim()), 0)
        return torch.cat([a, b]) if isinstance(a, torch.Tensor) and a.dim() and a.shape[0] == batch else a

    # ---- where it went wrong

    @contextlib.contextmanager
    def _listening(self, module: nn.Module) -> Iterator[Heard]:
        """The tensors that every module returns, call by call."""
        heard: Heard = {}
        handles = []

        def listen(path: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                heard.setdefault(path, []).append([t.detach().clone() for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)])

            return hook

        for path, layer in module.named_modules():
            if path and path in self._outlets:
                handles.append(layer.register_forward_hook(listen(path)))
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()

    @cached_property
    def _outlets(self) -> dict[str, list[int]]:
        """Path of a module -> positions of the nodes below it whose values are read outside of it."""
        found: dict[str, list[int]] = {}
        finals = set(self.pruned.outputs)
        for i, node in enumerate(self.pruned.nodes):
            readers = {plain(user.scope) for value in node.outputs for user in value.uses}
            path = plain(node.scope)
            while path:
                if finals & set(node.outputs) or any(not f"{reader}.".startswith(f"{path}.") for reader in readers):
                    found.setdefault(path, []).append(i)
                path = path.rpartition(".")[0]
        return found

    @cached_property
    def _expected_layers(self) -> tuple[dict[str, list[tuple[int, torch.Tensor]]], dict[int, torch.Tensor]]:
        """Path -> (position of the node, value) of every call of a module that runs nodes of its own; position -> value of outlets."""
        found: dict[str, list[tuple[int, torch.Tensor]]] = {}
        values: dict[int, torch.Tensor] = {}
        at = {node: i for i, node in enumerate(self.pruned.nodes)}
        outlets = {i for positions in self._outlets.values() for i in positions}
        open_call: dict[str, str] = {}

        def record(node: Node, args: Any, compute: Any) -> Any:
            results = compute(args)
            if node in at and results and isinstance(results[0], torch.Tensor):
                path, position = plain(node.scope), at[node]
                entry = (position, results[0].detach().clone())
                calls = found.setdefault(path, [])
                if calls and open_call.get(path) == node.scope and calls[-1][0] == position - 1:
                    calls[-1] = entry
                else:
                    calls.append(entry)
                open_call[path] = node.scope
                if position in outlets:
                    values[position] = entry[1]
            return results

        run(self.pruned, self.inputs[0], intercept=record)
        return found, values

    def _located(self, module: nn.Module, heard: Heard, reason: str, exception: BaseException | None = None) -> Failure:
        """Layers with weights are compared call by call, modules that run a graph by what leaves them, in the order of the graph."""
        parts = dict(module.named_modules())
        layers, values = self._expected_layers
        calls: list[tuple[int, bool, list[torch.Tensor], list[torch.Tensor]]] = []
        for path, part in parts.items():
            returned = heard.get(path, [])
            if hasattr(part, "edited_graph"):
                outlets = [i for i in self._outlets.get(path, ()) if i in values]
                if returned and outlets:
                    calls.append((outlets[-1], True, [values[i] for i in outlets], returned[-1]))
            elif not part._modules and (part._parameters or part._buffers):
                calls += [(at, len(got) == 1, [value], got) for (at, value), got in zip(layers.get(path, ()), returned)]
        good, bad = -1, len(self.pruned.nodes)
        for position, decisive, expected, got in sorted(calls, key=lambda call: call[0]):
            if any(self._close(t, value) for t in got for value in expected):
                good = position
            elif decisive:
                bad = position
                break
        suspects: list[str] = []
        if exception is not None and bad == len(self.pruned.nodes):
            names = {id(part): path for path, part in parts.items()}
            frame = exception.__traceback__
            while frame is not None:
                owner = id(frame.tb_frame.f_locals.get("self"))
                if owner in names:
                    suspects.insert(0, names[owner])
                frame = frame.tb_next
            inner = f"{suspects[0]}." if suspects else ""
            start = next((i for i, node in enumerate(self.pruned.nodes) if f"{plain(node.scope)}.".startswith(inner)), 0)
            good = max(good, start - 1)  # what runs before the module that fails did not fail
        else:
            suspects += [plain(node.scope) for node in self.pruned.nodes[good + 1 : bad + 1][::-1]]
        around = [path.rpartition(".")[0] for path in suspects]
        return Failure(reason, good + 1, tuple(dict.fromkeys([*suspects, *around, ""])))

    def _close(self, got: torch.Tensor, value: torch.Tensor) -> bool:
        if got.shape != value.shape or not value.is_floating_point() or not value.numel():
            return got.shape == value.shape
        return bool((got - value).abs_().max() <= max(10 * self.tolerance, 1e-3) * value.abs().max())

    # ---- training and decoding

    def training_failure(self, module: nn.Module) -> str:
        """Why the module does not run in training mode although the original does; empty if it does."""
        return self._trains(module) and ("" if self._trains(self.program.source.module) else self._trains(module))

    def _trains(self, module: nn.Module) -> str:
        modes = [(m, m.training) for m in module.modules()]
        held = [(b, b.detach().clone()) for b in module.buffers()]
        devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
        try:
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                module.train()
                args, kwargs = pytree.tree_unflatten(list(self.inputs[0]), self.spec)
                module(*args, **kwargs)
            return ""
        except Exception as exception:
            return f"in training mode: {type(exception).__name__}: {_line(exception)}"
        finally:
            with torch.no_grad():
                for buffer, before in held:
                    buffer.copy_(before)
            for m, mode in modes:
                m.training = mode

    def decoding_failure(self, module: nn.Module) -> str:
        """Why decoding with a cache differs from one pass although it does not in the original; empty if it does not, or there is no
        cache.
        """
        error = cached_decoding_error(module, self._tokens())
        if error == "" or error is None:
            return ""
        original = cached_decoding_error(self.program.source.module, self._tokens())
        return error if original == "" else ""

    def _tokens(self) -> torch.Tensor | None:
        return next((x for x in self.inputs[0] if isinstance(x, torch.Tensor) and x.dim() == 2 and x.dtype == torch.int64), None)


def cached_decoding_error(module: Any, ids: torch.Tensor | None) -> str | None:
    """Logits of one pass over the tokens against those of a prefill and single steps with a cache: None if there is none, "" if they
    agree.
    """
    can = getattr(module, "can_generate", None)
    config = getattr(module, "config", None)
    if ids is None or can is None or not can() or getattr(config, "is_encoder_decoder", False) or ids.shape[1] < 4:
        return None
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    try:
        with torch.no_grad(), evaluating(module):
            whole = module(input_ids=ids, use_cache=False).logits
            split = ids.shape[1] - 2
            step = module(input_ids=ids[:, :split], use_cache=True)
            cache = getattr(step, "past_key_values", None)
            if cache is None:
                return None
            pieces = [step.logits[:, -1:]]
            for i in (split, split + 1):
                step = module(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                pieces.append(step.logits)
            error = distance([torch.cat(pieces, 1)], [whole[:, split - 1 :]])
    except Exception as exception:
        return f"decoding with a cache: {type(exception).__name__}: {_line(exception)}"
    if error <= 30 * TOLERANCE.get(dtype, 1e-4):
        return ""
    return f"decoding with a cache differs from one pass by {error:.1e} of the largest logit"


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration; each sub-module's own mode comes back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def plain(scope: str) -> str:
    """A module path without the marks that an export puts on repeated calls."""
    return re.sub(r"@\d+", "", scope)


def _tensors(outputs: Sequence[Any]) -> list[torch.Tensor]:
    return [o for o in outputs if isinstance(o, torch.Tensor)]


def _line(exception: BaseException) -> str:
    lines = str(exception).strip().splitlines()
    return lines[0][:200] if lines else ""
