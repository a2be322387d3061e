"""A comparison as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rewriter.app.blocks import Line, counted, members, noun_of
from rewriter.app.terminal import printable
from rewriter.diff.report import BATCH_NORM, NODE

if TYPE_CHECKING:
    from rewriter.diff.report import Change, DiffReport, InputDiff, LayerDiff, SiteDiff

SIGNS = {"added": ("+", "green"), "removed": ("-", "red"), "changed": ("~", "yellow"), "missing": ("?", "magenta")}
SHORT = 120
"""Largest number of characters of an attribute that is shown."""
FEW = 12
"""Largest number of ops, of layers' names and of changes in one place that are shown without -v."""
STATUS = {
    "quantised": "quantised",
    "partly": "quantised in some places",
    "finalised": "finalised",
    "no longer quantised": "no longer quantised",
    "as before": "as before",
    "skipped": "not quantised",
    "new": "new",
}


def diff_lines(title: str, report: DiffReport, *, verbose: bool = False) -> Iterator[Line]:
    """Yield what differs in a sentence, other changes, layers and ops, and then changes by function.

    Args:
        title: the names of the models.
        report: the comparison.
        verbose: yield every op, layer, site and change.
    """
    yield Line(title, bold=True)
    yield Line(report.headline)
    if not report.changes:
        return
    yield from _others(report)
    for reason, count in report.skipped.items():
        yield Line(f"not quantised in {counted(count, 'place')}: {reason}")
    verdict = report.verdict
    yield Line(f"{verdict.signatures_intact} of {counted(verdict.signatures_found, 'signature')} intact")
    renamed = list(report.renamed.items())
    for old, new in renamed if verbose else renamed[:FEW]:
        yield Line(f"the function {old} is called {new} now")
    if len(renamed) > FEW and not verbose:
        yield Line(f"and {len(renamed) - FEW} more functions have other names now")
    yield from _layers(report, verbose=verbose)
    yield from _ops(report, verbose=verbose)
    yield from _changes(report, verbose=verbose)
    if not verbose:
        yield Line("")
        yield Line("-v lists every op, place and change; -o FILE.html writes the page")


def _others(report: DiffReport) -> Iterator[Line]:
    """Yield the number of changes that no record explains, and these changes."""
    number = report.verdict.other_changes
    if number is None:
        yield Line("no record: the second model holds no record of a rewrite of the first")
        return
    explained = f" ({len(report.changes) - number} explained by the record of the rewrite)"
    label = f"{number or 'no'} other change{'' if number == 1 else 's'}"
    yield Line(explained, label, "red" if number else "green")
    for change in report.other:
        yield from _change(change)


def _layers(report: DiffReport, *, verbose: bool) -> Iterator[Line]:
    """Yield the layers of one summary together, with the quantisers that they share."""
    groups: dict[tuple[str, str, tuple[tuple[str, str, str], ...]], list[LayerDiff]] = {}
    for layer in report.layers:
        groups.setdefault((layer.kind, _summary(layer), tuple(_quantizers(layer))), []).append(layer)
    if groups:
        yield Line("")
        yield Line("layers", bold=True)
    for (kind, summary, quantizers), layers in groups.items():
        number = len(layers) if kind == BATCH_NORM else sum(members(layer.name) for layer in layers)
        yield Line(f"  {counted(number, noun_of(kind))}: {summary}")
        for role, formula, port in quantizers:
            yield Line(f"    {role} ─ {formula} ─▶ {port}")
        if verbose:
            for layer in layers:
                yield from _sites(layer)
        else:
            names = [layer.name for layer in layers[:FEW]]
            more = f" and {len(layers) - FEW} more" if len(layers) > FEW else ""
            yield Line(f"    in {', '.join(names)}{more}")


def _summary(layer: LayerDiff) -> str:
    """Return what became of a layer: "quantised, 4-bit, now the fused kernel"."""
    widths = f"{', '.join(map(str, layer.bits))}-bit" if layer.bits else ""
    return ", ".join(filter(None, (STATUS[layer.status], widths, "now the fused kernel" if layer.fused else "")))


def _quantizers(layer: LayerDiff) -> dict[tuple[str, str, str], None]:
    """Return the role, formula and input of each quantiser of a layer, each once and in order."""
    return dict.fromkeys(
        (
            entering.role if entering.use == "input" else f"{entering.role} of a batch",
            entering.formula,
            "average" if entering.use == "statistic" else _port(layer, site, entering),
        )
        for use in ("input", "statistic")
        for site in layer.sites
        if site.what != "removed"
        for entering in site.inputs
        if entering.formula and entering.use == use
    )


def _port(layer: LayerDiff, site: SiteDiff, entering: InputDiff) -> str:
    """Return the name of an input; of an op that takes another value than a batch norm's, also the op."""
    if layer.kind == BATCH_NORM:
        return entering.port
    return f"{entering.port} of {site.kind}" if entering.node == site.node else f"what uses the rows of {site.kind}"


def _sites(layer: LayerDiff) -> Iterator[Line]:
    yield Line(f"    {layer.name}")
    for site in layer.sites:
        what = "" if site.what == "same" else f"{site.what}, "
        reason = f": {site.reason}" if site.reason else ""
        op = "" if layer.kind == BATCH_NORM else f" ({site.kind})"
        place = f"{site.node}{op} in {site.graph or 'the main graph'}"
        yield Line(f"      {what}{site.mode}, {site.status}{reason}: {place}")


def _ops(report: DiffReport, *, verbose: bool) -> Iterator[Line]:
    changed = {op: counts for op, counts in report.ops.items() if counts[0] != counts[1]}
    totals = [sum(counts[i] for counts in report.ops.values()) for i in (0, 1)]
    yield Line("")
    yield Line(f"ops: {totals[0]} -> {totals[1]}", bold=True)
    kernels_first = sorted(
        changed.items(), key=lambda item: (not item[0].startswith("FusedBatchNorm"), -abs(item[1][1] - item[1][0]))
    )
    for op, (old, new) in kernels_first[: None if verbose else FEW]:
        yield Line("", f"  {op:32} {old:6} -> {new:<6} {new - old:+}", "green" if new > old else "red")
    if len(changed) > FEW and not verbose:
        yield Line(f"  and {counted(len(changed) - FEW, 'more op')}")


def _changes(report: DiffReport, *, verbose: bool) -> Iterator[Line]:
    """Yield the counts of changes in each function and of each kind; of changes without a record, the first ones."""
    recorded = report.verdict.other_changes is not None
    groups: dict[str, list[Change]] = {}
    for change in (c for c in report.changes if c.by or not recorded):
        name = f"in {change.graph or 'the main graph'}" if change.kind == NODE else f"{change.kind}s"
        groups.setdefault(name, []).append(change)
    yield Line("")
    yield Line("changes", bold=True)
    for name, changes in sorted(groups.items())[: None if verbose else FEW]:
        counts = [f"{sign}{sum(c.what == what for c in changes)}" for what, (sign, _) in SIGNS.items()]
        summary = " ".join(c for c in counts if not c.endswith(("+0", "-0", "~0", "?0")))
        yield Line(f"  {name}: {summary}")
        for change in changes[: None if verbose else 0 if recorded else FEW]:
            yield from _change(change)
    if len(groups) > FEW and not verbose:
        yield Line(f"  and in {counted(len(groups) - FEW, 'more place')}")


def _change(change: Change) -> Iterator[Line]:
    sign, colour = SIGNS[change.what]
    where = f" in {change.graph or 'the main graph'}" if change.kind == NODE and not change.by else ""
    what = f" {change.op}" if change.op else "" if change.kind == NODE else f" ({change.kind})"
    passes = f", by {','.join(change.by)}" if change.by else ""
    yield Line(f"{what}{where}{passes}", f"  {sign} {change.name}", colour)
    for detail in change.details:
        port = f" ({detail.port})" if detail.port else ""
        if detail.old is None and detail.new is None:
            yield Line(f"      {detail.aspect}{port}: as before, though the record has a change")
        elif change.what == "changed":
            yield Line(f"      {detail.aspect}{port}: {' -> '.join(_pair(detail.old, detail.new))}")


def _pair(old: str | None, new: str | None) -> tuple[str, str]:
    """Return both texts; long ones are cut to the part around the first difference."""
    texts = ["none" if text is None else printable(text) for text in (old, new)]
    first_difference = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, first_difference - SHORT // 3) if max(map(len, texts)) > SHORT else 0
    old_part, new_part = (
        f"{'…' * (start > 0)}{t[start : start + SHORT]}{'…' * (len(t) > start + SHORT)}" for t in texts
    )
    return old_part, new_part
