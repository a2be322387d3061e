"""The report of a comparison: one schema, as dataclasses and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SCHEMA_VERSION = 2
"""The version of all reports, of comparisons and others. It grows when a field changes its meaning or is removed; new
fields may come without a new version."""

NODE, FUNCTION = "node", "function"
"""Two of the kinds of changes."""

ChangeState = Literal["added", "removed", "changed", "missing"]
"""State of a change; "missing" means that a rewrite's record has the change, and the models do not."""


BATCH_NORM = "batch norm"
"""The kind of a layer that is a batch norm; that of another is the role of its values, such as "weight"."""

LayerStatus = Literal["quantised", "partly", "finalised", "no longer quantised", "as before", "skipped", "new"]


@dataclass(frozen=True)
class Detail:
    """One aspect that differs.

    Attributes:
        aspect: for example "input 2", "attribute epsilon", "control inputs", "dtype".
        old: its text in the model before; None if that has no such aspect.
        new: its text in the model after; None if that has no such aspect.
        port: of a node's input, the name of the op's or called function's argument.
    """

    aspect: str
    old: str | None
    new: str | None
    port: str = ""


@dataclass(frozen=True)
class Change:
    """One item that differs.

    Attributes:
        kind: "node", "function", "variable", "checkpoint tensor" (not a variable's), "signature",
            "concrete function", "object" (of the object graph), "collection", "file" or "model".
        graph: of a node, its graph's name in the model after (in the one before, if that graph was removed); "" is
            the main graph.
        op: of a node, its op in the model after (in the one before, if the node was removed); of a function that was
            added or removed, the number of its nodes.
        details: the aspects that differ; of an item that was added or removed, its aspects.
        fingerprint: of a node or function that was added or removed, a hash of all of it.
        by: the passes that made the change, by the rewrite's record; empty if no record explains it.
    """

    kind: str
    what: ChangeState
    graph: str
    name: str
    op: str = ""
    details: tuple[Detail, ...] = ()
    fingerprint: str = ""
    by: tuple[str, ...] = ()


@dataclass(frozen=True)
class InputDiff:
    """One input of a site in two models.

    Attributes:
        role: "x", "gamma", "beta", "moving_mean" or "moving_variance"; of another value, its role, such as "weight".
        use: "input" of the site, or "statistic" on its way to a moving average.
        graph: the graph of the node that takes the input.
        node: that node.
        port: the name of that node's input.
        old: the value there in the model before, as "node:port"; null if there was no such input.
        new: the value there in the model after.
        formula: the formula of the quantiser of this input; empty if there is none.
        quantized: the value that the quantiser quantises.
        variable: the name of the variable that holds the value; empty if no variable does.
    """

    role: str
    use: str
    graph: str
    node: str
    port: str
    old: str | None
    new: str | None
    formula: str = ""
    quantized: str = ""
    variable: str = ""


@dataclass(frozen=True)
class SiteDiff:
    """A site in two models, or an op that takes another quantised value.

    Attributes:
        kind: ``fused`` or ``decomposed``; of an op that takes another value, the op, such as ``Conv2D``.
        what: "same" if both models have the site, otherwise "added" or "removed".
        status: in the model after (in the one before, if it was removed): ``float``, ``quantised`` or ``skipped``.
        reason: the reason why it was skipped.
        users: the signatures and the functions of the model object that run it.
    """

    graph: str
    node: str
    what: str
    kind: str
    mode: str
    status: str
    reason: str
    users: list[str]
    inputs: list[InputDiff]


@dataclass(frozen=True)
class LayerDiff:
    """A batch norm, or another value that is or was to be quantised, in two models, by its name.

    Attributes:
        sites: its sites, or the ops that take the value; those that a signature runs come first.
        status: ``quantised`` in the model after only, in all places or in some (``partly``); ``finalised``, with
            quantised values in its variables; ``no longer quantised``; ``as before``; ``skipped``, i.e. float in both;
            or ``new``, if only the model after has it.
        bits: the widths of its quantisers in the model after, or of its finalised values, each once.
        fused: true if single ops computed it before and the fused kernel does after.
        kind: "batch norm", or the value's role, such as "weight".
    """

    name: str
    sites: list[SiteDiff]
    status: LayerStatus
    bits: list[int]
    fused: bool = False
    kind: str = BATCH_NORM


@dataclass(frozen=True)
class Verdict:
    """Summary of a comparison, in numbers.

    Attributes:
        batch_norms: batch norms of the model before.
        batch_norms_quantized: those of them that are quantised in the model after only, in all places.
        batch_norms_skipped: those of them that a rewrite left float, in all places or in some.
        sites_found: sites of the model before.
        sites_rewritten: those of them that are quantised in the model after only.
        sites_added: quantised sites that only the model after has.
        sites_skipped: sites found that are quantised in neither model.
        other_changes: changes that no record explains; null if there is no record.
        signatures_intact: signatures of the model before whose inputs and outputs are the same in the model after.
        signatures_found: all signatures of the model before.
    """

    batch_norms: int
    batch_norms_quantized: int
    batch_norms_skipped: int
    sites_found: int
    sites_rewritten: int
    sites_added: int
    sites_skipped: int
    other_changes: int | None
    signatures_intact: int
    signatures_found: int


@dataclass(frozen=True)
class DiffReport:
    """The differences of two models.

    Attributes:
        headline: a sentence or two that say what differs.
        changes: all changes; those that no record explains come first.
        ops: op -> its number of nodes before and after.
        renamed: paired functions with different names: name before -> name after.
        skipped: reason -> number of sites, and of ops that take other values, skipped for it.
        users: graph of the model after -> the signatures and the functions of the model object that run it.
        labels: graph -> its name as its author wrote it.
    """

    headline: str
    verdict: Verdict
    changes: list[Change]
    layers: list[LayerDiff]
    ops: dict[str, list[int]]
    renamed: dict[str, str]
    skipped: dict[str, int]
    users: dict[str, list[str]]
    labels: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    @property
    def other(self) -> list[Change]:
        """The changes that no record explains; empty without a record."""
        return [] if self.verdict.other_changes is None else [c for c in self.changes if not c.by]
