"""What comparing says: one schema, as dataclasses and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from rewriter.report import SCHEMA_VERSION

ChangeState = Literal["added", "removed", "changed", "missing"]
"""The last: a rewrite's record has it, and it is not so."""


@dataclass(frozen=True)
class Detail:
    """One aspect that differs; None where one of the models has none such.

    Attributes:
        aspect: as "input 2", "attribute epsilon", "control inputs", "dtype".
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
        kind: "node", "function", "variable", "checkpoint tensor" (no variable's),
            "signature", "concrete function", "object" (of the object graph), "collection", "file", "model".
        graph: of a node, its graph's name in the model after (in the one before, if that graph was removed); "" is
            the main graph.
        op: of a node, its op (the new one, if it has one); of a function that was added or removed, how many nodes it
            has.
        details: what differs; of what was added or removed, what there is to say of it.
        fingerprint: of a node or function that was added or removed, a hash of all of it.
        by: the passes that made it, by the rewrite's record; empty where no record explains it.
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
    """What enters a site in one place.

    Attributes:
        role: "x", gamma, beta, moving_mean or moving_variance.
        use: "input" of the site, or "statistic" on its way to a moving average.
        graph: where the node is that takes it.
        port: the name of that node's input.
        old: the value there in the model before, as "node:port"; null where there was no such input.
        new: the value there now.
        formula: what a quantiser makes of it first; empty where there is none.
        quantized: of a quantiser, the value that it quantises.
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


@dataclass(frozen=True)
class SiteDiff:
    """A site in two models.

    Attributes:
        what: whether the site is in both ("same"), or was "added" or "removed".
        status: in the model after (in the one before, if it was removed): ``float``, ``quantised`` or ``skipped``.
        reason: why it was skipped.
    """

    graph: str
    node: str
    what: str
    kind: str
    mode: str
    status: str
    reason: str
    inputs: list[InputDiff]


@dataclass(frozen=True)
class LayerDiff:
    """A batch norm in two models, by its name."""

    name: str
    sites: list[SiteDiff]


@dataclass(frozen=True)
class Verdict:
    """What one wants to know first.

    Attributes:
        batch_norms: of the model before.
        sites_found: its sites.
        sites_rewritten: those of them that are quantised in the model after and were not before.
        sites_added: quantised sites that only the model after has.
        sites_skipped: sites found that are quantised in neither.
        other_changes: how many changes no record explains; null where there is no record to hold them against.
        signatures_intact: signatures of the model before whose inputs and outputs are the same.
        signatures_found: all of them.
    """

    batch_norms: int
    sites_found: int
    sites_rewritten: int
    sites_added: int
    sites_skipped: int
    other_changes: int | None
    signatures_intact: int
    signatures_found: int


@dataclass(frozen=True)
class DiffReport:
    """What differs between two models.

    Attributes:
        changes: all of them; other changes first.
        ops: how many nodes of each op there are, before and after.
        renamed: functions of another name that are a pair: name before -> name after.
        skipped: reasons, and how many sites were skipped for each.
    """

    verdict: Verdict
    changes: list[Change]
    layers: list[LayerDiff]
    ops: dict[str, list[int]]
    renamed: dict[str, str]
    skipped: dict[str, int]
    schema_version: int = SCHEMA_VERSION

    @property
    def other(self) -> list[Change]:
        """What no record explains; without a record, nothing."""
        return [] if self.verdict.other_changes is None else [c for c in self.changes if not c.by]

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=1)
