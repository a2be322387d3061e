"""Quantised values stored in the variables, in place of quantisers after them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from passes.deploy.quantized_values import Quantized, quantized_values, tagged, trusted_values
from passes.quantization.quantizer_marks import TAG
from passes.weights.kernels import GATHERS
from rewriter import op_defs, ops
from rewriter.dataflow import consumers
from rewriter.edit import AddVariable, Assign, Edit, Keep, Rewire
from rewriter.expr import Expr, Use, handle, read
from rewriter.ir import Edge, Error, Graph, Model, Value, Variable, unused
from rewriter.prune import needed_without

Node = tuple[str, str]
"""The name of a graph, and that of a node of it."""


@dataclass(frozen=True)
class BakeQuantizers:
    """Store quantised values in the variables, and let the variables be used without the quantisers.

    A variable that is used without a quantiser as well, or quantised in two ways, stays; the quantised value becomes
    a variable of its own. Variables that only quantisers read go with them.

    Attributes:
        trust: compute quantisers whatever ops they have; else only with ops that are known to be harmless.
    """

    name: ClassVar[str] = "bake-quantizers"

    trust: bool = False

    def edits(self, model: Model) -> Iterable[Edit]:
        """Replace every quantiser by a variable's value; yield nothing where the model has none.

        Raises:
            Error: the quantised value of a variable cannot be stored; the message says why.
        """
        plan = model.analysis(trusted_stores if self.trust else quantized_stores)
        by_node: dict[Node, list[Quantized]] = {}
        for entry in plan.values:
            by_node.setdefault((entry.graph, entry.node), []).append(entry)
        yield from (Assign(key, value) for key, value in plan.baked.items())
        yield from (AddVariable(v) for v in plan.new_variables.values())
        for name, node in tagged(model):
            graph = model.graphs[name]
            quantized = by_node.get((name, node), [])
            value = _raw(model, graph, node)
            if not all(entry.variable in plan.baked for entry in quantized):  # they are, where it can never run
                stored = plan.single(quantized)
                table = _table(graph, node)
                if table is None:
                    value = read(stored)
                else:
                    resource = graph.nodes[table.node].op == "ResourceGather"
                    yield Rewire(table, handle(stored) if resource else read(stored), node)
            for edge in model.analysis_of(graph, consumers).get(Value(node), ()):
                yield Rewire(edge, value, node)
        if by_node:
            # All functions stay; `Keep` removes the variables that only quantisers read.
            yield Keep(tuple(model.entries))


class BakePlan(NamedTuple):
    """The variables in which quantised values are to be stored.

    Attributes:
        values: the quantised values.
        baked: variables that can hold their quantised values: key -> value.
        new_variables: new variables for the other values, by the variable that is quantised and the bytes of the
            quantised value.
    """

    values: tuple[Quantized, ...]
    baked: Mapping[str, np.ndarray]
    new_variables: Mapping[tuple[str, bytes], Variable]

    def key(self, quantized: Quantized) -> str:
        """Return the checkpoint key of the variable that is to hold a value."""
        if quantized.variable in self.baked:
            return quantized.variable
        return self.new_variables[quantized.variable, quantized.value.tobytes()].key

    def single(self, quantized: Sequence[Quantized]) -> Variable:
        """Return the new variable for the value of one quantiser, on every way of calls to it.

        Raises:
            Error: the values differ between two ways.
        """
        first = quantized[0]
        if any(entry.value.tobytes() != first.value.tobytes() for entry in quantized):
            raise Error(
                f"{first.tag['role']} of {first.tag['layer_name']} is also used as it is, or quantised in two ways, "
                f"and {first.graph} is called for several layers; so no variable could hold it quantised"
            )
        return self.new_variables[first.variable, first.value.tobytes()]


def quantized_stores(model: Model) -> BakePlan:
    """Return the plan for the values of quantisers whose ops are known to be harmless."""
    return _plan(model, model.analysis(quantized_values))


def trusted_stores(model: Model) -> BakePlan:
    """Return the plan for the values of all quantisers, whatever ops they have."""
    return _plan(model, model.analysis(trusted_values))


def _plan(model: Model, quantized: tuple[Quantized, ...]) -> BakePlan:
    values: dict[str, dict[bytes, np.ndarray]] = {}
    for entry in quantized:
        if entry.variable:
            values.setdefault(entry.variable, {})[entry.value.tobytes()] = entry.value
    # A variable that is needed with all quantisers cut off is used as it is somewhere.
    bare = needed_without(
        model, (Edge(g, n, i) for g, n in tagged(model) for i in range(len(model.graphs[g].nodes[n].inputs)))
    )
    single = {key: next(iter(v.values())) for key, v in values.items() if len(v) == 1 and key not in bare}
    # The stored value has a shape even where the variable's is unknown.
    baked = {key: value.reshape(np.shape(model.value_of(key))) for key, value in single.items()}
    new_variables: dict[tuple[str, bytes], Variable] = {}
    used_paths: set[str] = set()
    for entry in quantized:
        key = (entry.variable, entry.value.tobytes())
        if entry.variable not in baked and key not in new_variables:
            source_name = model.variables[entry.variable].name if entry.variable else entry.tag["role"]
            path = unused(f"quantized.{re.sub(r'[^A-Za-z0-9_]', '_', source_name)}", used_paths)
            used_paths.add(path)
            name = path.replace(".", "/")
            new_variables[key] = Variable(
                model.new_key(name), name, entry.value.dtype.name, entry.value.shape, path=path, initial=entry.value
            )
    return BakePlan(quantized, baked, new_variables)


def _table(graph: Graph, node: str) -> Edge | None:
    """Return the use of the table of which a quantiser's input is rows that are looked up; None for another one."""
    value: Value | None = graph.nodes[node].inputs[-1]
    while value is not None:
        source = graph.nodes[value.node]
        if source.op in GATHERS:
            return Edge(graph.name, source.name, GATHERS[source.op])
        value = ops.forwarded(source, value.port)
    return None


def _raw(model: Model, graph: Graph, node: str) -> Expr:
    """Return the input of a quantiser; for several in a row, the input of the first."""
    value = Value(node)
    while TAG in graph.nodes[value.node].attrs:
        value = graph.nodes[value.node].inputs[-1]
    return Use(op_defs.output_dtype(model, graph, value), value)
