"""Inspections as lines and tables, layers first; sites and all weights are listed on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rewriter.app.blocks import (
    Block,
    Column,
    Line,
    Table,
    columns,
    counted,
    layers_named,
    quantized_text,
    quantizers_table,
)
from rewriter.app.relative_error import error_text

if TYPE_CHECKING:
    from rewriter.app.report_schema import BatchNormReport, Inspection, WeightReport

BARS = " ▁▂▃▄▅▆▇█"

ROWS = 60
"""Largest number of weights that a table shows, unless all are asked for."""

COMPUTED_BY = {"fused": "the fused kernel", "decomposed": "single ops"}


def inspection_blocks(report: Inspection, *, sites: bool = False) -> Iterator[Block]:
    """Yield signatures, a row for each batch norm and its values, one for each weight and whatever else is quantised.

    Args:
        report: the inspection.
        sites: yield every site, and every weight of many.
    """
    for name, signature in report.signatures.items():
        inputs = ", ".join(t.described for t in signature.inputs)
        outputs = ", ".join(t.described for t in signature.outputs)
        yield Line(f"signature {name}({inputs}) -> {outputs}")
    if report.batch_norms:
        yield _batch_norms(report.batch_norms, sites=sites)
        yield from _values(report.batch_norms)
        yield from _site_lines(report) if sites else _layer_lines(report)
    else:
        yield Line("no batch norm found")
    yield from _weights(report, verbose=sites)
    if report.quantizers:
        yield quantizers_table(
            report.quantizers, "what else is quantised" if report.batch_norms else "what is quantised"
        )


def inspection_headline(report: Inspection) -> str:
    """Return the numbers of batch norms by status, and of weights; without batch norms, what is quantised."""
    parts = [_batch_norm_numbers(report)] if report.batch_norms else []
    if not parts:
        parts = [f"quantised: {quantized_text(report.quantizers)}" if report.quantizers else "no batch norm"]
    return "; ".join([*parts, weights_total(report)] if report.weights else parts)


def _batch_norm_numbers(report: Inspection) -> str:
    """Return the number of batch norms, and how many have each status."""
    statuses = Counter(bn.status for bn in report.batch_norms)
    parts = ", ".join(f"{count} {status}" for status, count in statuses.items())
    return f"{counted(len(report.batch_norms), 'batch norm')}{': ' if parts else ''}{parts}"


def _batch_norms(batch_norms: Sequence[BatchNormReport], *, sites: bool) -> Table:
    """Return a row for each batch norm; with the numbers of its sites, if these are asked for."""
    heads = [
        *columns("batch norm", "variables", folded=True),
        *columns("epsilon", "momentum", *(("training", "inference") if sites else ()), justify="right"),
        *columns("computed by", "status"),
    ]
    rows = []
    for bn in batch_norms:
        modes = [s.mode for s in bn.sites]
        numbers = (str(len(modes) - modes.count("inference")), str(len(modes) - modes.count("training")))
        rows.append(
            (
                bn.name,
                " ".join(bn.variables) or "none",
                f"{bn.epsilon:.4g}",
                "" if bn.momentum is None else f"{bn.momentum:.6g}, {bn.momentum_of}",
                *(numbers if sites else ()),
                ", ".join(dict.fromkeys(COMPUTED_BY[s.kind] for s in bn.sites)),
                bn.status,
            )
        )
    return Table(heads, rows)


def _layer_lines(report: Inspection) -> Iterator[Line]:
    """Yield the numbers of layers, and those that cannot be rewritten, by reason."""
    yield Line(_batch_norm_numbers(report))
    for group in report.skipped_layers:
        part = " in part" if group.partly else ""
        yield Line(f"cannot be rewritten{part}, {layers_named(group.layers)}: {group.reason}")


def _site_lines(report: Inspection) -> Iterator[Line]:
    """Yield the numbers of layers and sites, and each site that cannot be rewritten."""
    sites = {(s.graph, s.node): s for bn in report.batch_norms for s in bn.sites}
    yield Line(f"{_batch_norm_numbers(report)}; {counted(len(sites), 'site')}")
    for site in sites.values():
        if site.reason:
            yield Line(f"cannot be rewritten: {site.node} in {site.graph or 'the main graph'}: {site.reason}")


def _values(batch_norms: Sequence[BatchNormReport]) -> Iterator[Table]:
    """Yield a table of the variables' values, and of the error that rounding them would make, if they are known."""
    held = [(bn.name, role, values) for bn in batch_norms for role, values in bn.values.items()]
    if not held:
        return
    widths = held[0][2].expected_error
    heads = [
        *columns("batch norm", "role", folded=True),
        *columns("channels", "least", "greatest", justify="right"),
        Column("histogram", unbroken=True),
        *columns(*(f"{bits} bits" for bits in widths), justify="right"),
    ]
    rows = [
        (
            *(name, role, str(values.channels), f"{values.least:.4g}", f"{values.greatest:.4g}"),
            _bars(values.histogram),
            *(error_text(error) for error in values.expected_error.values()),
        )
        for name, role, values in held
    ]
    yield Table(heads, rows, "values, and the expected error of the default quantisers")


def _weights(report: Inspection, *, verbose: bool) -> Iterator[Block]:
    """Yield a row for each weight that is not quantised, their numbers, and what cannot be quantised."""
    if report.weights:
        widths = next((w.expected_error for w in report.weights if w.expected_error), {})
        heads = [
            *columns("weight", "op", folded=True),
            *columns("shape", "channels", "values", *(f"{bits} bits" for bits in widths), justify="right"),
        ]
        shown = report.weights if verbose or len(report.weights) <= ROWS else report.weights[:ROWS]
        rows = [_weight(weight, len(widths)) for weight in shown]
        title = "weights, and the expected error of their default quantiser"
        yield Table(heads, rows, title if widths else "weights")
        hidden = len(report.weights) - len(shown)
        yield Line(weights_total(report) + (f"; {hidden} are not shown: -v lists all" if hidden else ""))
    for group in report.skipped_weights:
        yield Line(f"cannot be quantised, {layers_named(group.layers, 'op')}: {group.reason}")


def _weight(weight: WeightReport, widths: int) -> tuple[str, ...]:
    """Return the row of a weight."""
    errors = [error_text(error) for error in weight.expected_error.values()] or [""] * widths
    numbers = ("?" if number is None else f"{number:,}" for number in (weight.channels, weight.parameters))
    return weight.name, ", ".join(weight.ops), shape_text(weight.shape), *numbers, *errors


def shape_text(shape: Sequence[int | None]) -> str:
    """Return a shape as "3x3x16x32"."""
    return "x".join("?" if size is None else str(size) for size in shape)


def weights_total(report: Inspection) -> str:
    """Return the number of weights that are not quantised, and that of their values."""
    values = sum(weight.parameters or 0 for weight in report.weights)
    return f"{counted(len(report.weights), 'weight')}, {values:,} values"


def _bars(counts: list[int]) -> str:
    """Return a histogram as a line of bars; a bin that is not empty has a visible bar."""
    most = max(counts, default=0) or 1
    # The double minus rounds the height up.
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)
