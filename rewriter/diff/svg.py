"""One picture as an SVG file, with both models in one graph as on the page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from xml.etree import ElementTree as ET

import networkx as nx

from rewriter.diff.pictures import Line, Picture, Union
from rewriter.page.shell import read

WIDTH, HEIGHT, GAP, SPACE, SLOT, MARGIN = 150, 38, 40, 16, 14, 20
"""Sizes in pixels, as in picture.js: a node's width and height, the gap between columns, the space between rows, the
height for each input, the margin."""

SIGNS = {"added": "+", "removed": "\N{MINUS SIGN}", "changed": "~", "same": ""}


class Box(NamedTuple):
    """Position and height of a drawn node, in pixels."""

    x: float
    y: float
    height: float


def picture_svg(picture: Picture, union: Union, hops: int = 1) -> str:
    """Return a picture as SVG, up to `hops` edges from its middle; a quantiser is a formula at an edge.

    A solid line is in both models or, with a "+", only in the model after. A dashed line, with a "−", is only in the
    model before.
    """
    names = [s.name for s in picture.spots if s.near is not None and s.near <= hops]
    lines = [e for e in picture.lines if e.inner is not True and {e.source, e.target} <= {*names}]
    forward = [(e.source, e.target) for e in lines if union.node(e.source).op != "NextIteration"]
    boxes = _boxes(names, lines, forward)
    left, top = min(b.x for b in boxes.values()) - MARGIN, min(b.y for b in boxes.values()) - MARGIN
    width = max(b.x for b in boxes.values()) + WIDTH + MARGIN - left
    height = max(b.y + b.height for b in boxes.values()) + MARGIN - top
    view = f"{left:g} {top:g} {width:g} {height:g}"
    root = ET.Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=view, width=f"{width:g}", height=f"{height:g}")
    root.set("class", "picture")
    ET.SubElement(root, "style").text = _style()
    ET.SubElement(root, "title").text = f"{picture.middle} in {picture.graph or 'the main graph'}"
    ground = {"x": f"{left:g}", "y": f"{top:g}", "width": f"{width:g}", "height": f"{height:g}", "fill": "#ffffff"}
    ET.SubElement(root, "rect", ground)
    inputs, drawn_inputs = Counter(e.target for e in lines), Counter[str]()
    for line in sorted(lines, key=lambda e: e.position):
        drawn_inputs[line.target] += 1
        _edge(root, line, boxes, drawn_inputs[line.target] / (inputs[line.target] + 1), line.target == picture.middle)
    for name in names:
        _node(root, name, boxes[name], union, middle=name == picture.middle)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _boxes(names: Sequence[str], lines: Sequence[Line], edges: Sequence[tuple[str, str]]) -> Mapping[str, Box]:
    inputs = Counter(e.target for e in lines)
    columns: dict[int, list[tuple[int, str]]] = {}
    for name, (layer, row) in _places(names, edges).items():
        columns.setdefault(layer, []).append((row, name))
    boxes: dict[str, Box] = {}
    x = 0.0
    for _, column in sorted(columns.items()):
        column_names = [name for _, name in sorted(column)]
        heights = [max(HEIGHT, min(40, inputs[name]) * SLOT + 6) for name in column_names]
        y = -(sum(heights) + SPACE * (len(column_names) - 1)) / 2
        for name, height in zip(column_names, heights, strict=True):
            boxes[name] = Box(x, y, height)
            y += height + SPACE
        leaving = [e for e in lines if e.source in column_names]
        # The width of a text is estimated, as nothing measures it before it is drawn.
        labels = [len(text) * 5.5 + 14 for e in leaving for text in _label(e)]
        x += WIDTH + max([GAP, *labels]) + (44 if any(e.port for e in leaving) else 0)
    return boxes


def _places(names: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """Return the layer and row of each node: left of its users by one layer, in a row near its inputs and users."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from(e for e in edges if e[0] != e[1])
    if not nx.is_directed_acyclic_graph(graph):  # the edges before and after may form a cycle together
        acyclic = nx.DiGraph(graph)
        for component in [c for c in nx.strongly_connected_components(graph) if len(c) > 1]:
            acyclic.remove_edges_from([e for e in graph.edges(component) if e[1] in component])
        graph = acyclic
    generations = list(nx.topological_generations(graph))
    layer = {name: number for number, generation in enumerate(generations) for name in generation}
    # Generations place a node as far left as its inputs allow; it is drawn next to the nearest of its users.
    for generation in reversed(generations):
        for name in generation:
            user_layers = [layer[user] for user in graph.successors(name)]
            layer[name] = min(user_layers) - 1 if user_layers else layer[name]
    columns: dict[int, list[str]] = {}
    for name in names:
        columns.setdefault(layer[name], []).append(name)
    # The barycentre heuristic: columns are sorted by the mean row of their nodes' inputs, then of their users.
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


def _label(line: Line) -> list[str]:
    first, _, rest = line.formula.partition(": ")
    return [text for text in (first, rest) if text]


def _edge(root: ET.Element, line: Line, boxes: Mapping[str, Box], fraction: float, middle: bool) -> None:
    start, end = boxes[line.source], boxes[line.target]
    state = "formula" if line.formula else "same" if line.old == line.new else "added" if line.new else "removed"
    x1, y1 = start.x + WIDTH, start.y + start.height / 2
    x2, y2 = end.x - 6, end.y + end.height * fraction
    bend = max(30, abs(x2 - x1) / 2)
    path = f"M{x1:g},{y1:g} C{x1 + bend:g},{y1:g} {x2 - bend:g},{y2:g} {x2:g},{y2:g}"
    ET.SubElement(root, "path", {"class": f"edge {state}" + (" control" if line.position < 0 else ""), "d": path})
    ET.SubElement(root, "path", {"class": "arrow", "d": f"M{x2 + 6:g},{y2:g} l-7,-3.5 v7 z"})
    sign = [SIGNS[state]] if SIGNS.get(state) else []
    for number, text in enumerate(_label(line) or sign):
        label = ET.SubElement(root, "text", {"class": f"label {state}", "x": f"{x1 + 6:g}"})
        label.set("y", f"{y1 + (13 if number else -5):g}")
        label.text = _printable(text)
    if line.port and (middle or state != "same"):
        port = ET.SubElement(root, "text", {"class": "port", "x": f"{x2 - 3:g}", "y": f"{y2 - 3:g}"})
        port.set("text-anchor", "end")
        port.text = _printable(_shortened(line.port, 14))


def _node(root: ET.Element, name: str, box: Box, union: Union, *, middle: bool) -> None:
    state = union.states[name]
    group = ET.SubElement(root, "g", {"class": f"node {state}" + (" middle" if middle else "")})
    group.set("transform", f"translate({box.x:g},{box.y:g})")
    ET.SubElement(group, "title").text = _printable(f"{name} ({state})")
    ET.SubElement(group, "rect", width=str(WIDTH), height=f"{box.height:g}", rx="5")
    old_op, new_op = union.ops(name)
    op = f"{old_op} → {new_op}" if old_op and new_op and old_op != new_op else new_op or old_op
    for kind, y, text in (
        ("op", "16", _shortened(f"{SIGNS[state]} {op}".strip(), 19)),
        ("name", "30", _shortened(name, 21)),
    ):
        ET.SubElement(group, "text", {"class": kind, "x": "8", "y": y}).text = _printable(text)


def _shortened(text: str, most: int) -> str:
    # The end is kept, as names in one scope begin alike.
    return text if len(text) <= most else "…" + text[1 - most :]


def _printable(text: str) -> str:
    """Return a text with the characters that XML cannot hold replaced."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", text)


def _style() -> str:
    """Return the page's style sheet for pictures, in the light colours."""
    colours = dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]+)", read("colours.css").partition("@media")[0]))
    return re.sub(r"var\((--[a-z-]+)\)", lambda match: colours[match[1]], read("picture.css"))
