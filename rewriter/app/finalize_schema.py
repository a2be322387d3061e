"""The report of finalising, as dataclasses and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rewriter.app.blocks import Block, Report
from rewriter.app.report_schema import Skipped, SkippedLayers
from rewriter.app.show import finalize_blocks, finalize_headline
from rewriter.diff.report import SCHEMA_VERSION


@dataclass(frozen=True)
class Baked:
    """One variable that holds quantised values now.

    Attributes:
        variable: name of the variable.
        layer_name: name of the layer, or names of several layers, joined with "+".
        role: role of the variable, such as "gamma".
        scheme: ``affine``, ``symmetric``, ``power_of_two``, ``log``, or the name of the user's own function.
        bits: the width in force. With 0 the quantiser was off, and the values are as trained.
        values: number of values.
        error: the norm of the rounding error, divided by that of the values before; 0 if these are 0.
        added: true if the variable is new, because the old one is also used without a quantiser, or in two ways.
    """

    variable: str
    layer_name: str
    role: str
    scheme: str
    bits: int
    values: int
    error: float
    added: bool


@dataclass(frozen=True, repr=False)
class FinalizeReport(Report):
    """The result of finalising a fine-tuned model.

    Attributes:
        baked: the variables that hold quantised values.
        folded: batch norms that were folded into the convolution before them, as (graph, node).
        not_folded: batch norms that were not folded, and the reasons.
        signatures: names of the result's signatures.
        variables_removed: names of the removed variables.
        functions_before: number of functions of the source.
        functions: number of functions of the result.
        notes: sentences for the user.
        other_changes: other changes that were necessary.
        versions: versions of bnqat and TensorFlow.
        folded_layers: names of the folded batch norms; each is named once, in however many functions it is folded.
        left: batch norms that were not folded, by reason.
        params: the file with the parameters, and empty if there is none; not in the JSON text.
        target: where the result was written, and empty for a dry run; not in the JSON text.
    """

    PLACES = ("params", "target")

    baked: list[Baked]
    folded: list[tuple[str, str]]
    not_folded: list[Skipped]
    signatures: list[str]
    variables_removed: list[str]
    functions_before: int
    functions: int
    notes: list[str]
    other_changes: list[str]
    versions: dict[str, str]
    folded_layers: list[str] = field(default_factory=list)
    skipped_layers: list[SkippedLayers] = field(default_factory=list)
    params: str = ""
    target: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def headline(self) -> str:
        """The numbers of quantised variables and of folded layers."""
        return finalize_headline(self)

    def blocks(self) -> Iterable[Block]:
        """Return what the command prints."""
        return finalize_blocks(self)
