"""The report as one HTML page that needs nothing else: no network, no fonts, no libraries.

Sentences, figures and the certificate are written here, so they read without JavaScript too; plots and long tables are drawn by `page.js`
from the data at the end of the page. Whatever comes from a model (names, reasons, notes) is escaped, and the page forbids itself to load
anything.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from graphprune.errors import Reason
from graphprune.report import tables

if TYPE_CHECKING:
    from graphprune.report.record import Report

KINDS: Mapping[str, str] = {  # what one unit of each kind is
    "channel": "one feature map that a convolution makes",
    "neuron": "one hidden value of a fully connected layer",
    "head": "one attention head",
    "kv_group": "one key/value head with all query heads that share it",
    "head_dim": "one coordinate inside every attention head of a layer",
    "expert": "one expert network of a mixture",
    "hidden": "one coordinate of the stream that all layers read and add to",
    "layer": "a whole branch beside a skip connection",
    "ssm_head": "one head of a state-space layer",
    "ssm_state": "one coordinate of a state-space layer's memory",
    "vocab": "one entry of the vocabulary",
    "token": "one position of the sequence",
}

EXACTNESS: Mapping[str, str] = {
    "exact": "removing a unit gives what the network gives with the unit set to zero.",
    "renormalised": "a normalisation averages over these units; after the cut it averages over those that stay.",
    "approximate": "a sum runs over these units where a removed one would still have counted.",
}

MEANINGS: Mapping[str, str] = {  # of the reasons why something cannot be cut, for readers who do not know the compiler
    Reason.INPUT.value: "What is fed to the network fixes this size: an image has its colour channels, whatever goes inside.",
    Reason.OUTPUT.value: "Removing a part of it would change the shape of the answer.",
    Reason.DYNAMIC.value: "Its size changes from call to call, like the batch or the length of a text, so it has no fixed units.",
    Reason.NO_RULE.value: "It is not known how this operation ties its inputs to its outputs, so all of them are left alone.",
    Reason.FIXED.value: "The operation needs just these positions: height and width of a convolution's window, for example.",
    Reason.UNALIGNED.value: "Two reshapes divide it in ways that do not fit together, so no set of positions can go as one.",
    Reason.UNTAGGED_INDEX.value: "Numbers that come up at run time pick positions of it, and they would point elsewhere after a cut.",
    Reason.CONTROL_FLOW.value: "It enters or leaves the body of a loop or of a condition, which is kept as it is.",
    Reason.QUANTIZED.value: "It holds packed integers that share a scale.",
    Reason.NO_PARAMETER.value: "No weight lies along it, so nothing would be saved.",
    Reason.SHARED_STORAGE.value: "Two weights share a part of their memory, and cutting one would damage the other.",
    Reason.PARAMETRIZED.value: "The weight is computed from others at every call, by weight normalisation for example.",
}

_STATUS: Mapping[str, tuple[str, str, str]] = {  # class, word, sentence
    "passed": ("good", "verified", "The result was shown to compute what the original computes with the removed units masked."),
    "failed": ("bad", "failed", "The result does not compute what the original computes with the removed units masked: do not use it."),
    "ill-conditioned": ("open", "inconclusive", "This network magnifies rounding so much that the comparison proves little."),
    "not tested": ("open", "not tested", "Masking the removed units changed too little for the comparison to prove anything."),
    "": ("open", "not verified", "Nobody checked that the result computes what the original computes with the removed units masked."),
}


def html(report: Report) -> str:
    """The page."""
    return Template(_read("page.html")).substitute(
        css=_read("page.css"),
        js=_read("page.js"),
        title=escape(report.model or "network"),
        badge=_badge(report),
        lead=_lead(report),
        cards=_cards(report),
        warnings=_warnings(report.warnings),
        quality=_quality(report),
        kinds=_kinds(report),
        exactness=_exactness(report),
        timing=escape(report.timing or "not measured"),
        rounding=escape(
            (f" Widths are kept in {report.rounding}." if report.rounding else "")
            + (f" Under the budget {report.spread}." if report.spread else "")
        ),
        kernels=_kernels(report),
        certificate=_certificate(report.certificate),
        again=_again(report),
        work=_work(report),
        version=escape(_version()),
        data=_embedded(data(report)),
    )


def data(report: Report) -> dict[str, Any]:
    """What the page's script draws, as rows without names to keep large networks small."""
    reasons: dict[str, list[list[str]]] = defaultdict(list)
    hints: dict[str, dict[str, None]] = defaultdict(dict)
    for it in report.not_prunable:
        reasons[it.reason].append([it.name, it.node])
        if it.hint:
            hints[it.reason][it.hint] = None
    return {
        "layers": [[c.name, c.op, *c.params, *c.macs, *(c.width or (None, None)), *(c.ms or (None, None))] for c in report.costs],
        "groups": [[g.name, g.kind, g.size, g.kept, g.parameters, g.exact, g.note, list(g.members), g.spared] for g in report.groups],
        "shapes": [[it.name, it.before, it.after] for it in report.layers],
        "frozen": [[reason, MEANINGS.get(reason, ""), list(hints[reason]), rows] for reason, rows in reasons.items()],
    }


def _read(name: str) -> str:
    return files("graphprune.report").joinpath(name).read_text(encoding="utf-8")


def _embedded(it: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    return json.dumps(it, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _version() -> str:
    try:
        return version("graphprune")
    except PackageNotFoundError:  # run from a checkout
        return ""


# ---- the top of the page


def _status(certificate: Mapping[str, Any] | None) -> tuple[str, str, str]:
    status = "" if certificate is None else str(certificate.get("status", ""))
    return _STATUS.get(status, ("open", status, ""))


def _badge(report: Report) -> str:
    style, word, _ = _status(report.certificate)
    return f'<a class="badge {style}" href="#certificate">{escape(word)}</a>'


def _lead(report: Report) -> str:
    before, after = report.before, report.after
    parts = [f"This network went from <b>{_count(before.params)}</b> to <b>{_count(after.params)}</b> parameters"]
    if before.macs and after.macs is not None:
        parts.append(f" and from {_count(before.macs)} to {_count(after.macs)} multiply-accumulates per call")
    return f"<p>{''.join(parts)}. {_status(report.certificate)[2]}</p>"


def _cards(report: Report) -> str:
    before, after = report.before, report.after
    rows: list[tuple[str, str, float | None, float | None, Callable[[Any], str]]] = [
        ("Parameters", "numbers that were learned", before.params, after.params, _count),
        ("MACs", "multiply-accumulates of one call on the example inputs", before.macs, after.macs, _count),
        ("Size", "bytes of all weights", before.bytes, after.bytes, lambda it: _thin(tables.size(it))),
    ]
    if before.latency is not None and after.latency is not None:
        where = f"median time of one call: {after.latency.backend}, {after.latency.device}"
        rows.append(("Latency", where, before.latency.median_ms, after.latency.median_ms, lambda it: f"{it:.3g}{_unit('ms')}"))
    return "".join(_card(name, hint, old, new, write) for name, hint, old, new, write in rows if old is not None and new is not None)


def _card(name: str, meaning: str, before: float, after: float, write: Callable[[Any], str]) -> str:
    kept = after / before if before else 1.0
    return (
        f'<div class="card"><dt>{name}</dt><dd><span class="now">{write(after)}</span><span class="was">of {write(before)}</span>'
        f'<span class="meter" aria-hidden="true"><i style="width:{100 * min(kept, 1):.1f}%"></i></span>'
        f'<span class="share">{100 * kept:.1f}{_unit("%")} kept</span><span class="hint">{escape(meaning)}</span></dd></div>'
    )


def _count(number: float | None) -> str:
    return _thin(tables.count(number))


def _thin(text: str) -> str:
    """A number whose unit stands back behind it."""
    number, _, unit = text.partition(" ")
    return escape(number) + (_unit(unit) if unit else "")


def _unit(name: str) -> str:
    return f'<span class="u">\u202f{name}</span>'


def _warnings(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    shown = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<aside class="note" aria-label="Warnings"><h2>Please note</h2><ul>{shown}</ul></aside>'


def _quality(report: Report) -> str:
    if not report.quality:
        advice = "Quality on a task (accuracy, for example) was not measured: test it on your own data, and fine-tune if needed."
        return f'<p class="soft">{advice}</p>'
    rows = [(escape(name), f"{old:.4g}", f"{new:.4g}") for name, (old, new) in report.quality.items()]
    return _table("Quality before and after", ("Metric", "Before", "After"), rows)


def _table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A small table; cells are HTML already, all but the first `words` columns are numbers."""

    def align(i: int) -> str:
        return ' class="num"' if i >= words else ""

    head = "".join(f'<th scope="col"{align(i)}>{name}</th>' for i, name in enumerate(header))
    cells = (f'<th scope="row">{row[0]}</th>' + "".join(f"<td{align(i)}>{it}</td>" for i, it in enumerate(row[1:], 1)) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    inside = f"<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="small">{inside}</table></div>'


# ---- groups


def _kernels(report: Report) -> str:
    """How weights with zeros run, where a backend had to decide."""
    if not report.kernels:
        return ""
    header = [it.capitalize() for it in tables.KERNEL_COLUMNS]
    rows = [tuple(map(escape, row)) for row in tables.kernel_rows(report.kernels)]
    return _table("How products with zeros in their weights run", header, rows, words=3)


def _kinds(report: Report) -> str:
    sums: dict[str, list[int]] = {}
    for group in report.groups:
        found = sums.setdefault(group.kind, [0, 0, 0])
        for i, it in enumerate((1, group.size, group.kept)):
            found[i] += it
    names = {kind: f'{escape(kind)}<span class="hint">{KINDS.get(kind, "")}</span>' for kind in sums}
    rows = [(names[kind], *(f"{it:,}" for it in found)) for kind, found in sums.items()]
    return _table("Units by kind", ("Kind of unit", "Groups", "Before", "After"), rows) if rows else ""


def _exactness(report: Report) -> str:
    found = dict.fromkeys(group.exact for group in report.groups)
    terms = "".join(f"<dt>{escape(it)}</dt><dd>{EXACTNESS.get(it, '')}</dd>" for it in found)
    return f'<dl class="terms">{terms}</dl>' if terms else ""


# ---- certificate


def _certificate(it: Mapping[str, Any] | None) -> str:
    style, word, sentence = _status(it)
    if it is None:
        return (
            f'<p><span class="badge {style}">{word}</span> {sentence} To check it: '
            "<code>graphprune verify original.onnx small.onnx --plan plan.json</code></p>"
        )
    parts = [f'<p><span class="badge {style}">{escape(word)}</span> {sentence}</p>']
    if "error" in it and "tolerance" in it:
        parts.append(_proof(it))
    parts += [f'<p class="soft">{escape(str(note))}</p>' for note in it.get("notes", ())]
    return "".join(parts)


def _proof(it: Mapping[str, Any]) -> str:
    """What was compared, the figures, and where they lie on a scale."""
    exact, runs = it.get("exact", True), len(it.get("seeds", ()))
    formula = "set to zero" if exact else "masked, and normalisations taken over the units that stay"
    inputs = f"{runs} random {'input' if runs == 1 else 'inputs'}" if runs else "random inputs"
    dtype = f" in {escape(str(it['dtype']))}" if "dtype" in it else ""
    text = f"<p>Two networks ran on {inputs}{dtype}: the pruned one, and the original with the removed units {formula}. "
    text += "Their outputs must be the same but for rounding.</p>"
    marks = [
        ("error", "Difference", "largest difference between the two outputs, relative to the largest output"),
        ("floor", "Rounding", "how far rounding noise alone moves the output"),
        ("tolerance", "Allowed", "the difference must stay below this"),
        ("effect", "Effect of the cut", "how far masking moves the original's output; a cut that moves nothing would prove nothing"),
    ]
    marks = [mark for mark in marks if isinstance(it.get(mark[0]), (int, float))]
    rows = [(f"<i class='mark {key}'></i>{name}<span class='hint'>{meaning}</span>", _power(it[key])) for key, name, meaning in marks]
    return text + _scale({key: float(it[key]) for key, _, _ in marks}) + _table("Figures of the certificate", ("Figure", "Value"), rows)


LOWEST, HIGHEST = -18, 2  # powers of ten that the certificate's scale spans


def _scale(figures: Mapping[str, float]) -> str:
    """Figures on a logarithmic line; left of the tolerance is where the difference must be."""

    def place(value: float) -> float:
        power = math.log10(value) if value > 0 and math.isfinite(value) else (HIGHEST if value else LOWEST)
        return 100 * (min(max(power, LOWEST), HIGHEST) - LOWEST) / (HIGHEST - LOWEST)

    ticks = "".join(f'<span class="tick" style="left:{place(10.0**p):.2f}%">10<sup>{p}</sup></span>' for p in range(-15, HIGHEST, 5))
    marks = "".join(f'<i class="mark {key}" style="left:{place(value):.2f}%"></i>' for key, value in figures.items())
    zone = f'<span class="zone" style="width:{place(figures["tolerance"]):.2f}%"></span>'
    return (
        f'<div class="scale" aria-hidden="true">{zone}{marks}{ticks}</div>'
        '<p class="hint">On this scale every step is ten times the one before; the difference (dot) must lie in the shaded part.</p>'
    )


def _power(value: float) -> str:
    """8.1e-16 -> 8.1 x 10^-16, as HTML."""
    if value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}\u202f×\u202f10<sup>{int(power)}</sup>"


# ---- how to do it again, and what was done


def _again(report: Report) -> str:
    is_file = report.model.endswith(".onnx")
    source = shlex.quote(report.model) if is_file else "model.onnx"
    python = ["import graphprune as gp", "", 'plan = gp.Plan.load("plan.json")']
    python += [f'assert plan.hash == "{report.plan_hash}"'] if report.plan_hash else []
    if is_file:
        python += [f"result = gp.apply({report.model!r}, plan)", 'result.save("small.onnx")']
    else:
        python += ["result = gp.apply(model, plan, example_inputs)", "small = result.module"]
    blocks = [
        ("On the command line (for an ONNX file, or a folder with a checkpoint)", f"graphprune apply plan.json {source} -o small.onnx"),
        ("In Python", "\n".join(python)),
        ("Check the result again", f"graphprune verify {source} small.onnx --plan plan.json"),
    ]
    shown = [f'<p>Hash of this plan: <code class="hash">{escape(report.plan_hash)}</code></p>'] if report.plan_hash else []
    for title, code in blocks:
        pre = f'<pre tabindex="0"><code>{escape(code)}</code></pre>'
        shown.append(f'<figure class="code"><figcaption>{title}</figcaption>{pre}</figure>')
    return "".join(shown)


def _work(report: Report) -> str:
    parts = []
    if report.passes:
        ran = [(escape(it.name), escape(it.effect), f"{it.seconds:.2f}{_unit('s')}") for it in report.passes]
        parts.append(_table("What ran", ("Pass", "What it changed", "Time"), ran, words=2))
    if report.seconds:
        rows = [(escape(stage), f"{value:.2f}{_unit('s')}") for stage, value in report.seconds.items()]
        rows.append(("<b>all</b>", f"<b>{sum(report.seconds.values()):.2f}{_unit('s')}</b>"))
        parts.append(_table("Where the time went", ("Stage", "Time"), rows))
    return f'<div class="side">{"".join(parts)}</div>' if parts else '<p class="soft">Nothing was recorded.</p>'
