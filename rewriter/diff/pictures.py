"""Pictures of places in two models: a node and its neighbourhood, before and after.

A picture holds both models as one graph. Quantisers, i.e. nodes with `rewriter.ops.STAND_IN`, are hidden unless the
user asks for them, and so are nodes that only serve quantisers. A formula at the edge stands for them. Handles of
variables and control inputs are hidden likewise: nothing stands for them, as the node that reads or writes a variable
is labelled with the variable's name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

import networkx as nx

from rewriter import op_defs, ops
from rewriter.diff.compare import Comparison, port_name
from rewriter.ir import ARG, Graph, Node

HOPS = 3
"""Distance in edges that a picture reaches from its middle."""
MAX_NEIGHBOURS = 12
"""Largest number of unchanged inputs, and of unchanged users, that are drawn for one node."""
MAX_NODES = 100
"""Largest number of nodes in a picture of a place."""
MAX_PARTS = 30
"""Largest number of nodes that are drawn as parts of the thing in the middle."""
MAX_WHOLE = 80
"""Largest number of nodes of a function that is drawn whole."""

SAME, ADDED, REMOVED, CHANGED = "same", "added", "removed", "changed"


class Line(NamedTuple):
    """An edge of a picture.

    Attributes:
        port: the name of the input where it ends; "" for a control input.
        position: the number of that input, -1 for a control input.
        old: true if the model before has the edge.
        new: true if the model after has it.
        formula: the formula that stands for a hidden quantiser; "" where there is none.
        inner: true if the edge is drawn only with the hidden nodes, false if only without; None if in both cases.
    """

    source: str
    target: str
    port: str
    position: int
    old: bool
    new: bool
    formula: str = ""
    inner: bool | None = None


class Spot(NamedTuple):
    """A node of a picture.

    Attributes:
        near: its distance from the middle in edges; None if it is hidden with the quantisers, or too far away.
        far: its distance if quantisers are shown.
    """

    name: str
    near: int | None
    far: int


@dataclass(frozen=True)
class Picture:
    """A node of a graph and its neighbourhood.

    Attributes:
        graph: the graph's name in the model after, or in the model before if that alone has it.
        middle: the node's name.
        hidden: the number of the graph's nodes that are not in the picture, by state.
    """

    graph: str
    middle: str
    spots: tuple[Spot, ...]
    lines: tuple[Line, ...]
    hidden: Mapping[str, int]


@dataclass
class Union:
    """Two paired graphs, or one graph without a pair, as one graph.

    Attributes:
        old: the graph before; None if there is none.
        new: the graph after; None if there is none.
        states: the state of each node: same, added, removed or changed.
        lines: the edges at each node, by the node's name.
        inner: the nodes that are drawn on request only: quantisers, nodes that only serve them, handles of variables.
    """

    name: str
    old: Graph | None
    new: Graph | None
    states: dict[str, str] = field(default_factory=dict)
    lines: dict[str, list[Line]] = field(default_factory=dict)
    inner: set[str] = field(default_factory=set)

    def node(self, name: str) -> Node:
        """Return the node after, or the node before if there is none."""
        return next(g.nodes[name] for g in (self.new, self.old) if g is not None and name in g.nodes)

    def ops(self, name: str) -> tuple[str, str]:
        """Return the op before and the op after; "" if there is no such node."""
        nodes = (None if g is None else g.nodes.get(name) for g in (self.old, self.new))
        old, new = ("" if n is None else n.op for n in nodes)
        return old, new


def unite(compared: Comparison, name: str, changed: Iterable[str], formula: Callable[[Node], str]) -> Union:
    """Return the union of a graph of the model after and its pair, or a graph that only the model before has."""
    new = compared.after.graphs.get(name)
    old = compared.before.graphs.get(name) if new is None else compared.graph_before(name)
    union = Union(name, old, new)
    changed_nodes = set(changed)
    for graph in (g for g in (old, new) if g is not None):
        for node in graph.nodes:
            present = (old is not None and node in old.nodes, new is not None and node in new.nodes)
            union.states[node] = (
                REMOVED if not present[1] else ADDED if not present[0] else CHANGED if node in changed_nodes else SAME
            )
    for graph in (g for g in (old, new) if g is not None):
        union.inner |= _quantizer_nodes(graph) | {n.name for n in graph.nodes.values() if _is_handle(n)}
    for line in _lines(compared, union, formula):
        union.lines.setdefault(line.source, []).append(line)
        if line.target != line.source:
            union.lines.setdefault(line.target, []).append(line)
    return union


def _is_handle(node: Node) -> bool:
    """Return true for a node that only passes a variable on, or another resource."""
    if node.op == ARG:
        return op_defs.argument_dtype(node) == "resource"
    return node.op == "VarHandleOp"


def _quantizer_nodes(graph: Graph) -> set[str]:
    """Return the quantisers, and the nodes that only serve quantisers.

    The value that a quantiser stands for (its last input) is not among them.
    """
    inner = {n.name for n in graph.nodes.values() if ops.STAND_IN in n.attrs}
    if not inner:
        return inner
    uses: dict[str, set[str]] = {}
    for node in graph.nodes.values():
        for source in (*(v.node for v in node.inputs), *node.after):
            uses.setdefault(source, set()).add(node.name)
    outer = {graph.nodes[name].inputs[-1].node for name in inner}
    outer |= {r.value.node for r in graph.results} | {e.node for e in graph.effects}
    waiting = list(inner)
    while waiting:
        node = graph.nodes[waiting.pop()]
        for name in (*(v.node for v in node.inputs), *node.after):
            if name not in inner and name not in outer and uses[name] <= inner:
                inner.add(name)
                waiting.append(name)
    return inner


def _lines(compared: Comparison, union: Union, formula: Callable[[Node], str]) -> Iterator[Line]:
    edges: dict[tuple[str, str, int, int], list[bool]] = {}
    for side, graph in enumerate((union.old, union.new)):
        for node in () if graph is None else graph.nodes.values():
            for position, value in enumerate(node.inputs):
                edges.setdefault((value.node, node.name, position, value.port), [False, False])[side] = True
            for source in node.after:
                edges.setdefault((source, node.name, -1, 0), [False, False])[side] = True
    for (source, target, position, port), (old, new) in edges.items():
        model, graph = (compared.after, union.new) if new else (compared.before, union.old)
        nodes = {} if graph is None else graph.nodes
        label = port_name(model, nodes[target], position) if position >= 0 else ""
        producer = nodes[source]
        if new and ops.STAND_IN in producer.attrs and position >= 0:
            raw = producer.inputs[-1]
            was_raw = edges.get((raw.node, target, position, raw.port), [False, False])[0]
            # With quantisers hidden, the edge leads from the float value; shown, it leads from the quantiser.
            yield Line(raw.node, target, label, position, was_raw or old, True, formula(producer), inner=False)
            yield Line(source, target, label, position, old, True, inner=True)
        else:
            replaced = old and not new and _is_behind_quantizer(union, source, port, target, position)
            inner = True if replaced or position < 0 or {source, target} & union.inner else None
            yield Line(source, target, label, position, old, new, inner=inner)


def _is_behind_quantizer(union: Union, source: str, port: int, target: str, position: int) -> bool:
    """Return true if an edge's source before is, in the model after, the value that a quantiser stands for.

    The quantiser is then the input in the edge's place.
    """
    node = None if union.new is None else union.new.nodes.get(target)
    if union.new is None or node is None or not 0 <= position < len(node.inputs):
        return False
    producer = union.new.nodes[node.inputs[position].node]
    return ops.STAND_IN in producer.attrs and tuple(producer.inputs[-1]) == (source, port)


def around(union: Union, middle: str, parts: Collection[str] = ()) -> Picture:
    """Return the picture of a node, of further nodes that are parts of the same thing, and of their neighbourhood.

    The neighbourhood reaches up to `HOPS` edges away.
    """
    near = {} if middle in union.inner else _distances(union, middle, parts, inner=False)
    far = _distances(union, middle, parts, inner=True)
    # Hidden nodes, once shown, make the way to others longer; these stay in the picture, however far away.
    return _picture(union, middle, near, {**dict.fromkeys(near, HOPS), **far})


def whole(union: Union, middle: str) -> Picture:
    """Return the picture of a whole graph."""
    near = {name: int(name != middle) for name in union.states if name not in union.inner}
    return _picture(union, middle, near, {name: int(name != middle) for name in union.states})


def _distances(union: Union, middle: str, parts: Collection[str], *, inner: bool) -> dict[str, int]:
    drawn_parts = [p for p in parts if p != middle and p in union.states and (inner or p not in union.inner)]
    distances = dict.fromkeys((middle, *drawn_parts[:MAX_PARTS]), 0)
    waiting = [(0, number, name) for number, name in enumerate(distances)]
    while waiting and len(distances) < MAX_NODES:
        _, number, name = heappop(waiting)
        if distances[name] == HOPS:
            continue
        unchanged_counts = {True: 0, False: 0}
        # Changed edges first and control inputs last: the limits cut off what comes later.
        for line in sorted(union.lines.get(name, ()), key=lambda e: (e.old and e.new, e.position < 0)):
            neighbour = line.source if line.target == name else line.target
            if line.inner is (not inner) or neighbour in distances or (not inner and neighbour in union.inner):
                continue
            if union.states[neighbour] == SAME and distances[name]:
                unchanged_counts[line.target == name] += 1
                if unchanged_counts[line.target == name] > MAX_NEIGHBOURS:
                    continue
            # What else uses a part, such as its gradient, is further away than what enters it or follows the whole.
            distance = distances[name] + (2 if number and not distances[name] and line.source == name else 1)
            if len(distances) < MAX_NODES and distance <= HOPS:
                distances[neighbour] = distance
                heappush(waiting, (distance, len(distances), neighbour))
    return distances


def _picture(union: Union, middle: str, near: Mapping[str, int], far: Mapping[str, int]) -> Picture:
    lines = dict.fromkeys(e for name in far for e in union.lines.get(name, ()) if e.source in far and e.target in far)
    spots = tuple(Spot(name, near.get(name), hops) for name, hops in far.items())
    hidden = dict.fromkeys((SAME, ADDED, REMOVED, CHANGED), 0)
    for name, state in union.states.items():
        hidden[state] += name not in far
    return Picture(union.name, middle, spots, tuple(lines), hidden)


def pictures(
    compared: Comparison,
    places: Mapping[tuple[str, str], Collection[str]],
    formula: Callable[[Node], str],
    *,
    full: bool = False,
) -> tuple[dict[str, Union], list[Picture]]:
    """Return pictures of the given places, and further pictures until every changed node is in one.

    Args:
        compared: the two models.
        places: (graph, node) of the places that always have a picture, with the nodes that are parts of it.
        formula: returns the formula of a quantiser.
        full: add pictures until every node of the models is in one.

    Returns:
        The graphs that have pictures, by name, and the pictures.
    """
    changed: dict[str, set[str]] = {}
    for change in compared.changes:
        if change.kind == "node" and change.what != "missing":
            changed.setdefault(change.graph, set()).add(change.name)
    places_by_graph: dict[str, dict[str, Collection[str]]] = {}
    for (graph, node), parts in places.items():
        places_by_graph.setdefault(graph, {})[node] = parts
    unpaired = {c.name for c in compared.changes if c.kind == "function" and c.what in (ADDED, REMOVED)}
    names = [*dict.fromkeys((*places_by_graph, *changed, *sorted(unpaired)))]
    if full:
        removed_graphs = [n for n in compared.before.graphs if n not in compared.pairs]
        names = [*dict.fromkeys((*names, *compared.after.graphs, *removed_graphs))]
    unions: dict[str, Union] = {}
    drawn: list[Picture] = []
    for name in names:
        union = unite(compared, name, changed.get(name, ()), formula)
        if not union.states:
            continue
        unions[name] = union
        graph_pictures = [around(union, node, parts) for node, parts in places_by_graph.get(name, {}).items()]
        if not graph_pictures and len(union.states) <= MAX_WHOLE and (name in unpaired or full):
            graph_pictures.append(whole(union, _end(union)))
        if full:
            graph_pictures += _all(union, graph_pictures)
        elif name not in unpaired:
            graph_pictures += _covering(union, graph_pictures, sorted(changed.get(name, ())))
        drawn += graph_pictures
    return unions, drawn


def _end(union: Union) -> str:
    """Return a node that a function returns, or its last node."""
    graph = union.new or union.old
    returned = [] if graph is None else [r.value.node for r in graph.results]
    return returned[0] if returned else list(union.states)[-1]


def _all(union: Union, pictures_: Sequence[Picture]) -> Iterator[Picture]:
    """Yield more pictures, until every node is in one."""
    covered = {spot.name for picture in pictures_ for spot in picture.spots}
    for name in union.states:
        if name not in covered:
            picture = around(union, name)
            covered.update(spot.name for spot in picture.spots)
            yield picture


def _covering(union: Union, pictures_: Sequence[Picture], nodes: Sequence[str]) -> Iterator[Picture]:
    """Yield more pictures, until every given node is less than `HOPS` edges from the middle of one.

    One node of a connected group of added nodes is enough. Hidden nodes need no picture.
    """
    added: nx.Graph[str] = nx.Graph()
    added.add_nodes_from(name for name in nodes if union.states[name] == ADDED)
    added.add_edges_from(
        (e.source, e.target) for name in added for e in union.lines.get(name, ()) if {e.source, e.target} <= added.nodes
    )
    groups = {name: group for group in nx.connected_components(added) for name in group}
    covered: set[str] = set(union.inner)

    def cover(picture: Picture) -> None:
        for spot in picture.spots:
            if spot.near is not None and spot.near < HOPS and spot.name not in covered:
                covered.update(groups.get(spot.name, {spot.name}))

    for picture in pictures_:
        cover(picture)
    order = (CHANGED, REMOVED, ADDED)
    for name in sorted(nodes, key=lambda n: order.index(union.states[n])):
        if name not in covered:
            picture = around(union, name)
            cover(picture)
            yield picture
