"""Reports as text for a terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rewriter.app.sensitivity import Sensitivity
    from rewriter.report import Inspection, RewriteReport

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
