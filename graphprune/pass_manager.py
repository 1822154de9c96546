"""Passes over a program: named, printable, timed, and verified one by one.

A pass is a frozen dataclass; its fields are its options. It lists the *steps* that it would take on a state, then takes some of them. A
limit on steps ("fuel") cuts a pipeline short anywhere, so that `bisect` finds the first step whose result breaks the certificate.

    prune{ratio=0.5,units=channel+head},cleanup,verify

Values are numbers, words, "quoted strings", none, true, false, tuples `a+b` (`a+` holds one, `+` none) and mappings `a:1+b:2` (`:` is
empty).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar

from graphprune import costs
from graphprune.costs import Cost
from graphprune.errors import InvalidInput, VerificationFailed
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.report import PassRecord
from graphprune.surgery import Cut
from graphprune.verify.certificate import Certificate, certify


@dataclass(frozen=True, eq=False)
class State:
    """What passes work on: the program as it is now, and what it must equal."""

    program: Program
    reference: Program  # the network before the last cut
    cut: Cut  # of the reference: `program` is the reference with these units neutralised
    plans: tuple[Plan, ...] = ()
    certificate: Certificate | None = None

    @classmethod
    def of(cls, program: Program) -> State:
        """Nothing done yet."""
        return cls(program, program, Cut(program.analysis, {}))

    def certified(self, seeds: Sequence[int] = (0,)) -> State:
        """The state with a fresh certificate, whatever it says."""
        plan = self.plans[-1].hash if self.plans else ""
        return replace(self, certificate=certify(self.reference, self.program, self.cut, seeds=tuple(seeds), plan_hash=plan))


@dataclass(frozen=True)
class Step:
    """One indivisible change that a pass would make."""

    name: str
    what: Any = None


class Pass:
    """Base of all passes; a subclass is a frozen dataclass with a `name`."""

    name: ClassVar[str]

    def steps(self, state: State) -> Sequence[Step]:
        """What the pass would do, in order."""
        raise NotImplementedError

    def apply(self, state: State, steps: Sequence[Step]) -> State:
        """The state after these steps: the first ones of `steps(state)`, all of them unless fuel ran out."""
        raise NotImplementedError

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != _default(f)]  # type: ignore[arg-type]
        options = ",".join(f"{name}={_printed(value)}" for name, value in changed)
        return self.name + (f"{{{options}}}" if options else "")


@dataclass(frozen=True)
class PassRun:
    """What one pass did."""

    name: str  # the pass with its options
    steps: tuple[str, ...]
    seconds: float  # of the pass; verification is not counted
    before: Cost
    after: Cost
    nodes: tuple[int, int]  # before, after
    certificate: Certificate | None = field(default=None, compare=False)

    @property
    def effect(self) -> str:
        """What changed, in words."""
        pairs = (("parameters", self.before.params, self.after.params), ("MACs", self.before.macs, self.after.macs), ("nodes", *self.nodes))
        return ", ".join(f"{name} {a} -> {b}" for name, a, b in pairs if a != b) or "nothing changed"

    @property
    def record(self) -> PassRecord:
        """As a row of the report."""
        return PassRecord(self.name, self.seconds, self.effect)


@dataclass(frozen=True)
class Outcome:
    """The last state of a pipeline and how it came about."""

    state: State
    runs: tuple[PassRun, ...]

    def __str__(self) -> str:
        return "\n".join(f"{run.name}: {run.effect} ({len(run.steps)} steps, {run.seconds:.2f} s)" for run in self.runs)


@dataclass(frozen=True)
class PassManager:
    """Runs passes in order.

    Args:
        passes: what to run.
        verify: certify after each pass that changed something.
        fuel: the most steps that all passes together take; None has no limit.
    """

    passes: tuple[Pass, ...]
    verify: bool = True
    fuel: int | None = None

    @classmethod
    def parse(cls, text: str, registry: Mapping[str, type[Pass]], **options: Any) -> PassManager:
        """The manager of a printed pipeline."""
        return cls(parse(text, registry), **options)

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def run(self, program: Program) -> Outcome:
        """All passes, from a program.

        Raises:
            VerificationFailed: the result of a pass is not what it must equal; the message names the pass.
        """
        state, runs, left = State.of(program), [], self.fuel
        for each in self.passes:
            before, start = state.program, time.perf_counter()
            steps = list(each.steps(state))
            if left is not None:
                steps = steps[:left]
                left -= len(steps)
            state = each.apply(state, steps)
            seconds = time.perf_counter() - start
            changed = state.program is not before
            if self.verify and changed:
                state = state.certified()
            certificate = state.certificate
            if certificate is not None and certificate.status == "failed":
                raise VerificationFailed(
                    f"after {each} the network is not what it must equal: {certificate}; graphprune.pass_manager.bisect finds the step"
                )
            nodes = (len(before.nodes), len(state.program.nodes))
            names = tuple(step.name for step in steps)
            runs.append(PassRun(str(each), names, seconds, costs.cost(before), costs.cost(state.program), nodes, certificate))
        return Outcome(state, tuple(runs))


@dataclass(frozen=True)
class Culprit:
    """The first step whose result breaks the certificate."""

    name: str  # of the pass, with its options
    step: str
    index: int  # how many steps of the pipeline come before it
    error: str


def bisect(passes: Iterable[Pass], program: Program) -> Culprit | None:
    """The first wrong step of a pipeline, found by running it with less and less fuel; None where all is well.

    A step is wrong when a certificate fails after it, or when the pass or the network does not run any more.
    """
    passes = tuple(passes)

    def failure(fuel: int | None) -> str:
        try:
            PassManager(passes, fuel=fuel).run(program)
        except Exception as error:  # a wrong rewrite shows itself in any way
            return f"{type(error).__name__}: {error}"
        return ""

    if not failure(None):
        return None
    if failure(0):
        raise InvalidInput(f"the pipeline fails before its first step: {failure(0)}")
    good, bad = 0, 1
    while not failure(bad):  # the number of steps is not known beforehand: later ones depend on earlier ones
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if failure(middle) else (middle, bad)
    name, step = _step(passes, program, good)
    return Culprit(name, step, good, failure(bad))


def _step(passes: Sequence[Pass], program: Program, index: int) -> tuple[str, str]:
    """Pass and name of the step at an index, given that those before it are right."""
    state, left = State.of(program), index
    for each in passes:
        steps = list(each.steps(state))
        if left < len(steps):
            return str(each), steps[left].name
        left -= len(steps)
        state = each.apply(state, steps)
    raise AssertionError("the pipeline has fewer steps")


# ---- text


def _default(option: Any) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default


_WORD = r"[A-Za-z_*][\w.*/\[\]-]*"
_STRING, _NUMBER = r'"(?:[^"\\]|\\.)*"', r"-?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|inf)"
_TOKENS = re.compile(rf"\s*(?:(?P<string>{_STRING})|(?P<number>{_NUMBER})|(?P<word>{_WORD})|(?P<mark>[{{}}=,:+]))")
_NAMES: dict[str, Any] = {"none": None, "true": True, "false": False}


def _printed(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(f"{_scalar(k)}:{_scalar(v)}" for k, v in value.items()) or ":"
    if isinstance(value, tuple):
        return "+".join(map(_scalar, value)) + "+" * (len(value) < 2)
    return _scalar(value)


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return value if re.fullmatch(_WORD, value) and value not in _NAMES else json.dumps(value)
    raise InvalidInput(f"an option of a pass is a number, a string, none, true, false, a tuple or a mapping of these, found {value!r}")


def parse(text: str, registry: Mapping[str, type[Pass]]) -> tuple[Pass, ...]:
    """Passes from their printed form: `parse(str(p), registry) == (p,)`.

    Raises:
        InvalidInput: a name is unknown, or the text is no pipeline.
    """
    return tuple(_Parser(text, registry).pipeline())


class _Parser:
    def __init__(self, text: str, registry: Mapping[str, type[Pass]]) -> None:
        self.text, self.registry, self.at = text, registry, 0
        self.kind, self.token = "", ""
        self.advance()

    def advance(self) -> str:
        """Read the next token; the one before is returned."""
        before = self.token
        found = _TOKENS.match(self.text, self.at)
        if found is None and self.text[self.at :].strip():
            rest = self.text[self.at :].strip()
            raise InvalidInput(f"{self.text!r} is no pipeline of passes: {rest[0]!r} at position {self.at} is not understood")
        self.kind, self.token = (found.lastgroup or "", found[found.lastgroup or 0]) if found else ("end", "")
        self.at = found.end() if found else len(self.text)
        return before

    def expect(self, *wanted: str) -> str:
        if self.token not in wanted and self.kind not in wanted:
            what = f"expected {' or '.join(wanted)} before position {self.at}, found {self.token or 'the end'!r}"
            raise InvalidInput(f"{self.text!r} is no pipeline of passes: {what}")
        return self.advance()

    def pipeline(self) -> Iterator[Pass]:
        while True:
            yield self.single()
            if self.kind == "end":
                return
            self.expect(",")

    def single(self) -> Pass:
        name = self.expect("word")
        if name not in self.registry:
            raise InvalidInput(f"no pass is named {name!r}; known are {', '.join(self.registry)}")
        options: dict[str, Any] = {}
        if self.token == "{":
            self.advance()
            known = [f.name for f in fields(self.registry[name])]  # type: ignore[arg-type]
            while self.token != "}":
                option = self.expect("word")
                if option not in known:
                    raise InvalidInput(f"pass {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}")
                self.expect("=")
                options[option] = self.value()
                if self.token != "}":
                    self.expect(",")
            self.advance()
        return self.registry[name](**options)

    def value(self) -> Any:
        if self.token == "+":
            self.advance()
            return ()
        if self.token == ":":
            self.advance()
            return {}
        items, pairs = [self.scalar()], {}
        if self.token == ":":
            self.advance()
            key = items.pop()
            pairs[key] = self.scalar()
            while self.token == "+":
                self.advance()
                key = self.scalar()
                self.expect(":")
                pairs[key] = self.scalar()
            return pairs
        if self.token != "+":
            return items[0]
        while self.token == "+":
            self.advance()
            if self.kind in ("string", "number", "word"):
                items.append(self.scalar())
        return tuple(items)

    def scalar(self) -> Any:
        kind = self.kind
        token = self.expect("string", "number", "word")
        if kind == "string":
            return json.loads(token)
        if kind == "number":
            return int(token) if re.fullmatch(r"-?\d+", token) else float(token)
        return _NAMES.get(token, token)


__all__ = ["Culprit", "Outcome", "Pass", "PassManager", "PassRun", "State", "Step", "bisect", "parse"]
