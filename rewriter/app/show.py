"""Inspections and finalised models as lines and tables, layers first; sites are listed on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rewriter.app.blocks import Block, Column, Line, Table, columns, counted, layers_named, listed, quantized_text
from rewriter.app.relative_error import error_text

if TYPE_CHECKING:
    from rewriter.app.report_schema import BatchNormReport, FinalizeReport, Inspection, QuantizerReport

BARS = " ▁▂▃▄▅▆▇█"

COMPUTED_BY = {"fused": "the fused kernel", "decomposed": "single ops"}


def inspection_blocks(report: Inspection, *, sites: bool = False) -> Iterator[Block]:
    """Yield signatures, a row for each batch norm and its values, and one for whatever else is quantised."""
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
    yield from _quantizers(report.quantizers, "what else is quantised" if report.batch_norms else "what is quantised")


def inspection_headline(report: Inspection) -> str:
    """Return the number of batch norms, and how many have each status; or what else is quantised."""
    if report.quantizers and not report.batch_norms:
        return f"quantised: {quantized_text(report.quantizers)}"
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
    yield Line(inspection_headline(report))
    for group in report.skipped_layers:
        part = " in part" if group.partly else ""
        yield Line(f"cannot be rewritten{part}, {layers_named(group.layers)}: {group.reason}")


def _site_lines(report: Inspection) -> Iterator[Line]:
    """Yield the numbers of layers and sites, and each site that cannot be rewritten."""
    sites = {(s.graph, s.node): s for bn in report.batch_norms for s in bn.sites}
    yield Line(f"{inspection_headline(report)}; {counted(len(sites), 'site')}")
    for site in sites.values():
        if site.reason:
            yield Line(f"cannot be rewritten: {site.node} in {site.graph or 'the main graph'}: {site.reason}")


def _quantizers(quantizers: Sequence[QuantizerReport], title: str) -> Iterator[Table]:
    """Yield a table of the quantised values that are not a batch norm's, by layer and role, if there are any."""
    if quantizers:
        heads = [
            *columns("layer", folded=True),
            *columns("role", "scheme", "range"),
            *columns("bits", "places", justify="right"),
        ]
        rows = [(q.layer_name, q.role, q.scheme, q.range, str(q.bits), str(len(q.places))) for q in quantizers]
        yield Table(heads, rows, title)


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


def _bars(counts: list[int]) -> str:
    """Return a histogram as a line of bars; a bin that is not empty has a visible bar."""
    most = max(counts, default=0) or 1
    # The double minus rounds the height up.
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)


def finalize_blocks(report: FinalizeReport, *, sites: bool = False) -> Iterator[Block]:
    """Yield a row for each baked variable, the numbers of removed variables and functions, and what was folded."""
    heads = [
        *columns("variable", folded=True),
        *columns("role", "scheme"),
        *columns("bits", "values", "error", justify="right"),
    ]
    yield Table(
        heads,
        [
            (row.variable, row.role, row.scheme, str(row.bits or "off"), str(row.values), error_text(row.error))
            for row in report.baked
        ],
    )
    baked = counted(len(report.baked), "variable")
    yield Line(f"{baked} quantised for good; signatures: {', '.join(report.signatures)}")
    yield Line(_removed(report))
    yield from _folded(report, sites=sites)
    yield from (Line(f"note: {note}") for note in report.notes)
    yield from (Line(f"also: {change}") for change in report.other_changes)
    if report.params:
        yield Line(f"codes, scales and zero points are in {report.params}")
    yield Line(f"written to {report.target}" if report.target else "dry run: nothing was written")


def _removed(report: FinalizeReport) -> str:
    """Return the numbers of removed variables, by what they were for, and of removed functions."""
    controls = sum(name.startswith("quantization/") for name in report.variables_removed)
    others = len(report.variables_removed) - controls
    parts = [
        f"{counted(controls, 'variable')} of the quantisation" if controls else "",
        f"{counted(others, 'variable')} that serving does not read" if others else "",
        counted(report.functions_before - report.functions, "function"),
    ]
    *first, last = [part for part in parts if part]
    return f"removed: {', '.join(first)} and {last}" if first else f"removed: {last}"


def _folded(report: FinalizeReport, *, sites: bool) -> Iterator[Line]:
    """Yield lines on the layers that became part of a convolution and on those that did not, or on each site."""
    if report.folded or report.not_folded:
        them = "it" if len(report.folded_layers) == 1 else "them"
        which = ": " + (", ".join if sites else listed)(report.folded_layers) if report.folded_layers else ""
        yield Line(
            f"{counted(len(report.folded_layers), 'batch norm')} folded into the convolution before {them}{which}"
        )
    if sites:
        for graph, node in report.folded:
            yield Line(f"folded: {node} in {graph or 'the main graph'}")
        for site in report.not_folded:
            yield Line(f"not folded: {site.node} in {site.graph or 'the main graph'}: {site.reason}")
        return
    for group in report.skipped_layers:
        which = layers_named(group.layers) or counted(group.others, "place")
        yield Line(f"not folded{' in part' if group.partly else ''}, {which}: {group.reason}")


def finalize_headline(report: FinalizeReport) -> str:
    """Return the numbers of quantised variables and of folded layers."""
    folded = f", {counted(len(report.folded_layers), 'batch norm')} folded" if report.folded_layers else ""
    return f"{counted(len(report.baked), 'variable')} quantised for good{folded}"
