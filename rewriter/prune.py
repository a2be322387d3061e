"""Removal of what some concrete functions do not need: the reverse of `rewriter.lift`.

Nodes that no result and no effect depends on go, and with them the arguments that carried values to them, through
every call up to the variables that a concrete function binds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import networkx as nx
from tensorflow.core.framework import function_pb2

from rewriter import ops, protos
from rewriter.dataflow import call_graph, gradient_kinds, referred
from rewriter.ir import ARG, MAIN, Edge, Entry, Graph, Model, Node, Value
from rewriter.sweep import held, needed_by

READS = frozenset({"ReadVariableOp"})
"""Ops that are stateful, but change nothing: one that only others wait for is not needed, but what it waits for is."""

CUT = "bnqat/cut"
"""What a node is called that stands for inputs that are not to count."""

Position = tuple[str, int]
"""A function, and the position of one of its arguments."""


def keep(model: Model, functions: Collection[str]) -> Model:
    """The model with these concrete functions alone, the signatures that they compute, and what they need."""
    kept, waiting = set(), list(functions)
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept.add(name)
            waiting += (f for c in model.entries[name].captures if isinstance(c, int) for f in model.owned.get(c, ()))
        if not waiting:
            waiting += (name for name in _used_in_main(model) if name not in kept)
    entries = {name: entry for name, entry in model.entries.items() if name in kept}
    gone = model.entries.keys() - entries.keys()
    main = _without_calls(model, gone)
    signatures = {name: s for name, s in model.signatures.items() if not s.entry or s.entry in entries}
    model = replace(model, graphs={**model.graphs, MAIN: main}, entries=entries, signatures=signatures)
    return prune(model)


def prune(model: Model) -> Model:
    """The model without functions, nodes, arguments and variables that nothing needs."""
    model = _reached(model)
    usage = _Usage(model)
    graphs = {name: usage.pruned(graph) for name, graph in model.graphs.items()}
    entries = {name: usage.bound(entry) for name, entry in model.entries.items()}
    captured = {c for entry in entries.values() for c in entry.captures}
    variables = {key: v for key, v in model.variables.items() if key in captured or not model.object_based}
    return _reached(replace(model, graphs=graphs, entries=entries, variables=variables))


def _used_in_main(model: Model) -> Iterator[str]:
    """Concrete functions whose results another call of the main graph is given: the saver is given tables' contents."""
    main = model.graphs[MAIN]
    passed = {v.node for node in main.nodes.values() if ops.callees(model, node) for v in node.inputs}
    for call in model.analysis(call_graph).calls.get(MAIN, ()):
        if call.node in passed and call.callee in model.entries:
            yield call.callee


def needed_without(model: Model, edges: Iterable[Edge]) -> frozenset[str]:
    """The variables that would still be needed if some inputs of nodes were constants; their other inputs count."""
    cut: dict[str, dict[str, Node]] = {}
    for edge in edges:
        if edge.graph not in cut:
            cut[edge.graph] = {**model.graphs[edge.graph].nodes, CUT: Node(CUT, "Const")}
        held = cut[edge.graph]
        inputs = list(held[edge.node].inputs)
        inputs[edge.position] = Value(CUT)
        held[edge.node] = replace(held[edge.node], inputs=tuple(inputs))
    graphs = {**model.graphs, **{name: replace(model.graphs[name], nodes=held) for name, held in cut.items()}}
    return frozenset(prune(replace(model, graphs=graphs)).variables)


def _reached(model: Model) -> Model:
    """The model without functions that neither the main graph nor a concrete function calls."""
    reached = _closure(model, {MAIN, *model.entries})
    kinds = {kind for name in reached for kind in gradient_kinds(model.graphs[name])}
    gradients = {kind: g for kind, g in model.gradients.items() if kind in kinds}
    reached |= _closure(model, {g.function for g in gradients.values()})
    return replace(model, graphs={n: g for n, g in model.graphs.items() if n in reached}, gradients=gradients)


def _closure(model: Model, names: Collection[str]) -> set[str]:
    """Some graphs, and all functions that they refer to, by calls or otherwise."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += model.analysis_of(model.graphs[name], referred)
    return found


def _without_calls(model: Model, gone: Collection[str]) -> Graph:
    """The main graph without calls of these functions, what follows from them, and what only they needed."""
    main = model.graphs[MAIN]
    found = {call.node for call in model.analysis(call_graph).calls.get(MAIN, ()) if call.callee in gone}
    dead = following(main, found)
    nodes = {
        name: replace(node, after=tuple(a for a in node.after if a not in dead))
        if dead.intersection(node.after)
        else node
        for name, node in main.nodes.items()
        if name not in dead
    }
    before = (v.node for name in dead for v in main.nodes[name].inputs)
    return without_orphans(model, replace(main, nodes=nodes), before) if dead else main


def following(graph: Graph, names: Collection[str]) -> set[str]:
    """Some nodes, and all that are computed from what they compute."""
    digraph: nx.DiGraph[str] = nx.DiGraph()
    digraph.add_nodes_from(graph.nodes)
    digraph.add_edges_from((v.node, node.name) for node in graph.nodes.values() for v in node.inputs)
    return set(names).union(*(nx.descendants(digraph, name) for name in names))


def without_orphans(model: Model, graph: Graph, candidates: Iterable[str]) -> Graph:
    """A graph without those of these nodes that nothing uses, and without what only they used.

    A read that nothing uses is no use.
    """
    users: dict[str, list[str]] = {}
    uses = Counter(model.analysis(held))
    for node in graph.nodes.values():
        for name in needed_by(node):
            uses[name] += 1
            users.setdefault(name, []).append(node.name)
    nodes, waiting = dict(graph.nodes), list(candidates)

    def drop(name: str) -> None:
        node = nodes.pop(name)
        uses.subtract(needed_by(node))
        waiting.extend(needed_by(node))

    while waiting:
        name = waiting.pop()
        if name in nodes:
            reading = [u for u in users.get(name, ()) if u in nodes and nodes[u].op in READS and not uses[u]]
            if uses[name] == len(reading):
                for each in reading:
                    drop(each)
                drop(name)
    return replace(graph, nodes=nodes)


class _Usage:
    """Which nodes and which arguments a model needs.

    Attributes:
        live: by function, the nodes that its results and effects need.
        wanted: arguments that stay.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.calls = model.analysis(call_graph)
        self.bodies = self._bodies()
        fixed = {*self.calls.opaque, *(g.function for g in model.gradients.values()), *self._proxies()}
        fixed &= model.graphs.keys()
        self.wanted: set[Position] = {(n, p) for n in fixed for p in range(len(model.graphs[n].arguments))}
        self.wanted |= {(e.function, p) for e in model.entries.values() for p in range(len(e.inputs))}
        self.live: dict[str, set[str]] = {}
        order = [n for n in reversed(list(nx.topological_sort(self.calls.digraph))) if n in model.graphs and n]
        count = -1
        while count < len(self.wanted):  # what one branch needs, the other is given as well
            count = len(self.wanted)
            for name in order:
                self._walk(model.graphs[name])
            for name in order:
                self._agree(model.graphs[name], self.live[name])
        self._agree(model.graphs[MAIN], model.graphs[MAIN].nodes)

    def _proxies(self) -> Iterator[str]:
        """Functions called by nodes that stand for their last input, which says for what, even where it is not used."""
        for graph in self.model.graphs.values():
            for call in self.calls.calls.get(graph.name, ()):
                if ops.QUANTIZER_MARK in graph.nodes[call.node].attrs:
                    yield call.callee

    def _bodies(self) -> frozenset[str]:
        """The functions that are nothing but bodies of loops."""
        found = set()
        for name, callers in self.calls.callers.items():
            nodes = [self.model.graphs[c.graph].nodes[c.node] for c in callers if c.graph in self.model.graphs]
            if nodes and all(self._is_body(n, name) for n in nodes):
                found.add(name)
        return frozenset(found)

    def _is_body(self, node: Node, name: str) -> bool:
        """Return whether a call is a loop with this function as its body."""
        return ops.call_form_of(self.model, node).carried and ops.callees(self.model, node)[-1] == name

    def _passes(self, graph: Graph, position: int) -> bool:
        """Whether a loop's body returns one of its arguments as it is."""
        return graph.name in self.bodies and graph.results[position].value == Value(graph.arguments[position])

    def _walk(self, graph: Graph) -> None:
        waiting = [r.value.node for i, r in enumerate(graph.results) if not self._passes(graph, i)]
        waiting += [e.node for e in graph.effects if graph.nodes[e.node].op not in READS or _waits(graph, e.node)]
        waiting += [a for p, a in enumerate(graph.arguments) if (graph.name, p) in self.wanted]
        live: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name not in live:
                live.add(name)
                waiting += self._needed(graph, graph.nodes[name])
        self.live[graph.name] = live
        self.wanted |= {(graph.name, p) for p, a in enumerate(graph.arguments) if a in live}

    def _needed(self, graph: Graph, node: Node) -> Iterator[str]:
        gone = self._dropped(node)
        yield from (v.node for index, v in enumerate(node.inputs) if index not in gone)
        for name in node.after:
            if graph.nodes[name].op in READS:
                yield from _before(graph, name)
            else:
                yield name
        beside = node.attrs.get("_class")
        if beside is not None:
            names = (protos.text(s).removeprefix("loc:@") for s in beside.list.s)
            yield from (name for name in names if name in graph.nodes)

    def _agree(self, graph: Graph, live: Collection[str]) -> None:
        """Let the functions that one node calls have the same arguments."""
        used = {value for value, _ in graph.edges()}
        for call in self.calls.calls.get(graph.name, ()):
            if call.node in live:
                node = graph.nodes[call.node]
                called, form = ops.callees(self.model, node), ops.call_form_of(self.model, node)
                for position in range(len(node.inputs) - form.first):
                    carried = form.carried and Value(node.name, position) in used
                    if carried or any((name, position) in self.wanted for name in called):
                        self.wanted |= {(name, position) for name in called}

    def _dropped(self, node: Node) -> frozenset[int]:
        """The inputs of a node that what it calls does not need."""
        called = ops.callees(self.model, node)
        if not called or not ops.call_form(self.model, node):
            return frozenset()
        first = ops.call_form_of(self.model, node).first
        positions = range(len(node.inputs) - first)
        return frozenset(first + p for p in positions if not any((name, p) in self.wanted for name in called))

    def pruned(self, graph: Graph) -> Graph:
        """A graph without what is not needed; the same object where all of it is."""
        if graph.name == MAIN:
            return self._main(graph)
        kept = [(graph.name, p) in self.wanted for p in range(len(graph.arguments))]
        live = self.live[graph.name]
        arguments = {a for a, wanted in zip(graph.arguments, kept, strict=True) if wanted}
        stays = live | arguments
        nodes = {n.name: self._shorter(graph, n, stays) for n in graph.nodes.values() if n.name in stays}
        if all(kept) and len(nodes) == len(graph.nodes) and all(nodes[n] is graph.nodes[n] for n in nodes):
            return graph
        ports = {name: self._ports(graph.nodes[name]) for name in nodes}
        nodes = {n.name: _moved(n, ports) for n in nodes.values()}
        results = [r for i, r in enumerate(graph.results) if not self._passes(graph, i) or kept[i]]
        return replace(
            graph,
            nodes=nodes,
            arguments=tuple(a for a in graph.arguments if a in arguments),
            results=tuple(r._replace(value=_port(r.value, ports)) for r in results),
            effects=tuple(e for e in graph.effects if e.node in live),
            attrs=_attrs(graph, kept),
            residue=_residue(graph.residue),
        )

    def _main(self, graph: Graph) -> Graph:
        nodes = {n.name: self._shorter(graph, n, graph.nodes) for n in graph.nodes.values()}
        freed = [graph.nodes[n].inputs[i].node for n in nodes for i in self._dropped(graph.nodes[n])]
        if not freed:
            return graph
        return without_orphans(self.model, replace(graph, nodes=nodes), freed)

    def _shorter(self, graph: Graph, node: Node, stays: Collection[str]) -> Node:
        """A node without inputs that what it calls does not need.

        In place of a read that goes, it waits for what that has waited for; for nothing else that goes.
        """
        waits = (each for a in node.after for each in ((a,) if a in stays else _before(graph, a)))
        after = tuple(dict.fromkeys(name for name in waits if name in stays))
        node = node if after == node.after else replace(node, after=after)
        gone = self._dropped(node)
        if not gone:
            return node
        form = ops.call_form_of(self.model, node)
        keeps = [index not in gone for index in range(len(node.inputs))]
        lists = {form.types} | ({"output_shapes", "_output_shapes"} if form.carried else set())
        changed = {k: _filtered(v, keeps[form.first :]) for k, v in node.attrs.items() if k in lists}
        changed["_read_only_resource_inputs"] = None
        inputs = tuple(v for v, kept in zip(node.inputs, keeps, strict=True) if kept)
        return replace(node.with_attrs(**changed), inputs=inputs)

    def _ports(self, node: Node) -> Mapping[int, int]:
        """New places of a loop's outputs."""
        gone = self._dropped(node)
        form = ops.call_form(self.model, node)
        if not gone or form is None or not form.carried:
            return {}
        left = [p for p in range(len(node.inputs)) if p not in gone]
        return {old: new for new, old in enumerate(left)}

    def bound(self, entry: Entry) -> Entry:
        """A concrete function without captures that it does not need."""
        first = len(entry.inputs)
        captures = (c for i, c in enumerate(entry.captures) if (entry.function, first + i) in self.wanted)
        return replace(entry, captures=tuple(captures))


def _waits(graph: Graph, read: str) -> bool:
    return any(True for _ in _before(graph, read))


def _before(graph: Graph, read: str) -> Iterator[str]:
    """What a read waits for, and what other reads among that wait for."""
    seen, waiting = {read}, [read]
    while waiting:
        for name in graph.nodes[waiting.pop()].after:
            if name not in seen:
                seen.add(name)
                if graph.nodes[name].op in READS:
                    waiting.append(name)
                else:
                    yield name


def _port(value: Value, ports: Mapping[str, Mapping[int, int]]) -> Value:
    moved = ports.get(value.node)
    return Value(value.node, moved[value.port]) if moved else value


def _moved(node: Node, ports: Mapping[str, Mapping[int, int]]) -> Node:
    if node.op == ARG or not any(ports.get(v.node) for v in node.inputs):
        return node
    return replace(node, inputs=tuple(_port(v, ports) for v in node.inputs))


def _filtered(attribute: Any, keeps: Sequence[bool]) -> Any:
    """A list attribute without some elements; None where it is not about as many, as shapes of calls may be stale."""
    short = type(attribute)()
    short.list.SetInParent()
    for name in ("type", "shape"):
        found = getattr(attribute.list, name)
        if found and len(found) != len(keeps):
            return None
        getattr(short.list, name).extend(v for v, kept in zip(found, keeps, strict=False) if kept)
    return short


def _attrs(graph: Graph, kept: list[bool]) -> Mapping[str, Any]:
    if "_input_shapes" not in graph.attrs or all(kept):
        return graph.attrs
    return {**graph.attrs, "_input_shapes": _filtered(graph.attrs["_input_shapes"], kept)}


def _residue(residue: bytes) -> bytes:
    """What is not modelled of a function, without the numbers of its resources, which go by position."""
    proto = function_pb2.FunctionDef.FromString(residue)
    proto.resource_arg_unique_id.clear()
    data: bytes = proto.SerializeToString(deterministic=True)
    return data
