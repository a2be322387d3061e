"""Updates of averages beside a fused kernel, with moments in single ops.

An average that is updated before the batch norm runs, or under another condition, cannot take the kernel's statistics.
It keeps the source's moments of the same x.
"""

from __future__ import annotations

from passes.batch_norm.moments import moments_of
from passes.batch_norm.updates import Update, update
from rewriter.choices import Leaf, outside
from rewriter.ir import Edge, Graph, Model, Value
from rewriter.pattern import origin


def updates_beside(model: Model, graph: Graph, x: Value) -> dict[str, Update]:
    """Return the updates that take moments of x, by role; none where they are not those of one layer.

    Where a kernel lies in a branch, its x and these moments may be those of the graph outside.
    """
    value = origin(graph, x)
    source = outside(model, Leaf(Edge(graph.name, "", 0), graph.name, value))
    holder = model.graphs[source.graph]
    if not model.analysis_of(holder, _computes_means):
        return {}
    updates_by_role = {
        role: [u for value in values if (u := update(model, holder, value)).targets]
        for role, values in moments_of(holder, origin(holder, source.value)).items()
    }
    return (
        {role: updates[0] for role, updates in updates_by_role.items()}
        if all(len(u) == 1 for u in updates_by_role.values())
        else {}
    )


def _computes_means(_: Model, graph: Graph) -> bool:
    """Return true if a graph computes a mean in single ops at all (to be memoised)."""
    return any(node.op == "Mean" for node in graph.nodes.values())
