"""What inspecting, rewriting and finalising say: one schema, as dataclasses and as JSON.

`SCHEMA_VERSION` grows when a field changes its meaning or goes away; new fields may come without it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rewriter.ir import Spec

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Tensor:
    """An input or output: shape is a list with null for unknown sizes, or null where the rank is unknown."""

    name: str
    dtype: str
    shape: list[int | None] | None

    @property
    def described(self) -> str:
        """As ``x: float32[?, 8]``."""
        sizes = None if self.shape is None else ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {self.dtype}" + ("" if sizes is None else f"[{sizes}]")

    @classmethod
    def of(cls, name: str, spec: Spec) -> Tensor:
        """A spec under the name that callers use."""
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
        mode: ``training``, ``inference``, or ``both`` where the graph chooses while it runs.
        status: ``float``, ``quantised`` or ``skipped``.
        reason: why it is skipped; empty otherwise.
        quantizers: for each quantiser there: role, scheme, bits at first, range, rounding, narrow_range, batch_norm,
            layer (its place in variables for each layer), and use: parameter, statistic (of a batch) or average.
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
    """What is in one variable.

    Attributes:
        channels: how many values.
        least, greatest, mean: of the finite ones.
        zeros: how many are exactly 0.
        not_finite: how many are NaN or infinite.
        histogram: counts in intervals of equal width from the least to the greatest.
        expected_error: by width, the error that the default quantiser makes: for gamma, beta and the moving mean, the
            norm of the error to that of the vector; for the moving variance, the root of the mean squared relative
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
        variables: names by role.
        momentum: where a site says it.
        momentum_of: ``source``, or of derived training ``given`` or ``assumed``; empty where no site says a momentum.
        values: what is in the variables, by role, where the checkpoint has numbers for them.
    """

    name: str
    variables: dict[str, str]
    epsilon: float
    momentum: float | None
    sites: list[SiteReport]
    values: dict[str, ValuesReport] = field(default_factory=dict)
    momentum_of: str = ""


@dataclass(frozen=True)
class Inspection:
    """What is in a model; `title` is the name of its directory."""

    signatures: dict[str, SignatureReport]
    batch_norms: list[BatchNormReport]
    title: str = ""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=1)

    def to_html(self) -> str:
        """The report as a page that holds all it needs."""
        from rewriter.page.shell import page

        sites = {(s.graph, s.node): s for bn in self.batch_norms for s in bn.sites}
        return page(
            "inspect.html.j2", ["colours.css", "page.css", "inspect.css"], [], report=self, sites=sites.values()
        )

    def _repr_html_(self) -> str:
        from rewriter.page.shell import frame

        return frame(self.to_html())


@dataclass(frozen=True)
class Skipped:
    """A site that was left as it is, and why."""

    graph: str
    node: str
    reason: str


@dataclass(frozen=True)
class Declined:
    """A site that a pass, by its class, left as it is, and why."""

    by: str
    graph: str
    node: str
    reason: str


@dataclass(frozen=True)
class Changed:
    """What one pass changed: nodes added, removed and changed (inputs, attributes) in one graph."""

    by: str
    graph: str
    added: int
    removed: int
    changed: int


@dataclass(frozen=True)
class RewriteReport:
    """What a rewrite did.

    Attributes:
        sites_found: sites of the source.
        sites_rewritten: those of them that are quantised in the result and were not before; where nothing is
            quantised, those that are fused.
        sites_added: quantised sites that the rewrite added: those of new functions, and the second one where a
            mode is chosen while the graph runs.
        sites_fused: the source's sites in single ops that the fused kernel computes now.
        skipped: the source's sites that were left as they are.
        declined: sites that another pass than the quantising one left as they are.
        variables_added: names of the new variables.
        notes: what the user should know: where the training function comes from, what is assumed.
        other_changes: what had to change besides.
        changes: nodes added and changed, by pass and graph.
        options: the options in force, by pass.
        versions: of bnqat and TensorFlow.
    """

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
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=1)


@dataclass(frozen=True)
class Baked:
    """One variable that holds quantised values now.

    Attributes:
        variable: its name.
        batch_norm: that of the layer, or names of several, joined with "+".
        scheme: ``affine``, ``symmetric``, ``power_of_two``, ``log``, or what the user's own function is called.
        bits: the width in force; 0: it was off, and the values are as they were trained.
        channels: how many values.
        error: the norm of what rounding changed, to that of the values before; 0 where these are 0.
        added: whether it is a new variable, since the old one is used without a quantiser as well, or in two ways.
    """

    variable: str
    batch_norm: str
    role: str
    scheme: str
    bits: int
    channels: int
    error: float
    added: bool


@dataclass(frozen=True)
class FinalizeReport:
    """What became of a fine-tuned model.

    Attributes:
        baked: the variables that hold quantised values.
        folded: batch norms, by (graph, node), that went into the convolution before them.
        not_folded: those that did not, and why.
        signatures: those of the result.
        variables_removed: names of the variables that are gone.
        functions: how many functions the result has; before, it had `functions_before`.
        notes: what the user should know.
        other_changes: what had to change besides.
        versions: of bnqat and TensorFlow.
    """

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
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=1)
