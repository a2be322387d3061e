"""The HTML page of a comparison, as one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from rewriter.diff.compare import Comparison
from rewriter.diff.labels import variable_of
from rewriter.diff.pictures import Line, Picture, Union
from rewriter.diff.report import DiffReport, InputDiff, SiteDiff
from rewriter.page.shell import page

# In the order that diff.js has.
STATES = ("same", "added", "removed", "changed", "missing")


# diff.js takes a negative number for null.
NONE = -1


class _Table(dict[Any, int]):
    """Numbers for values, in the order in which they are met."""

    def __missing__(self, value: Any) -> int:
        self[value] = len(self)
        return self[value]


def diff_page(
    title: str, report: DiffReport, compared: Comparison, unions: Mapping[str, Union], pictures: Sequence[Picture]
) -> str:
    """Return the HTML page of a report with these pictures.

    The names and attributes of a model are untrusted. They are data, which the page's script writes as text.
    """
    return page(
        "diff.html.j2",
        ["colours.css", "picture.css", "page.css"],
        ["layout.js", "picture.js", "diff.js", "lists.js", "view.js", "panel.js", "files.js", "main.js"],
        title=title,
        data=page_data(report, compared, unions, pictures),
    )


def page_data(
    report: DiffReport, compared: Comparison, unions: Mapping[str, Union], pictures: Sequence[Picture]
) -> Mapping[str, Any]:
    """Return the data for the page's script: the report and the pictures, as numbers into a table of texts."""
    texts, authors, graph_names = _Table(), _Table(), _Table()

    def number(text: str | None) -> int:
        return NONE if text is None else texts[text]

    changes = [
        [
            texts[c.kind],
            STATES.index(c.what),
            texts[c.graph],
            texts[c.name],
            texts[c.op],
            [n for d in c.details for n in (texts[d.aspect], number(d.old), number(d.new), texts[d.port])],
            c.fingerprint,
            authors[c.by],
        ]
        for c in report.changes
    ]
    nodes = {name: _Table() for name in unions}
    drawn = [_picture(p, graph_names, nodes[p.graph]) for p in pictures]
    lines: dict[str, dict[Line, None]] = {name: {} for name in graph_names}
    for picture in pictures:
        lines[picture.graph].update(dict.fromkeys(picture.lines))
    graphs = [_graph(compared, unions[name], nodes[name], lines[name], texts) for name in graph_names]
    rest = {name: value for name, value in asdict(report).items() if name not in ("changes", "layers")}
    rest["layers"] = [
        {
            **{f.name: getattr(layer, f.name) for f in fields(layer)},
            "sites": [
                {**_fields(site), "inputs": [number(v) for i in site.inputs for v in _fields(i).values()]}
                for site in layer.sites
            ],
        }
        for layer in report.layers
    ]
    return {
        "report": rest,
        "changes": changes,
        "graphs": graphs,
        "pictures": drawn,
        "texts": list(texts),
        "authors": [list(by) for by in authors],
    }


def _fields(row: SiteDiff | InputDiff) -> dict[str, Any]:
    return {f.name: getattr(row, f.name) for f in fields(row)}


def _graph(
    compared: Comparison, union: Union, nodes: Mapping[str, int], lines: Iterable[Line], texts: _Table
) -> Mapping[str, Any]:
    """Return the nodes and edges of a graph that are in pictures.

    An edge is in every picture that both its ends are in, so pictures do not list edges.
    """
    return {
        "name": texts[union.name],
        "before": None if union.old is None else len(union.old.nodes),
        "after": None if union.new is None else len(union.new.nodes),
        "nodes": [
            n
            for name in nodes
            for n in (
                texts[name],
                *(texts[op] for op in union.ops(name)),
                STATES.index(union.states[name]),
                texts[_variable(compared, union, name)],
            )
        ],
        "lines": [n for line in lines for n in _line(line, nodes, texts)],
    }


def _variable(compared: Comparison, union: Union, name: str) -> str:
    """Return the name of the variable that a node of either model reads or assigns; "" for other nodes."""
    if union.new is not None and name in union.new.nodes:
        return variable_of(compared.after, union.new, name)
    return "" if union.old is None else variable_of(compared.before, union.old, name)


def _picture(picture: Picture, graphs: _Table, nodes: _Table) -> Mapping[str, Any]:
    return {
        "g": graphs[picture.graph],
        "m": nodes[picture.middle],
        "s": [n for s in picture.spots for n in (nodes[s.name], NONE if s.near is None else s.near, s.far)],
        "h": dict(picture.hidden),
    }


def _line(line: Line, nodes: Mapping[str, int], texts: _Table) -> tuple[int, ...]:
    # Bits 0 and 1: the model before has it, the model after has it. The bits above are `inner`, as diff.js reads them.
    kind = line.old + 2 * line.new + 4 * (None, False, True).index(line.inner)
    return nodes[line.source], nodes[line.target], texts[line.port], line.position, kind, texts[line.formula]
