"""Kernels that compute batch norm: those that are executed, and those that follow from a graph's sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import tensorflow as tf
from tensorflow.python.eager import context

from passes.batch_norm.roles import MEAN, ROLES
from passes.batch_norm.site import Site
from passes.batch_norm.sites import FUSED, sites
from rewriter import op_defs, ops
from rewriter.dataflow import call_graph
from rewriter.ir import MAIN, Graph, Model, Value
from rewriter.liveness import Assumption

T = TypeVar("T")
KINDS = ("single", "choosing", "serving", "training", "inference", "others")
Place = tuple[str, str]
"""A site by its graph and node."""
BoundNames = frozenset[tuple[str | None, ...]]
"""Variables that a site normalises with: their names, for each call site of its function."""


class Kernels(NamedTuple):
    """Executed kernels that contain batch norm, after Grappler.

    Attributes:
        placed: the number of each op in the graphs that ran, both branches of a conditional included.
        training: the number of these that normalise with the batch's statistics, gradients not counted.
        ran: the number that were reached.
    """

    placed: Counter[str]
    training: int
    ran: int

    @property
    def forward(self) -> int:
        """Number of placed kernels that are no gradients."""
        return sum(n for op, n in self.placed.items() if "Grad" not in op)

    @property
    def gradients(self) -> int:
        """Number of placed kernels that are gradients."""
        return self.placed.total() - self.forward

    def __str__(self) -> str:
        """Return the number and name of each op."""
        return ", ".join(f"{n} {op}" for op, n in sorted(self.placed.items())) or "none"

    @property
    def reach(self) -> str:
        """Numbers and names of ops, and the number that were reached if a branch left some out."""
        return str(self) if self.ran == self.placed.total() else f"{self} ({self.ran} reached)"


def kernels_in(graphs: Iterable[Any], stats: Any) -> Kernels:
    """Return the batch-norm kernels of partition graphs, with those that step stats list as reached."""
    reached = {n.node_name for device in stats.dev_stats for n in device.node_stats}
    norms = [n for graph in graphs for n in graph.node if _normalises(n)]
    training = [n for n in norms if "is_training" in n.attr and n.attr["is_training"].b and "Grad" not in n.op]
    return Kernels(Counter(n.op for n in norms), len(training), sum(n.name in reached for n in norms))


def _normalises(node: Any) -> bool:
    """Return true if a node is a batch-norm kernel, or one into which Grappler fused it."""
    fused = node.attr["fused_ops"].list.s if "fused_ops" in node.attr else ()
    return "FusedBatchNorm" in node.op or b"FusedBatchNorm" in fused


@tf.function  # type: ignore[untyped-decorator]  # TensorFlow has no types
def _nothing() -> tf.Tensor:
    """Return a constant; running this empties TensorFlow's list of executed graphs."""
    return tf.constant(0)


def with_kernels(call: Callable[[], T]) -> tuple[T, Kernels]:
    """Return the result of a call, and the batch-norm kernels that the loaded functions in it execute."""
    eager_context = context.context()
    eager_context.enable_graph_collection()
    eager_context.enable_run_metadata()
    try:
        # TensorFlow reports the graphs of functions that ran before with those of the next function that runs.
        _nothing()
        eager_context.export_run_metadata()
        result = call()
        metadata = eager_context.export_run_metadata()
    finally:
        eager_context.disable_graph_collection()
        eager_context.disable_run_metadata()
    graphs = (g for function in metadata.function_graphs for g in function.partition_graphs)
    return result, kernels_in(graphs, metadata.step_stats)


@dataclass(frozen=True)
class Placed:
    """Numbers of sites of each batch norm in a graph and in the functions that it calls, once for each call.

    Attributes:
        single: sites in single ops.
        choosing: those in single ops that choose their mode at run time, and need a kernel for each mode.
        serving: those in single ops that are in inference mode.
        training: fused sites in training mode.
        inference: fused sites in inference mode.
        others: fused ops in training mode that are no batch norm; Keras writes layer normalisation so.
    """

    single: Counter[BoundNames]
    choosing: Counter[BoundNames]
    serving: Counter[BoundNames]
    training: Counter[BoundNames]
    inference: Counter[BoundNames]
    others: int

    @property
    def both_modes(self) -> int:
        """Number of sites that compute both modes and use one; a rewrite may compute only that one."""
        return (self.training & self.inference).total()

    def raised(self, after: Placed) -> Counter[BoundNames]:
        """Return the sites in single ops that became fused kernels in the model after."""
        fused = self.single - after.single
        # A layer of constants has no names. Once it is unfrozen it has, so it counts as a layer with new names.
        renamed = sum(n for layer, n in after.single.items() if layer not in self.single)
        for layer in [layer for layer in fused if not any(any(names) for names in layer)]:
            fused[layer] -= renamed
        return +fused

    def kernels_for(self, raised: Counter[BoundNames]) -> int:
        """Return the number of kernels that replace these sites in single ops."""
        return raised.total() + (raised & self.choosing).total()

    def trained(self, raised: Counter[BoundNames]) -> int:
        """Return the number of kernels that train these batch norms once: one for each site that serves."""
        served = raised & self.serving
        training, inference = self.training + (raised - served), self.inference + served
        # The union takes the larger number: where a graph computes both modes of a batch norm, one kernel trains it.
        return (training | inference).total() + self.others


def placed(model: Model, signature: str, excluded_means: Collection[str] = ()) -> Placed:
    """Return the batch norms that a signature runs; none are known if no single function computes it.

    Batch norms whose moving mean is in `excluded_means`, keys of variables, are left out.
    """
    source_signature = model.signatures.get(signature)
    if source_signature is None:
        return _counted(())
    if source_signature.entry:
        return placed_by(model, source_signature.entry, excluded_means)
    fetched_nodes = [v.node for v in source_signature.fetches]
    return _counted(_in_graph(model, model.graphs[MAIN], {}, fetched_nodes, _with_means(model, excluded_means)))


def placed_by(model: Model, function: str, excluded_means: Collection[str] = ()) -> Placed:
    """Return the batch norms that a function runs, without those whose moving mean is in `excluded_means`, keys."""
    return _counted(_of_function(model, function, {}, _with_means(model, excluded_means)))


def _with_means(model: Model, means: Collection[str]) -> frozenset[Place]:
    """Return the sites of batch norms with these moving means."""
    position = ROLES.index(MEAN)
    excluded_sites = (s for s in model.analysis(sites) if all(keys[position] in means for keys in s.binding.variables))
    return frozenset((s.graph, s.node) for s in excluded_sites)


def _counted(kinds_and_layers: Iterable[tuple[str, BoundNames]]) -> Placed:
    kinds: dict[str, Counter[BoundNames]] = {f: Counter() for f in KINDS}
    for kind, layer in kinds_and_layers:
        kinds[kind][layer] += 1
    others = kinds.pop("others").total()
    return Placed(**kinds, others=others)


def _of_function(
    model: Model, name: str, known_booleans: Mapping[Value, bool], excluded: frozenset[Place]
) -> Iterator[tuple[str, BoundNames]]:
    graph = model.graphs[name]
    roots = [*(r.value.node for r in graph.results), *(e.node for e in graph.effects)]
    yield from _in_graph(model, graph, known_booleans, roots, excluded)


def _in_graph(
    model: Model, graph: Graph, known_booleans: Mapping[Value, bool], roots: list[str], excluded: frozenset[Place]
) -> Iterator[tuple[str, BoundNames]]:
    """Return the batch norms that `roots` need, if these booleans are known; without those in `excluded`."""
    assumed = Assumption(model, graph, known_booleans)
    needed = assumed.needed(roots)
    norm_sites = [s for s in model.analysis(sites) if s.graph == graph.name and s.node in needed]
    for site in (s for s in norm_sites if (s.graph, s.node) not in excluded):
        yield from ((kind, _layer(model, site)) for kind in _kinds(site, assumed))
    site_nodes = {site.node for site in norm_sites}
    for name in needed:
        node = graph.nodes[name]
        if node.op in FUSED and name not in site_nodes and op_defs.get(model, node, "is_training"):
            yield "others", frozenset()
    calls = model.analysis(call_graph).calls.get(graph.name, [])
    for name in dict.fromkeys(c.node for c in calls if c.node in needed):
        node = graph.nodes[name]
        form = ops.call_form_of(model, node)
        # A loop may change its variables, so nothing is known of them inside.
        values = [None if form.carried else _known_boolean(model, assumed, v) for v in node.inputs[form.first :]]
        for callee in assumed.taken(node):
            arguments = zip(model.graphs[callee].arguments, values, strict=True)
            yield from _of_function(model, callee, {Value(a): v for a, v in arguments if v is not None}, excluded)


def _known_boolean(model: Model, assumed: Assumption, value: Value) -> bool | None:
    return assumed.known(value) if op_defs.output_dtype(model, assumed.graph, value) == "bool" else None


def _kinds(site: Site, assumed: Assumption) -> list[str]:
    if site.kind == "fused":
        return ["training" if site.mode == "training" else "inference"]
    if site.mode == "both":
        settled = any(assumed.settles(edge) for edge in site.binding.parameters.get(MEAN, ()))
        return ["single"] if settled else ["single", "choosing"]
    return ["single", "serving"] if site.mode == "inference" else ["single"]


def _layer(model: Model, site: Site) -> BoundNames:
    names = {k: v.name for k, v in model.variables.items()}
    return frozenset(tuple(key and names[key] for key in keys) for keys in site.binding.variables)
