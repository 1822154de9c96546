"""Reports for people: tables and trees that fit 80 columns, plain text when there is no terminal."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleRenderable
from rich.console import Group as Stack
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    from graphprune.report.record import Footprint, Frozen, GroupSummary, KernelChoice, Report, TensorChange

WIDTH = 80
LONGEST = 10  # rows of a list that is shown abbreviated


def plain(renderable: Any, width: int = WIDTH) -> str:
    """`renderable` as text without colours."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, force_terminal=False, legacy_windows=False).print(renderable)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def count(number: float | None) -> str:
    """25557032 -> "25.56 M"."""
    return _scaled(number, 1000, ("", " k", " M", " G", " T"))


def size(number: float | None) -> str:
    """102400000 -> "102.4 MB"."""
    return _scaled(number, 1000, (" B", " kB", " MB", " GB", " TB"))


def _scaled(number: float | None, base: int, units: Sequence[str]) -> str:
    if number is None:
        return "-"
    unit, *larger = units
    while larger and abs(number) >= base:
        number, unit, *larger = number / base, *larger
    return f"{number:.4g}{unit}" if unit != units[0] else f"{number:,.0f}{unit}"


def plural(number: int, noun: str) -> str:
    """1, "group" -> "1 group"; 2 -> "2 groups"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def tail(name: str, width: int) -> str:
    """`name` cut on the left to `width` characters: the end of a dotted name is what tells it from its neighbours."""
    return name if len(name) <= width else "…" + name[1 - width :]


def report(it: Report) -> ConsoleRenderable:
    """The whole report, compact."""
    title = tail(it.model, 50) + (f"   plan {it.plan_hash[:12]}" if it.plan_hash else "")
    parts: list[Any] = [Text(title, style="bold"), _footprints(it), *_speed(it.before, it.after)]
    if it.groups:
        parts.append(_kinds(it.groups))
    if it.rounding:
        parts.append(Text(f"widths  {it.rounding}", style="dim"))
    if it.spread:
        parts.append(Text(f"budget  {it.spread}", style="dim"))
    if it.layers:
        parts.append(shapes(it.layers, LONGEST))
    if it.not_prunable:
        parts.append(_reasons(it.not_prunable))
    if it.passes:
        parts.append(grid(("pass", "time", "effect"), [(p.name, f"{p.seconds:.2f} s", p.effect) for p in it.passes]))
    if it.kernels:
        parts.append(kernels(it.kernels))
    if it.certificate is not None:
        parts.append(certificate(it.certificate))
    if it.seconds:
        parts.append(_times(it.seconds))
    parts += [Text(f"warning: {line}", style="yellow") for line in it.warnings]
    return stack(parts)


def stack(parts: Iterable[Any]) -> ConsoleRenderable:
    """Parts one below the other, a blank line around every table."""
    return Stack(*_spaced(parts))


def _spaced(parts: Iterable[Any]) -> Iterator[Any]:
    before: Any = None
    for part in parts:
        if before is not None and (isinstance(part, Table) or isinstance(before, Table)):
            yield Text("")
        yield part
        before = part


def _times(seconds: Mapping[str, float]) -> Text:
    total = sum(seconds.values())
    stages = ", ".join(f"{stage} {value:.2f}" for stage, value in seconds.items() if value >= 0.05 * total)
    return Text(f"time  {total:.2f} s ({stages})", style="dim")


_COSTS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("parameters", "params", count),
    ("MACs", "macs", count),
    ("size", "bytes", size),
)


def _footprints(it: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for column in ("before", "after", "kept"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, attribute, write in _COSTS:
        old, new = getattr(it.before, attribute), getattr(it.after, attribute)
        if old is not None or new is not None:
            table.add_row(label, write(old), write(new), f"{100 * new / old:.1f} %" if old and new is not None else "-")
    old, new = it.before.latency, it.after.latency
    if old is not None and new is not None:
        table.add_row("latency", f"{old.median_ms:.3g} ms", f"{new.median_ms:.3g} ms", f"{100 * new.median_ms / old.median_ms:.1f} %")
    for metric, (old, new) in it.quality.items():
        table.add_row(escape(metric), f"{old:.4g}", f"{new:.4g}", "")
    return table


def _speed(before: Footprint, after: Footprint) -> list[Text]:
    old, new = before.latency, after.latency
    if old is None or new is None:
        return []
    spread = f"{new.low_ms:.3g} to {new.high_ms:.3g} ms"
    return [Text(f"speed  {old.median_ms / new.median_ms:.2f}x  ({new.backend}, {new.device}; quartiles {spread})")]


def _kinds(groups: Iterable[GroupSummary]) -> Table:
    by_kind = defaultdict(list)
    for group in groups:
        by_kind[group.kind].append(group)
    rows = []
    for kind, members in by_kind.items():
        before, after = sum(g.size for g in members), sum(g.kept for g in members)
        exactness = Counter(g.exact for g in members)
        rows.append((kind, f"{len(members)}", f"{before} -> {after}", ", ".join(f"{n} {name}" for name, n in exactness.items())))
    return grid(("unit", "groups", "units", ""), rows)


def shapes(rows: Sequence[TensorChange], most: int | None = None) -> Table:
    """Shapes before and after, the first `most` of them."""
    shown = rows if most is None else rows[:most]
    cells = [(tail(r.name, 38), _shape(r.before), _shape(r.after)) for r in shown]
    if len(shown) < len(rows):
        cells.append((f"... and {len(rows) - len(shown)} more", "", ""))
    return grid(("weight", "before", "after"), cells)


def _shape(sizes: Sequence[int] | None) -> str:
    return "-" if sizes is None else "x".join(map(str, sizes)) or "scalar"


def _reasons(entries: Iterable[Frozen]) -> Table:
    counted = Counter(entry.reason for entry in entries)
    return grid(("not prunable because", "axes"), [(reason, str(n)) for reason, n in counted.most_common()])


KERNEL_COLUMNS = ("weights", "runs as", "speed-up", "kept", "tokens", "dense", "sparse")


def kernel_rows(choices: Iterable[KernelChoice]) -> list[tuple[str, ...]]:
    """What was decided about masked weights, layers of equal answers in one row; columns as in KERNEL_COLUMNS.

    Where nothing was measured, the reason stands in place of the speed-up.
    """
    alike: dict[tuple, list[KernelChoice]] = defaultdict(list)
    for it in choices:
        alike[it.shape, round(it.density, 2), it.tokens, it.path, it.dense_us, it.sparse_us, it.reason].append(it)
    rows: list[tuple[str, ...]] = []
    for (shape, kept, tokens, path, dense, sparse, reason), them in alike.items():
        weights = (f"{len(them)} x " if len(them) > 1 else "") + "x".join(map(str, shape))
        won = reason if dense is None or not sparse else f"{dense / sparse:.2f}x"
        rows.append((weights, path, won, f"{100 * kept:.0f} %", str(tokens), _micro(dense), _micro(sparse)))
    return rows


def kernels(choices: Iterable[KernelChoice]) -> ConsoleRenderable:
    """The same as a table; what was not measured is one line for each reason."""
    plain, rows = Counter[tuple[str, str]](), []
    for it in choices:
        if it.dense_us is None:
            plain[it.path, it.reason] += 1
        else:
            rows.append(it)
    lines = [Text(f"{plural(number, 'product')} with zeros in the weight, {path}: {why}") for (path, why), number in plain.items()]
    return stack([*([grid(KERNEL_COLUMNS, kernel_rows(rows))] if rows else []), *lines])


def _micro(time: float | None) -> str:
    return "-" if time is None or time == float("inf") else f"{time:.1f} us"


def certificate(it: Mapping[str, Any]) -> ConsoleRenderable:
    """A certificate's line, green only when it passed."""
    status = str(it.get("status", "unknown"))
    style = {"passed": "green", "failed": "bold red"}.get(status, "yellow")
    line = Text.assemble("certificate  ", (status, style))
    if "error" in it and "tolerance" in it:
        formula = "the masked network" if it.get("exact", True) else "the masked network, norms over what is kept"
        verb = "equals" if status == "passed" else "against"
        line.append(f"  {verb} {formula}: error {it['error']:.1e}, tolerance {it['tolerance']:.1e}")
    for note in it.get("notes", ()):
        line.append(f"\n             {note}", style="dim")
    return line


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table of text cells."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in header:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def inventory(
    groups: Sequence[GroupSummary],
    frozen: Sequence[Frozen],
    everything: bool = False,
    blocks: Mapping[str, Sequence[str]] | None = None,
) -> ConsoleRenderable:
    """A tree of what can be cut, by kind, then of what cannot and why; long lists are cut short unless `everything`.

    Args:
        blocks: name of a block -> its groups of kind layer, which go together.
    """
    most = None if everything else LONGEST
    prunable = Tree(f"[bold]prunable[/]: {plural(len(groups), 'group')}")
    by_kind = defaultdict(list)
    for group in groups:
        by_kind[group.kind].append(group)
    for kind, members in by_kind.items():
        total = plural(sum(g.size for g in members), "unit")
        branch = prunable.add(f"[cyan]{kind}[/]: {plural(len(members), 'group')}, {total}")
        for group in _first(branch, members, most):
            line = f"{escape(group.name if everything else tail(group.name, 34))}  {plural(group.size, 'unit')} x {count(group.parameters)}"
            line += f" in {plural(len(group.members), 'tensor')}"
            leaf = branch.add(line + ("" if group.exact == "exact" else f"  [yellow]{group.exact}[/]"))
            if group.spared:
                leaf.add(Text(group.spared, style="yellow"))
            for member in group.members if everything else ():
                leaf.add(Text(member, style="dim"))
    if blocks:
        branch = prunable.add(f"[cyan]blocks[/]: {len(blocks)}, each all its layers together")
        for name, parts in _first(branch, list(blocks.items()), most):
            leaf = branch.add(Text(f"{name if everything else tail(name, 40)}  {plural(len(parts), 'layer')}"))
            for part in parts if everything else ():
                leaf.add(Text(part, style="dim"))
    kept = Tree(f"[bold]not prunable[/]: {len(frozen)}")
    by_reason = defaultdict(list)
    for entry in frozen:
        by_reason[entry.reason].append(entry)
    for reason, entries in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        branch = kept.add(f"[magenta]{escape(reason)}[/]: {len(entries)}")
        for entry in _first(branch, entries, None if everything else 4):
            name = entry.name if everything else tail(entry.name, 40)
            branch.add(Text.assemble(name, (f"  at {entry.node}" if entry.node else "", "dim")))
        for hint in dict.fromkeys(entry.hint for entry in entries if entry.hint):
            branch.add(Text(f"hint: {hint}", style="yellow"))
    return Stack(prunable, kept) if frozen else prunable


def _first(branch: Tree, items: Sequence[Any], most: int | None) -> Iterable[Any]:
    shown = items if most is None or len(items) <= most + 1 else items[:most]
    yield from shown
    if len(shown) < len(items):
        branch.add(Text(f"... {len(items) - len(shown)} more (--all shows them)", style="dim"))


def explanation(rows: Iterable[tuple[str, int, Any]]) -> list[dict[str, Any]]:
    """What `program.explain` found, one record per weight axis and group or reason."""
    found = []
    for tensor, axis, what in rows:
        name = getattr(what, "name", None)
        verdict = f"{what.size} units of group {name}" + (f"; {what.spared}" if what.spared else "") if name is not None else str(what)
        found.append({"weight": tensor, "axis": axis, "prunable": name is not None, "why": verdict})
    return found


def methods(rows: Sequence[Mapping[str, str]]) -> ConsoleRenderable:
    """Recipes as `Recipe.describe` puts them, a table for each unit: the score, and below it the other parts."""
    by_unit = defaultdict(list)
    for row in rows:
        by_unit[row["unit"], row["amount"]].append(row)
    longest = max(len(row["name"]) for row in rows)
    parts = []
    for (unit, amount), members in by_unit.items():
        table = grid(("recipe", f"unit: {unit}\nby {amount}", "paper"), ())
        table.expand, (name, score, paper) = True, table.columns
        name.width, score.ratio, paper.width = longest, 1, 26  # the same in all of them
        for row in members:
            steps = [f"{part} {row[part]}" for part in ("prepare", "allocation", "repair") if row[part] != "-"]
            line = "; ".join([*steps, *(["needs data"] if row["data"] == "yes" else [])])
            source = row["paper"].replace(", arXiv", "\narXiv")
            table.add_row(f"[cyan]{escape(row['name'])}[/]", f"{escape(row['score'])}\n[dim]{escape(line)}[/]", escape(source))
        parts.append(table)
    return stack(parts)


def listing(rows: Sequence[Mapping[str, Any]]) -> ConsoleRenderable:
    """Rows of equal keys as a table under these keys."""
    return grid(list(rows[0]), [[_word(cell) for cell in row.values()] for row in rows]) if rows else Text("none")


def _word(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_word, value))
    return str(getattr(value, "__name__", value))
