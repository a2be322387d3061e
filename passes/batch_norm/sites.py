"""Sites: the places where a model computes batch norms, fused or in single ops, and the values that enter there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Literal

import numpy as np

from passes.batch_norm.decomposed import INPUT, DecomposedBatchNorm, decomposed, near_misses
from passes.batch_norm.roles import BETA, GAMMA, MEAN, ROLES, VARIANCE
from passes.batch_norm.site import Binding, Mode, Site
from passes.batch_norm.updates import Update, assigned, averaged, update
from passes.batch_norm.updates_beside import updates_beside
from passes.quantization.quantizer_marks import tag_of
from rewriter import op_defs
from rewriter.choices import Leaf, leaves, outside
from rewriter.dataflow import (
    Captured,
    Computed,
    Constant,
    Origin,
    VariableKey,
    bindings,
    call_graph,
    consumers,
    origins,
    running,
)
from rewriter.ir import MAIN, Edge, Graph, Model, Node, Value

STATISTICS = {MEAN: 1, VARIANCE: 2}
"""The kernel's outputs that hold the batch's statistics (the variance Bessel-corrected), by role."""

FUSED = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")


def sites(model: Model) -> tuple[Site, ...]:
    """Return all sites, in the order of graphs and nodes."""
    all_sites: list[Site | None] = []
    for name, forms in model.analysis(_forms).items():
        form_edges = frozenset(e for form in forms for edges in form.inputs.values() for e in edges)
        all_sites += [_site(model, model.graphs[name], form, form_edges) for form in forms]
        matched = [form.matched for form in forms if isinstance(form, _Decomposed)]
        all_sites += [_unknown(name, *missed) for missed in near_misses(model, model.graphs[name], matched)]
    return tuple(site for site in all_sites if site is not None)


def _unknown(graph: str, node: str, why: str) -> Site:
    """Return a site for a possible batch norm of no known form."""
    reason = (
        f"it begins like a batch norm, with the root of a variance and epsilon, but goes on in no known form: {why}"
    )
    no_variables: frozenset[tuple[None, ...]] = frozenset([(None,) * 4])
    unbound = Binding(no_variables, no_variables, weight=None)
    return Site(graph, node, "decomposed", "inference", epsilon=0.0, inputs={}, binding=unbound, reason=reason)


def quantized(model: Model) -> frozenset[tuple[str, str]]:
    """Return (graph, node) of the sites that have a quantiser."""
    return frozenset(
        (name, form.node) for name, forms in model.analysis(_forms).items() for form in forms if _proxies(model, form)
    )


def _proxies(model: Model, form: _Form) -> tuple[tuple[str, str], ...]:
    """Return (graph, node) of the quantisers on a site's parameters and statistics."""
    of_parameters = [p for role in ROLES for leaf in _leaves(model, form.inputs.get(role, ())) for p in leaf.proxies]
    return tuple(dict.fromkeys([*of_parameters, *(p for u in _updates(form) for p in u.proxies)]))


def _forms(model: Model) -> Mapping[str, tuple[_Form, ...]]:
    """Return the fused nodes and groups of ops that look like a batch norm, by graph.

    A form reaches into callers and callees, so the forms of all graphs are found together.
    """
    return {name: _in_graph(model, graph) for name, graph in model.graphs.items()}


def _in_graph(model: Model, graph: Graph) -> tuple[_Form, ...]:
    """Return the fused nodes of a graph and the groups of ops that look like a batch norm, in the graph's order."""
    forms: list[_Form] = [_Fused(model, graph, n) for n in graph.nodes.values() if n.op in FUSED]
    forms += [_Decomposed(model, match) for match in decomposed(model, graph)]
    order = {name: position for position, name in enumerate(graph.nodes)} if len(forms) > 1 else {}
    return tuple(sorted(forms, key=lambda form: order.get(form.node, 0)))


class _Fused:
    """A fused node: x, gamma, beta, mean and variance are its inputs."""

    kind: Literal["fused"] = "fused"
    interior: tuple[str, ...] = ()

    def __init__(self, model: Model, graph: Graph, node: Node) -> None:
        get = partial(op_defs.get, model, node)
        self.node = node.name
        self.epsilon = float(np.float32(get("epsilon")))
        # The two older ops keep no average of their own.
        averages = any(a.name == "exponential_avg_factor" for a in op_defs.op_def(model, node.op).attr)
        self.kernel_factor = float(np.float32(get("exponential_avg_factor"))) if averages else 1.0
        self.training = bool(get("is_training"))
        self.inputs = {name: (Edge(graph.name, node.name, position),) for position, name in enumerate((INPUT, *ROLES))}
        self.updates: dict[str, Update] = {}
        if self.training:
            for role, port in STATISTICS.items():
                entered = update(model, graph, Value(node.name, port))
                # All uses count as updates, whatever the graph does with them: these outputs have no other purpose.
                uses = model.analysis_of(graph, consumers).get(Value(node.name, port), ())
                self.updates[role] = replace(entered, edges=tuple(uses))
            # The averages may have kept the source's moments, beside this kernel.
            if not any(u.targets for u in self.updates.values()):
                self.updates |= updates_beside(model, graph, node.inputs[0])


class _Decomposed:
    """Single ops: the captures of a form. A mean and a variance that are no variables are the batch's."""

    kind: Literal["decomposed"] = "decomposed"
    kernel_factor = 1.0
    training = False

    def __init__(self, model: Model, batch_norm: DecomposedBatchNorm) -> None:
        self.matched = batch_norm
        self.node = batch_norm.root
        self.interior = tuple(n for n in dict.fromkeys(batch_norm.match.nodes) if n != batch_norm.root)
        self.epsilon = float(np.float32(batch_norm.epsilon))
        self.inputs = {name: batch_norm.match[name].edges for name in (INPUT, *ROLES) if name in batch_norm.match}
        self.updates: dict[str, Update] = {}
        normalising = frozenset(edge for edges in self.inputs.values() for edge in edges)
        for role in STATISTICS:
            for leaf in _leaves(model, self.inputs[role]):
                if not _held(model, leaf) and not _from_average(model, leaf):
                    # Where the only caller of a function computes the statistic, the way to the average begins there.
                    source = outside(model, leaf)
                    self.updates[role] = update(
                        model, model.graphs[source.graph], source.value, source.calls, normalising
                    )


_Form = _Fused | _Decomposed


def _leaves(model: Model, edges: Iterable[Edge]) -> Iterator[Leaf]:
    """Yield the alternatives of the values at some edges."""
    for edge in edges:
        yield from leaves(model, edge, model.graphs[edge.graph].used_at(edge))


def _held(model: Model, leaf: Leaf) -> bool:
    """Return true if an alternative is a variable's value, a constant, or a caller's, and not computed."""
    return not any(isinstance(o, Computed) for o in origins(model, leaf.graph, leaf.value))


def _site(model: Model, graph: Graph, form: _Form, form_edges: frozenset[Edge]) -> Site | None:
    """Return the site of a fused node or a decomposed form; None where the form is no batch norm.

    A layer or instance normalisation has the same form, but keeps no moving averages. Keras 2 writes it as a
    fused node in training mode, with constants for gamma and beta.
    """
    alternatives = {role: tuple(_leaves(model, form.inputs.get(role, ()))) for role in ROLES}
    held_leaves = {
        role: [leaf for leaf in leaves_of_role if _held(model, leaf)] for role, leaves_of_role in alternatives.items()
    }
    averages = [u.targets[-1] if u.targets else None for u in _updates(form)]
    computed = [f for r in STATISTICS for f in alternatives[r] if f not in held_leaves[r] and _from_average(model, f)]
    if form.kind == "decomposed" and not (computed or _moving(model, held_leaves) or any(averages)):
        return None
    mode: Mode = "inference"
    if form.training or form.updates:
        mode = "both" if (held_leaves[MEAN] or computed) and not form.training else "training"
    used = {r: alternatives[r] if r in (GAMMA, BETA) else held_leaves[r] if mode != "training" else [] for r in ROLES}
    # Of a chosen statistic, it is the moving one that tells which layer this is.
    values = [next(iter(held_leaves[role] or alternatives[role]), None) for role in ROLES]
    with_averages = _origins(model, graph, [*(v if v is None else (v.graph, v.value) for v in values), *averages])
    origins_of_roles = frozenset(o[:4] for o in with_averages)
    if form.training and not any(isinstance(o, VariableKey) for origin in with_averages for o in origin):
        return None
    edges = {
        r: tuple(dict.fromkeys(_quantizable(model, graph, leaves_of_role, form_edges)))
        for r, leaves_of_role in used.items()
    }
    weights = [u.weight for u in _updates(form) if u.weight is not None]
    binding = Binding(
        origins=origins_of_roles,
        variables=frozenset(tuple(_keys(*o)) for o in with_averages),
        weight=form.kernel_factor if form.kernel_factor != 1.0 else next(iter(weights), None),
        parameters={r: e for r, e in edges.items() if e},
        statistics={role: u.edges for role, u in form.updates.items()},
        assigns={role: u.assigns for role, u in form.updates.items()},
        runs=tuple(dict.fromkeys(run for u in _updates(form) for run in u.runs)),
        quantized=tuple(tag_of(model.graphs[g].nodes[n]) for g, n in _proxies(model, form)),
    )
    return Site(
        graph=graph.name,
        node=form.node,
        kind=form.kind,
        mode=mode,
        epsilon=form.epsilon,
        inputs=form.inputs,
        binding=binding,
        interior=form.interior,
        kernel_factor=form.kernel_factor,
        reason=_reason(model, graph, mode, origins_of_roles) or _computed(computed),
    )


def _updates(form: _Form) -> tuple[Update, Update]:
    return form.updates.get(MEAN, Update()), form.updates.get(VARIANCE, Update())


def _moving(model: Model, held_leaves: Mapping[str, list[Leaf]]) -> bool:
    """Return true if mean and variance may be variables."""
    return all(
        any(
            isinstance(o, VariableKey | Constant | Captured)
            for f in held_leaves[r]
            for o in origins(model, f.graph, f.value)
        )
        for r in STATISTICS
    )


def _origins(
    model: Model, graph: Graph, values: list[tuple[str, Value] | None]
) -> frozenset[tuple[Origin | None, ...]]:
    """Return the origins of values, together for each way to call the graph; None stays None.

    A value of another graph has to have one origin.
    """
    inside = [v[1] for v in values if v is not None and v[0] == graph.name]
    origin_tuples = set()
    for binding in bindings(model, graph.name, tuple(inside)):
        bound = iter(binding)
        origin_tuples.add(tuple(v if v is None else _origin(model, graph, v, bound) for v in values))
    return frozenset(origin_tuples)


def _origin(model: Model, graph: Graph, value: tuple[str, Value], bound: Iterator[Origin]) -> Origin:
    if value[0] == graph.name:
        return next(bound)
    return min(origins(model, *value), key=str)


def _keys(*origin: Origin | None) -> Iterator[str | None]:
    """Yield the variables' keys by role, from the origins of parameters and, after them, of updated averages."""
    for index, parameter in enumerate(origin[:4]):
        variable = parameter
        if index >= 2 and not isinstance(parameter, VariableKey):  # noqa: PLR2004  moving mean and variance
            variable = origin[index + 2]
        yield variable.key if isinstance(variable, VariableKey) else None


def _quantizable(
    model: Model, graph: Graph, alternatives: Iterable[Leaf], form_edges: frozenset[Edge]
) -> Iterator[Edge]:
    """Yield the edges of alternatives that are no constants, and those of the same values in gradients."""
    for leaf in alternatives:
        if not all(isinstance(o, Constant | Captured) for o in origins(model, leaf.graph, leaf.value)):
            yield leaf.edge
            # A train op in the graph is to differentiate by the values that the batch norm uses.
            if leaf.edge.graph == graph.name:
                yield from _gradients(model, graph, leaf.edge, form_edges)


def _gradients(model: Model, graph: Graph, edge: Edge, form_edges: frozenset[Edge]) -> Iterator[Edge]:
    """Yield the uses of the same value in the gradients that a graph holds.

    A gradient of a batch norm follows its output. It is a fused kernel's, or a product that no result of the graph
    needs. An update of a variable follows the output too, but leads to an assignment.
    """
    value = graph.used_at(edge)
    other_uses = [e for e in model.analysis_of(graph, consumers)[value] if e != edge and e.node and e not in form_edges]
    for use in other_uses:
        op = graph.nodes[use.node].op
        if (op == "Mul" or op.startswith("FusedBatchNormGrad")) and not assigned(model, graph, use):
            after, returned = model.analysis(_after_batch_norms)(graph.name), model.analysis(_returned)(graph.name)
            if use.node in after and (op != "Mul" or use.node not in returned):
                yield use


def _returned(model: Model) -> Callable[[str], frozenset[str]]:
    """Return a function from a graph to the nodes that its results, or the main graph's signatures, need."""

    @cache
    def needed(name: str) -> frozenset[str]:
        graph = model.graphs[name]
        waiting = [r.value.node for r in graph.results]
        if name == MAIN:
            waiting = [v.node for s in model.signatures.values() for v in s.fetches]
        nodes: set[str] = set()
        while waiting:
            node = waiting.pop()
            if node not in nodes:
                nodes.add(node)
                waiting += [*(v.node for v in graph.nodes[node].inputs), *graph.nodes[node].after]
        return frozenset(nodes)

    return needed


def _after_batch_norms(model: Model) -> Callable[[str], frozenset[str]]:
    """Return a function from a graph to its nodes that need a batch norm's output, computed on demand."""

    @cache
    def after(name: str) -> frozenset[str]:
        graph = model.graphs[name]
        uses = model.analysis_of(graph, consumers)
        waiting = [Value(form.node) for form in model.analysis(_forms)[name]]
        nodes: set[str] = set()
        while waiting:
            for edge in uses.get(waiting.pop(), ()):
                if edge.node and edge.node not in nodes:
                    nodes.add(edge.node)
                    count = op_defs.output_count(model, graph.nodes[edge.node])
                    waiting += [Value(edge.node, port) for port in range(count)]
        return frozenset(nodes)

    return after


def _reason(model: Model, graph: Graph, mode: Mode, origins_of_roles: frozenset[tuple[Origin | None, ...]]) -> str:
    """Return the reason why a site cannot be rewritten, from its calls and origins; empty where it can."""
    calls = model.analysis(call_graph)
    if graph.name not in model.analysis(running):
        return "nothing calls its function, so it never runs"
    if graph.name in calls.opaque:
        return "its function is used by an op other than a call, so the switch cannot be brought to it"
    if mode == "training":
        return ""
    for index, role in ((2, MEAN), (3, VARIANCE)):
        for origin in sorted({by_role[index] for by_role in origins_of_roles}, key=str):
            if not isinstance(origin, VariableKey):
                return f"its {role.replace('_', ' ')} is {_described(origin)}"
    return ""


def _from_average(model: Model, leaf: Leaf) -> bool:
    """Return true if an alternative is computed from a moving average by arithmetic alone."""
    return averaged(model, model.graphs[leaf.graph], leaf.value)


def _computed(computed: list[Leaf]) -> str:
    """Return the reason of a site whose moving statistics are computed; empty where none is."""
    return f"a moving statistic is computed by {computed[0].value.node}, not a variable" if computed else ""


def _described(origin: Origin | None) -> str:
    """Return an origin in words."""
    match origin:
        case Constant(node=node):
            return f"the constant {node}; --unfreeze-constants makes it a variable again"
        case Captured():
            return "a constant that its function captures; --unfreeze-constants makes it a variable again"
        case Computed(node=node, op=op):
            return f"computed by {node} ({op}), not a variable"
        case _:
            return "an input of its function, not a variable"
