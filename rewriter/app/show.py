"""Reports as text for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rewriter.app.blocks import counted
from rewriter.app.report_schema import error_text
from rewriter.app.terminal import say, show

if TYPE_CHECKING:
    from rewriter.app.report_schema import FinalizeReport, Inspection, QuantizerReport
    from rewriter.app.sensitivity import Sensitivity
    from rewriter.app.verification.claims import Verification

BARS = " ▁▂▃▄▅▆▇█"

COMPUTED_BY = {"fused": "the fused kernel", "decomposed": "single ops"}


def show_inspection(report: Inspection) -> None:
    """Print signatures, a row for each batch norm, and one for whatever else is quantised."""
    for name, signature in report.signatures.items():
        inputs = ", ".join(t.described for t in signature.inputs)
        outputs = ", ".join(t.described for t in signature.outputs)
        say(f"signature {name}({inputs}) -> {outputs}")
    if report.batch_norms:
        _show_batch_norms(report)
    else:
        say("no batch norm found")
    _show_quantizers(report.quantizers)


def _show_batch_norms(report: Inspection) -> None:
    """Print a row for each batch norm, its values, and the sites that cannot be rewritten."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column, justify in (("batch norm", "left"), ("variables", "left"), ("epsilon", "right"), ("momentum", "right")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for column in ("training", "inference"):
        table.add_column(column, justify="right")
    for column in ("computed by", "status"):
        table.add_column(column)
    rows = []
    for bn in report.batch_norms:
        modes = [s.mode for s in bn.sites]
        rows.append(
            (
                bn.name,
                " ".join(bn.variables) or "none",
                f"{bn.epsilon:.4g}",
                "" if bn.momentum is None else f"{bn.momentum:.6g}, {bn.momentum_of}",
                str(len(modes) - modes.count("inference")),
                str(len(modes) - modes.count("training")),
                ", ".join(dict.fromkeys(COMPUTED_BY[s.kind] for s in bn.sites)),
                ", ".join(dict.fromkeys(s.status for s in bn.sites)),
            )
        )
    show(table, rows)
    _show_values(report)
    sites = {(s.graph, s.node): s for bn in report.batch_norms for s in bn.sites}
    say(f"{counted(len(report.batch_norms), 'batch norm')} at {counted(len(sites), 'site')}")
    for site in sites.values():
        if site.reason:
            say(f"skipped: {site.node} in {site.graph or 'the main graph'}: {site.reason}")


def _show_quantizers(quantizers: list[QuantizerReport]) -> None:
    """Print a row for each layer and role whose values are quantised and are not a batch norm's."""
    from rich import box
    from rich.table import Table

    if not quantizers:
        return
    table = Table(box=box.SIMPLE_HEAD, title="what else is quantised")
    table.add_column("layer", overflow="fold")
    for column in ("role", "scheme", "range"):
        table.add_column(column)
    for column in ("bits", "places"):
        table.add_column(column, justify="right")
    show(table, ((q.layer_name, q.role, q.scheme, q.range, str(q.bits), str(len(q.places))) for q in quantizers))


def _show_values(report: Inspection) -> None:
    """Print a row for each variable: its values, and the error that rounding them would make."""
    from rich import box
    from rich.table import Table

    rows = [(bn.name, role, values) for bn in report.batch_norms for role, values in bn.values.items()]
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
    show(
        table,
        (
            (
                *(
                    name,
                    role,
                    str(values.channels),
                    f"{values.least:.4g}",
                    f"{values.greatest:.4g}",
                    _bars(values.histogram),
                ),
                *(error_text(error) for error in values.expected_error.values()),
            )
            for name, role, values in rows
        ),
    )


def _bars(counts: list[int]) -> str:
    """Return a histogram as a line of bars; a bin that is not empty has a visible bar."""
    most = max(counts, default=0) or 1
    # The double minus rounds the height up.
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)


def show_finalized(report: FinalizeReport, target: Path | None, params: Path | None) -> None:
    """Print a row for each baked variable, and the numbers of removed variables and functions."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("variable", overflow="fold")
    for column in ("role", "scheme"):
        table.add_column(column)
    for column in ("bits", "channels", "error"):
        table.add_column(column, justify="right")
    show(
        table,
        (
            (row.variable, row.role, row.scheme, str(row.bits or "off"), str(row.channels), error_text(row.error))
            for row in report.baked
        ),
    )
    say(f"{counted(len(report.baked), 'variable')} quantised for good; signatures: {', '.join(report.signatures)}")
    say(
        f"{counted(len(report.variables_removed), 'other variable')} and "
        f"{counted(report.functions_before - report.functions, 'function')} removed"
    )
    if report.folded or report.not_folded:
        say(f"{counted(len(report.folded), 'batch-norm site')} folded into the convolution before it")
    for site in report.not_folded:
        say(f"not folded: {site.node} in {site.graph}: {site.reason}")
    for note in report.notes:
        say(f"note: {note}")
    for change in report.other_changes:
        say(f"also: {change}")
    if params is not None:
        say(f"codes, scales and zero points are in {params}")
    say("dry run: nothing was written" if target is None else f"written to {target}")


def show_sensitivity(measured: Sensitivity) -> None:
    """Print a row for each layer and role, and a column for each width."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"relative error of the outputs, {counted(measured.inputs, 'input')}")
    table.add_column("layer", justify="right")
    table.add_column("name", overflow="fold")
    table.add_column("role")
    for width in measured.rows[0].error:
        table.add_column(f"{width} bits", justify="right")
    show(
        table,
        (
            (str(row.layer), row.name, row.role, *(f"{error:.2g}" for error in row.error.values()))
            for row in measured.rows
        ),
    )


def show_verification(verification: Verification) -> None:
    """Print a line for each claim, and a row for each output's error."""
    from rich import box
    from rich.table import Table

    colours = {"holds": "green", "fails": "red"}
    say(verification.inputs)
    for claim in verification.claims:
        say(f"{claim.status:15} ", fg=colours.get(claim.status, "yellow"), nl=False)
        say(f"{claim.name}: {claim.detail}")
    for note in verification.notes:
        say(f"note: {note}")
    rows = [row for claim in verification.claims for row in claim.table]
    if rows:
        table = Table(box=box.SIMPLE_HEAD, title="the outputs with quantisers on, to those of the source")
        table.add_column("signature", overflow="fold")
        table.add_column("output", overflow="fold")
        for column in ("largest error", "RMS error", "relative RMS", "same class"):
            table.add_column(column, justify="right")
        show(
            table,
            (
                (
                    *(row.signature, row.output, f"{row.largest:.3g}", f"{row.rms:.3g}"),
                    "" if row.relative_rms is None else f"{row.relative_rms:.3g}",
                    "" if row.agreement is None else f"{row.agreement:.1%}",
                )
                for row in rows
            ),
            width=140,
        )
