"""What inspecting and rewriting say: one schema, as dataclasses and as JSON.

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
class BatchNormReport:
    """One batch norm: its variables' names by role, epsilon, momentum where a site says it, and its sites."""

    name: str
    variables: dict[str, str]
    epsilon: float
    momentum: float | None
    sites: list[SiteReport]


@dataclass(frozen=True)
class Inspection:
    """What is in a model."""

    signatures: dict[str, SignatureReport]
    batch_norms: list[BatchNormReport]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=1)


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
