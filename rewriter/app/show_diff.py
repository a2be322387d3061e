"""A comparison as text for a terminal; colours only where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewriter.app.show import counted
from rewriter.app.terminal import printable, say
from rewriter.diff.compare import NODE

if TYPE_CHECKING:
    from rewriter.diff.report import Change, DiffReport, LayerDiff

SIGNS = {"added": ("+", "green"), "removed": ("-", "red"), "changed": ("~", "yellow"), "missing": ("?", "magenta")}
SHORT = 120
"""Largest number of characters of an attribute that is shown."""
FEW = 12
"""Largest number of ops, of layers' names and of changes in one place that are shown without -v."""
STATUS = {
    "quantised": "quantised",
    "partly": "quantised in some places",
    "as before": "as before",
    "skipped": "not quantised",
    "new": "new",
}


def show_diff(title: str, report: DiffReport, *, verbose: bool) -> None:
    """Print what differs in a sentence, other changes, ops and layers, and then changes by function.

    Args:
        title: the names of the models.
        report: the comparison.
        verbose: print every op, layer, site and change.
    """
    verdict = report.verdict
    say(title, bold=True)
    say(report.headline)
    if not report.changes:
        return
    if verdict.other_changes is None:
        say("no record: the second model holds no record of a rewrite of the first")
    else:
        colour = "red" if verdict.other_changes else "green"
        other_changes = f"{verdict.other_changes or 'no'} other change{'' if verdict.other_changes == 1 else 's'}"
        say(other_changes, fg=colour, bold=True, nl=False)
        say(f" ({len(report.changes) - verdict.other_changes} explained by the record of the rewrite)")
    for change in report.other:
        _show_change(change)
    for reason, count in report.skipped.items():
        say(f"not quantised in {counted(count, 'place')}: {reason}")
    say(f"{verdict.signatures_intact} of {counted(verdict.signatures_found, 'signature')} intact")
    for old, new in report.renamed.items():
        say(f"the function {old} is called {new} now")
    _show_layers(report, verbose=verbose)
    _show_ops(report, verbose=verbose)
    _show_changes(report, verbose=verbose)
    if not verbose:
        say("")
        say("-v lists every op, place and change; -o FILE.html writes the page")


def _show_ops(report: DiffReport, *, verbose: bool) -> None:
    changed = {op: counts for op, counts in report.ops.items() if counts[0] != counts[1]}
    totals = [sum(counts[i] for counts in report.ops.values()) for i in (0, 1)]
    say("")
    say(f"ops: {totals[0]} -> {totals[1]}", bold=True)
    kernels_first = sorted(changed.items(), key=lambda item: (not _is_kernel(item[0]), -abs(item[1][1] - item[1][0])))
    for op, (old, new) in kernels_first[: None if verbose else FEW]:
        say(f"  {op:32} {old:6} -> {new:<6} ", nl=False)
        say(f"{new - old:+}", fg="green" if new > old else "red")
    if len(changed) > FEW and not verbose:
        say(f"  and {counted(len(changed) - FEW, 'more op')}")


def _is_kernel(op: str) -> bool:
    return op.startswith("FusedBatchNorm")


def _show_layers(report: DiffReport, *, verbose: bool) -> None:
    """Print the layers of one summary together, with the quantisers that they share."""
    groups: dict[tuple[str, tuple[tuple[str, str, str], ...]], list[LayerDiff]] = {}
    for layer in report.layers:
        groups.setdefault((_summary(layer), tuple(_quantizers(layer))), []).append(layer)
    if groups:
        say("")
        say("layers", bold=True)
    for (summary, quantizers), layers in groups.items():
        say(f"  {counted(len(layers), 'batch norm')}: {summary}")
        for role, formula, port in quantizers:
            say(f"    {role} ─ {formula} ─▶ {port}")
        if verbose:
            for layer in layers:
                _show_sites(layer)
        else:
            names = [layer.name for layer in layers[:FEW]]
            more = f" and {len(layers) - FEW} more" if len(layers) > FEW else ""
            say(f"    in {', '.join(names)}{more}")


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
            entering.port if entering.use == "input" else "average",
        )
        for site in layer.sites
        for entering in site.inputs
        if entering.formula
    )


def _show_sites(layer: LayerDiff) -> None:
    say(f"    {layer.name}")
    for site in layer.sites:
        what = "" if site.what == "same" else f"{site.what}, "
        reason = f": {site.reason}" if site.reason else ""
        say(f"      {what}{site.mode}, {site.status}{reason}: {site.node} in {site.graph or 'the main graph'}")


def _show_changes(report: DiffReport, *, verbose: bool) -> None:
    """Print the counts of changes in each function and of each kind; of changes without a record, the first ones."""
    recorded = report.verdict.other_changes is not None
    groups: dict[str, list[Change]] = {}
    for change in (c for c in report.changes if c.by or not recorded):
        name = f"in {change.graph or 'the main graph'}" if change.kind == NODE else f"{change.kind}s"
        groups.setdefault(name, []).append(change)
    say("")
    say("changes", bold=True)
    for name, changes in sorted(groups.items())[: None if verbose else FEW]:
        counts = [f"{sign}{sum(c.what == what for c in changes)}" for what, (sign, _) in SIGNS.items()]
        summary = " ".join(c for c in counts if not c.endswith(("+0", "-0", "~0", "?0")))
        say(f"  {name}: {summary}")
        for change in changes[: None if verbose else 0 if recorded else FEW]:
            _show_change(change)
    if len(groups) > FEW and not verbose:
        say(f"  and in {counted(len(groups) - FEW, 'more place')}")


def _show_change(change: Change) -> None:
    sign, colour = SIGNS[change.what]
    where = f" in {change.graph or 'the main graph'}" if change.kind == "node" and not change.by else ""
    what = f" {change.op}" if change.op else "" if change.kind == "node" else f" ({change.kind})"
    say(f"  {sign} {change.name}", fg=colour, nl=False)
    say(f"{what}{where}{f', by {chr(44).join(change.by)}' if change.by else ''}")
    for detail in change.details:
        port = f" ({detail.port})" if detail.port else ""
        if detail.old is None and detail.new is None:
            say(f"      {detail.aspect}{port}: as before, though the record has a change")
        elif change.what == "changed":
            say(f"      {detail.aspect}{port}: {' -> '.join(_pair(detail.old, detail.new))}")


def _pair(old: str | None, new: str | None) -> tuple[str, str]:
    """Return both texts; long ones are cut to the part around the first difference."""
    texts = ["none" if text is None else printable(text) for text in (old, new)]
    first_difference = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, first_difference - SHORT // 3) if max(map(len, texts)) > SHORT else 0
    old_part, new_part = (
        f"{'…' * (start > 0)}{t[start : start + SHORT]}{'…' * (len(t) > start + SHORT)}" for t in texts
    )
    return old_part, new_part
