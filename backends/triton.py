"""Runs a network with zeros in its weights by sparse kernels, layer by layer where the gate says that they pay.

`sparse_module` copies the module (every tensor is shared with the original) and lets each product `x W^T` with a masked weight go through a
`Product`, which takes the path that was decided for the number of tokens at hand: dense, or a kernel with the weight stored compressed.
Products are found in three places: linear modules and convolutions, which change their class and stay where they are, so the rest of the
model (`generate`, caches, hooks, names) does not notice; `aten.linear` and `aten.conv2d` nodes of graphs that stand in for a module;
MatMul, Gemm and Conv nodes of a network that came as ONNX. A convolution with tiles of zeros is a product too, whose tokens are the pixels
of its result. Anything else with zeros (convolutions with groups, stacked experts) runs dense, and is listed as such.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune.backends.gate import Decision, Gate
from graphprune.backends.kernels import block_sparse_conv
from graphprune.backends.products import FORMATS, IMAGES, TOKENS, Choice, Factor, Layer, Product, Site, full_weight
from graphprune.errors import InvalidInput
from graphprune.execute.module import ProgramModule
from graphprune.program import Node, Program, Value

GAIN = 1.0  # what weights side by side must gain over one product each: as fast is better, for there are fewer launches
FEWEST_ZEROS = 0.1  # of a weight without a plan, to count as masked


def sparse_module(
    result: Any, *, tokens: Sequence[int] = TOKENS, force: str | bool = False, gate: Gate | None = None, device: Any = None,
    keep_dense: bool = True, images: Sequence[int] = IMAGES,
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
        images: the same as `tokens` for convolutions: numbers of images, as large as those the network was captured with. Activations are
            taken to have their channels last in memory.

    Raises:
        InvalidInput: `force` is no kernel, or `tokens` is empty.
    """
    if isinstance(force, str) and force not in FORMATS:
        raise InvalidInput(f"force names a kernel, one of {', '.join(FORMATS)}, found {force!r}")
    for name, counts in {"tokens": tokens, "images": images}.items():
        if not counts or min(counts) < 1:
            raise InvalidInput(f"{name} are the numbers of {name} to decide for, each at least 1, found {counts!r}")
    source: nn.Module = result if isinstance(result, nn.Module) else result.module
    root = _copied(source)
    masks = _masks(root, None if isinstance(result, nn.Module) else result.plan.masks)
    program = getattr(result, "program", None)
    sizes = _sizes(program)
    factors: dict[tuple[Any, ...], Factor] = {}
    for site in _sites(root):
        if id(site.held) in masks:
            name, mask = masks[id(site.held)]
            key = id(site.held), site.transposed, *(site.steps or {}).values()
            factor = factors.setdefault(key, Factor(name, mask.T if site.transposed else mask, []))
            factor.sites.append(site)

    def choose(side_by_side: Sequence[Factor]) -> Choice:
        where = device if device is not None else side_by_side[0].sites[0].held.device
        with torch.no_grad():
            weights = torch.cat([it.weight for it in side_by_side])
            masks = torch.cat([it.mask.to(weights.device) for it in side_by_side])
            full, counts, given = full_weight(weights, masks), sorted(tokens), {}
            if steps := side_by_side[0].sites[0].steps:
                given = {**steps, "size": sizes.get(side_by_side[0].name, block_sparse_conv.SIZE)}
                pixels = prod(block_sparse_conv.outputs(given["size"], full.shape, **steps))
                counts = sorted(max(1, count * pixels) for count in images)
            return Choice.of(full, tuple(counts), gate or Gate(where), force, **given)

    layers: dict[str, list[Layer]] = {}
    for several in _side_by_side(program, factors.values()):
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
    elsewhere = tuple(Decision("dense", n, "dense products only: it is no linear layer and no plain convolution") for n in tokens)
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
        if force or any(it.sparse and gains[it.tokens] >= GAIN for it in together.decisions):
            apart = {count for count, gain in gains.items() if gain < GAIN}
    if len(several) == 1:
        return None, [Product(several, alone[0])]
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
        if planned is None and (weight.dim() not in (2, 4) or float((weight == 0).float().mean()) < FEWEST_ZEROS):
            continue
        if planned is None or name in planned:
            mask = weight.detach() != 0 if planned is None or planned[name].shape != weight.shape else planned[name]
            found.setdefault(id(weight), (shown.get(name, name), mask))
    return found


# ---- where weights are multiplied


def _sites(root: nn.Module) -> Iterator[Site]:
    for part in list(root.modules()):
        if type(part) is nn.Linear and "forward" not in vars(part):
            yield Site(part, "weight", False, functools.partial(_change_class, part, SparseLinear))
        elif type(part) is nn.Conv2d and "forward" not in vars(part):
            steps = _steps(part.stride, part.padding, part.dilation, part.groups) if part.padding_mode == "zeros" else None
            if steps is not None:
                yield Site(part, "weight", False, functools.partial(_change_class, part, SparseConv2d), steps)
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


class SparseConv2d(SparseForward, nn.Conv2d):
    """A convolution with a masked weight."""


@functools.cache
def _sparse(kind: Any) -> type[nn.Module]:
    """A layer of another library with a masked weight."""
    return type(f"Sparse{kind.__name__}", (SparseForward, kind), {})


def _change_class(layer: Any, kind: type[nn.Module], product: Product, part: int) -> None:
    layer.__class__ = kind
    layer.product, layer.part = product, part


def _steps(stride: Any, padding: Any, dilation: Any, groups: int) -> dict[str, tuple[int, int]] | None:
    """How a convolution over images steps; None where no kernel does that."""
    pairs = {"stride": stride, "padding": padding, "dilation": dilation}
    numbers = {name: tuple(it) * 2 if len(it) == 1 else tuple(it) for name, it in pairs.items() if not isinstance(it, str)}
    plain = groups == 1 and len(numbers) == 3 and all(len(it) == 2 and all(isinstance(n, int) for n in it) for it in numbers.values())
    return numbers if plain else None  # type: ignore[return-value]


def _sizes(program: Program | None) -> dict[str, tuple[int, int]]:
    """Height and width of the images that a convolution reads, by the name of its weight."""
    found = {}
    for node in program.nodes if program is not None else ():
        if node.op_type in ("conv2d", "Conv") and (shape := node.inputs[0].shape) is not None and len(shape) == 4:
            if all(isinstance(size, int) for size in shape[2:]):
                found[node.inputs[1].name] = shape[2], shape[3]
    return found


def _graph_sites(module: fx.GraphModule) -> Iterator[Site]:
    for target in (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default):
        for node in module.graph.find_nodes(op="call_function", target=target):
            held, steps = node.args[1], None
            if target is torch.ops.aten.conv2d.default:
                given: tuple[Any, ...] = node.args[3:]
                if (steps := _steps(*given, *([1], [0], [1], 1)[len(given) :])) is None:  # type: ignore[arg-type]
                    continue
            if isinstance(held, fx.Node) and held.op == "get_attr" and not node.kwargs:
                path, _, attribute = str(held.target).rpartition(".")
                yield Site(module.get_submodule(path), attribute, False, functools.partial(_replace_node, module, node), steps)


def _replace_node(module: fx.GraphModule, node: fx.Node, product: Product, part: int) -> None:
    name = f"product_{node.name}"
    module.add_submodule(name, product)
    with module.graph.inserting_before(node):
        new = module.graph.call_module(name, (node.args[0], *node.args[2:3]), {"part": part})
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _program_sites(module: ProgramModule) -> Iterator[Site]:
    for node in module.program.nodes:
        steps, width = None, 2
        if node.op == ("", "Conv"):
            weight, bias, transposed, width = node.args["W"], node.args.get("B"), False, 4
            if (steps := _onnx_steps(node)) is None:
                continue
        elif node.op == ("", "MatMul"):
            weight, bias, transposed = node.args["B"], None, True
        elif node.op == ("", "Gemm") and not node["transA"] and node["alpha"] == node["beta"] == 1:
            weight, bias, transposed = node.args["B"], node.args.get("C"), not node["transB"]
        else:
            continue
        plain = bias is None or (isinstance(bias, Value) and bias.shape is not None and len(bias.shape) == 1)
        if isinstance(weight, Value) and weight.name in module.names and len(weight.shape or ()) == width and plain:
            place = functools.partial(_intercept, module, node, ("B" if steps else "C") if bias is not None else "")
            yield Site(module, module.names[weight.name], transposed, place, steps)


def _onnx_steps(node: Node) -> dict[str, tuple[int, int]] | None:
    """As `_steps`, of a Conv with as much padding before as after."""
    args, weight = node.args, node.args["W"]
    if not isinstance(weight, Value) or len(weight.shape or ()) != 4 or args.get("auto_pad") not in (None, "NOTSET", "VALID"):
        return None
    pads = list(args.get("pads") or [0] * 4)
    if args.get("auto_pad") == "VALID" or pads[:2] != pads[2:]:
        pads = [0] * 4 if args.get("auto_pad") == "VALID" else []
    return _steps(list(args.get("strides") or [1]), pads[:2], list(args.get("dilations") or [1]), int(args.get("group") or 1))


class Products(dict[Node, tuple["Product", int, str]]):
    """Node -> what is run in its place, which part of that it is, and which of its arguments is the bias."""

    def __call__(self, node: Node, args: Mapping[str, Any], compute: Callable[..., tuple[Any, ...]]) -> tuple[Any, ...]:
        if node not in self:
            return compute(args)
        product, part, bias = self[node]
        return (product(args["X" if node.op_type == "Conv" else "A"], args[bias] if bias else None, part=part),)


def _intercept(module: ProgramModule, node: Node, bias: str, product: Product, part: int) -> None:
    module.add_module(f"product_{len(module._modules)}", product)
    module.intercept = module.intercept or Products()
    module.intercept[node] = (product, part, bias)  # type: ignore[index]


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
            before = part[index - 1]
            if name and steps and steps[-1] == (index - 1, "") and type(before) in (SparseLinear, SparseConv2d) and _plain(before):
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
