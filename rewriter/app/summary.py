"""The summary of a rewrite, layers first, in a few lines; and the full list, with sites."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rewriter.app.blocks import Line, Table, columns, counted, layers_named, quantized_text, widths_text

if TYPE_CHECKING:
    from rewriter.app.report_schema import RewriteReport, SkippedLayers

LINES = 8
"""Largest number of lines of a summary."""


def rewrite_headline(report: RewriteReport) -> str:
    """Return the numbers of batch norms that were rewritten and found, and their widths; or what else was quantised."""
    if report.quantizers and not report.layers:
        return f"quantised: {quantized_text(report.quantizers)}"
    number = sum(layer.status == "rewritten" for layer in report.layers)
    widths = f", {widths_text(report.bits)}" if report.bits else ""
    others = f"; {quantized_text(report.quantizers)}" if report.quantizers else ""
    return f"{number} of {counted(len(report.layers), 'batch norm')} {_verb(report)}{widths}{others}"


def rewrite_summary(report: RewriteReport) -> list[Line]:
    """Return at most eight lines: what was found and done, what was left and why, what `train` is, what comes next."""
    first = [_found(report), *_other_values(report)]
    last = [*_train(report), *_schedule(report), *_next(report)]
    room = LINES - len(first) - len(last) - 1
    reasons = [_skipped(report, group) for group in _both_kinds_first(report.skipped_layers)]
    others = [f"note: {note}" for note in _decisions(report)]
    others += [_skipped(report, group) for group in report.skipped_layers if group.by]
    # One of the others has a place even where there are many reasons.
    shown = reasons[: room - bool(others)]
    shown += others[: room - len(shown)]
    hidden = len(reasons) + len(others) - len(shown)
    more = (
        f"; {hidden} more {'reasons or notes' if hidden > 1 else 'reason or note'}: -v prints all, --report writes them"
        if hidden
        else ""
    )
    return [Line(text) for text in (*first, *shown, *last, _written(report) + more)]


def rewrite_list(report: RewriteReport) -> list[Line]:
    """Return all that there is to say: the summary's lines, every site that was left, every note and change."""
    lines = [_found(report), *_other_values(report), *_sites(report), *_schedule(report)]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"also: {change}" for change in report.other_changes]
    return [Line(text) for text in (*lines, *_next(report), _written(report))]


def layers_table(report: RewriteReport) -> Table:
    """Return a row for each batch norm: what became of it, and why."""
    rows = [(layer.name, layer.status, "; ".join(layer.reasons)) for layer in report.layers]
    return Table(columns("batch norm", "result", "reason", folded=True), rows)


def _verb(report: RewriteReport) -> str:
    return "quantised" if report.schedule else "rewritten"


def _found(report: RewriteReport) -> str:
    """Return the numbers of layers by what became of them."""
    number = len(report.layers)
    if not number:
        return "no batch norm found"
    statuses = Counter(layer.status for layer in report.layers)
    parts = [f"{counted(number, 'batch norm')} found", f"{statuses['rewritten']} {_verb(report)}"]
    parts[1] += f" to {widths_text(report.bits)}" if report.bits else ""
    if statuses["partly rewritten"]:
        parts.append(f"{statuses['partly rewritten']} in part")
    if statuses["skipped"]:
        parts.append(f"{statuses['skipped']} left {'in float' if report.schedule else 'as before'}")
    fused = sum(layer.fused for layer in report.layers)
    everything = "it" if number == 1 else "all"
    kernel = f"; {everything if fused == number else fused} became the fused kernel" if fused else ""
    return ", ".join(parts) + kernel


def _other_values(report: RewriteReport) -> Iterator[str]:
    if report.quantizers:
        yield f"{'also ' if report.layers else ''}quantised: {quantized_text(report.quantizers)}"


def _both_kinds_first(groups: Sequence[SkippedLayers]) -> list[SkippedLayers]:
    """Return the reasons of the pass that quantises: first one of batch norms and one of other values."""
    own = [group for group in groups if not group.by]
    first = [next((g for g in own if bool(g.layers) == is_layer), None) for is_layer in (True, False)]
    firsts = [group for group in first if group is not None]
    return [*firsts, *(group for group in own if group not in firsts)]


def _skipped(report: RewriteReport, group: SkippedLayers) -> str:
    """Return a line on the layers that were left as they are for one reason."""
    other = counted(group.others, "value") + ("" if group.by or not report.layers else " of other layers")
    which = layers_named(group.layers) or layers_named(group.ops, "op") or other
    if group.by:
        return f"{group.by} left {which} as before: {group.reason}"
    how = "left in float" if report.schedule else "left as before"
    return f"{how}{' in part' if group.partly else ''}, {which}: {group.reason}"


def _decisions(report: RewriteReport) -> list[str]:
    """Return the notes that are neither details nor the one on `train`, which has a line of its own."""
    return [note for note in report.notes if note != report.train_note and note not in report.details]


def _train(report: RewriteReport) -> Iterator[str]:
    if report.train_note:
        yield report.train_note


def _schedule(report: RewriteReport) -> Iterator[str]:
    """Yield a line on when quantisers begin to act."""
    if not report.bits and not report.quantizers:
        return
    start, ramp = report.schedule["start_step"], report.schedule["ramp_steps"]
    if start:
        rounding = " up to float rounding" if report.sites_fused else ""
        text = f"until step {start}, outputs are those of {report.source or 'the source'}{rounding}"
        text += f"; quantisers act in full from step {start + ramp} on" if ramp else ""
    else:
        text = "quantisers act from step 0 on" + (f", in full from step {ramp} on" if ramp else "")
    freeze = report.schedule.get("freeze_step")
    yield text + ("" if freeze is None else f"; statistics are frozen from step {freeze} on")


def _next(report: RewriteReport) -> Iterator[str]:
    """Yield a line on what to do with the result."""
    if not report.target:
        return
    check = f"`{shlex.join(['bnqat', 'verify', report.source, report.target])}` checks this rewrite"
    name = {"": "", "signature train": "the signature train"}.get(report.train, f"its function {report.train}")
    train = f"fine-tune {report.target} with {name}, then run `bnqat finalize`; " if name else ""
    yield f"next: {train}{check}"


def _written(report: RewriteReport) -> str:
    return f"written to {report.target}" if report.target else "dry run: nothing was written"


def _sites(report: RewriteReport) -> Iterator[str]:
    """Yield lines on sites: their numbers, and each that was left as it was."""
    added = f", {report.sites_added} added in new functions" if report.sites_added else ""
    yield f"{report.sites_rewritten} of {counted(report.sites_found, 'site')} {_verb(report)}{added}"
    if report.sites_fused:
        yield f"{counted(report.sites_fused, 'site')} in single ops became the fused kernel"
    for site in report.skipped:
        yield f"skipped: {site.node} in {site.graph or 'the main graph'}: {site.reason}"
    skipped = {(s.graph, s.node, s.reason) for s in report.skipped}
    for declined in report.declined:
        if (declined.graph, declined.node, declined.reason) not in skipped:
            yield f"{declined.by} left {declined.node} in {declined.graph or 'the main graph'}: {declined.reason}"
