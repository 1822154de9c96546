"""The verbs of the command line: each parses, calls the api, prints."""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from graphprune.errors import InvalidInput, VerificationFailed
from graphprune.files import check_output
from graphprune.options import Planning
from graphprune.terminal import Talk, app, progress, show, verb

# The compiler itself is imported inside the verbs: torch takes seconds to load, and `--help` should not.

In = Annotated[Path, typer.Argument(metavar="IN", help="An .onnx file, or a folder with a Hugging Face checkpoint.", show_default=False)]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where the result goes: an .onnx file or a folder.", show_default=False)]
Calibration = Annotated[
    Path | None, typer.Option("--calibration", metavar="FILE.npz", help="Sample inputs: one array per model input, samples first.")
]
ReportFile = Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Also write the report: .json or .html.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the proof that the pruned network is the masked one.")]
Device = Annotated[str | None, typer.Option("--device", help="Where to compute, as torch names it. Default: where the model is.")]
OnUnknown = Annotated[str, typer.Option("--on-unknown", metavar="freeze|raise", help="At an op without a rule: leave it alone, or stop.")]
Everything = Annotated[bool, typer.Option("--all", help="Show long lists whole.")]


Saved = Annotated[Path | None, typer.Option("--plan-out", metavar="FILE.json", help="Also write the plan.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of the runtime.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"graphprune {version('graphprune')}")
        raise typer.Exit


@app.callback()
def graphprune(
    show_version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


@verb("prune", "graphprune prune resnet50.onnx -o small.onnx --ratio 0.3")
def prune(
    source: In,
    out: Out,
    planning: Planning,
    calibration: Calibration = None,
    plan_out: Saved = None,
    report: ReportFile = None,
    no_verify: NoVerify = False,
    backend: Annotated[str | None, typer.Option(help="What the result is for: torch, onnxruntime, triton.")] = None,
    compress: Annotated[bool, typer.Option("--compress", help="Store weights with zeros in the ONNX file by their kept values.")] = False,
    device: Device = None,
    on_unknown: OnUnknown = "freeze",
    talk: Talk = Talk(),  # noqa: B008  frozen
) -> None:
    """Remove the least important part of a network and save what is left.

    A quarter of the units of every group goes, unless --ratio or --budget say otherwise; --sparsity, --pattern and some recipes put zeros
    into weights instead. The report tells how much smaller and faster the result is, and whether the cut was proved right.
    """
    arguments = planning.arguments()
    _outputs(source, out, plan_out, report)
    import graphprune as gp
    from graphprune.samples import read_samples

    with progress(talk, f"reading {source.name}"):
        model = _model(source, device if source.is_dir() else None)
        if calibration:
            model = _captured(model, calibration)
            arguments["calibration_data"] = read_samples(calibration, model.inputs)
        arguments |= {"backend": backend} if backend else {}
        place = None if source.is_dir() else device
        result = gp.compile(model, **arguments, verify=not no_verify, device=place, on_unknown=on_unknown, progress=not talk.quiet)
        result.save(out, compress=compress)
        _also(result, plan_out, report)
    show(talk, result.report.to_json, lambda: result.report)


@verb("inspect", "graphprune inspect resnet50.onnx")
def inspect(source: In, everything: Everything = False, talk: Talk = Talk()) -> None:  # noqa: B008
    """List what can be cut, and what cannot and why."""
    _kind(source)
    with progress(talk, f"reading {source.name}"):
        import graphprune as gp
        from graphprune.blocks import named_blocks
        from graphprune.report import Frozen, GroupSummary, tables

        program = gp.capture(_model(source))
        groups = [GroupSummary.of(group) for group in program.groups]
        frozen = [Frozen.of(f"{value.name}[{axis}]", why) for value, axis, why in program.analysis.frozen_axes()]
        blocks = named_blocks(program)
    data = {"groups": [asdict(g) for g in groups], "blocks": blocks, "not_prunable": [asdict(f) for f in frozen]}
    show(talk, lambda: data, lambda: tables.inventory(groups, frozen, everything, blocks))


@verb("explain", "graphprune explain resnet50.onnx layer4.2.conv3")
def explain(
    source: In,
    name: Annotated[str, typer.Argument(help="A weight, a module or a group, as inspect names them.", show_default=False)],
    talk: Talk = Talk(),  # noqa: B008
) -> None:
    """Tell of one weight, module or group why it can be cut or not."""
    _kind(source)
    with progress(talk, f"reading {source.name}"):
        import graphprune as gp
        from graphprune.report import tables

        rows = tables.explanation(gp.capture(_model(source)).explain(name))
    show(talk, lambda: rows, lambda: tables.listing(rows))


@verb("plan", "graphprune plan resnet50.onnx -o plan.json --budget macs=50%")
def plan(
    source: In,
    planning: Planning,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE.json", help="Where the plan goes.")] = None,
    calibration: Calibration = None,
    device: Device = None,
    talk: Talk = Talk(),  # noqa: B008
) -> None:
    """Decide what to cut without cutting it. The plan fits the same network in any form: ONNX file, checkpoint, module."""
    arguments = planning.arguments()
    _outputs(source, out)
    import graphprune as gp
    from graphprune.samples import read_samples

    with progress(talk, f"reading {source.name}"):
        model = _model(source, device)
        program = _captured(model, calibration) if calibration else gp.capture(model)
        arguments |= {"calibration_data": read_samples(calibration, program.inputs)} if calibration else {}
        made = gp.plan(program, **arguments)
        if out is not None:
            made.save(out)
    show(talk, made.to_json, lambda: str(made))


@verb("apply", "graphprune apply plan.json resnet50.onnx -o small.onnx")
def apply(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.", show_default=False)],
    source: In,
    out: Out,
    calibration: Calibration = None,
    report: ReportFile = None,
    no_verify: NoVerify = False,
    device: Device = None,
    talk: Talk = Talk(),  # noqa: B008
) -> None:
    """Cut a network as a plan says."""
    _outputs(source, out, report)
    import graphprune as gp
    from graphprune.samples import read_samples

    with progress(talk, f"reading {source.name}"):
        made, model, samples = gp.Plan.load(plan), _model(source, device), None
        if calibration:
            model = _captured(model, calibration)
            samples = read_samples(calibration, model.inputs)
        result = gp.apply(model, made, calibration_data=samples, verify=not no_verify)
        result.save(out)
        _also(result, None, report)
    show(talk, result.report.to_json, lambda: result.report)


@verb("verify", "graphprune verify resnet50.onnx small.onnx --plan plan.json")
def verify(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The network before the cut.", show_default=False)],
    pruned: Annotated[Path, typer.Argument(metavar="PRUNED", help="The network after it.", show_default=False)],
    plan: Annotated[Path, typer.Option("--plan", metavar="PLAN.json", help="The plan that was applied.", show_default=False)],
    talk: Talk = Talk(),  # noqa: B008
) -> None:
    """Prove again that a pruned network is its original with the removed units masked."""
    _exist(original, pruned, plan)
    with progress(talk, f"reading {original.name}"):
        import graphprune as gp
        from graphprune.report import tables

        certificate = gp.verify(_model(original), _model(pruned), gp.Plan.load(plan))
    show(talk, certificate.to_json, lambda: tables.certificate(asdict(certificate)))
    if not certificate.passed:
        raise VerificationFailed(f"{pruned.name} was not shown to be {original.name} with the units of {plan.name} masked")


@verb("bench", "graphprune bench resnet50.onnx small.onnx --seconds 10")
def bench(
    a: Annotated[Path | None, typer.Argument(metavar="A", help="An .onnx file, or a folder with a Hugging Face checkpoint.")] = None,
    b: Annotated[Path | None, typer.Argument(metavar="B", help="Another one of the same kind.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="How long to measure.")] = 5.0,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads that each model may use.")] = 1,
    crossover: Annotated[
        str | None, typer.Option("--crossover", metavar="ROWSxCOLUMNS", help="No models: where do sparse kernels pay on this GPU?")
    ] = None,
    tokens: Annotated[str, typer.Option("--tokens", metavar="A,B", help="Numbers of tokens for --crossover.")] = "1,16,2048",
    widths: Annotated[bool, typer.Option("--widths", help="No models: which widths run well? Kept for --round-to auto.")] = False,
    device: Annotated[str, typer.Option("--device", help="What --widths measures: cpu or cuda.")] = "cpu",
    talk: Talk = Talk(),  # noqa: B008
) -> None:
    """Time two models in turns on the CPU: ONNX files by ONNX Runtime, folders by PyTorch."""
    if widths and crossover is not None:
        raise InvalidInput("--widths and --crossover are two measurements; ask for one at a time")
    if device != "cpu" and not widths:
        raise InvalidInput(f"--device goes with --widths: models are timed on the CPU, kernels on the GPU; found --device {device}")
    if crossover is not None:
        if a is not None or b is not None:
            raise InvalidInput("--crossover measures kernels on random weights and takes no models")
        with progress(talk, f"measuring {crossover}"):
            from graphprune import bench

            table = bench.crossover(crossover, _numbers(tokens, "--tokens"))
        return show(talk, lambda: asdict(table), lambda: table)
    if widths:
        if a is not None or b is not None:
            raise InvalidInput("--widths measures layers with random weights and takes no models")
        with progress(talk, f"measuring {device}"):
            from graphprune import bench

            costs = bench.widths(device)
        return show(talk, lambda: asdict(costs), lambda: costs)
    if a is None or b is None:
        raise InvalidInput("bench takes two models, as in graphprune bench before.onnx after.onnx; or --crossover ROWSxCOLUMNS or --widths")
    _exist(a, b)
    if a.is_dir() != b.is_dir():
        raise InvalidInput("an .onnx file and a folder are run by different runtimes, so their times do not compare; give two of a kind")
    with progress(talk, f"measuring for {seconds:g} s"):
        from graphprune.bench import compare_models

        comparison = compare_models(_model(a), _model(b), (a.name, b.name), threads, seconds)
    show(talk, lambda: asdict(comparison), lambda: comparison)


@verb("diff", "graphprune diff resnet50.onnx small.onnx")
def diff(a: In, b: In, everything: Everything = False, talk: Talk = Talk()) -> None:  # noqa: B008
    """Show in which tensors two model files differ."""
    from graphprune.report.compare import compare

    with progress(talk, "comparing"):
        difference = compare(a, b)
    show(talk, lambda: asdict(difference), lambda: difference.view(everything))


@verb("recipes", "graphprune recipes")
def recipes(talk: Talk = Talk()) -> None:  # noqa: B008
    """List the published methods that --recipe takes. With --json also how each differs from its paper."""
    with progress(talk, "reading recipes"):
        import graphprune as gp
        from graphprune.report import tables

        rows = [{"name": name, **recipe.describe()} for name, recipe in gp.recipes().items()]
    show(talk, lambda: rows, lambda: tables.methods(rows))


@verb("demo", "graphprune demo")
def demo(
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE.onnx", help="Keep the pruned model.")] = None,
    ratio: Annotated[float, typer.Option("--ratio", metavar="R", help="Fraction of units removed per group.")] = 0.2,
    talk: Talk = Talk(),  # noqa: B008
) -> None:
    """Prune a real pretrained model, run it, and show size, speed and quality before and after."""
    if out is not None:
        check_output(out)
    with progress(talk, "starting"):
        from graphprune.demo import run

        report = run(ratio, out)
    show(talk, report.to_json, lambda: report)


def _numbers(text: str, option: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise InvalidInput(f"{option} takes positive numbers with commas between, found {text!r}")
    return [int(word) for word in words]


def _exist(*paths: Path) -> None:
    for path in paths:
        if not path.exists():
            raise InvalidInput(f"{path} does not exist")


def _kind(path: Path) -> None:
    _exist(path)
    if path.is_file() and path.suffix != ".onnx":
        raise InvalidInput(f"{path} is neither an .onnx file nor a folder with a checkpoint")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InvalidInput(f"{path} is no checkpoint: it holds no config.json")


def _model(path: Path, device: str | None = None) -> Any:
    """What `graphprune.capture` takes for IN: the path of an ONNX file, or the model in a folder."""
    _kind(path)
    from graphprune.api import placed

    if path.is_file():
        return placed(path, device)
    from graphprune.results import load_result

    return placed(load_result(path), device)


def _captured(model: Any, calibration: Path) -> Any:
    """The program of a model; that of a checkpoint takes inputs of the sizes that the calibration samples have."""
    import graphprune as gp
    from graphprune.capture.huggingface import example_kwargs
    from graphprune.samples import first_samples

    made = None if isinstance(model, Path) else example_kwargs(model)
    return gp.capture(model, first_samples(calibration, made) if made is not None else None)


def _outputs(source: Path, out: Path | None, *others: Path | None) -> None:
    """Refuse before any work what could not be read in it or written after it."""
    _kind(source)
    if out is not None:
        check_output(out, [source], folder=out.suffix not in (".onnx", ".json"))
    for path in others:
        if path is not None:
            check_output(path, [source])


def _also(result: Any, plan_out: Path | None, report: Path | None) -> None:
    if plan_out is not None:
        result.plan.save(plan_out)
    if report is not None:
        result.report.save(report)


def main() -> None:
    """Entry point of the `graphprune` command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary files go
    app(prog_name="graphprune")
