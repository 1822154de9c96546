"""Runs a network with zeros in its weights by sparse kernels, layer by layer where the gate says that they pay.

`sparse_module` copies the module (every tensor is shared with the original) and lets each product `x W^T` with a masked weight go through a
`Product`, which takes the path that was decided for the number of tokens at hand: dense, or a kernel with the weight stored compressed.
Products are found in three places: linear modules, which change their class and stay where they are, so the rest of the model
(`generate`, caches, hooks, names) does not notice; `aten.linear` nodes of graphs that stand in for a module; MatMul and Gemm nodes of a
network that came as ONNX. Anything else with zeros (convolutions, stacked experts) runs dense, and is listed as such.

Layers that read the same value (queries, keys and values; gate and up) become one product with their weights side by side, where that
was measured to be faster: one large product fills a GPU better than three small ones.

Weights keep their names and stay the parameters: while they are trained, a product is `x (W * mask)^T`, so zeros stay zeros; else it
reads the compressed copy, which follows the weights (after an optimizer step, `load_state_dict`, `.to`). A compiled module
looks for changes at `eval()` and `load_state_dict` only.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphprune.backends.gate import Decision, Gate
from graphprune.backends.kernels import KERNELS, block_sparse, library
from graphprune.backends.kernels.base import ACTIVATIONS, EXPAND, Kernel, Packed, check_weight
from graphprune.errors import InvalidInput
from graphprune.execute.module import ProgramModule
from graphprune.program import Node, Program, Value

FORMATS: Mapping[str, Kernel] = {**KERNELS, library.KERNEL.name: library.KERNEL}
TOKENS = (1, 16, 2048)  # where it is decided: one sequence and a batch that decode, and prefill
WASTE = 1.1  # blocks may store so many times the weights that are kept
EACH = "each"  # the path of weights side by side where one product each is faster
GAIN = 1.03  # what weights side by side must gain over one product each
FEWEST_ZEROS = 0.1  # of a weight without a plan, to count as masked


@dataclass(frozen=True)
class Layer:
    """One masked weight, or several side by side, and what was decided about it, by number of tokens."""

    name: str  # of several: joined by " + "
    shape: tuple[int, ...]
    density: float
    decisions: tuple[Decision, ...]


def sparse_module(
    result: Any, *, tokens: Sequence[int] = TOKENS, force: str | bool = False, gate: Gate | None = None, device: Any = None,
    keep_dense: bool = True,
) -> nn.Module:  # fmt: skip
    """A module that computes what `result.module` computes, sparse where that is faster; it shares its weights.

    Args:
        result: a result with a `module` and a `plan`, or a module; then weights with zeros count as masked.
        tokens: the numbers of tokens at which dense and sparse are compared. A call takes what was decided for the next larger one.
        force: for tests: the kernel of this name, or True for the first that takes a weight, without asking whether it is fast.
        gate: decides; by default one for the device of the weights.
        device: where the gate measures; by default where the weights are.
        keep_dense: whether weights that are also stored compressed stay on the device. False saves their memory: they move to the host's,
            cannot be trained, and a call with so many tokens that dense is faster expands the compressed ones first, every time.

    Raises:
        InvalidInput: `force` is no kernel, or `tokens` is empty.
    """
    if isinstance(force, str) and force not in FORMATS:
        raise InvalidInput(f"force names a kernel, one of {', '.join(FORMATS)}, found {force!r}")
    if not tokens or min(tokens) < 1:
        raise InvalidInput(f"tokens are the numbers of tokens to decide for, each at least 1, found {tokens!r}")
    source: nn.Module = result if isinstance(result, nn.Module) else result.module
    root = _copied(source)
    masks = _masks(root, None if isinstance(result, nn.Module) else result.plan.masks)
    factors: dict[tuple[int, bool], Factor] = {}
    for site in _sites(root):
        if id(site.held) in masks:
            name, mask = masks[id(site.held)]
            factor = factors.setdefault((id(site.held), site.transposed), Factor(name, mask.T if site.transposed else mask, []))
            factor.sites.append(site)

    def choose(side_by_side: Sequence[Factor]) -> Choice:
        where = device if device is not None else side_by_side[0].sites[0].held.device
        with torch.no_grad():
            weights = torch.cat([it.weight for it in side_by_side])
            masks = torch.cat([it.mask.to(weights.device) for it in side_by_side])
            return Choice.of(_full(weights, masks), tuple(sorted(tokens)), gate or Gate(where), force)

    layers: dict[str, list[Layer]] = {}
    for several in _side_by_side(getattr(result, "program", None), factors.values()):
        joint, single = _products(several, choose, tokens, bool(force))
        for index, factor in enumerate(several):
            runs = [*([joint] if joint else []), *([single[index]] if single else [])]
            for site in factor.sites:
                site.place(runs[0], index if joint else 0)
            layers[factor.name] = [_layer(several if it is joint else [factor], it.decisions) for it in runs]
            if not keep_dense and runs[0].formats:
                for it in runs:
                    it.expands = bool(it.formats)
                _to_host(factor)
        for it in (*([joint] if joint else []), *single):
            it.settle()
    _fuse(root)
    elsewhere = tuple(Decision("dense", n, "dense products only: what multiplies with it is no linear layer") for n in tokens)
    for name, mask in masks.values():
        layers.setdefault(name, [_layer([Factor(name, mask, [])], elsewhere)])
    root.__dict__["sparse_layers"] = tuple(dict.fromkeys(it for name, _ in masks.values() for it in layers[name]))
    return root


def _products(
    several: Sequence[Factor], choose: Callable[[Sequence[Factor]], Choice], tokens: Sequence[int], force: bool
) -> tuple[Product | None, list[Product]]:
    """One product for all weights, if it is faster for some numbers of tokens; and one for each weight, for the others."""
    alone, together, apart = [choose([it]) for it in several], None, set(tokens)
    if len(several) > 1:
        together = choose(several)
        gains = dict.fromkeys(tokens, float("inf")) if force else together.gains(alone)
        if max(gains.values()) > GAIN:
            apart = {count for count, gain in gains.items() if gain < 1.0}
    single = [Product([factor], it.only(apart)) for factor, it in zip(several, alone)] if apart else []
    if together is None or apart == set(tokens):
        return None, single
    joint = Product(several, together.only(set(tokens) - apart))
    joint.leave(single)
    return joint, single


def _to_host(factor: Factor) -> None:
    held = nn.Parameter(factor.sites[0].held.detach().cpu(), requires_grad=False)
    for site in factor.sites:
        setattr(site.owner, site.attribute, held)


def _layer(factors: Sequence[Factor], decisions: tuple[Decision, ...]) -> Layer:
    shape = sum(it.mask.shape[0] for it in factors), *factors[0].mask.shape[1:]
    kept = sum(int(it.mask.sum()) for it in factors) / max(1, prod(shape))
    return Layer(" + ".join(it.name for it in factors), shape, kept, decisions)


def _side_by_side(program: Program | None, factors: Iterable[Factor]) -> Iterator[tuple[Factor, ...]]:
    """Every factor once, those together that multiply the same value of the graph."""
    alone = {it.name: it for it in factors if len(it.sites) == 1}
    readers: dict[Value, list[Factor]] = {}
    uses: Counter[str] = Counter()
    for node in program.nodes if program is not None else ():
        if node.op_type in ("linear", "MatMul", "Gemm") and len(node.inputs) > 1 and (factor := alone.get(node.inputs[1].name)):
            uses[factor.name] += 1
            readers.setdefault(node.inputs[0], []).append(factor)
    together = {
        id(it): (*several,)
        for several in readers.values()
        if all(uses[it.name] == 1 and it.kind == several[0].kind for it in several)
        for it in several
    }
    groups = [together.get(id(it), (it,)) for it in factors]
    yield from {id(group[0]): group for group in groups}.values()


def _copied(module: nn.Module) -> nn.Module:
    """A copy that shares every tensor, and the program that it may run."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        held = (*vars(part).values(), *part._parameters.values(), *part._buffers.values())
        memo |= {id(it): it for it in held if isinstance(it, Tensor)}
        if isinstance(part, ProgramModule):
            memo[id(part.program)] = part.program
    return copy.deepcopy(module, memo)


def _masks(root: nn.Module, planned: Mapping[str, Tensor] | None) -> dict[int, tuple[str, Tensor]]:
    """Name and mask of each masked parameter, by identity; those of weights that were cut are read off the zeros."""
    found: dict[int, tuple[str, Tensor]] = {}
    names = {given: name for part in root.modules() if isinstance(part, ProgramModule) for given, name in part.names.items()}
    planned = {names.get(name, name): mask for name, mask in planned.items()} if planned is not None else None
    shown = {name: given for given, name in names.items()}
    for name, weight in root.named_parameters(remove_duplicate=False):
        if planned is None and (weight.dim() != 2 or float((weight == 0).float().mean()) < FEWEST_ZEROS):
            continue
        if planned is None or name in planned:
            mask = weight.detach() != 0 if planned is None or planned[name].shape != weight.shape else planned[name]
            found.setdefault(id(weight), (shown.get(name, name), mask))
    return found


# ---- where weights are multiplied


@dataclass(frozen=True)
class Site:
    """A product with a weight: who holds it, whether as (columns, rows), and how (the nth part of) another one takes its place."""

    owner: nn.Module
    attribute: str
    transposed: bool
    place: Callable[[Product, int], None]

    @property
    def held(self) -> Tensor:
        return getattr(self.owner, self.attribute)

    @property
    def weight(self) -> Tensor:
        """(rows, columns)."""
        return self.held.T if self.transposed else self.held


@dataclass(frozen=True, eq=False)
class Factor:
    """A masked weight and everything that multiplies with it."""

    name: str
    mask: Tensor  # (rows, columns)
    sites: list[Site]

    @property
    def weight(self) -> Tensor:
        """(rows, columns)."""
        return self.sites[0].weight

    @property
    def kind(self) -> tuple[Any, ...]:
        """Weights of the same kind can be laid side by side."""
        held = self.sites[0].held
        return self.mask.shape[1], held.dtype, held.device


def _sites(root: nn.Module) -> Iterator[Site]:
    for part in list(root.modules()):
        if type(part) is nn.Linear and "forward" not in vars(part):
            yield Site(part, "weight", False, functools.partial(_change_class, part, SparseLinear))
        elif (type(part).__module__, type(part).__name__) == ("transformers.pytorch_utils", "Conv1D"):  # a linear layer
            yield Site(part, "weight", True, functools.partial(_change_class, part, _sparse(type(part))))  # type: ignore[arg-type]
        elif isinstance(part, fx.GraphModule):
            yield from _graph_sites(part)
        elif isinstance(part, ProgramModule):
            yield from _program_sites(part)


class SparseForward(nn.Module):
    """What a linear layer with a masked weight does."""

    product: Product
    part: int
    bias: Any

    def forward(self, x: Tensor, activation: str = "") -> Tensor:
        return self.product(x, self.bias, activation, self.part)


class SparseLinear(SparseForward, nn.Linear):
    """A linear layer with a masked weight."""


@functools.cache
def _sparse(kind: Any) -> type[nn.Module]:
    """A layer of another library with a masked weight."""
    return type(f"Sparse{kind.__name__}", (SparseForward, kind), {})


def _change_class(layer: Any, kind: type[nn.Module], product: Product, part: int) -> None:
    layer.__class__ = kind
    layer.product, layer.part = product, part


def _graph_sites(module: fx.GraphModule) -> Iterator[Site]:
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        held = node.args[1]
        if isinstance(held, fx.Node) and held.op == "get_attr" and not node.kwargs:
            path, _, attribute = str(held.target).rpartition(".")
            yield Site(module.get_submodule(path), attribute, False, functools.partial(_replace_node, module, node))


def _replace_node(module: fx.GraphModule, node: fx.Node, product: Product, part: int) -> None:
    name = f"product_{node.name}"
    module.add_submodule(name, product)
    with module.graph.inserting_before(node):
        new = module.graph.call_module(name, (node.args[0], *node.args[2:]), {"part": part})
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _program_sites(module: ProgramModule) -> Iterator[Site]:
    for node in module.program.nodes:
        if node.op == ("", "MatMul"):
            weight, bias, transposed = node.args["B"], None, True
        elif node.op == ("", "Gemm") and not node["transA"] and node["alpha"] == node["beta"] == 1:
            weight, bias, transposed = node.args["B"], node.args.get("C"), not node["transB"]
        else:
            continue
        plain = bias is None or (isinstance(bias, Value) and bias.shape is not None and len(bias.shape) == 1)
        if isinstance(weight, Value) and weight.name in module.names and len(weight.shape or ()) == 2 and plain:
            place = functools.partial(_intercept, module, node, "C" if bias is not None else "")
            yield Site(module, module.names[weight.name], transposed, place)


class Products(dict[Node, tuple["Product", int, str]]):
    """Node -> what is run in its place, which part of that it is, and which of its arguments is the bias."""

    def __call__(self, node: Node, args: Mapping[str, Any], compute: Callable[..., tuple[Any, ...]]) -> tuple[Any, ...]:
        if node not in self:
            return compute(args)
        product, part, bias = self[node]
        return (product(args["A"], args[bias] if bias else None, part=part),)


def _intercept(module: ProgramModule, node: Node, bias: str, product: Product, part: int) -> None:
    module.add_module(f"product_{len(module._modules)}", product)
    module.intercept = module.intercept or Products()
    module.intercept[node] = (product, part, bias)  # type: ignore[index]


# ---- one product


@dataclass(frozen=True)
class Choice:
    """What was decided about a weight, by number of tokens, and options of `pack` of each format that this takes."""

    decisions: tuple[Decision, ...]
    packing: Mapping[str, dict[str, Any]]

    @classmethod
    def of(cls, weight: Tensor, tokens: Sequence[int], gate: Gate, force: str | bool) -> Choice:
        """For a weight with zeros; see `sparse_module`."""
        takes = [(kernel, options) for kernel, options in _formats(weight) if force in (False, True, kernel.name)]
        decisions = (_forced(takes, weight, count) if force else gate.decide(takes, weight, count) for count in tokens)
        return cls(tuple(decisions), {kernel.name: options for kernel, options in takes})

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        paths = {it.path for it in self.decisions}
        return {name: options for name, options in self.packing.items() if name in paths}

    def only(self, tokens: Collection[int]) -> Choice:
        return replace(self, decisions=tuple(it for it in self.decisions if it.tokens in tokens))

    def gains(self, single: Sequence[Choice]) -> dict[int, float]:
        """How many times faster than one product for each weight it was measured to be, by number of tokens; 0 where that is unknown."""
        found = {}
        for together, *each in zip(self.decisions, *(it.decisions for it in single)):
            if together.sparse:
                times = [it.sparse_us if it.sparse else it.dense_us for it in each]
                known = [it for it in times if it is not None]
                found[together.tokens] = sum(known) / together.sparse_us if together.sparse_us and len(known) == len(times) else 0.0
            else:
                found[together.tokens] = 0.0 if any(it.sparse for it in each) else 1.0
        return found


class Stored(nn.Module):
    """A compressed weight whose tensors are buffers that no state dict holds; kernels read it like the `Packed` that it came from."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        for name, value in vars(packed).items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def take(self, packed: Packed) -> None:
        """Other numbers; in place where the sizes are the same, so that compiled code sees them."""
        for name, value in vars(packed).items():
            old = getattr(self, name)
            same = type(value) is Tensor and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device)
            if same and not old.is_inference():
                old.copy_(value)
            else:
                setattr(self, name, value)


class Product(nn.Module):
    """y = act(x W^T + bias) for masked weights: of one layer, or of several that read the same x, side by side."""

    bits: Tensor

    def __init__(self, factors: Sequence[Factor], choice: Choice) -> None:
        super().__init__()
        self.sites = tuple(it.sites[0] for it in factors)  # a tuple, so that the owners do not become parts
        ends = [*accumulate(it.mask.shape[0] for it in factors)]
        self.rows = tuple(zip((0, *ends), ends))  # of each weight
        self.register_buffer("bits", _packed_bits(torch.cat([it.mask.to(self.sites[0].held.device) for it in factors])), persistent=False)
        self.expands = False  # dense products from the compressed weight, because the dense one is not on the device
        self.shared: tuple[Tensor, int, Tensor] | None = None  # an x, its version and the product, until all layers took their part
        self.decisions, self.options = choice.decisions, choice.options
        self.steps = tuple((d.tokens, d.path, d.config) for d in self.decisions)
        self.each: Any = ()  # products of each weight alone
        self.formats = nn.ModuleDict({name: Stored(packed) for name, packed in self._packed().items()})
        self.state = self._state()
        for site in self.sites:
            site.owner.register_load_state_dict_post_hook(functools.partial(_loaded, self))

    def leave(self, single: Sequence[Product]) -> None:
        """Leaves the numbers of tokens that were decided for each weight alone to those products."""
        self.each = nn.ModuleList(single)
        self.steps = tuple(sorted((*self.steps, *((it.tokens, EACH, "") for each in single[:1] for it in each.decisions))))

    @property
    def weight(self) -> Tensor:
        """(rows, columns), of all layers."""
        weights = [site.weight for site in self.sites]
        return torch.cat(weights) if len(weights) > 1 else weights[0]

    def mask(self, part: int | None = None) -> Tensor:
        """(rows, columns) bool, of all layers or of one, on the weight's device."""
        flags = (self.bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=self.bits.device)) & 1
        rows, columns = self.rows[-1][1], self.sites[0].weight.shape[1]
        whole = flags.bool().flatten()[: rows * columns].reshape(rows, columns)
        return whole if part is None else whole[slice(*self.rows[part])]

    def forward(self, x: Tensor, bias: Tensor | None = None, activation: str = "", part: int = 0) -> Tensor:
        """The rows of one layer, the nth `part`."""
        weight = self.sites[part].weight
        trains, compiling = torch.is_grad_enabled() and weight.requires_grad, torch.compiler.is_compiling()
        if trains and (compiling or self.training or not self.formats):
            return ACTIVATIONS[activation](F.linear(x, weight * self.mask(part), bias))
        if not compiling:
            self.refresh()
        if trains:
            return SparseForwards.apply(x, weight, bias, self, activation, part)
        tokens = x.numel() // max(1, x.shape[-1])
        path, config = self._path(tokens)
        if path == EACH:
            if not self.expands or self.each[part]._path(tokens)[0] != "dense":
                return self.each[part](x, bias, activation)
            path = "dense"
        if path == "dense" and self.expands:
            path, config = next(iter(self.options)), EXPAND
        if path == "dense" or x.dtype != weight.dtype:  # autocast chooses the type of a dense product
            if self.expands:
                name = next(iter(self.options))
                weight = FORMATS[name].unpack(self.formats[name])[slice(*self.rows[part])]
            return ACTIVATIONS[activation](F.linear(x, weight, bias))
        if len(self.sites) == 1:
            return FORMATS[path].linear(x, self.formats[path], bias, activation, config)
        y = self._shared(x, path, config, part)[..., slice(*self.rows[part])].contiguous()
        return ACTIVATIONS[activation](y if bias is None else y + bias)

    def _shared(self, x: Tensor, path: str, config: str, part: int) -> Tensor:
        """The product for all layers: the first that is called with an x computes it, the last lets go of it."""
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version  # x may be written between two layers
        held = self.shared
        if held is None or held[0] is not x or held[1] != version:
            held = x, version, FORMATS[path].linear(x, self.formats[path], None, "", config)
        self.shared = held if part < len(self.sites) - 1 else None
        return held[2]

    def _path(self, tokens: int) -> tuple[str, str]:
        for most, path, config in self.steps:
            if tokens <= most:
                return path, config
        return self.steps[-1][1:]

    def train(self, mode: bool = True) -> Product:
        if not mode:
            self.refresh()
        return super().train(mode)

    def refresh(self) -> None:
        """Compress the weights again if one changed, and mask what was written over zeros."""
        if self.sites[0].held.is_meta or self._state() == self.state:
            return
        for name, packed in self._packed().items():
            self.formats[name].take(packed)  # type: ignore[operator]
        self.settle()

    def settle(self) -> None:
        """The weights as they are now are those that are compressed."""
        self.state, self.shared = self._state(), None

    @torch.no_grad()
    def _packed(self) -> dict[str, Packed]:
        for part, site in enumerate(self.sites):
            mask = self.mask(part).to(site.held.device)
            if bool((site.weight[~mask] != 0).any()):
                site.weight.mul_(mask)
        if not self.options:
            return {}
        full = _full(self.weight.detach().to(self.bits.device), self.mask())
        return {name: FORMATS[name].pack(full, **options) for name, options in self.options.items()}

    def _state(self) -> tuple[Any, ...]:
        """Changes whenever the numbers may have changed."""
        held = [site.held for site in self.sites]
        return tuple((-1 if it.is_inference() else it._version, it.data_ptr(), it.dtype, it.device) for it in held)

    def extra_repr(self) -> str:
        return ", ".join(f"{path} to {most}" for most, path, _ in self.steps) + " tokens"


class SparseForwards(torch.autograd.Function):
    """A product in evaluation mode where gradients happen to be enabled: by the kernel; backwards, if ever, as the dense masked product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product, activation: str, part: int) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.product, ctx.activation, ctx.part = product, activation, part
        return product(x, bias, activation, part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            pairs = zip(ctx.saved_tensors, ctx.needs_input_grad)
            leaves: list[Any] = [None if tensor is None else tensor.detach().requires_grad_(needed) for tensor, needed in pairs]
            y = ACTIVATIONS[ctx.activation](F.linear(leaves[0], leaves[1] * ctx.product.mask(ctx.part), leaves[2]))
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grads))
        return *(next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves), None, None, None


def _loaded(product: Product, module: nn.Module, keys: Any) -> None:
    product.refresh()


def _full(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with no zero where the mask keeps it: kernels store what is not zero, and the places must not depend on values."""
    info = torch.finfo(weight.dtype)
    least = max(info.smallest_normal * info.eps, 2.0**-126)  # of what is not zero in any arithmetic
    return torch.where(mask, torch.where(weight == 0, least, weight), 0.0).to(weight.dtype)


def _packed_bits(mask: Tensor) -> Tensor:
    """A bool tensor as uint8, eight entries each, lowest bits first."""
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).reshape(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1).to(torch.uint8)


def _formats(weight: Tensor) -> list[tuple[Kernel, dict[str, Any]]]:
    """Formats worth asking about, with options of `pack`: the largest blocks that store few zeros, else 2:4, else any zeros."""
    if check_weight(weight) is not None or not weight.numel():
        return []
    kept = weight != 0
    count = int(kept.sum())
    for block in sorted(block_sparse.BLOCKS, reverse=True):
        padded = F.pad(kept, (0, -weight.shape[1] % block, 0, -weight.shape[0] % block))
        tiles = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block)).any(3).any(1)
        if block <= max(weight.shape) and int(tiles.sum()) * block * block <= WASTE * count < weight.numel():
            return [(KERNELS["block_sparse"], {"block": block})]
    pairs = [FORMATS["two_four"], FORMATS["two_four_library"]] if FORMATS["two_four"].accepts(weight) is None else []
    return [(kernel, {}) for kernel in (*pairs, KERNELS["unstructured"])]


def _forced(takes: Sequence[tuple[Kernel, dict[str, Any]]], weight: Tensor, tokens: int) -> Decision:
    for kernel, _ in takes:
        if kernel.accepts(weight) is None and (kernel.most_tokens is None or tokens <= kernel.most_tokens) and kernel is not library.KERNEL:
            return Decision(kernel.name, tokens, "forced")
    return Decision("dense", tokens, "no kernel that was forced takes this weight and number of tokens")


# ---- where sparse begins to pay

DENSITIES: Mapping[str, tuple[float, ...]] = {  # kept, by format
    "block_sparse": (0.7, 0.5, 0.3, 0.2, 0.1),
    "two_four": (0.5,),
    "two_four_library": (0.5,),
    "unstructured": (0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
}
BLOCK = 64


def crossover(rows: int, columns: int, *, tokens: Sequence[int] = TOKENS, gate: Gate | None = None) -> tuple[Layer, ...]:
    """What the gate says about random bfloat16 weights of one size: a `Layer` for each format and density, named after the format.

    Raises:
        InvalidInput: a size is not positive, or there is no device to measure on.
    """
    if min(rows, columns, *tokens) < 1:
        raise InvalidInput(f"rows, columns and tokens must be positive, found {rows}, {columns} and {', '.join(map(str, tokens))}")
    gate = gate or Gate()
    if not gate.can_measure:
        raise InvalidInput("where sparse kernels begin to pay is measured on a CUDA device, and this machine has none that PyTorch can use")
    generator = torch.Generator(gate.device).manual_seed(0)
    found = []
    for name, densities in DENSITIES.items():
        for density in densities:
            weight = random_weight(name, rows, columns, density, generator)
            decisions = gate.crossover(FORMATS[name], lambda _: weight, (density,), tokens)  # type: ignore[misc]
            found.append(Layer(name, (rows, columns), density, tuple(decisions)))
    return tuple(found)


def random_weight(name: str, rows: int, columns: int, density: float, generator: torch.Generator) -> Tensor:
    """A weight (rows, columns) in bfloat16 on the generator's device, with the zeros that a format is for."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device)

    if name == "block_sparse":
        wanted = uniform(-(-rows // BLOCK), -(-columns // BLOCK))
        kept = (wanted.flatten().argsort().argsort() < round(density * wanted.numel())).reshape(wanted.shape)
        mask = kept.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    elif name.startswith("two_four"):
        mask = (uniform(rows, -(-columns // 4), 4).argsort(-1).argsort(-1) < 2).reshape(rows, -1)[:, :columns]
    else:
        mask = uniform(rows, columns) < density
    return (torch.where(mask, uniform(rows, columns) + 0.5, 0.0)).to(torch.bfloat16)


# ---- the activation behind a layer


class FusedSequential(nn.Sequential):
    """Hands the activation that follows a sparse layer to it; its parts stay as they are."""

    steps: tuple[tuple[int, str], ...]
    length: int

    def forward(self, x: Tensor) -> Tensor:
        if len(self) != self.length:
            return super().forward(x)
        for index, activation in self.steps:
            x = self[index](x, activation) if activation else self[index](x)
        return x


def _fuse(root: nn.Module) -> None:
    """Only where the order of the layers is plain: in `nn.Sequential`. Elsewhere torch.compile fuses an activation with what follows it."""
    for part in root.modules():
        if type(part) is not nn.Sequential:
            continue
        steps: list[tuple[int, str]] = []
        for index, layer in enumerate(part):
            name = _activation(layer)
            if name and steps and steps[-1] == (index - 1, "") and type(part[index - 1]) is SparseLinear and _plain(part[index - 1]):
                steps[-1] = (index - 1, name)
            else:
                steps.append((index, ""))
        if any(name for _, name in steps):
            part.__class__ = FusedSequential
            part.steps, part.length = tuple(steps), len(part)  # type: ignore[assignment]


def _activation(layer: nn.Module) -> str:
    """Its name in ACTIVATIONS, or nothing."""
    if not _plain(layer):
        return ""
    if type(layer) is nn.GELU:
        return "gelu" if layer.approximate == "none" else "gelu_tanh"
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(layer), "")


def _plain(layer: nn.Module) -> bool:
    return not any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks))
