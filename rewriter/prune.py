"""Removal of all that the concrete functions of a model do not need: the reverse of `rewriter.lift`.

It removes nodes that no result and no effect depends on. It also removes the arguments that only carried values to
them, through every call, up to the variables that a concrete function captures.
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

CUT = "bnqat/cut"
"""Name of a node that stands for inputs that do not count as uses."""

Position = tuple[str, int]
"""A function, and the position of one of its arguments."""


def keep(model: Model, functions: Collection[str]) -> Model:
    """Return the model with only these concrete functions, the signatures that they compute, and what they need."""
    kept_functions, waiting = set(), list(functions)
    while waiting:
        name = waiting.pop()
        if name not in kept_functions:
            kept_functions.add(name)
            # The functions of a captured object stay with it, such as those that fill a table.
            waiting += (f for c in model.entries[name].captures if isinstance(c, int) for f in model.owned.get(c, ()))
        if not waiting:
            waiting += (name for name in _used_in_main(model) if name not in kept_functions)
    entries = {name: entry for name, entry in model.entries.items() if name in kept_functions}
    removed = model.entries.keys() - entries.keys()
    main = _without_calls(model, removed)
    signatures = {name: s for name, s in model.signatures.items() if not s.entry or s.entry in entries}
    model = replace(model, graphs={**model.graphs, MAIN: main}, entries=entries, signatures=signatures)
    return prune(model)


def prune(model: Model) -> Model:
    """Return the model without functions, nodes, arguments and variables that nothing needs."""
    # Twice: calls in functions that nothing reaches would count as uses, and the calls that are removed below may be
    # the last ones of a function.
    model = _without_unreached(model)
    usage = _Usage(model)
    graphs = {name: usage.pruned(graph) for name, graph in model.graphs.items()}
    entries = {name: usage.bound(entry) for name, entry in model.entries.items()}
    captured = {c for entry in entries.values() for c in entry.captures}
    # In TensorFlow 1's format, variables are nodes of the main graph, and no concrete function captures them.
    variables = {key: v for key, v in model.variables.items() if key in captured or not model.object_based}
    return _without_unreached(replace(model, graphs=graphs, entries=entries, variables=variables))


def _used_in_main(model: Model) -> Iterator[str]:
    """Yield the concrete functions whose results the main graph passes to another call.

    An example is the function that gives a table's contents to the saver.
    """
    main = model.graphs[MAIN]
    passed = {v.node for node in main.nodes.values() if ops.callees(model, node) for v in node.inputs}
    for call in model.analysis(call_graph).calls.get(MAIN, ()):
        if call.node in passed and call.callee in model.entries:
            yield call.callee


def needed_without(model: Model, edges: Iterable[Edge]) -> frozenset[str]:
    """Return the variables that would still be needed if some inputs of nodes were constants.

    The other inputs of these nodes count as uses.
    """
    cut: dict[str, dict[str, Node]] = {}
    for edge in edges:
        if edge.graph not in cut:
            cut[edge.graph] = {**model.graphs[edge.graph].nodes, CUT: Node(CUT, "Const")}
        nodes = cut[edge.graph]
        inputs = list(nodes[edge.node].inputs)
        inputs[edge.position] = Value(CUT)
        nodes[edge.node] = replace(nodes[edge.node], inputs=tuple(inputs))
    graphs = {**model.graphs, **{name: replace(model.graphs[name], nodes=nodes) for name, nodes in cut.items()}}
    return frozenset(prune(replace(model, graphs=graphs)).variables)


def _without_unreached(model: Model) -> Model:
    """Return the model without functions that neither the main graph nor a concrete function reaches."""
    reached = _closure(model, {MAIN, *model.entries})
    kinds = {kind for name in reached for kind in gradient_kinds(model.graphs[name])}
    gradients = {kind: g for kind, g in model.gradients.items() if kind in kinds}
    reached |= _closure(model, {g.function for g in gradients.values()})
    return replace(model, graphs={n: g for n, g in model.graphs.items() if n in reached}, gradients=gradients)


def _closure(model: Model, names: Collection[str]) -> set[str]:
    """Return some graphs and all functions that they refer to, by calls or otherwise, directly or not."""
    closure: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in closure:
            closure.add(name)
            waiting += model.analysis_of(model.graphs[name], referred)
    return closure


def _without_calls(model: Model, callees: Collection[str]) -> Graph:
    """Return the main graph without the calls of these functions, their dependants, and what only those needed."""
    main = model.graphs[MAIN]
    calls = {call.node for call in model.analysis(call_graph).calls.get(MAIN, ()) if call.callee in callees}
    dead = following(main, calls)
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
    """Return some nodes, and all nodes that depend on their outputs, directly or not."""
    digraph: nx.DiGraph[str] = nx.DiGraph()
    digraph.add_nodes_from(graph.nodes)
    digraph.add_edges_from((v.node, node.name) for node in graph.nodes.values() for v in node.inputs)
    return set(names).union(*(nx.descendants(digraph, name) for name in names))


def without_orphans(model: Model, graph: Graph, candidates: Iterable[str]) -> Graph:
    """Return a graph without the candidates that nothing uses, and without the nodes that only they used.

    A read that nothing uses does not count as a use.
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
            reading = [u for u in users.get(name, ()) if u in nodes and nodes[u].op in ops.READS and not uses[u]]
            if uses[name] == len(reading):
                for read in reading:
                    drop(read)
                drop(name)
    return replace(graph, nodes=nodes)


class _Usage:
    """The nodes and arguments that a model needs.

    Attributes:
        calls: the call graph.
        bodies: the functions that are only bodies of loops.
        live: by function, the nodes that its results and effects need.
        live_arguments: arguments that stay.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.calls = model.analysis(call_graph)
        self.bodies = self._bodies()
        # Ops other than calls, and TensorFlow when it differentiates, go on passing all arguments to these functions.
        fixed = {*self.calls.opaque, *(g.function for g in model.gradients.values()), *self._marked_callees()}
        fixed &= model.graphs.keys()
        self.live_arguments: set[Position] = {(n, p) for n in fixed for p in range(len(model.graphs[n].arguments))}
        self.live_arguments |= {(e.function, p) for e in model.entries.values() for p in range(len(e.inputs))}
        self.live: dict[str, set[str]] = {}
        # Callees first: an input of a call is live if the callee's argument is. The main graph ("") comes last.
        order = [n for n in reversed(list(nx.topological_sort(self.calls.digraph))) if n in model.graphs and n]
        count = -1
        while count < len(self.live_arguments):  # if one branch needs an argument, the other takes it as well
            count = len(self.live_arguments)
            for name in order:
                self._mark_live(model.graphs[name])
            for name in order:
                self._equalize_arguments(model.graphs[name], self.live[name])
        self._equalize_arguments(model.graphs[MAIN], model.graphs[MAIN].nodes)

    def _marked_callees(self) -> Iterator[str]:
        """Yield the functions called by marked nodes, whose last input stays: they stand for that value."""
        for graph in self.model.graphs.values():
            for call in self.calls.calls.get(graph.name, ()):
                if ops.STAND_IN in graph.nodes[call.node].attrs:
                    yield call.callee

    def _bodies(self) -> frozenset[str]:
        """Return the functions that are called only as bodies of loops."""
        bodies = set()
        for name, callers in self.calls.callers.items():
            nodes = [self.model.graphs[c.graph].nodes[c.node] for c in callers if c.graph in self.model.graphs]
            if nodes and all(self._is_body(n, name) for n in nodes):
                bodies.add(name)
        return frozenset(bodies)

    def _is_body(self, node: Node, function: str) -> bool:
        """Return true if a call is a loop with this function as its body."""
        return ops.call_form_of(self.model, node).carried and ops.callees(self.model, node)[-1] == function

    def _passes_through(self, graph: Graph, position: int) -> bool:
        """Return true if a graph is a loop's body that returns the argument at this position unchanged."""
        return graph.name in self.bodies and graph.results[position].value == Value(graph.arguments[position])

    def _mark_live(self, graph: Graph) -> None:
        """Find the live nodes of a function, and add its live arguments to `live_arguments`."""
        # A value that a loop's body only passes on is needed if something else needs the argument.
        waiting = [r.value.node for i, r in enumerate(graph.results) if not self._passes_through(graph, i)]
        waiting += [e.node for e in graph.effects if graph.nodes[e.node].op not in ops.READS or _waits(graph, e.node)]
        waiting += [a for p, a in enumerate(graph.arguments) if (graph.name, p) in self.live_arguments]
        live: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name not in live:
                live.add(name)
                waiting += self._needed(graph, graph.nodes[name])
        self.live[graph.name] = live
        self.live_arguments |= {(graph.name, p) for p, a in enumerate(graph.arguments) if a in live}

    def _needed(self, graph: Graph, node: Node) -> Iterator[str]:
        """Yield the nodes that a live node needs: inputs, control inputs, and nodes that it is colocated with."""
        dropped = self._dropped_inputs(node)
        yield from (v.node for index, v in enumerate(node.inputs) if index not in dropped)
        for name in node.after:
            if graph.nodes[name].op in ops.READS:
                yield from _awaited(graph, name)
            else:
                yield name
        colocation = node.attrs.get("_class")
        if colocation is not None:
            names = (protos.text(s).removeprefix("loc:@") for s in colocation.list.s)
            yield from (name for name in names if name in graph.nodes)

    def _equalize_arguments(self, graph: Graph, live: Collection[str]) -> None:
        """Give the functions that one node calls the same arguments: if one needs an argument, all keep it."""
        used = {value for value, _ in graph.edges()}
        for call in self.calls.calls.get(graph.name, ()):
            if call.node in live:
                node = graph.nodes[call.node]
                callees, form = ops.callees(self.model, node), ops.call_form_of(self.model, node)
                for position in range(len(node.inputs) - form.first):
                    # Output i of a loop is its i-th variable, which stays if the output is used.
                    carried = form.carried and Value(node.name, position) in used
                    if carried or any((name, position) in self.live_arguments for name in callees):
                        self.live_arguments |= {(name, position) for name in callees}

    def _dropped_inputs(self, node: Node) -> frozenset[int]:
        """Return the positions of a call's inputs that no callee needs."""
        callees = ops.callees(self.model, node)
        if not callees or not ops.call_form(self.model, node):
            return frozenset()
        first = ops.call_form_of(self.model, node).first
        positions = range(len(node.inputs) - first)
        return frozenset(first + p for p in positions if not any((name, p) in self.live_arguments for name in callees))

    def pruned(self, graph: Graph) -> Graph:
        """Return a graph without what is not needed; the same object if all of it is needed."""
        if graph.name == MAIN:
            return self._main(graph)
        is_kept = [(graph.name, p) in self.live_arguments for p in range(len(graph.arguments))]
        live = self.live[graph.name]
        arguments = {a for a, flag in zip(graph.arguments, is_kept, strict=True) if flag}
        stays = live | arguments
        nodes = {n.name: self._without_dropped_inputs(graph, n, stays) for n in graph.nodes.values() if n.name in stays}
        # A graph that stays the same object is written as the proto that was read.
        if all(is_kept) and len(nodes) == len(graph.nodes) and all(nodes[n] is graph.nodes[n] for n in nodes):
            return graph
        ports = {name: self._new_ports(graph.nodes[name]) for name in nodes}
        nodes = {n.name: _with_new_ports(n, ports) for n in nodes.values()}
        results = [r for i, r in enumerate(graph.results) if not self._passes_through(graph, i) or is_kept[i]]
        return replace(
            graph,
            nodes=nodes,
            arguments=tuple(a for a in graph.arguments if a in arguments),
            results=tuple(r._replace(value=_with_new_port(r.value, ports)) for r in results),
            effects=tuple(e for e in graph.effects if e.node in live),
            attrs=_filtered_attrs(graph, is_kept),
            residue=_residue_without_resource_ids(graph.residue),
        )

    def _main(self, graph: Graph) -> Graph:
        """Return the main graph without dropped inputs of calls, and without the nodes that only computed them."""
        nodes = {n.name: self._without_dropped_inputs(graph, n, graph.nodes) for n in graph.nodes.values()}
        freed = [graph.nodes[n].inputs[i].node for n in nodes for i in self._dropped_inputs(graph.nodes[n])]
        if not freed:
            return graph
        return without_orphans(self.model, replace(graph, nodes=nodes), freed)

    def _without_dropped_inputs(self, graph: Graph, node: Node, stays: Collection[str]) -> Node:
        """Return a node without the inputs that its callees do not need.

        If it waits for a read that is removed, it waits for the nodes that the read waited for. It waits for no other
        removed node.
        """
        waits = (awaited for a in node.after for awaited in ((a,) if a in stays else _awaited(graph, a)))
        after = tuple(dict.fromkeys(name for name in waits if name in stays))
        node = node if after == node.after else replace(node, after=after)
        dropped = self._dropped_inputs(node)
        if not dropped:
            return node
        form = ops.call_form_of(self.model, node)
        is_kept = [index not in dropped for index in range(len(node.inputs))]
        lists = {form.types} | ({"output_shapes", "_output_shapes"} if form.carried else set())
        new_attrs = {k: _filtered(v, is_kept[form.first :]) for k, v in node.attrs.items() if k in lists}
        # It lists inputs by number, and the numbers change.
        new_attrs["_read_only_resource_inputs"] = None
        inputs = tuple(v for v, flag in zip(node.inputs, is_kept, strict=True) if flag)
        return replace(node.with_attrs(**new_attrs), inputs=inputs)

    def _new_ports(self, node: Node) -> Mapping[int, int]:
        """Return the new ports of a loop's outputs by their old ports; empty if no port moves."""
        dropped = self._dropped_inputs(node)
        form = ops.call_form(self.model, node)
        if not dropped or form is None or not form.carried:
            return {}
        kept_positions = [p for p in range(len(node.inputs)) if p not in dropped]
        return {old: new for new, old in enumerate(kept_positions)}

    def bound(self, entry: Entry) -> Entry:
        """Return a concrete function without the captures that it does not need."""
        first = len(entry.inputs)
        captures = (c for i, c in enumerate(entry.captures) if (entry.function, first + i) in self.live_arguments)
        return replace(entry, captures=tuple(captures))


def _waits(graph: Graph, read: str) -> bool:
    return any(True for _ in _awaited(graph, read))


def _awaited(graph: Graph, read: str) -> Iterator[str]:
    """Yield the nodes that a read waits for; in place of other reads, the nodes that those wait for."""
    visited, waiting = {read}, [read]
    while waiting:
        for name in graph.nodes[waiting.pop()].after:
            if name not in visited:
                visited.add(name)
                if graph.nodes[name].op in ops.READS:
                    waiting.append(name)
                else:
                    yield name


def _with_new_port(value: Value, ports: Mapping[str, Mapping[int, int]]) -> Value:
    moved = ports.get(value.node)
    return Value(value.node, moved[value.port]) if moved else value


def _with_new_ports(node: Node, ports: Mapping[str, Mapping[int, int]]) -> Node:
    if node.op == ARG or not any(ports.get(v.node) for v in node.inputs):
        return node
    return replace(node, inputs=tuple(_with_new_port(v, ports) for v in node.inputs))


def _filtered(attribute: Any, is_kept: Sequence[bool]) -> Any:
    """Return a list attribute without some elements; None if its length differs, as shapes of calls may be stale."""
    filtered = type(attribute)()
    filtered.list.SetInParent()
    for name in ("type", "shape"):
        elements = getattr(attribute.list, name)
        if elements and len(elements) != len(is_kept):
            return None
        getattr(filtered.list, name).extend(v for v, flag in zip(elements, is_kept, strict=False) if flag)
    return filtered


def _filtered_attrs(graph: Graph, is_kept: list[bool]) -> Mapping[str, Any]:
    if "_input_shapes" not in graph.attrs or all(is_kept):
        return graph.attrs
    return {**graph.attrs, "_input_shapes": _filtered(graph.attrs["_input_shapes"], is_kept)}


def _residue_without_resource_ids(residue: bytes) -> bytes:
    """Return a function's residue without the unique ids of its resource arguments, which go by position."""
    proto = function_pb2.FunctionDef.FromString(residue)
    proto.resource_arg_unique_id.clear()
    data: bytes = proto.SerializeToString(deterministic=True)
    return data
