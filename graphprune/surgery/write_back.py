"""From the edited graph back to the user's own module.

In this order: weights by name and the attributes of torch's own layers; integers that hold an old size (`attributes`); modules that take
another's place (`substitutes`); a module that runs its own piece of the
edited graph (`fallback`). Each step is decided by running the module against the edited graph, layer by layer: the first layer that
computes something else names the module to look at. Where nothing helps, the
result is the edited graph itself.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphprune.program import Node, Program
from graphprune.surgery.attributes import Choice, Sizes, ancestors, known, layer_edits, scope_of
from graphprune.surgery.configs import edits_of_config
from graphprune.surgery.cut import Cut
from graphprune.surgery.edits import Edit, Workspace, apply_edits, set_tensors
from graphprune.surgery.fallback import FREEDOMS, GIVING_UP, EditedGraph, edited_graph, edited_submodule, rebound, recaptured
from graphprune.surgery.substitutes import Absent, substitute_for
from graphprune.surgery.torch_graph import sliced_weights
from graphprune.verify.module import Failure, Reference, evaluating

log = logging.getLogger("graphprune")

MAX_RUNS = 150  # forward runs of the search
MAX_SECONDS = 15.0  # of processor time
MAX_WAIT = 40.0  # by the clock

Replaced = list[tuple[str, nn.Module]]  # path and former module


@dataclass(frozen=True)
class WriteBack:
    """The pruned network as a module, and how it came about."""

    module: nn.Module
    how: str  # "module" | "graph"
    notes: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()  # attributes that were changed
    substitutes: Mapping[str, str] = field(default_factory=dict)  # path -> "table" | "graph" | "absent": what took a module's place


def write_back(program: Program, cut: Cut, pruned: Program, inplace: bool = False) -> WriteBack:
    """The user's module with the cut made in it, or the edited graph as a module where that cannot be done.

    Args:
        program: the captured network; its module is copied, sharing every tensor that is not cut.
        cut: what is removed.
        pruned: the edited program, `apply_cut(program, cut)`.
        inplace: make the changes in the user's module, all of them or none. (An edited graph is always a module of its own.)
    """
    original: nn.Module = program.source.module
    replacements = named_replacements(program, cut, pruned)
    if not cut.removed and not replacements:
        return WriteBack(original if inplace else copied(original, {}), "module")
    search = _Search(program, cut, pruned, replacements)
    result = search.result()
    if result.how == "graph":
        notes = (*result.notes, "the module given was left as it was") if inplace else result.notes
        return WriteBack(result.module, "graph", notes, (), {})
    filled = edits_of_config(original, result.module, result.edits)
    apply_edits(result.module, filled)
    result = replace(result, edits=(*result.edits, *filled))
    if inplace:
        _transplant(original, result, replacements)
        return WriteBack(original, "module", result.notes, result.edits, result.substitutes)
    return result


def named_replacements(program: Program, cut: Cut, pruned: Program) -> dict[str, torch.Tensor]:
    """Every name of a weight that is not the module's own any more -> its new tensor, names of tied weights included.

    It was cut, or changed before the cut: a prepared program holds other tensors than the module that it was captured from.
    """
    named = dict(_tensors(program.source.module))
    unread = None  # weights of removed branches are no part of the edited graph, but their modules may keep them
    by_id: dict[int, torch.Tensor] = {}
    for alias, name in (*((name, name) for name in program.weights), *program.aliases.items()):
        old, found = program.weights[name], pruned.weights.get(pruned.aliases.get(name, name))
        if found is None:
            unread = unread or sliced_weights(program, cut)
        new = unread[old] if found is None and unread else found.tensor if found else None
        if alias in named and new is not None and (new is not old.tensor or new.data_ptr() != named[alias].data_ptr()):
            by_id[id(named[alias])] = new
    return {name: by_id[id(tensor)] for name, tensor in named.items() if id(tensor) in by_id}


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers under every name that they have."""
    return itertools.chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))


def copied(module: nn.Module, replacements: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy with some weights replaced wherever they are referred to; all other tensors are shared."""
    memo: dict[int, Any] = {}
    for name, tensor in _tensors(module):
        memo[id(tensor)] = new = replacements.get(name, tensor)
        vars(new).update(vars(tensor))  # what users write on a parameter, as `_no_weight_decay`
    for part in module.modules():
        for held in vars(part).values():
            if isinstance(held, torch.Tensor):
                memo.setdefault(id(held), held)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # torch about its own specs in an edited graph
        return copy.deepcopy(module, memo)


class _Search:
    """Edits a copy until it computes what the edited graph computes, within a bounded number of runs."""

    def __init__(self, program: Program, cut: Cut, pruned: Program, replacements: Mapping[str, torch.Tensor]) -> None:
        self.program, self.cut, self.pruned = program, cut, pruned
        self.replacements = replacements
        self.notes: list[str] = []
        self.substitutes: dict[str, str] = {}
        self.kernel_edits: list[Edit] = []
        self.results: dict[str, Any] = {}  # what the modules asked for last returned
        self.templates: dict[tuple, Program] = {}
        self.runs, self.started, self.deadline = 0, time.process_time(), time.monotonic() + MAX_WAIT

    def result(self) -> WriteBack:
        try:
            self.module = copied(self.program.source.module, self.replacements)
        except Exception as error:  # anything that a user's __deepcopy__ raises
            return self._graph(f"the module cannot be copied: {type(error).__name__}: {error}")
        keeps: dict[str, Mapping[int, np.ndarray]] = {value.name: axes for value, axes in self.cut.weights.items()}
        self.workspace = Workspace(self.module)
        self.layer_edits = list(layer_edits(self.module, self.pruned, keeps))
        for edit in self.layer_edits:
            self.workspace.set(edit.path, edit.attribute, edit.new)
        self.choices = list(Sizes(self.program, self.cut).choices(self.module))
        # modules whose own code meets the cut
        self.computing = {scope_of(node) for node in self.program.walk() if self.cut.touches(node)} - {""}
        for choice in self.choices:
            self._set(choice)
        self._table_substitutes()
        self._without_branches()
        if any(value.tensor is not None and value.tensor.is_meta for value in self.program.weights.values()):
            self.notes.append("not run against the edited graph: the weights are on the meta device")
            return WriteBack(self.module, "module", tuple(self.notes), self._edits(), dict(self.substitutes))
        try:
            self.reference = Reference(self.program, self.pruned)
        except Exception as error:
            return self._graph(f"the edited graph does not run on the example inputs: {type(error).__name__}: {error}")
        failure = self._run()
        while failure is not None:
            better = self._improved(failure)
            if better is failure:
                return self._graph(self._blame(failure))
            failure = better
        trouble = self.reference.training_failure(self.module)
        if trouble:
            return self._graph(trouble)
        trouble = self.reference.decoding_failure(self.module)
        if trouble and "absent" in self.substitutes.values():
            trouble = self._renumbered(trouble)
        if trouble:
            self.notes.append(f"{trouble}; generate() needs use_cache=False")
            self._switch_cache_off()
        return WriteBack(self.module, "module", tuple(self.notes), self._edits(), dict(self.substitutes))

    def _edits(self) -> tuple[Edit, ...]:
        graphs = [path for path, kind in self.substitutes.items() if kind == "graph"]
        layers = [e for e in self.layer_edits if not self._absent(e.path)]
        chosen = [c.edit for c in self.choices if c.edit.new != c.edit.old]
        return tuple(e for e in (*layers, *chosen, *self.kernel_edits) if e.path not in graphs)

    def _set(self, choice: Choice) -> None:
        if not isinstance(self.workspace.module(choice.path), EditedGraph):
            edit = choice.edit
            self.workspace.set(edit.path, edit.attribute, edit.new)

    def _run(self) -> Failure | None:
        self.runs += 1
        return self.reference.failure(self.module)

    @property
    def _exhausted(self) -> bool:
        return self.runs >= MAX_RUNS or time.process_time() - self.started > MAX_SECONDS or time.monotonic() > self.deadline

    def _table_substitutes(self) -> None:
        weights = {name.rpartition(".")[0] for name in self.replacements}
        for path, module in list(self.module.named_modules()):
            if path in weights and (new := substitute_for(module)) is not None:
                self.workspace.replace(path, new)
                self.substitutes[path] = "table"
                self.notes.append(f"{path}: {type(module).__name__} gave way to a substitute with the same parameters")

    def _without_branches(self) -> None:
        """The modules of a removed residual branch give way to zeros; what else the branch consists of then runs on zeros."""
        below: dict[str, set[Node]] = {}
        finals = set(self.program.outputs)
        for node in self.program.nodes:
            for path in ancestors(scope_of(node)):
                below.setdefault(path, set()).add(node)
        for branch in self.cut.bypassed.values():
            region = set(branch.region)
            for node in self.program.nodes[::-1]:  # what only the branch reads (masks, rotary tables) belongs to it
                uses = [user for value in node.outputs for user in value.uses]
                if uses and region.issuperset(uses) and not finals.intersection(node.outputs):
                    region.add(node)
            inside = {path for path, nodes in below.items() if path and nodes <= region}
            outermost = [path for path in inside if not any(outer in inside for outer in ancestors(path.rpartition(".")[0]))]
            calls = self._recorded(self.program.source.module, outermost)
            for path in outermost:
                args, output = calls[path], self.results[path]
                leaves, spec = pytree.tree_flatten(output)
                first = next((tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor)), None)
                if first is None:
                    continue
                values = (v for node in branch.region[::-1] if node in below[path] for v in node.outputs)
                shape = next((self.cut.shape(v) for v in values if v.shape == first), first)
                self.workspace.replace(path, Absent(pytree.tree_leaves(args), leaves, spec, shape))
                self.substitutes[path] = "absent"
            self.notes.append(f"{', '.join(sorted(outermost)) or branch.join.name}: removed")
        self.choices = [c for c in self.choices if not self._absent(c.path)]

    def _renumbered(self, trouble: str) -> str:
        """A cache counts tokens in its first layer: where that one's attention is gone, the layers that are left are counted anew."""
        numbered = [(p, m.layer_idx) for p, m in self.module.named_modules() if isinstance(getattr(m, "layer_idx", None), int)]
        keys = [name for name in self.pruned.weights if re.search(r"\bk_|\bkey|qkv|c_attn|query_key", name)]
        left = sorted({index for p, index in numbered if any(name.startswith(f"{p}.") for name in keys)})
        for path, index in numbered:
            if index in left:
                self.workspace.set(path, "layer_idx", left.index(index))
        if self.reference.decoding_failure(self.module):
            for path, index in numbered:
                self.workspace.set(path, "layer_idx", index)
            return trouble
        self.kernel_edits += [Edit(p, "layer_idx", i, left.index(i)) for p, i in numbered if i in left and i != left.index(i)]
        return ""

    def _absent(self, path: str) -> bool:
        return any(self.substitutes.get(outer) == "absent" for outer in ancestors(path))

    # ---- one step

    def _improved(self, failure: Failure) -> Failure | None:
        """The failure after the best single change, which comes later in the graph; the same failure if nothing helps."""
        suspects = [s for s in failure.suspects if s in self.workspace._modules]
        if "strides" in failure.reason:
            for path in suspects[:2]:
                found = self._kernel_step(path, failure)
                if found is not failure:
                    return found
        for path in suspects:
            if isinstance(self.workspace.module(path), EditedGraph):
                continue
            found = self._attribute_step(path, failure)
            if found is not failure:
                return found
        for path in suspects:
            if path in self.computing and known(self.workspace.module(path)) is None:
                found = self._graph_step(path, failure)
                if found is not failure:
                    return found
        return failure

    def _attribute_step(self, path: str, failure: Failure) -> Failure | None:
        choices = [c for c in self.choices if c.path == path]
        singles: list[tuple[tuple[Choice, int], ...]] = [((c, i),) for c in choices for i in range(len(c.options)) if i != c.taken]
        pairs = [a + b for a, b in itertools.combinations(singles, 2) if a[0][0] is not b[0][0]]
        changed = [(c, 1 - c.kept if c.kept < 2 else 0) for c in choices if c.taken == c.kept]
        jointly = [tuple(changed), *(tuple(x for x in changed if x is not left) for left in changed)] if len(changed) > 2 else []
        more = [*pairs[:20], *jointly[:10]] if path in self.computing else []
        for changes in (*singles, *more):
            if self._exhausted:
                break
            before = [(c, c.taken) for c, _ in changes]
            for choice, option in changes:
                choice.taken = option
                self._set(choice)
            after = self._run()
            if after is None or after.position > failure.position:
                return self._like_siblings(changes, after)
            for choice, taken in before:
                choice.taken = taken
                self._set(choice)
        return failure

    def _like_siblings(self, changes: tuple[tuple[Choice, int], ...], after: Failure | None) -> Failure | None:
        """The same decision in all layers of this class, kept if that is no step back."""
        labels = {c.sibling: c.options[i][1] for c, i in changes}
        others = [(c, c.taken) for c in self.choices if c.sibling in labels and not any(c is d for d, _ in changes)]
        for choice, _ in others:
            choice.take(labels[choice.sibling])
            self._set(choice)
        if after is None or not any(c.taken != taken for c, taken in others):
            return after
        together = self._run()
        if together is None or together.position >= after.position:
            return together
        for choice, taken in others:
            choice.taken = taken
            self._set(choice)
        return after

    def _kernel_step(self, path: str, failure: Failure) -> Failure | None:
        """Experts of transformers run in plain Python where a grouped kernel refuses their new width (its rows must be multiples of
        16 bytes).
        """
        old = getattr(getattr(self.workspace.module(path), "config", None), "_experts_implementation", "eager")
        if old == "eager" or path not in self.computing:
            return failure
        name = type(self.workspace.module(path)).__qualname__
        alike = self._of_class(name)
        for p in alike:
            self.workspace.set(p, "config._experts_implementation", "eager")
        after = self._run()
        if after is None or after.position > failure.position:
            self.kernel_edits += [Edit(p, "config._experts_implementation", old, "eager") for p in alike]
            self.notes.append(f"{name} runs its experts one by one: {failure.reason}")
            return after
        for p in alike:
            self.workspace.set(p, "config._experts_implementation", old)
        return failure

    def _graph_step(self, path: str, failure: Failure) -> Failure | None:
        """The module, and all of its class that meet the cut, run their piece of the edited graph.

        If that is not enough, once more with the sizes of the modules around them as they were: a table that those compute (ALiBi slopes)
        is then cut where it is used.
        """
        around = [c for c in self.choices if c.taken != c.kept and (not c.path or path.startswith(c.path + "."))]
        for outer, freedom in itertools.product((False, True) if around else (False,), FREEDOMS):
            if self._exhausted:
                break
            before = [(c, c.taken) for c in around]
            if outer:
                for choice in around:
                    choice.taken = choice.kept
                    self._set(choice)
            done = self._graphs([path], freedom)
            after = self._run() if done else failure
            if done and (after is None or after.position > failure.position):
                return self._graphs_of_siblings(path, freedom, done, after, failure.reason)
            self._undo(done)
            for choice, taken in before:
                choice.taken = taken
                self._set(choice)
        return failure

    def _graphs_of_siblings(self, path: str, freedom: str, done: Replaced, after: Failure | None, reason: str) -> Failure | None:
        """The same for all modules of this class, kept if that is no step back."""
        name = type(done[0][1]).__qualname__
        siblings = [p for p in self._of_class(name) if not _nested(p, path)]
        first = self.workspace.module(path)
        more = self._graphs(siblings, freedom, first.selected) if after is not None and isinstance(first, EditedGraph) else []
        if more:
            together = self._run()
            if together is None or (after is not None and together.position >= after.position):
                done, after = done + more, together
            else:
                self._undo(more)
        for p, shell in done:
            self.substitutes[p] = "graph"
            name = type(shell).__name__
            self.notes.append(f"{p}: the code of {name} cannot express the cut ({reason}), so it runs its edited graph, for {freedom}")
        return after

    def _of_class(self, name: str) -> list[str]:
        return [p for p, m in self.module.named_modules() if type(m).__qualname__ == name and p in self.computing]

    def _undo(self, done: Replaced) -> None:
        for p, shell in done:
            self.workspace.replace(p, shell)

    def _graphs(self, paths: list[str], freedom: str, selected: Mapping[int, Sequence[int]] | None = None) -> Replaced:
        """Replaces modules by their edited graphs; the path and the former module of each that was."""
        original = self.program.source.module
        calls, arriving = self._recorded(original, paths), self._recorded(self.module, paths)
        modules = dict(original.named_modules())
        done: Replaced = []
        for p in paths:
            shell = self.workspace.module(p)
            if p not in calls or isinstance(shell, EditedGraph):
                continue
            flat = pytree.tree_leaves(arriving[p]) if p in arriving else None
            try:
                new = edited_submodule(self._captured(modules[p], calls[p], freedom), p, flat, shell, self.program, self.cut, selected)
            except GIVING_UP as error:
                log.debug("%s has no graph of its own for %s: %s", p, freedom, error)
                continue
            done.append((p, shell))
            self.workspace.replace(p, new)
        return done

    def _captured(self, module: nn.Module, call: tuple[tuple, dict[str, Any]], freedom: str) -> Program:
        """A sub-module captured by itself; of several that look alike only the first one is, which is a guess that the next run
        confirms.
        """
        shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else str(x) for x in pytree.tree_leaves(call)]
        counters = ("idx", "id", "index")
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, list, tuple)) and not k.endswith(counters)}
        key = (type(module), freedom, str(shapes), str([(name, tuple(t.shape)) for name, t in _tensors(module)]), str(plain))
        if key in self.templates:
            template = self.templates[key]
            if template.source.module is not module:
                return rebound(template, module)
        self.templates[key] = recaptured(module, *call, freedom)
        return self.templates[key]

    def _recorded(self, module: nn.Module, paths: list[str]) -> dict[str, tuple[tuple, dict[str, Any]]]:
        """Arguments of the first call of some modules, as far as the network runs; their results are kept in `results`."""
        found: dict[str, tuple[tuple, dict[str, Any]]] = {}
        modules = dict(module.named_modules())

        def listen(path: str) -> Any:
            def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                if path not in found:
                    found[path] = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, (args, kwargs))

            return hook

        def keep(path: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                self.results.setdefault(path, output)

            return hook

        self.results.clear()
        handles = [modules[p].register_forward_pre_hook(listen(p), with_kwargs=True) for p in paths if p in modules]
        handles += [modules[p].register_forward_hook(keep(p)) for p in paths if p in modules]
        try:
            with torch.no_grad(), evaluating(module):
                module(*self.program.source.args, **self.program.source.kwargs)
        except Exception as error:  # a network that is not finished
            log.debug("recorded calls up to %s", error)
        finally:
            for handle in handles:
                handle.remove()
        return found

    # ---- giving up

    def _blame(self, failure: Failure) -> str:
        """Which attributes were tried in vain."""
        suspects = [s for s in failure.suspects if s in self.workspace._modules]
        tried = [f"{c.path}.{c.attribute}" for c in self.choices if c.path in suspects[:3] and c.path]
        named = [f"{s} ({type(self.workspace.module(s)).__name__})" for s in suspects if s and known(self.workspace.module(s)) is None]
        at = next(iter(named), type(self.module).__name__)
        attributes = f"tried {', '.join(tried[:4])}" if tried else "no attribute of it holds the size"
        return f"write-back was defeated at {at}: {failure.reason}; {attributes}"

    def _graph(self, why: str) -> WriteBack:
        shell = getattr(self, "module", None)
        if shell is None or self.substitutes:
            shell = copied(self.program.source.module, self.replacements)
        _drop(shell, {value.name for branch in self.cut.bypassed.values() for value in branch.weights})
        module, shapes = edited_graph(shell, self.program, self.cut, self.pruned, self.deadline)
        return WriteBack(module, "graph", (why, f"the result is the edited graph, for {shapes}"))

    def _switch_cache_off(self) -> None:
        for holder in (getattr(self.module, "config", None), getattr(self.module, "generation_config", None)):
            if holder is not None and hasattr(holder, "use_cache"):
                holder.use_cache = False


def _drop(module: nn.Module, names: set[str]) -> None:
    """Weights that nothing reads any more."""
    for path, part in module.named_modules():
        for held in (part._parameters, part._buffers):
            for name in [n for n in held if (f"{path}.{n}" if path else n) in names]:
                del held[name]


def _nested(path: str, other: str) -> bool:
    return path == other or path.startswith(other + ".") or other.startswith(path + ".")


def _transplant(original: nn.Module, result: WriteBack, replacements: Mapping[str, torch.Tensor]) -> None:
    """The changes of a verified copy, in the user's module; if one cannot be made, none is."""
    before = [(m, dict(m.__dict__), {k: dict(m.__dict__[k]) for k in ("_modules", "_parameters", "_buffers")}) for m in original.modules()]
    new = dict(result.module.named_modules(remove_duplicate=False))
    try:
        set_tensors(original, replacements)
        apply_edits(original, result.edits)
        workspace = Workspace(original)
        for path, kind in result.substitutes.items():
            if kind == "absent":
                workspace.replace(path, new[path])
            elif kind == "graph":
                shell = workspace.module(path)
                took = new[path]
                took._modules, took._parameters = shell._modules, shell._parameters
                workspace.replace(path, took)
            else:
                made = substitute_for(workspace.module(path))
                assert made is not None
                workspace.replace(path, made)
    except BaseException:
        for m, attributes, registries in before:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for name, entries in registries.items():
                m.__dict__[name].clear()
                m.__dict__[name].update(entries)
        raise
