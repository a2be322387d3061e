"""Quantised values in the variables, in place of quantisers before them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from passes.quantized_values import Quantized, quantized_values, tagged, trusted_values
from passes.sites import TAG
from passes.updates import consumers
from rewriter import ops
from rewriter.edit import AddVariable, Assign, Edit, Keep, Rewire
from rewriter.expr import Expr, Use, read
from rewriter.ir import Error, Graph, Model, Value, Variable, unused
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

    trust: bool = False

    def edits(self, model: Model) -> Iterable[Edit]:
        """Nothing where the model has no quantiser.

        Raises:
            Error: what a quantiser makes of a variable cannot be stored; the message says why.
        """
        found = model.analysis(trusted_values if self.trust else quantized_values)
        if not tagged(model):
            return
        by_node: dict[Node, list[Quantized]] = {}
        for each in found:
            by_node.setdefault((each.graph, each.node), []).append(each)
        baked = _baked(model, found)
        yield from (Assign(key, value) for key, value in baked.items())
        further = _Further(model)
        for name, node in tagged(model):
            graph = model.graphs[name]
            quantized = by_node.get((name, node), [])
            if all(each.variable in baked for each in quantized):  # or it can never run
                value = _raw(model, graph, node)
            else:
                value = read(further.variable(quantized))
            for edge in model.analysis_of(graph, consumers).get(Value(node), ()):
                yield Rewire(edge, value, node)
        yield from (AddVariable(v) for v in further.made)
        yield Keep(tuple(model.entries))


def _raw(model: Model, graph: Graph, node: str) -> Expr:
    """What a quantiser is given; of several in a row, what the first is."""
    value = Value(node)
    while TAG in graph.nodes[value.node].attrs:
        value = graph.nodes[value.node].inputs[-1]
    return Use(ops.output_dtype(model, graph, value), value)


def _baked(model: Model, found: Iterable[Quantized]) -> Mapping[str, np.ndarray]:
    """The variables that can hold their quantised values, with these."""
    values: dict[str, dict[bytes, np.ndarray]] = {}
    for each in found:
        if each.variable:
            values.setdefault(each.variable, {})[each.value.tobytes()] = each.value
    bare = needed_without(model, tagged(model))
    single = {key: next(iter(v.values())) for key, v in values.items() if len(v) == 1 and key not in bare}
    return {key: value.reshape(model.variables[key].shape) for key, value in single.items()}


class _Further:
    """Variables for what is quantised of others, each once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._made: dict[tuple[str, bytes], Variable] = {}

    @property
    def made(self) -> Iterator[Variable]:
        """All of them."""
        return iter(self._made.values())

    def variable(self, quantized: list[Quantized]) -> Variable:
        """The variable for what one quantiser makes, on every way to it.

        Raises:
            Error: on one way it makes something else than on another.
        """
        first = quantized[0]
        if any(each.value.tobytes() != first.value.tobytes() for each in quantized):
            raise Error(
                f"{first.tag['role']} of {first.tag['batch_norm']} is also used as it is, or quantised in two ways, "
                f"and {first.graph} is called for several batch norms; so no variable could hold it quantised"
            )
        key = (first.variable, first.value.tobytes())
        if key not in self._made:
            held = self.model.variables[first.variable].name if first.variable else first.tag["role"]
            taken = {v.path for v in self._made.values()}
            path = unused(f"quantized.{held.replace('/', '_').replace('.', '_').replace(':', '_')}", taken)
            name = path.replace(".", "/")
            self._made[key] = Variable(
                self.model.new_key(name),
                name,
                first.value.dtype.name,
                first.value.shape,
                path=path,
                initial=first.value,
            )
        return self._made[key]
