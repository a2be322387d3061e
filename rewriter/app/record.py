"""Record of a rewrite: its changes, each with the passes that made it."""

from __future__ import annotations

from collections.abc import Sequence

from rewriter.diff.compare import compare
from rewriter.diff.facts import VARIABLE
from rewriter.diff.log import Record, record
from rewriter.diff.report import FUNCTION, NODE, Change
from rewriter.ir import Model
from rewriter.pipeline import Step
from rewriter.savedmodel.write import Written

WRITER = "writing"
"""Author of changes that the format needs: new variables in the saver, signatures in the main graph."""


def record_of(before: Model, steps: Sequence[Step], written: Written) -> Record:
    """Return the changes by passes and by the writer, each change with its authors.

    A node that differs although neither of them changed it is not in the record.
    """
    source = before.source
    added = written.model.variables.keys() - before.variables.keys()
    comparison = compare(before, written.model, values=added, describe=False)
    final = steps[-1].after if steps else before
    graphs_changed = [
        (step.name, {n for n, g in step.after.graphs.items() if step.before.graphs.get(n) is not g}) for step in steps
    ]

    def author(change: Change) -> tuple[str, ...]:
        name, node = (change.name, "") if change.kind == FUNCTION else (change.graph, change.name)
        if change.kind == VARIABLE:
            authors = [
                s.name for s in steps if s.before.variables.get(change.name) != s.after.variables.get(change.name)
            ]
            return tuple(dict.fromkeys(authors)) or (WRITER,)
        if change.kind not in (NODE, FUNCTION):
            return (WRITER,)
        authors_of_node = [
            step.name
            for step, (_, graphs) in zip(steps, graphs_changed, strict=True)
            if name in graphs and _differs(step.before, step.after, name, node)
        ]
        if _differs(final, written.model, name, node):
            authors_of_node.append(WRITER)
        return tuple(dict.fromkeys(authors_of_node))

    return record(source.path / source.file, comparison.changes, author)


def _differs(before: Model, after: Model, graph: str, node: str) -> bool:
    """Return true if a node, or a graph if no node is given, is another object in a later model."""
    old, new = before.graphs.get(graph), after.graphs.get(graph)
    if old is None or new is None or not node:
        return old is not new
    return old.nodes.get(node) is not new.nodes.get(node)
