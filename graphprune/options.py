"""The planning options of the command line, and how their text becomes arguments of the api."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from graphprune.errors import InvalidInput


@dataclass(frozen=True)
class Planning:
    """What is cut: the planning arguments of `graphprune.compile`."""

    recipe: Annotated[str | None, typer.Option(help="A published method by name: see [bold]graphprune recipes[/].")] = None
    ratio: Annotated[list[str] | None, typer.Option(metavar="R|PATTERN=R", help="Fraction of units removed per group. Repeatable.")] = None
    budget: Annotated[list[str] | None, typer.Option(metavar="macs=50%", help="What to keep: params, macs, latency_ms, memory_mb.")] = None
    units: Annotated[str | None, typer.Option(metavar="A,B", help="What may go: channel, neuron, head, kv_group, expert, ...")] = None
    importance: Annotated[str | None, typer.Option(help="How units are scored.", show_default="magnitude")] = None
    scope: Annotated[str | None, typer.Option(metavar="local|global|isomorphic", help="Among which units they are compared.")] = None
    ignore: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Leave this alone: a name, glob, re:... or op:Conv.")] = None
    targets: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Cut only this.")] = None
    round_to: Annotated[str | None, typer.Option(metavar="auto|N", help="Keep a multiple of N units.")] = None
    min_keep: Annotated[int | None, typer.Option(metavar="N", help="Keep at least so many units of every group.")] = None
    sparsity: Annotated[float | None, typer.Option(metavar="S", help="Zeros inside tensors instead of removed units.")] = None
    pattern: Annotated[str | None, typer.Option(metavar="P", help="Of the zeros: unstructured, 2:4, block:64x64.")] = None
    repair: Annotated[str | None, typer.Option(metavar="A,B", help="Make up for the loss: bn, bias, removed_mean, least_squares.")] = None
    num_samples: Annotated[int | None, typer.Option(metavar="N", help="How many calibration samples to use.")] = None
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of everything random.")] = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the api: only those that were given."""
        given = {
            "recipe": self.recipe,
            "pruning_ratio": _ratios(self.ratio),
            "budget": _budgets(self.budget),
            "units": _words(self.units),
            "importance": self.importance,
            "scope": self.scope,
            "ignore": tuple(self.ignore) if self.ignore else None,
            "targets": tuple(self.targets) if self.targets else None,
            "round_to": _round_to(self.round_to),
            "min_keep": self.min_keep,
            "sparsity": self.sparsity,
            "pattern": self.pattern,
            "repair": _words(self.repair),
            "num_samples": self.num_samples,
            "seed": self.seed,
        }
        return {name: value for name, value in given.items() if value is not None}


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidInput(f"{option} takes a number, found {text!r}") from None


def _ratios(items: list[str] | None) -> float | dict[str, float] | None:
    if not items:
        return None
    found: dict[str, float] = {}
    for item in items:
        pattern, equals, value = item.rpartition("=")
        found[pattern if equals else "*"] = ratio = _number(value, "--ratio")
        if not 0 <= ratio < 1:
            raise InvalidInput(f"--ratio is the fraction that goes, at least 0 and less than 1, found {value}")
    return found["*"] if list(found) == ["*"] else found


def _budgets(items: list[str] | None) -> dict[str, float | str] | None:
    found: dict[str, float | str] = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals:
            raise InvalidInput(f"--budget takes name=value, as in macs=50% or latency_ms=5, found {item!r}")
        number = _number(value.removesuffix("%"), "--budget")
        found[name] = value if value.endswith("%") else number
    return found or None


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _round_to(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise InvalidInput(f"--round-to takes auto or a positive number, found {text!r}")
    return int(text)
