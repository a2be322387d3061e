"""The kernels that compute batch norm: those that are executed, and those that a graph's sites lead to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import tensorflow as tf
from tensorflow.python.eager import context

from passes.batch_norm.sites import FUSED, Site, sites
from passes.roles import MEAN, ROLES
from rewriter import op_defs, ops
from rewriter.dataflow import call_graph
from rewriter.ir import MAIN, Graph, Model, Value
from rewriter.liveness import Assumption

T = TypeVar("T")
KINDS = ("single", "choosing", "serving", "training", "inference", "others")
Place = tuple[str, str]
"""A site by its graph and node."""
BoundNames = frozenset[tuple[str | None, ...]]
"""What a site normalises with: the names of its variables, for each way to call it."""


class Kernels(NamedTuple):
    """Executed kernels that contain batch norm, after Grappler.

    Attributes:
        placed: how many of each op are in the graphs that ran, both branches of a conditional included.
        training: how many of these normalise with the batch's statistics, gradients not counted.
        ran: how many were reached.
    """

    placed: Counter[str]
    training: int
    ran: int

    @property
    def forward(self) -> int:
        """How many of those placed are no gradients."""
        return sum(n for op, n in self.placed.items() if "Grad" not in op)

    @property
    def gradients(self) -> int:
        """How many of those placed are gradients."""
        return self.placed.total() - self.forward

    def __str__(self) -> str:
        """Numbers and ops."""
        return ", ".join(f"{n} {op}" for op, n in sorted(self.placed.items())) or "none"

    @property
    def reach(self) -> str:
        """Numbers and ops, and how many are reached where a choice leaves some out."""
        return str(self) if self.ran == self.placed.total() else f"{self} ({self.ran} reached)"


def kernels_in(graphs: Iterable[Any], stats: Any) -> Kernels:
    """The batch-norm kernels of partition graphs, and those of them that step stats list."""
    reached = {n.node_name for device in stats.dev_stats for n in device.node_stats}
    found = [n for graph in graphs for n in graph.node if _normalises(n)]
    training = [n for n in found if "is_training" in n.attr and n.attr["is_training"].b and "Grad" not in n.op]
    return Kernels(Counter(n.op for n in found), len(training), sum(n.name in reached for n in found))


def _normalises(node: Any) -> bool:
    fused = node.attr["fused_ops"].list.s if "fused_ops" in node.attr else ()
    return "FusedBatchNorm" in node.op or b"FusedBatchNorm" in fused


@tf.function  # type: ignore[untyped-decorator]  # TensorFlow has no types
def _nothing() -> tf.Tensor:
    return tf.constant(0)


def with_kernels(call: Callable[[], T]) -> tuple[T, Kernels]:
    """What a call gives, and the batch-norm kernels that the loaded functions in it execute."""
    own = context.context()
    own.enable_graph_collection()
    own.enable_run_metadata()
    try:
        # The graphs of functions that ran before are told with those of the next one that does.
        _nothing()
        own.export_run_metadata()
        result = call()
        metadata = own.export_run_metadata()
    finally:
        own.disable_graph_collection()
        own.disable_run_metadata()
    graphs = (g for function in metadata.function_graphs for g in function.partition_graphs)
    return result, kernels_in(graphs, metadata.step_stats)


@dataclass(frozen=True)
class Placed:
    """How often each batch norm is in a graph and in what it calls, as often as it is called.

    Attributes:
        single: sites in single ops.
        choosing: of these, those that choose their mode while they run, which need a kernel for each.
        serving: of these, those in inference mode.
        training: fused sites in training mode.
        inference: fused sites in inference mode.
        others: fused ops in training mode that are no batch norm, as Keras writes layer normalisation.
    """

    single: Counter[BoundNames]
    choosing: Counter[BoundNames]
    serving: Counter[BoundNames]
    training: Counter[BoundNames]
    inference: Counter[BoundNames]
    others: int

    @property
    def twice(self) -> int:
        """Sites that compute both modes, of which one is used: a rewrite may compute that one alone."""
        return (self.training & self.inference).total()

    def raised(self, after: Placed) -> Counter[BoundNames]:
        """The sites in single ops that are no longer so."""
        found = self.single - after.single
        # What was constants is named otherwise once it is unfrozen.
        renamed = sum(n for layer, n in after.single.items() if layer not in self.single)
        for layer in [layer for layer in found if not any(any(names) for names in layer)]:
            found[layer] -= renamed
        return +found

    def kernels_for(self, raised: Counter[BoundNames]) -> int:
        """How many kernels take the place of sites in single ops."""
        return raised.total() + (raised & self.choosing).total()

    def trained(self, raised: Counter[BoundNames]) -> int:
        """How many kernels train these batch norms once: one for each site that serves."""
        served = raised & self.serving
        training, inference = self.training + (raised - served), self.inference + served
        return (training | inference).total() + self.others


def placed(model: Model, signature: str, but: Collection[str] = ()) -> Placed:
    """The batch norms that a signature runs; none that are known where no single function computes it.

    Those with a moving mean in `but`, keys of variables, are left out.
    """
    known = model.signatures.get(signature)
    if known is None:
        return _counted(())
    if known.entry:
        return placed_by(model, known.entry, but)
    fetched = [v.node for v in known.fetches]
    return _counted(_in(model, model.graphs[MAIN], {}, fetched, _with_means(model, but)))


def placed_by(model: Model, function: str, but: Collection[str] = ()) -> Placed:
    """The batch norms that a function runs; those with a moving mean in `but`, keys of variables, are left out."""
    return _counted(_of_function(model, function, {}, _with_means(model, but)))


def _with_means(model: Model, means: Collection[str]) -> frozenset[Place]:
    """The sites of batch norms with these moving means."""
    position = ROLES.index(MEAN)
    found = (s for s in model.analysis(sites) if all(keys[position] in means for keys in s.variables))
    return frozenset((s.graph, s.node) for s in found)


def _counted(found: Iterable[tuple[str, BoundNames]]) -> Placed:
    kinds: dict[str, Counter[BoundNames]] = {f: Counter() for f in KINDS}
    for kind, layer in found:
        kinds[kind][layer] += 1
    others = kinds.pop("others").total()
    return Placed(**kinds, others=others)


def _of_function(
    model: Model, name: str, known: Mapping[Value, bool], left: frozenset[Place]
) -> Iterator[tuple[str, BoundNames]]:
    graph = model.graphs[name]
    roots = [*(r.value.node for r in graph.results), *(e.node for e in graph.effects)]
    yield from _in(model, graph, known, roots, left)


def _in(
    model: Model, graph: Graph, known: Mapping[Value, bool], roots: list[str], left: frozenset[Place]
) -> Iterator[tuple[str, BoundNames]]:
    """The batch norms that some nodes of a graph need, where some booleans are known; without those in `left`."""
    assumed = Assumption(model, graph, known)
    needed = assumed.needed(roots)
    found = [s for s in model.analysis(sites) if s.graph == graph.name and s.node in needed]
    for site in (s for s in found if (s.graph, s.node) not in left):
        yield from ((kind, _layer(model, site)) for kind in _kinds(site, assumed))
    own = {site.node for site in found}
    for name in needed:
        node = graph.nodes[name]
        if node.op in FUSED and name not in own and op_defs.get(model, node, "is_training"):
            yield "others", frozenset()
    calls = model.analysis(call_graph).calls.get(graph.name, [])
    for name in dict.fromkeys(c.node for c in calls if c.node in needed):
        node = graph.nodes[name]
        form = ops.call_form_of(model, node)
        values = [None if form.carried else _known(model, assumed, v) for v in node.inputs[form.first :]]
        for callee in assumed.taken(node):
            arguments = zip(model.graphs[callee].arguments, values, strict=True)
            yield from _of_function(model, callee, {Value(a): v for a, v in arguments if v is not None}, left)


def _known(model: Model, assumed: Assumption, value: Value) -> bool | None:
    return assumed.known(value) if op_defs.output_dtype(model, assumed.graph, value) == "bool" else None


def _kinds(site: Site, assumed: Assumption) -> list[str]:
    if site.kind == "fused":
        return ["training" if site.mode == "training" else "inference"]
    if site.mode == "both":
        settled = any(assumed.settles(edge) for edge in site.parameters.get(MEAN, ()))
        return ["single"] if settled else ["single", "choosing"]
    return ["single", "serving"] if site.mode == "inference" else ["single"]


def _layer(model: Model, site: Site) -> BoundNames:
    names = {k: v.name for k, v in model.variables.items()}
    return frozenset(tuple(key and names[key] for key in keys) for keys in site.variables)
