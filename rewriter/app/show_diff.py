"""A comparison as text for a terminal; colours only where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewriter.app.blocks import counted
from rewriter.app.terminal import printable, say

if TYPE_CHECKING:
    from rewriter.diff.report import Change, DiffReport

SIGNS = {"added": ("+", "green"), "removed": ("-", "red"), "changed": ("~", "yellow"), "missing": ("?", "magenta")}
SHORT = 120
"""Largest number of characters of an attribute that is shown."""


def show_diff(title: str, report: DiffReport, *, verbose: bool) -> None:
    """Print the verdict, other changes, counts per op and layer, and then all changes by function."""
    verdict = report.verdict
    say(title, bold=True)
    if not report.changes:
        say("the two models are the same")
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
    totals = f"{counted(verdict.batch_norms, 'batch norm')} at {counted(verdict.sites_found, 'site')}"
    added_sites = f"{verdict.sites_added} more in new places"
    say(f"{totals}: {verdict.sites_rewritten} rewritten, {added_sites}, {verdict.sites_skipped} skipped")
    for reason, count in report.skipped.items():
        say(f"  skipped {count}: {reason}")
    say(f"{verdict.signatures_intact} of {counted(verdict.signatures_found, 'signature')} intact")
    for old, new in report.renamed.items():
        say(f"the function {old} is called {new} now")
    _show_ops(report)
    _show_layers(report)
    _show_changes(report, verbose=verbose)


def _show_ops(report: DiffReport) -> None:
    changed = {op: counts for op, counts in report.ops.items() if counts[0] != counts[1]}
    totals = [sum(counts[i] for counts in report.ops.values()) for i in (0, 1)]
    say("")
    say(f"ops: {totals[0]} -> {totals[1]}", bold=True)
    for op, (old, new) in sorted(changed.items(), key=lambda item: -abs(item[1][1] - item[1][0])):
        say(f"  {op:32} {old:6} -> {new:<6} ", nl=False)
        say(f"{new - old:+}", fg="green" if new > old else "red")


def _show_layers(report: DiffReport) -> None:
    if report.layers:
        say("")
        say("layers", bold=True)
    for layer in report.layers:
        states = [f"{site.what}, {site.status}" for site in layer.sites]
        summary = "; ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        say(f"  {layer.name}: {counted(len(layer.sites), 'site')}: {summary}")
        quantizers = dict.fromkeys(
            (
                entering.role if entering.use == "input" else f"{entering.role} of a batch",
                entering.formula,
                entering.port if entering.use == "input" else "average",
            )
            for site in layer.sites
            for entering in site.inputs
            if entering.formula
        )
        for role, formula, port in quantizers:
            say(f"    {role} ─ {formula} ─▶ {port}")


def _show_changes(report: DiffReport, *, verbose: bool) -> None:
    remaining = [c for c in report.changes if c.by or report.verdict.other_changes is None]
    graphs: dict[str, list[Change]] = {}
    for change in remaining:
        graphs.setdefault(change.graph if change.kind == "node" else f"\0{change.kind}", []).append(change)
    for name, changes in sorted(graphs.items()):
        counts = [f"{sign}{sum(c.what == what for c in changes)}" for what, (sign, _) in SIGNS.items()]
        summary = " ".join(c for c in counts if not c.endswith(("+0", "-0", "~0", "?0")))
        heading = f"{name[1:]}s" if name.startswith("\0") else f"in {name or 'the main graph'}"
        say("")
        say(f"{heading}: {summary}", bold=True)
        shown = [c for c in changes if verbose or c.kind != "node" or c.what != "added"]
        for change in shown:
            _show_change(change)
        if len(shown) < len(changes):
            say(f"  {counted(len(changes) - len(shown), 'added node')} (--verbose lists them)")


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
