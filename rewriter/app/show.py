"""Finalised models as lines and tables, layers first; sites are listed on request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rewriter.app.blocks import Block, Line, Table, columns, counted, layers_named, listed
from rewriter.app.relative_error import error_text

if TYPE_CHECKING:
    from rewriter.app.finalize_schema import FinalizeReport


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
