"""The public surface: capture, plan, apply, compile, verify, load."""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.allocation import Measure
from graphprune.calibration import first_inputs
from graphprune.capture.huggingface import example_kwargs, forward_defaults
from graphprune.decisions import decide, known_arguments
from graphprune.errors import CaptureError, GraphPruneError, InvalidInput, VerificationFailed
from graphprune.layer_costs import Times, layer_costs, op_times
from graphprune.measure import interleaved
from graphprune.plan import Plan
from graphprune.prepare import PREPARATIONS
from graphprune.program import Program, Value
from graphprune.repair import DATA_FREE, repaired, replace_weight
from graphprune.report import Footprint, Frozen, GroupSummary, KernelChoice, Latency, PassRecord, Report, changes
from graphprune.sparsity import UPDATES, masked_tensors, masks_after, pattern_of, repair_masked
from graphprune.surgery import Cut, apply_cut
from graphprune.trials import Trials, paired
from graphprune.units import DEFAULT_UNITS
from graphprune.verify.certificate import Certificate, certify

log = logging.getLogger("graphprune")

Source = Any  # nn.Module | Program | path of an .onnx file or of a checkpoint folder | onnx.ModelProto | onnx_ir.Model


def capture(model: Source, example_inputs: Any = None, kwargs: Mapping[str, Any] | None = None, dynamic_shapes: Any = None) -> Program:
    """Turn a model into the standardized graph.

    Args:
        model: a torch module (out of `torch.compile` and data-parallel wrappers it is taken), an `.onnx` file, a folder with a Hugging Face
            checkpoint, an ONNX model in memory, or a `Program` (returned as it is).
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments. Optional for Hugging Face models and
            ONNX.
        kwargs: further keyword arguments of `forward`.
        dynamic_shapes: as `torch.export.export` takes it.

    Raises:
        InvalidInput: the model or the inputs are not what they must be.
        CaptureError: torch.export rejects the module, or no input sizes run the ONNX file.
    """
    if isinstance(model, Program):
        return model
    if isinstance(model, (str, os.PathLike)) and Path(model).is_dir():
        from graphprune.results import load_result

        model = load_result(Path(model))
    if not isinstance(model, nn.Module):
        from graphprune.capture.onnx_file import capture_onnx

        return capture_onnx(model, example_inputs)
    from graphprune.capture.torch_export import capture_torch

    module = _unwrapped(model)
    args, named = _arguments(module, example_inputs, kwargs)
    if isinstance(dynamic_shapes, Mapping):  # arguments that were made up here have sizes of their own
        dynamic_shapes = {**dynamic_shapes, **{name: None for name in named if name not in dynamic_shapes}}
    from graphprune.surgery.fallback import shapes_for

    return capture_torch(module, args, named, shapes_for(module, dynamic_shapes, args, named))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and data-parallel wrappers."""
    if hasattr(model, "_orig_mod"):
        return _unwrapped(model._orig_mod)  # type: ignore[arg-type]
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(model.module)
    if type(model).__module__.partition(".")[0] == "peft":
        raise InvalidInput("the model carries a PEFT adapter; merge it first: model = model.merge_and_unload()")
    quantized = any(type(m).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")) for m in model.modules())
    if quantized or getattr(model, "is_quantized", False) or hasattr(model, "hf_quantizer"):
        raise InvalidInput("the model is quantized; prune the full-precision model and quantize the result")
    if any(hasattr(m, "_hf_hook") for m in model.modules()) and any(p.is_meta for p in model.parameters()):
        raise InvalidInput(
            "accelerate has moved weights of the model off its device; load it whole, or use graphprune.streaming.prune_checkpoint"
        )
    return model


def _arguments(module: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple, dict[str, Any]]:
    named = dict(kwargs or {})
    args: tuple = ()
    if isinstance(example_inputs, Mapping):
        named = {**example_inputs, **named}
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    elif example_inputs is not None:
        args = (example_inputs,)
    elif not named:
        made = example_kwargs(module)
        if made is None:
            names = ", ".join(inspect.signature(module.forward).parameters)
            raise InvalidInput(
                f"example inputs are needed to trace {type(module).__name__}.forward({names}): "
                "call graphprune.compile(model, torch.randn(2, 3, 224, 224)), "
                "with inputs of the sizes you use and a batch of at least 2"
            )
        named = made
    accepted = forward_defaults(module)
    return args, {**{k: v for k, v in accepted.items() if k not in named}, **named}


@torch.inference_mode(False)
def plan(
    model: Source,
    example_inputs: Any = None,
    *,
    remove: Mapping[str, Iterable[int]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    measure: Measure | None = None,
    backend: str = "torch",
    **planning: Any,
) -> Plan:
    """Decide what goes, without cutting.

    Args:
        remove: explicit units, `{"group": [0, 7]}`, or `{"model.layers.3": [0]}` for a whole block; then nothing else decides.
        measure: what budgets of latency and accuracy are measured by, in place of building and timing each candidate.
        backend: what is to run the result: `latency_ms` is measured there, and round_to="auto" keeps widths that suit it.
        planning: the arguments of `compile` that say what goes.
    """
    if remove is not None:
        return Plan.of(capture(model, example_inputs, kwargs, dynamic_shapes), remove)
    from graphprune.backends.base import check_backend
    from graphprune.backends.widths import widths_of

    check_backend(backend)
    trials = partial(_trials, backend=backend) if measure is None else lambda program, **given: measure
    widths = partial(widths_of, backend=backend)
    example_inputs, data = _examples(model, example_inputs, kwargs, planning.get("calibration_data"))
    planning |= {"calibration_data": data} if data is not None else {}
    return decide(lambda: capture(model, example_inputs, kwargs, dynamic_shapes), trials, widths=widths, **known_arguments(planning)).plan


def _examples(model: Source, example_inputs: Any, kwargs: Mapping[str, Any] | None, data: Any) -> tuple[Any, Any]:
    """Example inputs, where none are given those of the first batch of calibration data; and the data."""
    if example_inputs is not None or kwargs or data is None or not isinstance(model, nn.Module):
        return example_inputs, data
    return first_inputs(_unwrapped(model), data)


def _trials(program: Program, backend: str = "torch", device: Any = None, **given: Any) -> Trials:
    """Candidates as `_latency` times them: the way the report does."""

    held: dict[str, Any] = {}

    def latency(program: Program, pruned: Program, module: nn.Module | None) -> tuple[float, float] | None:
        sizes = Report(Footprint(0, 0, 0), Footprint(0, 0, 0))  # of no interest here
        place = str(device) if device is not None else None
        return _latency(Result(program, pruned, Plan(), sizes, None, backend, module, None, place), paired, held)

    return Trials(program, latency, **given)


@dataclass(eq=False)
class Result:
    """A pruned network: callable like the model, with the plan and the report that belong to it."""

    program: Program  # before
    pruned: Program  # after; its source is right by construction
    plan: Plan
    report: Report
    certificate: Certificate | None
    backend: str = "torch"
    _module: nn.Module | None = field(default=None, repr=False)
    written: Any = field(default=None, repr=False)  # how the module came about: a `WriteBack`, None for ONNX
    device: str | None = None  # where the backend is to run; None leaves that to it

    @cached_property
    def module(self) -> nn.Module:
        """The pruned network as an nn.Module, trainable: the user's class where write-back was verified, else the edited graph."""
        if self._module is not None:
            return self._module
        from graphprune.execute.module import ProgramModule

        return ProgramModule(self.pruned)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.runner(*args, **kwargs)

    @cached_property
    def runner(self) -> Any:
        """What a call runs: by torch the module itself; by triton one of the same class, names and weights with sparse layers in it."""
        if self.backend == "torch":
            return self.module
        from graphprune.backends.base import lower

        return lower(self, self.backend, **({"device": self.device} if self.device else {}))

    def save(self, path: str | os.PathLike[str], *, compress: bool = False) -> None:
        """Write `x.onnx`, or a folder that `graphprune.load` (and, for uniform cuts, `from_pretrained`) reads back. Atomic.

        `compress`: an ONNX file holds weights with zeros as kept values and bits, put together by a function of standard operators.
        """
        from graphprune.results import save_result

        save_result(self, Path(path), compress)


@torch.inference_mode(False)
def apply(
    model: Source,
    plan: Plan,
    example_inputs: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    calibration_data: Any = None,
    backend: str = "torch",
    inplace: bool = False,
    verify: bool | str = True,
    device: Any = None,
) -> Result:
    """Cut a network as a plan says.

    Raises:
        InvalidInput: the plan is of another network.
        VerificationFailed: the pruned network is not the masked network; nothing is returned or changed.
    """
    model = placed(model, device, backend)
    return _apply(model, plan, example_inputs, kwargs, dynamic_shapes, calibration_data, backend, inplace, verify, device=device)


def placed(model: Source, device: Any, backend: str = "torch") -> Source:
    """The model on the device that is asked for, and the backend ready for it.

    Raises:
        InvalidInput: there is no such backend or device, or the model is a file or a program, which is worked on where it is.
        MissingExtra: what the backend needs is not installed.
    """
    from graphprune.backends.base import check_backend

    check_backend(backend)
    if device is None:
        return model
    if backend == "onnxruntime":
        from graphprune.backends.onnxruntime import check_device

        check_device(str(device))
    if isinstance(model, (str, os.PathLike)) and Path(model).is_dir():
        from graphprune.results import load_result

        model = load_result(Path(model))
    if isinstance(model, nn.Module):
        try:
            return model.to(device)
        except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
            raise InvalidInput(f"device={str(device)!r} cannot be used: {str(error).strip().splitlines()[0]}") from None
    if backend != "onnxruntime" and str(device) != "cpu":
        raise InvalidInput(f"device={str(device)!r}: an ONNX file or a captured program is worked on where it is; leave device out")
    return model


def _apply(
    model: Source,
    plan: Plan,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    calibration_data: Any = None,
    backend: str = "torch",
    inplace: bool = False,
    verify: bool | str = True,
    solved: Mapping[str, Tensor] | None = None,
    device: Any = None,
    prepared: bool = False,
) -> Result:
    """`apply`; with `solved` given, the weights that the repair of the masks would come to again.

    Args:
        prepared: the program has been through what the plan says to do before the cut.
    """
    clock = _Clock()
    with clock("capture"):
        program = capture(model, example_inputs, kwargs, dynamic_shapes)
    with clock("analysis"):
        program.analysis  # noqa: B018  solved here so that its time is its own
    if plan.settings.get("prepare") and not prepared:
        if calibration_data is None:
            raise InvalidInput(f"the plan is of the network after {plan.settings['prepare']!r}; pass the calibration_data it was made with")
        program = PREPARATIONS[plan.settings["prepare"]](program, calibration_data)
    removed = plan.resolve(program)
    cut = Cut(program.analysis, removed)
    with clock("surgery"):
        pruned = apply_cut(program, cut)
        masks = masks_after(program, cut, plan.masks)
        dense = {name: pruned.weights[name].tensor for name in masks}
        for name, mask in masks.items() if verify or not solved else ():  # weights that are solved come masked
            replace_weight(pruned, name, dense[name] * mask.to(dense[name].device))  # type: ignore[union-attr, operator]
    certificate = None
    if verify:
        with clock("verify"):
            certificate = _certificate(program, pruned, cut, plan, verify, masked_tensors(program, plan.masks))
    module, written, notes = None, None, []
    repairs = [name for name in plan.repair if calibration_data is not None or name in DATA_FREE or (solved and name in UPDATES)]
    if len(repairs) < len(plan.repair):
        notes.append(f"repair skipped for want of calibration_data: {', '.join(name for name in plan.repair if name not in repairs)}")
    if repairs:
        with clock("repair"):
            for name in (name for name in repairs if name in UPDATES):
                if not solved:
                    for weight, tensor in dense.items():
                        replace_weight(pruned, weight, tensor)  # type: ignore[arg-type]
                pattern = pattern_of(str(plan.settings.get("pattern", "unstructured")))
                found = solved or repair_masked(pruned, masks, UPDATES[name], pattern, calibration_data)
                for weight, tensor in found.items():
                    replace_weight(pruned, weight, tensor * masks[weight].to(tensor.device))
            pruned = repaired(program, cut, pruned, [name for name in repairs if name not in UPDATES], calibration_data)
    with clock("measure"):
        times = op_times(program, pruned)
    from graphprune.capture.torch_export import TorchSource

    if isinstance(program.source, TorchSource):
        from graphprune.surgery.write_back import write_back

        with clock("write-back"):
            written = write_back(program, cut, pruned, inplace=inplace)
        module = written.module
        notes += list(written.notes)
    report = _report(program, pruned, cut, plan, certificate, notes, times, clock.seconds)
    result = Result(program, pruned, plan, report, certificate, backend, module, written, str(device) if device is not None else None)
    from graphprune.backends.base import check_backend

    if check_backend(backend).decides:
        with clock("backend"):
            report = replace(report, kernels=KernelChoice.of(result.runner.sparse_layers))
        if not report.kernels:
            idle = f"backend {backend} has nothing to do: no weight was given zeros (sparsity=)"
            report = replace(report, warnings=(*report.warnings, idle))
    with clock("measure"):
        latency = _latency(result)
    if latency is not None:
        report = replace(report, before=replace(report.before, latency=latency[0]), after=replace(report.after, latency=latency[1]))
    result.report = replace(report, seconds=dict(clock.seconds))
    return result


MEASURE_SECONDS = 0.5


def _latency(result: Result, timed: Callable[..., Any] | None = None, held: dict[str, Any] | None = None) -> Any:
    """One call before and after, in turns: by ONNX Runtime where that is the backend or the network came as ONNX, else as a torch module.

    None where that does not run it. `timed` takes the place of `_timed`; `held` keeps the network before between calls.
    """
    from graphprune.capture.torch_export import evaluating

    timed = timed or _timed
    program, module, source = result.program, result._module, result.program.source
    if module is None or result.backend == "onnxruntime":
        place = result.device if result.backend == "onnxruntime" and result.device else "cpu"
        try:
            from graphprune.backends.onnxruntime import OnnxRuntimeModel
            from graphprune.results import exported

            held = {} if held is None else held
            if "before" not in held:
                held["before"] = OnnxRuntimeModel(program if module is None else exported(source.module, source), device=place)
            runs = [held["before"], OnnxRuntimeModel(result.pruned if module is None else exported(module, source), device=place)]
        except GraphPruneError as why:
            log.info("latency was not measured: %s", why)
            return None
        inputs = [x for x in program.example_inputs if isinstance(x, Tensor)]
        where = "cpu, 1 thread" if place == "cpu" else place
        return timed([lambda run=run: run(*inputs) for run in runs], torch.device(place).type, where, "onnxruntime")  # type: ignore[misc]
    device = next((v.tensor.device for v in program.weights.values()), torch.device("cpu"))
    if device.type == "meta":
        return None
    original = source.module if module is not source.module else source.graph_module
    where = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    if result.backend == "triton":
        module = result.runner
    with evaluating(source.module), evaluating(module), torch.no_grad():
        return timed([lambda m=m: m(*source.args, **source.kwargs) for m in (original, module)], device.type, where, result.backend)  # type: ignore[misc]


def _timed(calls: Sequence[Callable[[], Any]], device: str, where: str, backend: str) -> tuple[Latency, Latency]:
    found = interleaved(dict(zip(("before", "after"), calls)), warmup=1, repeats=5, device=device, seconds=MEASURE_SECONDS)
    (a, low_a, high_a), (b, low_b, high_b) = (np.quantile(found[name].times, (0.5, 0.25, 0.75)).tolist() for name in ("before", "after"))
    return Latency(a, low_a, high_a, where, backend), Latency(b, low_b, high_b, where, backend)


def _certificate(
    program: Program, pruned: Program, cut: Cut, plan: Plan, verify: bool | str, zeroed: Mapping[Value, Tensor] | None = None
) -> Certificate:
    weights = sum(v.tensor.numel() for v in program.weights.values() if v.tensor is not None)
    dtype = torch.float64 if verify == "full" or weights <= 200e6 else torch.float32
    seconds = float("inf") if verify == "full" else 2.0
    certificate = certify(program, pruned, cut, dtype=dtype, plan_hash=plan.hash, seconds=seconds, zeroed=zeroed)
    if certificate.status == "failed":
        raise VerificationFailed(f"the pruned network is not the masked network: {certificate}; " + " ".join(certificate.notes))
    return certificate


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _report(
    program: Program,
    pruned: Program,
    cut: Cut,
    plan: Plan,
    certificate: Certificate | None,
    notes: Sequence[str],
    times: tuple[Times, str],
    seconds: Mapping[str, float],
) -> Report:
    from graphprune import costs

    before, after = costs.footprint(program), costs.footprint(pruned)
    analysis = program.analysis
    frozen: dict[tuple[str, int], Frozen] = {(v.name, a): Frozen.of(f"{v.name}[{a}]", why) for v, a, why in analysis.frozen_axes()}
    return Report(
        before=before,
        after=after,
        model=type(program.source.module).__name__
        if hasattr(program.source, "module")
        else Path(getattr(program.source, "path", None) or "model.onnx").name,
        plan_hash=plan.hash,
        layers=changes({n: v.shape or () for n, v in program.weights.items()}, {n: v.shape or () for n, v in pruned.weights.items()}),
        costs=layer_costs(program, cut, times[0]),
        timing=times[1],
        rounding=str(plan.settings.get("rounding", "")),
        spread=str(plan.settings.get("spread", "")),
        groups=tuple(GroupSummary.of(g, g.size - len(cut.removed.get(g.name, ()))) for g in analysis.groups),
        not_prunable=tuple(frozen.values()),
        passes=(PassRecord("structured", seconds.get("surgery", 0.0), f"{before.params - after.params} parameters removed"),),
        certificate=asdict(certificate) if certificate else None,
        warnings=tuple(notes),
        seconds=dict(seconds),
    )


@torch.inference_mode(False)  # tensors made inside it could not be trained
def compile(
    model: Source,
    example_inputs: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    recipe: Any = None,
    pruning_ratio: float | Mapping[str, float] | None = None,
    budget: Mapping[str, Any] | None = None,
    units: Sequence[str] = DEFAULT_UNITS,
    sparsity: float | None = None,
    pattern: str | None = None,
    importance: Any = "magnitude",
    scope: str = "local",
    ignore: Sequence[str] = (),
    targets: Sequence[str] = (),
    round_to: int | str = "auto",
    min_keep: int = 1,
    repair: Sequence[str] = (),
    calibration_data: Any = None,
    num_samples: int | None = None,
    loss: Callable | None = None,
    metric: Callable | None = None,
    backend: str = "torch",
    device: Any = None,
    inplace: bool = False,
    on_unknown: str = "freeze",
    verify: bool | str = True,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Prune a network: capture, plan, cut, repair, prove.

    Args:
        pruning_ratio: fraction of units removed per group, or `{pattern: fraction}`; in [0, 1).
        budget: what is kept: `{"params": "60%", "macs": 2e9, "memory_mb": "50%"}`, one or several. With a ratio too, the budget binds and
            the ratio is the most any group loses. Two are met by building and measuring candidates: `{"latency_ms": 5.0}` (or "60%" of
            what the network takes now), and `{"accuracy_drop": 0.01}`, the largest cut under which `metric` falls by no more than that.
        metric: `metric(module) -> float`, higher is better; of the result and of the original, for the report and for `accuracy_drop`.
        units: kinds of units that may go, of `graphprune.units.UNITS`.
        recipe: a published method by name (`graphprune.recipes()`), or a `Recipe`. It brings score, allocation, repair (`repair` adds to
            it) and units (if none are given). pruning_ratio or budget say how much goes; sparsity and pattern where it zeroes weights.
        sparsity: fraction of zeros inside weights, in place of removed units; by default 0.5, or what the pattern says.
        pattern: of the zeros: "unstructured", "2:4" (kept:of), "block:64x64".
        importance: "magnitude", "magnitude_l1", "bn_scale", "random", "fpgm", "lamp", "taylor", or a callable `group -> scores`.
        scope: "local" (per group), "global", or "isomorphic" (among groups of the same structure).
        ignore, targets: exact names, globs, "re:...", "op:Conv".
        round_to: keep multiples of this; "auto" is what was measured on the device that the network is on, else 8 from a width of 64 on.
            A GPU is measured on first use, some seconds; a CPU by `graphprune bench --widths` alone. Layers keep no width there that is not
            clearly faster than the wider ones. The report says which it was.
        calibration_data: iterable of inputs (tensor, tuple or dict) for scores and repairs that need data. Tensors and dicts are the
            example inputs too, where none are given.
        backend: what runs the result and is timed: "torch", "onnxruntime", or "triton", where layers with zeros in their weights run by
            sparse kernels if these were measured to be faster on the device at hand.
        verify: True, "full" (always float64 and three inputs), or False.

    Raises:
        InvalidInput, CaptureError, NothingToPrune, BudgetNotMet, VerificationFailed: each says what, where and the way out.
    """
    if on_unknown not in ("freeze", "raise"):
        raise InvalidInput(f"on_unknown is 'freeze' or 'raise', found {on_unknown!r}")
    model = placed(model, device, backend)
    example_inputs, calibration_data = _examples(model, example_inputs, kwargs, calibration_data)
    clock = _Clock()

    def captured() -> Program:
        with clock("capture"):
            program = capture(model, example_inputs, kwargs, dynamic_shapes)
        with clock("analysis"):
            if on_unknown == "raise":
                from graphprune.analysis import analyze

                program.__dict__["analysis"] = analyze(program, on_unknown)
            program.analysis  # noqa: B018
        return program

    from graphprune.backends.widths import widths_of

    made = decide(
        captured, partial(_trials, backend=backend, device=device), clock, partial(widths_of, backend=backend, device=device),
        recipe=recipe, pruning_ratio=pruning_ratio, budget=budget, units=units, sparsity=sparsity, pattern=pattern, importance=importance,
        scope=scope, ignore=ignore, targets=targets, round_to=round_to, min_keep=min_keep, repair=repair, calibration_data=calibration_data,
        num_samples=num_samples, loss=loss, metric=metric, seed=seed,
    )  # fmt: skip
    dense = made.trials.dense if metric is not None else None  # before anything is changed in place
    result = _apply(
        made.program, made.plan, calibration_data=made.data, backend=backend, inplace=inplace, verify=verify, solved=made.solved,
        device=device, prepared=True,
    )  # fmt: skip
    if dense is not None:
        name = getattr(metric, "__name__", "metric")
        quality = {"metric" if name == "<lambda>" else name: (dense, made.trials.quality(result.module))}
        result.report = replace(result.report, quality=quality)
    result.report = replace(
        result.report, seconds={**clock.seconds, **{k: v for k, v in result.report.seconds.items() if k not in ("capture", "analysis")}}
    )
    return result


def verify(original: Source, pruned: Source, plan: Plan) -> Certificate:
    """Prove again that a pruned network is its original with the removed units of `plan` neutralised."""
    program, other = capture(original), capture(pruned)
    cut = Cut(program.analysis, plan.resolve(program))
    if len(program.inputs) != len(other.inputs):
        raise InvalidInput(f"the original takes {len(program.inputs)} inputs, the pruned network {len(other.inputs)}")
    certificate = certify(program, other, cut, plan_hash=plan.hash, zeroed=masked_tensors(program, plan.masks))
    if certificate.status == "failed" and plan.repair:
        raise InvalidInput(
            f"the plan names the repair {', '.join(plan.repair)}: kept weights were changed on purpose, so this is not the masked network. "
            "The certificate saved beside it was made before the repair; to prove the cut again, apply the plan without its repair"
        )
    return certificate


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> Any:
    """Read back what `Result.save` wrote: a module for a folder (`model` is the original, needed for plain modules), a `Program` for an
    `.onnx` file.
    """
    if Path(path).is_file():
        return capture(path)
    from graphprune.results import load_result

    return load_result(Path(path), model)


def recipes() -> dict[str, Any]:
    """The registered published methods: name -> unit, score, allocation, repair, paper."""
    from graphprune.recipes import RECIPES

    return dict(RECIPES)


__all__ = ["CaptureError", "Plan", "Program", "Result", "apply", "capture", "compile", "load", "plan", "recipes", "verify"]
