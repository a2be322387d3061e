"""Quantised values in the variables, in place of quantisers before them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from passes.deploy.quantized_values import Quantized, quantized_values, tagged, trusted_values
from passes.quantization.quantizer_marks import TAG
from rewriter import op_defs
from rewriter.dataflow import consumers
from rewriter.edit import AddVariable, Assign, Edit, Keep, Rewire
from rewriter.expr import Expr, Use, read
from rewriter.ir import Edge, Error, Graph, Model, Value, Variable, unused
from rewriter.prune import needed_without

Node = tuple[str, str]
"""A graph and a node of it."""


@dataclass(frozen=True)
class BakeQuantizers:
    """Store what quantisers make of variables in these, and let the variables be used as they are.

    A variable that is used without a quantiser as well, or quantised in two ways, stays; what is quantised becomes a
    variable of its own. Variables that only quantisers read go with them.

    Attributes:
        trust: compute quantisers with whatever ops they have; else with such alone that are known to be harmless.
    """

    name: ClassVar[str] = "bake-quantizers"

    trust: bool = False

    def edits(self, model: Model) -> Iterable[Edit]:
        """Nothing where the model has no quantiser.

        Raises:
            Error: what a quantiser makes of a variable cannot be stored; the message says why.
        """
        stores = model.analysis(trusted_stores if self.trust else quantized_stores)
        by_node: dict[Node, list[Quantized]] = {}
        for each in stores.values:
            by_node.setdefault((each.graph, each.node), []).append(each)
        yield from (Assign(key, value) for key, value in stores.baked.items())
        yield from (AddVariable(v) for v in stores.further.values())
        for name, node in tagged(model):
            graph = model.graphs[name]
            quantized = by_node.get((name, node), [])
            if all(each.variable in stores.baked for each in quantized):  # or it can never run
                value = _raw(model, graph, node)
            else:
                value = read(stores.single(quantized))
            for edge in model.analysis_of(graph, consumers).get(Value(node), ()):
                yield Rewire(edge, value, node)
        if by_node:
            yield Keep(tuple(model.entries))


class BakePlan(NamedTuple):
    """Where quantised values are to be stored.

    Attributes:
        values: what is to be stored.
        baked: variables that can hold their quantised values, with these.
        further: new variables for the others, by the variable that is quantised and the bytes of the quantised value.
    """

    values: tuple[Quantized, ...]
    baked: Mapping[str, np.ndarray]
    further: Mapping[tuple[str, bytes], Variable]

    def key(self, quantized: Quantized) -> str:
        """The checkpoint key of the variable that holds a value."""
        if quantized.variable in self.baked:
            return quantized.variable
        return self.further[quantized.variable, quantized.value.tobytes()].key

    def single(self, quantized: Sequence[Quantized]) -> Variable:
        """The new variable for what one quantiser makes, on every way to it.

        Raises:
            Error: on one way it makes something else than on another.
        """
        first = quantized[0]
        if any(each.value.tobytes() != first.value.tobytes() for each in quantized):
            raise Error(
                f"{first.tag['role']} of {first.tag['batch_norm']} is also used as it is, or quantised in two ways, "
                f"and {first.graph} is called for several batch norms; so no variable could hold it quantised"
            )
        return self.further[first.variable, first.value.tobytes()]


def quantized_stores(model: Model) -> BakePlan:
    """Where the values are to be stored that harmless quantisers make."""
    return _stores(model, model.analysis(quantized_values))


def trusted_stores(model: Model) -> BakePlan:
    """Where the values are to be stored that quantisers make, whatever ops they have."""
    return _stores(model, model.analysis(trusted_values))


def _stores(model: Model, found: tuple[Quantized, ...]) -> BakePlan:
    values: dict[str, dict[bytes, np.ndarray]] = {}
    for each in found:
        if each.variable:
            values.setdefault(each.variable, {})[each.value.tobytes()] = each.value
    bare = needed_without(
        model, (Edge(g, n, i) for g, n in tagged(model) for i in range(len(model.graphs[g].nodes[n].inputs)))
    )
    single = {key: next(iter(v.values())) for key, v in values.items() if len(v) == 1 and key not in bare}
    baked = {key: value.reshape(np.shape(model.value_of(key))) for key, value in single.items()}
    further: dict[tuple[str, bytes], Variable] = {}
    taken: set[str] = set()
    for each in found:
        key = (each.variable, each.value.tobytes())
        if each.variable not in baked and key not in further:
            held = model.variables[each.variable].name if each.variable else each.tag["role"]
            path = unused(f"quantized.{re.sub(r'[^A-Za-z0-9_]', '_', held)}", taken)
            taken.add(path)
            name = path.replace(".", "/")
            further[key] = Variable(
                model.new_key(name), name, each.value.dtype.name, each.value.shape, path=path, initial=each.value
            )
    return BakePlan(found, baked, further)


def _raw(model: Model, graph: Graph, node: str) -> Expr:
    """What a quantiser is given; of several in a row, what the first is."""
    value = Value(node)
    while TAG in graph.nodes[value.node].attrs:
        value = graph.nodes[value.node].inputs[-1]
    return Use(op_defs.output_dtype(model, graph, value), value)
