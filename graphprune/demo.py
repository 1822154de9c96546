"""A real pretrained model, pruned before your eyes: a text recogniser that ships in a package, read from there and nowhere else.

The model is PP-OCR v4 (SVTR-LCNet, 2.7 M parameters, 38 convolutions and two attention blocks) from `rapidocr-onnxruntime`. Its quality
is the character error rate on lines of text that are drawn here.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphprune import api, bench
from graphprune.backends.onnxruntime import open_session
from graphprune.errors import MissingExtra
from graphprune.report import Report

log = logging.getLogger("graphprune")

MODEL = "ch_PP-OCRv4_rec_infer.onnx"
HEIGHT, WIDTH = 48, 320  # what the recogniser was trained on
WORDS = (
    "the quick brown fox jumps over a lazy dog while seven bright children count green apples near an old stone bridge under heavy summer "
    "rain and nobody knows why that small white house beside our river always keeps its kitchen window open at night"
).split()


def run(ratio: float = 0.2, out: Path | None = None, lines: int = 60, samples: int = 24) -> Report:
    """Prune the recogniser, save it, read text with both models; the report holds quality and measured latency.

    Units are scored by how well what is left can stand in for them (`obspa`), and weights that read it are refitted by least squares, both
    on `samples` drawn lines. Nothing is trained.

    Raises:
        MissingExtra: if the package with the model is not installed.
    """
    source = find_model()
    log.info("drawing text")
    test, calibration = list(drawn(lines, seed=2)), [torch.from_numpy(image) for _, image in drawn(samples, seed=1)]
    batches = [{"x": torch.cat(calibration[start : start + 8])} for start in range(0, samples, 8)]
    log.info("pruning %s, about a minute", MODEL)
    result = api.compile(
        str(source),
        calibration[0],
        pruning_ratio=ratio,
        recipe="obspa",
        calibration_data=batches,
        backend="onnxruntime",
    )
    with tempfile.TemporaryDirectory() as folder:
        target = out or Path(folder) / "small.onnx"
        result.save(target)
        log.info("reading %d lines with both models", lines)
        quality = error_rate(source, test), error_rate(target, test)
        log.info("measuring")
        calls = [bench.onnx_call(path, {"x": test[0][1]}) for path in (source, target)]
        times = bench.compare(calls, (MODEL, target.name), "cpu, 1 thread", "onnxruntime", seconds=3)
    report = result.report
    return replace(
        report,
        model="PP-OCR v4 text recogniser",
        before=replace(report.before, latency=times.before),
        after=replace(report.after, latency=times.after),
        quality={**report.quality, f"character errors, {lines} lines": quality},
    )


def find_model() -> Path:
    """The recogniser in the package that is installed.

    Raises:
        MissingExtra: it is not.
    """
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    missing = [name for name in ("onnxruntime", "PIL") if importlib.util.find_spec(name) is None]
    if spec is None or spec.origin is None or missing:
        raise MissingExtra('the demo prunes a model that comes in a package of its own: pip install "graphprune[demo]"')
    path = Path(spec.origin).parent / "models" / MODEL
    if not path.is_file():
        raise MissingExtra(f'the installed rapidocr-onnxruntime has no {MODEL}; install the one that fits: pip install "graphprune[demo]"')
    return path


def drawn(count: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Lines of text and their pictures, (1, 3, HEIGHT, WIDTH) float32 in -1 .. 1, padded with 0 on the right."""
    from PIL import Image, ImageDraw, ImageFont

    chance = random.Random(seed)
    made = 0
    while made < count:
        text = " ".join(chance.choice(WORDS) for _ in range(chance.randint(2, 3)))
        if chance.random() < 0.3:
            text = f"{text.capitalize()} {chance.randint(10, 9999)}"
        font = ImageFont.load_default(size=chance.randint(20, 32))
        width = int(font.getlength(text)) + 16
        if width > WIDTH:
            continue
        made += 1
        picture = Image.new("RGB", (width, HEIGHT), "white")
        ImageDraw.Draw(picture).text((8, HEIGHT // 2), text, fill=(chance.randint(0, 90),) * 3, font=font, anchor="lm")
        image = np.zeros((1, 3, HEIGHT, WIDTH), np.float32)
        image[0, :, :, :width] = (np.asarray(picture, np.float32) / 127.5 - 1).transpose(2, 0, 1)
        yield text, image


def error_rate(path: Path, lines: Sequence[tuple[str, np.ndarray]]) -> float:
    """Edits per character between what was drawn and what a model reads, spaces aside."""
    session = open_session(path)
    alphabet = _alphabet(session)
    edits = characters = 0
    for text, image in lines:
        (scores,) = session.run(None, {"x": image})
        wanted, read = text.replace(" ", ""), _decode(scores[0].argmax(-1), alphabet).replace(" ", "")
        edits += edit_distance(wanted, read)
        characters += len(wanted)
    return edits / characters


def _alphabet(session: Any) -> list[str]:
    return ["", *session.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]


def _decode(best: np.ndarray, alphabet: Sequence[str]) -> str:
    """Best label per step -> text: repeats merge, label 0 separates (Graves et al., 2006)."""
    starts = np.concatenate([[True], best[1:] != best[:-1]])
    return "".join(alphabet[label] for label in best[starts] if label)


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements that make `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
