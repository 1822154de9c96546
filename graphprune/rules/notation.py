"""The one-line notation in which a dim rule says how the axes of an op correspond.

    input[... i] weight[o i] + bias[o] -> ... o

Operands are named as in the op's schema; an operand that is absent (None) is skipped. Inside the brackets:

    i        one axis; equal letters are equal axes in all operands and results
    (g o)    one axis that is the product of two, outermost first; sizes of letters may be given by the rule
    ...      any number of leading axes that broadcast against each other
    *        any number of axes that the op fixes (they are frozen, fresh in the result)
    _        one axis that the op fixes

Operands that stand together are multiplied; `+` starts a term that is added; operands after `;` scale or shift by statistics and have no
say in whether the result vanishes. A letter that is missing from the result is contracted (summed over). Several results are separated by
`,`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Operand:
    """`name[axes]`; each axis is a tuple of letters (one letter: a plain axis), or "...", "*", "_"."""

    name: str
    axes: tuple[tuple[str, ...] | str, ...]


@dataclass(frozen=True)
class Spec:
    """A parsed line: terms (sums of products of operands), statistics operands, results."""

    terms: tuple[tuple[Operand, ...], ...]
    statistics: tuple[Operand, ...]
    results: tuple[tuple[tuple[str, ...] | str, ...], ...]

    @property
    def operands(self) -> tuple[Operand, ...]:
        return tuple(operand for term in self.terms for operand in term) + self.statistics


_OPERAND = re.compile(r"\s*([\w.]+)\[([^\]]*)\]\s*")
_AXIS = re.compile(r"\(([^)]*)\)|(\.\.\.)|(\*)|(\w+)")


def _axes(text: str) -> tuple[tuple[str, ...] | str, ...]:
    out: list[tuple[str, ...] | str] = []
    for product, dots, star, word in _AXIS.findall(text):
        out.append(tuple(product.split()) if product else dots or star or (word if word == "_" else (word,)))
    return tuple(out)


def _operands(text: str) -> tuple[Operand, ...]:
    found = _OPERAND.findall(text)
    assert _OPERAND.sub("", text).strip() == "", f"cannot read {text!r}"
    return tuple(Operand(name, _axes(axes)) for name, axes in found)


@cache
def parse(line: str) -> Spec:
    """Read one line of the notation."""
    left, arrow, right = line.partition("->")
    assert arrow, f"no '->' in {line!r}"
    terms, _, statistics = left.partition(";")
    return Spec(
        tuple(_operands(term) for term in terms.split("+")),
        _operands(statistics),
        tuple(_axes(result) for result in right.split(",")),
    )
