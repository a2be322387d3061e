"""Reports as text for a terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rewriter.app.sensitivity import Sensitivity
    from rewriter.report import Change, DiffReport, Inspection, RewriteReport

SIGNS = {"added": ("+", "green"), "removed": ("-", "red"), "changed": ("~", "yellow"), "missing": ("?", "magenta")}
SHORT = 120
"""How many characters of an attribute are shown."""

COMPUTED_BY = {"fused": "the fused kernel", "decomposed": "single ops"}


def show_inspection(report: Inspection) -> None:
    """Print signatures, and a row for each batch norm."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    for name, signature in report.signatures.items():
        inputs = ", ".join(f"{t.name}: {t.dtype}{_shape(t.shape)}" for t in signature.inputs)
        outputs = ", ".join(f"{t.name}: {t.dtype}{_shape(t.shape)}" for t in signature.outputs)
        click.echo(f"signature {name}({inputs}) -> {outputs}")
    if not report.batch_norms:
        click.echo("no batch norm found")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column, justify in (("batch norm", "left"), ("variables", "left"), ("epsilon", "right"), ("momentum", "right")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for column in ("training", "inference"):
        table.add_column(column, justify="right")
    for column in ("computed by", "status"):
        table.add_column(column)
    for bn in report.batch_norms:
        modes = [s.mode for s in bn.sites]
        table.add_row(
            bn.name,
            " ".join(bn.variables) or "none",
            f"{bn.epsilon:.4g}",
            "" if bn.momentum is None else f"{bn.momentum:.6g}",
            str(len(modes) - modes.count("inference")),
            str(len(modes) - modes.count("training")),
            ", ".join(dict.fromkeys(COMPUTED_BY[s.kind] for s in bn.sites)),
            ", ".join(dict.fromkeys(s.status for s in bn.sites)),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    sites = {(s.graph, s.node): s for bn in report.batch_norms for s in bn.sites}
    click.echo(f"{_count(len(report.batch_norms), 'batch norm')} at {_count(len(sites), 'site')}")
    for site in sites.values():
        if site.reason:
            click.echo(f"skipped: {site.node} in {site.graph or 'the main graph'}: {site.reason}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _shape(shape: list[int | None] | None) -> str:
    return "" if shape is None else "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def show_rewrite(report: RewriteReport, target: Path | None) -> None:
    """Print what was rewritten, and what was not and why."""
    click.echo(f"{report.sites_rewritten} of {report.sites_found} batch-norm sites rewritten", nl=False)
    click.echo(f", {report.sites_added} more in new places" if report.sites_added else "")
    if report.sites_fused:
        click.echo(f"{_count(report.sites_fused, 'site')} in single ops became the fused kernel")
    for site in report.skipped:
        click.echo(f"skipped: {site.node} in {site.graph or 'the main graph'}: {site.reason}")
    told = {(s.graph, s.node, s.reason) for s in report.skipped}
    for left in report.declined:
        if (left.graph, left.node, left.reason) not in told:
            click.echo(f"{left.by} left {left.node} in {left.graph or 'the main graph'}: {left.reason}")
    for note in report.notes:
        click.echo(f"note: {note}")
    for change in report.other_changes:
        click.echo(f"also: {change}")
    click.echo("dry run: nothing was written" if target is None else f"written to {target}")


def show_sensitivity(found: Sensitivity) -> None:
    """Print a row for each layer and role, and a column for each width."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"relative error of the outputs, {_count(found.inputs, 'input')}")
    table.add_column("layer", justify="right")
    table.add_column("batch norm", overflow="fold")
    table.add_column("role")
    for width in found.rows[0].error:
        table.add_column(f"{width} bits", justify="right")
    for row in found.rows:
        table.add_row(str(row.layer), row.name, row.role, *(f"{error:.2g}" for error in row.error.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def show_diff(title: str, report: DiffReport, *, verbose: bool) -> None:
    """Print the verdict, other changes, counts per op and layer, and then what changed, by function."""
    verdict = report.verdict
    click.secho(title, bold=True)
    if not report.changes:
        click.echo("the two models are the same")
        return
    if verdict.other_changes is None:
        click.echo("no record: the second model holds no record of a rewrite of the first")
    else:
        colour = "red" if verdict.other_changes else "green"
        told = f"{verdict.other_changes or 'no'} other change{'' if verdict.other_changes == 1 else 's'}"
        click.secho(told, fg=colour, bold=True, nl=False)
        click.echo(f" ({len(report.changes) - verdict.other_changes} explained by the record of the rewrite)")
    for change in report.other:
        _show_change(change)
    click.echo(
        f"{_count(verdict.batch_norms, 'batch norm')} at {_count(verdict.sites_found, 'site')}: "
        f"{verdict.sites_rewritten} rewritten, {verdict.sites_added} more in new places, {verdict.sites_skipped} skipped"
    )
    for reason, count in report.skipped.items():
        click.echo(f"  skipped {count}: {reason}")
    click.echo(f"{verdict.signatures_intact} of {_count(verdict.signatures_found, 'signature')} intact")
    for old, new in report.renamed.items():
        click.echo(f"the function {old} is called {new} now")
    _show_ops(report)
    _show_layers(report)
    _show_changes(report, verbose=verbose)


def _show_ops(report: DiffReport) -> None:
    changed = {op: counts for op, counts in report.ops.items() if counts[0] != counts[1]}
    totals = [sum(counts[i] for counts in report.ops.values()) for i in (0, 1)]
    click.secho(f"\nops: {totals[0]} -> {totals[1]}", bold=True)
    for op, (old, new) in sorted(changed.items(), key=lambda item: -abs(item[1][1] - item[1][0])):
        click.secho(f"  {op:32} {old:6} -> {new:<6} ", nl=False)
        click.secho(f"{new - old:+}", fg="green" if new > old else "red")


def _show_layers(report: DiffReport) -> None:
    if report.layers:
        click.secho("\nlayers", bold=True)
    for layer in report.layers:
        states = [f"{site.what}, {site.status}" for site in layer.sites]
        told = "; ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        click.echo(f"  {layer.name}: {_count(len(layer.sites), 'site')}: {told}")
        seen = dict.fromkeys((i.role, i.formula, i.port) for s in layer.sites for i in s.inputs if i.formula)
        for role, formula, port in seen:
            click.echo(f"    {role} ─ {formula} ─▶ {port}")


def _show_changes(report: DiffReport, *, verbose: bool) -> None:
    rest = [c for c in report.changes if c not in report.other] if report.other else report.changes
    graphs: dict[str, list[Change]] = {}
    for change in rest:
        graphs.setdefault(change.graph if change.kind == "node" else f"\0{change.kind}", []).append(change)
    for name, changes in sorted(graphs.items()):
        counts = [f"{sign}{sum(c.what == what for c in changes)}" for what, (sign, _) in SIGNS.items()]
        told = " ".join(c for c in counts if not c.endswith(("+0", "-0", "~0", "?0")))
        head = f"{name[1:]}s" if name.startswith("\0") else f"in {name or 'the main graph'}"
        click.secho(f"\n{head}: {told}", bold=True)
        shown = [c for c in changes if verbose or c.kind != "node" or c.what != "added"]
        for change in shown:
            _show_change(change)
        if len(shown) < len(changes):
            click.echo(f"  {_count(len(changes) - len(shown), 'added node')} (--verbose lists them)")


def _show_change(change: Change) -> None:
    sign, colour = SIGNS[change.what]
    where = f" in {change.graph or 'the main graph'}" if change.kind == "node" and not change.by else ""
    what = f" {change.op}" if change.op else "" if change.kind == "node" else f" ({change.kind})"
    click.secho(f"  {sign} {_printable(change.name)}", fg=colour, nl=False)
    click.echo(f"{what}{where}{f', by {chr(44).join(change.by)}' if change.by else ''}")
    for detail in change.details:
        port = f" ({detail.port})" if detail.port else ""
        if detail.old is None and detail.new is None:
            click.echo(f"      {detail.aspect}{port}: as before, though the record has a change")
        elif change.what == "changed":
            click.echo(f"      {detail.aspect}{port}: {_short(detail.old)} -> {_short(detail.new)}")


def _short(text: str | None) -> str:
    if text is None:
        return "none"
    return _printable(text if len(text) <= SHORT else f"{text[:SHORT]}… ({len(text)} characters)")


def _printable(text: str) -> str:
    """Text that cannot steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
