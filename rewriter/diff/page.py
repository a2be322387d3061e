"""The page of a comparison, as one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rewriter.diff.pictures import Line, Picture, Union
from rewriter.page.shell import page
from rewriter.report import DiffReport

STATES = ("same", "added", "removed", "changed", "missing")


NOWHERE = (-1, 0, 0)


class _Table(dict[Any, int]):
    """Numbers for values, in the order in which they are met."""

    def __missing__(self, value: Any) -> int:
        self[value] = len(self)
        return self[value]


def diff_page(title: str, report: DiffReport, unions: Mapping[str, Union], pictures: Sequence[Picture]) -> str:
    """The page of a report with these pictures.

    What a model says (names, attributes) is data, which the page's script writes as text.
    """
    return page(
        "diff.html.j2",
        ["colours.css", "picture.css", "page.css"],
        ["picture.js", "diff.js", "lists.js", "view.js", "main.js"],
        title=title,
        data=page_data(report, unions, pictures),
    )


def page_data(report: DiffReport, unions: Mapping[str, Union], pictures: Sequence[Picture]) -> Mapping[str, Any]:
    """What the page's script decodes: the report, and pictures, with each text once."""
    texts, authors = _Table(), _Table()
    shown = _Table()
    changes = [
        [
            texts[c.kind],
            STATES.index(c.what),
            texts[c.graph],
            texts[c.name],
            texts[c.op],
            [asdict(d) for d in c.details] or 0,
            c.fingerprint,
            authors[c.by],
        ]
        for c in report.changes
    ]
    nodes = {name: _Table() for name in unions}
    drawn = [_picture(p, shown, nodes[p.graph], texts) for p in pictures]
    graphs = [_graph(unions[name], nodes[name], texts) for name in shown]
    rest = {name: value for name, value in asdict(report).items() if name != "changes"}
    return {
        "report": rest,
        "changes": changes,
        "graphs": graphs,
        "pictures": drawn,
        "texts": list(texts),
        "authors": [list(by) for by in authors],
    }


def _graph(union: Union, nodes: Iterable[str], texts: _Table) -> Mapping[str, Any]:
    return {
        "name": texts[union.name],
        "before": None if union.old is None else len(union.old.nodes),
        "after": None if union.new is None else len(union.new.nodes),
        "nodes": [
            [texts[name], *(texts[op] for op in union.ops(name)), STATES.index(union.states[name])] for name in nodes
        ],
    }


def _picture(picture: Picture, graphs: _Table, nodes: _Table, texts: _Table) -> Mapping[str, Any]:
    place = {spot.name: number for number, spot in enumerate(picture.spots)}
    return {
        "g": graphs[picture.graph],
        "m": nodes[picture.middle],
        "s": [n for s in picture.spots for n in (nodes[s.name], *(s.near or NOWHERE), *s.far)],
        "l": [n for line in picture.lines for n in _line(line, place, texts)],
        "h": dict(picture.hidden),
    }


def _line(line: Line, place: Mapping[str, int], texts: _Table) -> tuple[int, ...]:
    return (
        place[line.source],
        place[line.target],
        texts[line.port],
        line.position,
        line.old + 2 * line.new,
        (None, False, True).index(line.inner),
        texts[line.formula],
    )
