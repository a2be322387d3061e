"""Outcomes and reasons by layer, made from those by site."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from passes.batch_norm.batch_norms import batch_norms
from rewriter.app.report_schema import BatchNormReport, LayerOutcome, SkippedLayers
from rewriter.ir import Model

Key = tuple[str, str]
"""A site by its graph and node."""


class LayerReason(NamedTuple):
    """A reason why a layer, or a value that is no layer's, was left as it is.

    Attributes:
        layer: the layer's name; "" for a value that is no layer's.
        by: the pass that left it; "" for the one that quantises.
        partly: true if other sites of the layer were rewritten.
        op: of a value that is no layer's, the name of the op that takes it.
    """

    layer: str
    reason: str
    by: str = ""
    partly: bool = False
    op: str = ""


def outcomes(
    model: Model, rewritten: Collection[Key], reasons: Mapping[Key, str], fused: Collection[Key]
) -> list[LayerOutcome]:
    """Return the outcome of each batch norm of the source.

    Args:
        model: the source.
        rewritten: its sites that were rewritten.
        reasons: the reasons of the others.
        fused: its sites in single ops that became the fused kernel.
    """
    return [
        _outcome(bn.name, list(dict.fromkeys((s.graph, s.node) for s in bn.sites)), rewritten, reasons, fused)
        for bn in model.analysis(batch_norms)
    ]


def _outcome(
    name: str, keys: Sequence[Key], rewritten: Collection[Key], reasons: Mapping[Key, str], fused: Collection[Key]
) -> LayerOutcome:
    left = [key for key in keys if key not in rewritten]
    status = "rewritten" if not left else "skipped" if len(left) == len(keys) else "partly rewritten"
    return LayerOutcome(
        name=name,
        status=status,
        reasons=list(dict.fromkeys(reasons[key] for key in left)),
        sites_found=len(keys),
        sites_rewritten=len(keys) - len(left),
        fused=any(key in fused for key in keys),
    )


def reasons_of(layers: Iterable[LayerOutcome]) -> Iterator[LayerReason]:
    """Yield the reasons for which layers, or sites of them, were not rewritten."""
    for layer in layers:
        for reason in layer.reasons:
            yield LayerReason(layer.name, reason, partly=layer.status == "partly rewritten")


def unchangeable(batch_norms: Iterable[BatchNormReport]) -> Iterator[LayerReason]:
    """Yield the reasons for which layers, or sites of them, cannot be rewritten."""
    for bn in batch_norms:
        partly = any(not site.reason for site in bn.sites)
        for reason in dict.fromkeys(site.reason for site in bn.sites if site.reason):
            yield LayerReason(bn.name, reason, partly=partly)


def grouped(models: Iterable[Model], layer_reasons: Iterable[LayerReason]) -> list[SkippedLayers]:
    """Return layers by reason, most layers first. Reasons that differ only in the nodes that they name are one."""
    all_reasons = list(layer_reasons)
    nodes = {node for model in models for g in model.graphs.values() for node in g.nodes} if all_reasons else set()
    groups: dict[tuple[str, bool, bool, str], list[LayerReason]] = {}
    for each in all_reasons:
        key = (each.by, each.partly, bool(each.layer), _without_nodes(each.reason, nodes))
        groups.setdefault(key, []).append(each)
    return sorted(_skipped(groups), key=_rank)


def _rank(group: SkippedLayers) -> tuple[bool, int, list[str], str]:
    """Return the sort key: most layers first. Names come last, as functions have no order that could be relied on."""
    return bool(group.by), -max(len(group.layers), group.others), group.layers, group.reason


def _skipped(groups: Mapping[tuple[str, bool, bool, str], Sequence[LayerReason]]) -> Iterator[SkippedLayers]:
    for (by, partly, is_layer, general), members in groups.items():
        reasons = {member.reason for member in members}
        names = list(dict.fromkeys(member.layer for member in members)) if is_layer else []
        yield SkippedLayers(
            reason=reasons.pop() if len(reasons) == 1 else general,
            layers=names,
            others=0 if is_layer else len(members),
            partly=partly,
            by=by,
            ops=list(dict.fromkeys(member.op for member in members if member.op)),
        )


def _without_nodes(reason: str, nodes: Collection[str]) -> str:
    """Return a reason with "…" in place of nodes' names; words that may be English are kept."""
    words = []
    for word in reason.split(" "):
        name = word.strip("();,:")
        is_name = name in nodes and not (name.isalpha() and name.islower())
        words.append(word.replace(name, "…") if is_name else word)
    return " ".join(words)
