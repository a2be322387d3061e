"""Results of running models, as lines and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rewriter.app.blocks import Block, Line, Table, columns, counted

if TYPE_CHECKING:
    from rewriter.app.sensitivity import Sensitivity
    from rewriter.app.verification.claims import Verification


PLURAL = {"holds": "hold", "fails": "fail", "does not apply": "do not apply"}
"""Statuses of claims, of more than one."""


def sensitivity_blocks(measured: Sensitivity) -> Iterator[Block]:
    """Yield a row for each layer and role, and a column for each width."""
    widths = measured.rows[0].error if measured.rows else ()
    heads = [
        *columns("layer", justify="right"),
        *columns("name", folded=True),
        *columns("role"),
        *columns(*(f"{width} bits" for width in widths), justify="right"),
    ]
    rows = [(str(r.layer), r.name, r.role, *(f"{error:.2g}" for error in r.error.values())) for r in measured.rows]
    yield Table(heads, rows, f"relative error of the outputs, {counted(measured.inputs, 'input')}")


def sensitivity_headline(measured: Sensitivity) -> str:
    """Return the numbers of quantisers and of inputs, and the widths."""
    widths = ", ".join(str(width) for width in (measured.rows[0].error if measured.rows else ()))
    return f"{counted(len(measured.rows), 'quantiser')} at {widths} bits, {counted(measured.inputs, 'input')}"


def verification_blocks(verification: Verification) -> Iterator[Block]:
    """Yield a line for each claim, and a row for each output's error."""
    colours = {"holds": "green", "fails": "red"}
    yield Line(verification.inputs)
    for claim in verification.claims:
        yield Line(f"{claim.name}: {claim.detail}", f"{claim.status:15} ", colours.get(claim.status, "yellow"))
    yield from (Line(f"note: {note}") for note in verification.notes)
    errors = [row for claim in verification.claims for row in claim.table]
    if errors:
        heads = [
            *columns("signature", "output", folded=True),
            *columns("largest error", "RMS error", "relative RMS", "same class", justify="right"),
        ]
        rows = [
            (
                *(row.signature, row.output, f"{row.largest:.3g}", f"{row.rms:.3g}"),
                "" if row.relative_rms is None else f"{row.relative_rms:.3g}",
                "" if row.agreement is None else f"{row.agreement:.1%}",
            )
            for row in errors
        ]
        yield Table(heads, rows, "the outputs with quantisers on, to those of the source")


def verification_headline(verification: Verification) -> str:
    """Return the numbers of claims by status, and the names of those that fail."""
    statuses = Counter(claim.status for claim in verification.claims)
    failed = [claim.name for claim in verification.claims if claim.status == "fails"]
    parts = [f"{number} {PLURAL[status] if number > 1 else status}" for status, number in statuses.items()]
    names = f"; failed: {', '.join(failed)}" if failed else ""
    return (
        f"{counted(len(verification.claims), 'claim')}, {', '.join(parts)}{names}" if parts else "no claim was checked"
    )
