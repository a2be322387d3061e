"""Reports as text for a terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from rewriter.app.sensitivity import Sensitivity
    from rewriter.app.verification.claims import Verification
    from rewriter.report import FinalizeReport, Inspection, RewriteReport

BARS = " ▁▂▃▄▅▆▇█"

COMPUTED_BY = {"fused": "the fused kernel", "decomposed": "single ops"}


def show_inspection(report: Inspection) -> None:
    """Print signatures, and a row for each batch norm."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    for name, signature in report.signatures.items():
        inputs = ", ".join(t.described for t in signature.inputs)
        outputs = ", ".join(t.described for t in signature.outputs)
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
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    _show_values(console, report)
    sites = {(s.graph, s.node): s for bn in report.batch_norms for s in bn.sites}
    click.echo(f"{counted(len(report.batch_norms), 'batch norm')} at {counted(len(sites), 'site')}")
    for site in sites.values():
        if site.reason:
            click.echo(f"skipped: {site.node} in {site.graph or 'the main graph'}: {site.reason}")


def _show_values(console: Console, report: Inspection) -> None:
    """A row for each variable: what is in it, and what rounding it would cost."""
    from rich import box
    from rich.table import Table

    rows = [(bn.name, role, held) for bn in report.batch_norms for role, held in bn.values.items()]
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, title="values, and the expected error of the default quantisers")
    for column in ("batch norm", "role"):
        table.add_column(column, overflow="fold")
    for column in ("channels", "least", "greatest"):
        table.add_column(column, justify="right")
    table.add_column("histogram", no_wrap=True)
    for bits in rows[0][2].expected_error:
        table.add_column(f"{bits} bits", justify="right")
    for name, role, held in rows:
        errors = [f"{error:.2g}" for error in held.expected_error.values()]
        ends = (str(held.channels), f"{held.least:.4g}", f"{held.greatest:.4g}")
        table.add_row(name, role, *ends, _bars(held.histogram), *errors)
    console.print(table)


def _bars(counts: list[int]) -> str:
    """A histogram in a line; what is not empty is seen."""
    most = max(counts, default=0) or 1
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)


def counted(number: int, noun: str) -> str:
    """As "1 site", "2 sites"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def show_rewrite(report: RewriteReport, target: Path | None) -> None:
    """Print what was rewritten, and what was not and why."""
    click.echo(f"{report.sites_rewritten} of {report.sites_found} batch-norm sites rewritten", nl=False)
    click.echo(f", {report.sites_added} more in new places" if report.sites_added else "")
    if report.sites_fused:
        click.echo(f"{counted(report.sites_fused, 'site')} in single ops became the fused kernel")
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


def show_finalized(report: FinalizeReport, target: Path | None, params: Path | None) -> None:
    """Print what was baked into variables, and what is gone."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("variable", overflow="fold")
    for column in ("role", "scheme"):
        table.add_column(column)
    for column in ("bits", "channels", "error"):
        table.add_column(column, justify="right")
    for row in report.baked:
        table.add_row(row.variable, row.role, row.scheme, str(row.bits or "off"), str(row.channels), f"{row.error:.2g}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    click.echo(
        f"{counted(len(report.baked), 'variable')} quantised for good; signatures: {', '.join(report.signatures)}"
    )
    click.echo(
        f"{counted(len(report.variables_removed), 'other variable')} and "
        f"{counted(report.functions_before - report.functions, 'function')} removed"
    )
    if report.folded or report.not_folded:
        click.echo(f"{counted(len(report.folded), 'batch-norm site')} folded into the convolution before it")
    for site in report.not_folded:
        click.echo(f"not folded: {site.node} in {site.graph}: {site.reason}")
    for note in report.notes:
        click.echo(f"note: {note}")
    for change in report.other_changes:
        click.echo(f"also: {change}")
    if params is not None:
        click.echo(f"codes, scales and zero points are in {params}")
    click.echo("dry run: nothing was written" if target is None else f"written to {target}")


def show_sensitivity(found: Sensitivity) -> None:
    """Print a row for each layer and role, and a column for each width."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"relative error of the outputs, {counted(found.inputs, 'input')}")
    table.add_column("layer", justify="right")
    table.add_column("batch norm", overflow="fold")
    table.add_column("role")
    for width in found.rows[0].error:
        table.add_column(f"{width} bits", justify="right")
    for row in found.rows:
        table.add_row(str(row.layer), row.name, row.role, *(f"{error:.2g}" for error in row.error.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def show_verification(found: Verification) -> None:
    """Print a line for each claim, and a row for each output's error."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    colours = {"holds": "green", "fails": "red"}
    click.echo(found.inputs)
    for claim in found.claims:
        click.secho(f"{claim.status:15} ", fg=colours.get(claim.status, "yellow"), nl=False)
        click.echo(f"{claim.name}: {claim.detail}")
    rows = [row for claim in found.claims for row in claim.table]
    if rows:
        table = Table(box=box.SIMPLE_HEAD, title="the outputs with quantisers on, to those of the source")
        table.add_column("signature", overflow="fold")
        table.add_column("output", overflow="fold")
        for column in ("largest error", "RMS error", "relative RMS", "same class"):
            table.add_column(column, justify="right")
        for row in rows:
            relative = "" if row.relative_rms is None else f"{row.relative_rms:.3g}"
            same = "" if row.agreement is None else f"{row.agreement:.1%}"
            table.add_row(row.signature, row.output, f"{row.largest:.3g}", f"{row.rms:.3g}", relative, same)
        Console(width=None if sys.stdout.isatty() else 140).print(table)
