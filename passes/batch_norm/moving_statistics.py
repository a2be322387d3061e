"""Sites in training mode that normalise with their moving statistics, and do not update them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from passes.batch_norm.roles import ROLES
from passes.batch_norm.site import Site
from passes.batch_norm.sites import STATISTICS
from rewriter import op_defs, protos
from rewriter.edit import Edit, Replace, Rewire, SetAttr
from rewriter.expr import Apply, Expr, Use, op, read
from rewriter.ir import Error, Model, Node


def normalise_with_moving(model: Model, site: Site, names: Mapping[str, str]) -> Iterator[Edit]:
    """Let the copy of a site normalise with its moving statistics, and keep its updates from running.

    The names of functions' copies are in `names`; updates in functions without a copy stay.

    Raises:
        Error: the variables that hold its statistics are not known.
    """
    averages = {role: value for role in STATISTICS if (value := _average(model, site, role)) is not None}
    if len(averages) < len(STATISTICS):
        raise Error(f"statistics of {site.node} cannot be frozen: which variables hold them is not known")
    for role, average in averages.items():
        for edge in site.inputs[role]:
            graph = model.graphs[edge.graph]
            used = graph.used_at(edge)
            batch = Use(op_defs.output_dtype(model, graph, used), used)
            value = average if average.dtype == batch.dtype else op("Cast", average, DstT=protos.Dtype(batch.dtype))
            # Single ops may use a statistic with axes of size 1, as `keepdims` leaves them.
            if site.kind == "decomposed":
                value = op("Reshape", value, op("Shape", batch))
            yield Rewire(edge._replace(graph=names[edge.graph]), value, f"{site.node}/{role}")
        # A NoOp stays in the place of an assignment, as other nodes may wait for it.
        for name, node in site.binding.assigns[role]:
            if name in names:
                yield Replace(names[name], node, Apply("", "NoOp", ()))
    if site.kind == "fused":
        yield SetAttr(names[site.graph], site.node, "is_training", protos.attr(value=False))
        yield SetAttr(names[site.graph], site.node, "exponential_avg_factor", None)


def _average(model: Model, site: Site, role: str) -> Expr | None:
    """Return a moving statistic of a site, read in its graph; None where its variable is not known."""
    # An assignment in the site's graph names the resource even where several layers share the function. The last one is
    # the average's: a zero-debiased update assigns a biased average first.
    for graph, node in reversed(site.binding.assigns[role]):
        if graph == site.graph:
            assign = model.graphs[graph].nodes[node]
            return op("ReadVariableOp", Use("resource", assign.inputs[0]), dtype=protos.Dtype(_dtype(assign)))
    keys = {keys[ROLES.index(role)] for keys in site.binding.variables}
    key = keys.pop()
    return None if keys or key is None else read(model.variables[key])


def _dtype(assign: Node) -> str:
    return protos.dtype_name(op_defs.attribute(assign, "dtype").type)
