"""Which groups a user means: exact names, globs, "re:..." and "op:Conv", matched on groups, tensors, module paths and op types."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from graphprune.analysis import Analysis
from graphprune.errors import InvalidInput
from graphprune.units import Group, Member, Role


class Selection:
    """The names of one program.

    A name stands for itself and for all that lies below it: `layer1` means every weight of that module. A regular expression must match
    from the first character on.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self._other_names: dict[str, list[str]] = {}
        for alias, name in analysis.program.aliases.items():
            self._other_names.setdefault(name, []).append(alias)

    def touched(self, patterns: Sequence[str]) -> set[str]:
        """Groups of which any member is meant: what must be left alone to leave these modules as they are."""
        return self._groups(patterns, lambda member: True)

    def produced(self, patterns: Sequence[str]) -> set[str]:
        """Groups whose axis is produced or carried by what is meant: what "cut this layer" says."""
        return self._groups(patterns, lambda member: member.role is not Role.READER)

    def _groups(self, patterns: Sequence[str], counts: Callable[[Member], bool]) -> set[str]:
        if isinstance(patterns, str):
            patterns = (patterns,)
        matchers = [self._matcher(pattern) for pattern in patterns]
        return {g.name for g in self.analysis.groups if any(m(self._names(g, counts), self._ops(g, counts)) for m in matchers)}

    def _matcher(self, pattern: str) -> Callable[[set[str], set[str]], bool]:
        """A test of (names, op types); a pattern that meets nothing in the whole network is an error."""
        if pattern.startswith("op:"):
            wanted = _op_key(pattern[3:])
            if wanted not in self._all_ops:
                self._unknown(pattern, "op", [f"op:{op}" for op in sorted({node.op_type for node in self.analysis.program.walk()})])
            return lambda names, ops: wanted in ops
        if pattern.startswith("re:"):
            try:
                match = re.compile(pattern[3:]).match
            except re.error as error:
                raise InvalidInput(f"{pattern!r} is not a regular expression: {error}") from error
        elif any(c in pattern for c in "*?["):
            match = re.compile(fnmatch.translate(pattern)).match
        else:
            match = pattern.__eq__  # type: ignore[assignment]
        if not any(match(name) for name in self._all_names):
            self._unknown(pattern, "name", self._all_names)
        return lambda names, ops: any(match(name) for name in names)

    def _unknown(self, pattern: str, what: str, known: Iterable[str]) -> None:
        close = difflib.get_close_matches(pattern, list(known), 3, 0.4)
        hint = f"close {what}s: {', '.join(close)}" if close else f"`graphprune inspect` lists the {what}s"
        raise InvalidInput(f"no group, tensor, module or op of this network matches {pattern!r}; {hint}")

    def _names(self, group: Group, counts: Callable[[Member], bool]) -> set[str]:
        found = {group.name}
        for member in group.members:
            if counts(member):
                for name in (member.tensor, *self._other_names.get(member.tensor, ()), *(node.scope for node in member.value.uses)):
                    found.update(_path(name))
        return found

    def _ops(self, group: Group, counts: Callable[[Member], bool]) -> set[str]:
        return {_op_key(node.op_type) for member in group.members if counts(member) for node in member.value.uses}

    @cached_property
    def _all_names(self) -> list[str]:
        program = self.analysis.program
        found = dict.fromkeys(group.name for group in self.analysis.groups)
        for name in (*program.weights, *program.aliases, *(node.scope for node in program.walk())):
            found.update(dict.fromkeys(_path(name)))
        found.pop("", None)
        return list(found)

    @cached_property
    def _all_ops(self) -> set[str]:
        return {_op_key(node.op_type) for node in self.analysis.program.walk()}


def _path(name: str) -> list[str]:
    """A dotted name and all that it lies in."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _op_key(op_type: str) -> str:
    """Spelling that both dialects share: Conv, conv2d -> conv; ConvTranspose, conv_transpose2d -> convtranspose."""
    return re.sub(r"[123]d$", "", op_type.lower()).replace("_", "")
