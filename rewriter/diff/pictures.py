"""Pictures of places in two models: a node and what is around it, before and after, in layers.

Both models are in one picture, so that what is in both is in the same place. A node that stands for a value in another
precision (`rewriter.ops.QUANTIZER_MARK`) is passed over, with what only serves such nodes, unless it is asked for: the
edge says what happens there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import networkx as nx

from rewriter import ops
from rewriter.diff.compare import Comparison, port_name
from rewriter.ir import Graph, Node

HOPS = 3
MAX_NEIGHBOURS = 12
"""How many unchanged neighbours of one node are drawn, to either side."""
MAX_NODES = 100
"""How many nodes are drawn at most."""
MAX_WHOLE = 80
"""How many nodes a function may have to be drawn whole."""

SAME, ADDED, REMOVED, CHANGED = "same", "added", "removed", "changed"


class Line(NamedTuple):
    """An edge of a picture.

    Attributes:
        port: the name of the input where it ends; "" for a control input.
        position: the number of that input, -1 for a control input.
        old: whether the model before has it.
        new: whether the model after has it.
        formula: what stands for the nodes that are passed over.
        inner: whether it is drawn only with those nodes; None where it is drawn with and without.
    """

    source: str
    target: str
    port: str
    position: int
    old: bool
    new: bool
    formula: str = ""
    inner: bool | None = None


class Place(NamedTuple):
    """Where a node is in a picture.

    Attributes:
        hops: how many edges it is away from the middle.
        layer: its column: every edge leads to a higher one, but for the way back of a loop and control inputs.
        row: its place in the column.
    """

    hops: int
    layer: int
    row: int


class Spot(NamedTuple):
    """A node of a picture.

    Attributes:
        near: where it is without the nodes that are passed over; None where it is one of them, or too far away.
        far: where it is with them.
    """

    name: str
    near: Place | None
    far: Place


@dataclass(frozen=True)
class Picture:
    """A place: a node of a graph (its name in the model after, if it is there), and what is around it.

    Attributes:
        hidden: how many nodes of the graph are not in the picture, by state.
    """

    graph: str
    middle: str
    spots: tuple[Spot, ...]
    lines: tuple[Line, ...]
    hidden: Mapping[str, int]


@dataclass
class Union:
    """Two graphs that are a pair, or one that has none, as one.

    Attributes:
        nodes: by name, before and after.
        inner: nodes that only serve proxies, and these.
    """

    name: str
    old: Graph | None
    new: Graph | None
    states: dict[str, str] = field(default_factory=dict)
    lines: dict[str, list[Line]] = field(default_factory=dict)
    inner: set[str] = field(default_factory=set)

    def node(self, name: str) -> Node:
        """The node after, or before if there is none."""
        return next(g.nodes[name] for g in (self.new, self.old) if g is not None and name in g.nodes)

    def ops(self, name: str) -> tuple[str, str]:
        """The op before and after; "" where there is no such node."""
        nodes = (None if g is None else g.nodes.get(name) for g in (self.old, self.new))
        old, new = ("" if n is None else n.op for n in nodes)
        return old, new


def unite(compared: Comparison, name: str, changed: Iterable[str], formula: Callable[[Node], str]) -> Union:
    """A graph of the model after and its pair, or one that only the model before has."""
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
    union.inner = _inner(new) if new is not None else set()
    for line in _lines(compared, union, formula):
        union.lines.setdefault(line.source, []).append(line)
        if line.target != line.source:
            union.lines.setdefault(line.target, []).append(line)
    return union


def _inner(graph: Graph) -> set[str]:
    """Proxies, and the nodes whose every use serves one. What a proxy stands for is not among them."""
    inner = {n.name for n in graph.nodes.values() if ops.QUANTIZER_MARK in n.attrs}
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
        if new and ops.QUANTIZER_MARK in producer.attrs and position >= 0:
            raw = producer.inputs[-1]
            was = edges.get((raw.node, target, position, raw.port), [False, False])[0]
            yield Line(raw.node, target, label, position, was or old, True, formula(producer), inner=False)
            yield Line(source, target, label, position, old, True, inner=True)
        else:
            replaced = old and not new and _is_behind_proxy(union, source, port, target, position)
            inner = True if replaced or source in union.inner or target in union.inner else None
            yield Line(source, target, label, position, old, new, inner=inner)


def _is_behind_proxy(union: Union, source: str, port: int, target: str, position: int) -> bool:
    """Whether an edge before leads from what, after, a proxy stands for that takes its place."""
    node = None if union.new is None else union.new.nodes.get(target)
    if union.new is None or node is None or not 0 <= position < len(node.inputs):
        return False
    producer = union.new.nodes[node.inputs[position].node]
    return ops.QUANTIZER_MARK in producer.attrs and tuple(producer.inputs[-1]) == (source, port)


def around(union: Union, middle: str) -> Picture:
    """The picture of a place, up to `HOPS` edges away."""
    near = {} if middle in union.inner else _distances(union, middle, inner=False)
    far = _distances(union, middle, inner=True)
    return _picture(union, middle, near, {**dict.fromkeys(near, HOPS), **far})


def whole(union: Union, middle: str) -> Picture:
    """The picture of a whole graph."""
    near = {name: int(name != middle) for name in union.states if name not in union.inner}
    return _picture(union, middle, near, {name: int(name != middle) for name in union.states})


def _distances(union: Union, middle: str, *, inner: bool) -> dict[str, int]:
    distances = {middle: 0}
    waiting = deque([middle])
    while waiting and len(distances) < MAX_NODES:
        name = waiting.popleft()
        if distances[name] == HOPS:
            continue
        unchanged_counts = {True: 0, False: 0}
        for line in sorted(union.lines.get(name, ()), key=lambda e: (e.old and e.new, e.position < 0)):
            neighbour = line.source if line.target == name else line.target
            if line.inner is (not inner) or neighbour in distances or (not inner and neighbour in union.inner):
                continue
            if union.states[neighbour] == SAME and name != middle:
                unchanged_counts[line.target == name] += 1
                if unchanged_counts[line.target == name] > MAX_NEIGHBOURS:
                    continue
            if len(distances) < MAX_NODES:
                distances[neighbour] = distances[name] + 1
                waiting.append(neighbour)
    return distances


def _picture(union: Union, middle: str, near: Mapping[str, int], far: Mapping[str, int]) -> Picture:
    lines = tuple(
        dict.fromkeys(e for name in far for e in union.lines.get(name, ()) if e.source in far and e.target in far)
    )

    def placed(hops: Mapping[str, int], inner: bool) -> dict[str, Place]:
        drawn = (e for e in lines if e.inner in (None, inner) and e.source in hops and e.target in hops)
        forward = (e for e in drawn if e.position >= 0 and union.node(e.source).op != "NextIteration")
        edges = [(e.source, e.target) for e in forward]
        return {name: Place(hops[name], *place) for name, place in _places(list(hops), edges).items()}

    without, within = placed(near, inner=False), placed(far, inner=True)
    spots = tuple(Spot(name, without.get(name), within[name]) for name in far)
    hidden = dict.fromkeys((SAME, ADDED, REMOVED, CHANGED), 0)
    for name, state in union.states.items():
        hidden[state] += name not in far
    return Picture(union.name, middle, spots, lines, hidden)


def _places(names: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """The layer and row of each node: as far right as what uses it allows, and near to what it uses."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from(e for e in edges if e[0] != e[1])
    if not nx.is_directed_acyclic_graph(graph):  # before and after together may go round
        kept = nx.DiGraph(graph)
        for component in [c for c in nx.strongly_connected_components(graph) if len(c) > 1]:
            kept.remove_edges_from([e for e in graph.edges(component) if e[1] in component])
        graph = kept
    generations = list(nx.topological_generations(graph))
    layer = {name: number for number, generation in enumerate(generations) for name in generation}
    for generation in reversed(generations):
        for name in generation:
            user_layers = [layer[user] for user in graph.successors(name)]
            layer[name] = min(user_layers) - 1 if user_layers else layer[name]
    columns: dict[int, list[str]] = {}
    for name in names:
        columns.setdefault(layer[name], []).append(name)
    row: dict[str, float] = {}
    for number in sorted(columns):
        order = [(_mean(row[p] for p in graph.predecessors(name)), i) for i, name in enumerate(columns[number])]
        columns[number] = [columns[number][i] for _, i in sorted(order)]
        row |= {name: i - len(columns[number]) / 2 for i, name in enumerate(columns[number])}
    for number in sorted(columns, reverse=True):
        order = [(_mean((row[s] for s in graph.successors(n)), row[n]), i) for i, n in enumerate(columns[number])]
        columns[number] = [columns[number][i] for _, i in sorted(order)]
        row |= {name: i - len(columns[number]) / 2 for i, name in enumerate(columns[number])}
    return {name: (number, i) for number, column in columns.items() for i, name in enumerate(column)}


def _mean(values: Iterable[float], none: float = 0.0) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else none


def pictures(
    compared: Comparison, sites: Iterable[tuple[str, str]], formula: Callable[[Node], str], *, full: bool = False
) -> tuple[dict[str, Union], list[Picture]]:
    """Pictures of these places, and of others until all that changed is in one.

    Args:
        compared: two models.
        sites: (graph, node) of places that have a picture in any case.
        formula: what to say of a proxy.
        full: go on until every node of the models is in a picture.

    Returns:
        The graphs that have pictures, by name, and the pictures.
    """
    changed: dict[str, set[str]] = {}
    for change in compared.changes:
        if change.kind == "node" and change.what != "missing":
            changed.setdefault(change.graph, set()).add(change.name)
    sites_by_graph: dict[str, list[str]] = {}
    for graph, node in sites:
        sites_by_graph.setdefault(graph, []).append(node)
    unpaired = {c.name for c in compared.changes if c.kind == "function" and c.what in (ADDED, REMOVED)}
    names = [*dict.fromkeys((*sites_by_graph, *changed, *sorted(unpaired)))]
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
        graph_pictures = [around(union, node) for node in sites_by_graph.get(name, ())]
        if not graph_pictures and len(union.states) <= MAX_WHOLE and (name in unpaired or full):
            graph_pictures.append(whole(union, _end(union)))
        if full:
            graph_pictures += _all(union, graph_pictures)
        elif name not in unpaired:
            graph_pictures += _covering(union, graph_pictures, sorted(changed.get(name, ())))
        drawn += graph_pictures
    return unions, drawn


def _end(union: Union) -> str:
    """A node that a function returns, or its last one."""
    graph = union.new or union.old
    returned = [] if graph is None else [r.value.node for r in graph.results]
    return returned[0] if returned else list(union.states)[-1]


def _all(union: Union, pictures_: Sequence[Picture]) -> Iterator[Picture]:
    """More pictures, until every node is in one."""
    covered = {spot.name for picture in pictures_ for spot in picture.spots}
    for name in union.states:
        if name not in covered:
            picture = around(union, name)
            covered.update(spot.name for spot in picture.spots)
            yield picture


def _covering(union: Union, pictures_: Sequence[Picture], nodes: Sequence[str]) -> Iterator[Picture]:
    """More pictures, until every node left is near the middle of one.

    Of nodes that were added and hang together, one that is there is enough; what is passed over is not looked for.
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
            if spot.near is not None and spot.near.hops < HOPS and spot.name not in covered:
                covered.update(groups.get(spot.name, {spot.name}))

    for picture in pictures_:
        cover(picture)
    order = (CHANGED, REMOVED, ADDED)
    for name in sorted(nodes, key=lambda n: order.index(union.states[n])):
        if name not in covered:
            picture = around(union, name)
            cover(picture)
            yield picture
