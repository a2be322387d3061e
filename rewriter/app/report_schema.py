"""Reports of inspecting and rewriting: one schema, as dataclasses and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rewriter.app.blocks import Block, Report, html_of, quantizers_table
from rewriter.app.relative_error import HEAT_LABELS, error_text, heat
from rewriter.app.show_inspection import inspection_blocks, inspection_headline, shape_text, weights_total
from rewriter.app.summary import layers_table, rewrite_headline, rewrite_summary
from rewriter.diff.report import SCHEMA_VERSION
from rewriter.ir import Spec


@dataclass(frozen=True)
class Tensor:
    """An input or output. `shape` is a list with null for unknown sizes, or null if the rank is unknown."""

    name: str
    dtype: str
    shape: list[int | None] | None

    @property
    def described(self) -> str:
        """Text such as ``x: float32[?, 8]``."""
        sizes = None if self.shape is None else ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {self.dtype}" + ("" if sizes is None else f"[{sizes}]")

    @classmethod
    def of(cls, name: str, spec: Spec) -> Tensor:
        """Return the tensor of a spec, under the name that callers use."""
        shape = None if spec.shape is None else [None if size < 0 else size for size in spec.shape]
        return cls(name, spec.dtype, shape)


@dataclass(frozen=True)
class SignatureReport:
    """A signature's inputs and outputs."""

    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass(frozen=True)
class SiteReport:
    """One place where a batch norm is computed.

    Attributes:
        kind: ``fused``: one FusedBatchNorm node; ``decomposed``: single ops, of which `node` is the last.
        mode: ``training``, ``inference``, or ``both`` if the graph chooses while it runs.
        status: ``float``, ``quantised`` or ``skipped``.
        reason: the reason why it is skipped; else empty.
        quantizers: for each quantiser of the site: role, scheme, initial bits, range, rounding, narrow_range,
            layer_name, layer (its index in variables with a value per layer), and use: parameter, statistic (of a
            batch) or average.
    """

    graph: str
    node: str
    kind: str
    mode: str
    status: str
    reason: str
    quantizers: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ValuesReport:
    """Statistics of the values in one variable.

    Attributes:
        channels: number of values.
        least, greatest, mean: minimum, maximum and mean of the finite values.
        zeros: number of values that are exactly 0.
        not_finite: number of values that are NaN or infinite.
        histogram: counts in intervals of equal width from the least to the greatest.
        expected_error: error of the default quantiser, by bit width. For gamma, beta and the moving mean: the norm of
            the error divided by that of the vector. For the moving variance: the root of the mean squared relative
            error of 1 / sqrt(variance + epsilon).
    """

    channels: int
    least: float
    greatest: float
    mean: float
    zeros: int
    not_finite: int
    histogram: list[int]
    expected_error: dict[int, float]


@dataclass(frozen=True)
class BatchNormReport:
    """One batch norm.

    Attributes:
        variables: names of its variables by role.
        momentum: its momentum; None if no site states one.
        momentum_of: origin of the momentum: ``source``, or in derived training ``given`` or ``assumed``; empty if no
            site states a momentum.
        values: statistics of its variables by role, if the checkpoint has numbers for them.
    """

    name: str
    variables: dict[str, str]
    epsilon: float
    momentum: float | None
    sites: list[SiteReport]
    values: dict[str, ValuesReport] = field(default_factory=dict)
    momentum_of: str = ""

    @property
    def status(self) -> str:
        """The status of its sites; several, if they differ."""
        return ", ".join(dict.fromkeys(s.status for s in self.sites))


@dataclass(frozen=True)
class WeightReport:
    """One weight that is not quantised: the filter, matrix or table of an op.

    Attributes:
        name: name of its variable, or of the constant's node.
        ops: the ops that take it, such as ``Conv2D``.
        shape: its shape where they take it; null for unknown sizes.
        axes: the axes that are its channels, counted from the end.
        channels: the number of channels; null if it is not known.
        parameters: the number of values; null if it is not known.
        places: (graph, node) of the ops that take it.
        not_finite: number of values that are NaN or infinite.
        expected_error: by bit width, the norm of the error of the default quantiser, divided by that of the values;
            empty if the checkpoint has no values.
    """

    name: str
    ops: list[str]
    shape: list[int | None]
    axes: list[int]
    channels: int | None
    parameters: int | None
    places: list[tuple[str, str]]
    not_finite: int
    expected_error: dict[int, float]


@dataclass(frozen=True)
class QuantizerReport:
    """Quantisers of one layer's values of one role, other than those of batch norms.

    Attributes:
        layer_name: name of the layer, or names of several layers, joined with "+".
        scheme: ``affine``, ``symmetric``, ``power_of_two``, ``log``, or the name of the user's own function.
        bits: the initial width.
        range: ``dynamic``, ``fixed``, ``ema`` or ``learned``.
        places: (graph, node) of the quantisers.
        axis: the axis of the channels, or several axes, counted from the end, if each channel has a range of its own;
            of a table whose rows are looked up, those of the rows.
        granularity: ``per_channel``, or ``per_tensor`` for one range.
    """

    role: str
    layer_name: str
    scheme: str
    bits: int
    range: str
    places: list[tuple[str, str]]
    axis: int | list[int] | None = None
    granularity: str = "per_tensor"


@dataclass(frozen=True)
class SkippedLayers:
    """Layers that were left as they are for one reason.

    Attributes:
        reason: the reason, with "…" in place of names of nodes if these differ from layer to layer.
        layers: names of the batch norms.
        others: number of values that are no batch norm's, if the reason is about such values.
        partly: true if other sites of these layers were rewritten.
        by: the pass that left them; empty for the one that quantises.
        ops: names of the ops that take such values.
    """

    reason: str
    layers: list[str]
    others: int = 0
    partly: bool = False
    by: str = ""
    ops: list[str] = field(default_factory=list)


@dataclass(frozen=True, repr=False)
class Inspection(Report):
    """The signatures, batch norms and weights of a model, and what else is quantised.

    Attributes:
        title: the name of its directory.
        skipped_layers: the batch norms that cannot be rewritten, by reason.
        weights: the weights that are not quantised.
        skipped_weights: the ops whose weights cannot be quantised, by reason.
    """

    signatures: dict[str, SignatureReport]
    batch_norms: list[BatchNormReport]
    title: str = ""
    quantizers: list[QuantizerReport] = field(default_factory=list)
    skipped_layers: list[SkippedLayers] = field(default_factory=list)
    weights: list[WeightReport] = field(default_factory=list)
    skipped_weights: list[SkippedLayers] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    @property
    def headline(self) -> str:
        """The name of the directory, the numbers of batch norms by status, and those of weights and their values."""
        return f"{self.title}, {inspection_headline(self)}"

    def blocks(self) -> Iterable[Block]:
        """Return what the command prints."""
        return inspection_blocks(self)

    def to_html(self) -> str:
        """Return the report as a self-contained HTML page."""
        from rewriter.page.shell import page

        sites = {(s.graph, s.node): s for bn in self.batch_norms for s in bn.sites}
        return page(
            "inspect.html.j2",
            ["colours.css", "page.css", "inspect.css"],
            [],
            report=self,
            statuses=Counter(bn.status for bn in self.batch_norms),
            sites=sites.values(),
            error_text=error_text,
            heat=heat,
            heat_labels=HEAT_LABELS,
            shape_text=shape_text,
            totals=weights_total(self),
            widths=list(next((w.expected_error for w in self.weights if w.expected_error), {})),
        )

    def _repr_html_(self) -> str:
        from rewriter.page.shell import frame

        return frame(self.to_html())


@dataclass(frozen=True)
class Skipped:
    """A site that was left unchanged, and the reason."""

    graph: str
    node: str
    reason: str


@dataclass(frozen=True)
class Declined:
    """A site that a pass left unchanged, and the reason; `by` is the pass's class."""

    by: str
    graph: str
    node: str
    reason: str


@dataclass(frozen=True)
class LayerOutcome:
    """The outcome of a rewrite for one batch norm of the source.

    Attributes:
        status: ``rewritten``, ``partly rewritten`` if this is true of some of its sites only, or ``skipped``.
        reasons: the reasons of sites that were not rewritten.
        sites_found, sites_rewritten: numbers of its sites.
        fused: true if a site of it was in single ops, and is the fused kernel now.
    """

    name: str
    status: str
    reasons: list[str]
    sites_found: int
    sites_rewritten: int
    fused: bool = False


@dataclass(frozen=True)
class Changed:
    """Changes of one pass in one graph: numbers of nodes added, removed and changed (inputs, attributes)."""

    by: str
    graph: str
    added: int
    removed: int
    changed: int


@dataclass(frozen=True, repr=False)
class RewriteReport(Report):
    """The result of a rewrite.

    Attributes:
        sites_found: number of sites of the source.
        sites_rewritten: number of them that are quantised in the result and were not before; if no pass quantises,
            number of them that are fused.
        sites_added: number of quantised sites that the rewrite added: those of new functions, and the second site if
            the graph chooses a mode while it runs.
        quantizers: quantisers that the rewrite added to values other than batch norms'.
        sites_fused: number of the source's sites in single ops that the fused kernel computes now.
        skipped: the source's sites that were left unchanged, and what else was to be quantised and could not be.
        declined: sites that a pass other than the quantising one left unchanged.
        variables_added: names of the new variables.
        notes: sentences for the user: the origin of the training function, assumptions.
        other_changes: other changes that were necessary.
        changes: numbers of nodes added, removed and changed, by pass and graph.
        options: the options in force, by pass.
        versions: versions of bnqat and TensorFlow.
        layers: the source's batch norms, and what became of them.
        left: layers that were left as they are, by reason.
        bits: widths that batch norms' quantisers have at first, in ascending order; empty if no pass quantises.
        schedule: start_step, ramp_steps and freeze_step, as far as the rewrite sets them.
        train: where the training function is: ``train``, ``quantization.train``, ``signature train``, or empty if the
            rewrite adds none.
        train_note: the note that says what the training function is, or why there is none; empty if no pass says it.
        details: notes on which there is nothing to decide.
        source: the source as it was given; not in the JSON text.
        target: where the result was written, and empty for a dry run; not in the JSON text.
    """

    PLACES = ("source", "target")

    sites_found: int
    sites_rewritten: int
    sites_added: int
    sites_fused: int
    skipped: list[Skipped]
    declined: list[Declined]
    variables_added: list[str]
    notes: list[str]
    other_changes: list[str]
    changes: list[Changed]
    options: dict[str, str]
    versions: dict[str, str]
    quantizers: list[QuantizerReport] = field(default_factory=list)
    layers: list[LayerOutcome] = field(default_factory=list)
    skipped_layers: list[SkippedLayers] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)
    schedule: dict[str, int] = field(default_factory=dict)
    train: str = ""
    train_note: str = ""
    details: list[str] = field(default_factory=list)
    source: str = ""
    target: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def headline(self) -> str:
        """The numbers of batch norms and the widths."""
        return rewrite_headline(self)

    def blocks(self) -> Iterable[Block]:
        """Return the summary that the command prints."""
        return rewrite_summary(self)

    def _repr_html_(self) -> str:
        tables = [layers_table(self)] if self.layers else []
        tables += [quantizers_table(self.quantizers, "what else is quantised")] if self.quantizers else []
        return html_of([*self.blocks(), *tables])
