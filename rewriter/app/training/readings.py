"""Readings of a loaded model's quantisers: their blend weight, widths, limits and errors.

Control values are computed as the training function computes them: that part of its graph is run on the values of its
variables. Quantised values are those of bnqat's own functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from passes.batch_norm.batch_norms import batch_norms
from passes.quantization.quantizers import QuantizerSpec, fake_quantize_function
from passes.quantization.ranges import DYNAMIC, Ema, Fixed, Learned, Range
from passes.quantization.schemes import SCHEMES
from rewriter import op_defs
from rewriter.app.loaded import variables_by_key
from rewriter.app.values import error, run
from rewriter.dataflow import VariableKey, call_graph, origins
from rewriter.draft import define
from rewriter.ir import ARG, MAIN, Error, Graph, Model, Node, Result, Value
from rewriter.savedmodel.objects import held_functions
from rewriter.savedmodel.read import load

RANGES: Mapping[str, Range] = {"dynamic": DYNAMIC, "fixed": Fixed(0, 1), "ema": Ema(), "learned": Learned()}


class Reading(NamedTuple):
    """State of one quantiser.

    Attributes:
        bits: the width in force, 0: off.
        low: the lowest level; for the scheme log, that of log(v + epsilon).
        high: the highest level, likewise.
        error: the error of the quantised variable, as `ValuesReport.expected_error` defines it, at blend weight 1.
    """

    bits: int
    low: float
    high: float
    error: float


class _Quantizer(NamedTuple):
    """One quantiser: the key of its variable, its row in the controls' values, and its spec."""

    batch_norm: str
    role: str
    key: str
    row: int
    spec: QuantizerSpec


class Readings:
    """Reader of a loaded model's quantisers of batch norms; those that are a user's own function are left out.

    Args:
        model: the model as `tf.saved_model.load` returned it.
        filepath: the directory that it was loaded from, unchanged since.

    Raises:
        Error: the model has no quantisers.
    """

    def __init__(self, model: Any, filepath: str | Path) -> None:
        self.path = filepath
        self.source = load(Path(filepath))
        meta = self.source.source.proto.meta_graphs[self.source.source.index]
        functions = dict(held_functions(meta.object_graph_def))
        # Objects go by their shortest path: a function that is `train` of the root as well has that path.
        self.entry = self.source.entries[functions.get("quantization.train") or functions["train"]]
        self.variables = variables_by_key(model.quantization.train.concrete_functions[0], self.entry)
        self.quantizers = tuple(_quantizers(self.source))
        if not self.quantizers:
            raise Error(
                f"{filepath} has no quantisers to read: those of batch norms are read, but not a function of your own"
            )

    def amount(self) -> float:
        """Return the blend weight: 0 before the start step, 1 from the ramp's end on."""
        return float(self._computed("quantization_amount"))

    def __call__(self) -> dict[tuple[str, str], Reading]:
        """Return the readings by the batch norm's name and the role."""
        bits = self._computed("quantization_bits")
        has_limits = any(q.spec.scheme.range is not DYNAMIC for q in self.quantizers)
        all_limits = self._computed("quantization_limits") if has_limits else np.zeros((len(bits), 2), np.float32)
        readings = {}
        for spec in dict.fromkeys(q.spec for q in self.quantizers):
            group = [q for q in self.quantizers if q.spec == spec]
            vectors = [self.variables[q.key].numpy().astype(np.float32).ravel() for q in group]
            rows = [q.row for q in group]
            limits = all_limits[rows]
            inputs = [np.array(1, np.float32), bits[rows][:, None]]
            if spec.scheme.range is DYNAMIC:
                limits = np.array([spec.scheme.limits_of(v) for v in vectors])
            else:
                inputs.append(limits)
            quantized = run(define(fake_quantize_function(spec, len(group))), [*inputs, np.stack(vectors)])
            for q, row, v, (low, high), after in zip(group, rows, vectors, limits, quantized, strict=True):
                readings[q.batch_norm, q.role] = Reading(int(bits[row]), float(low), float(high), error(spec, v, after))
        return {(q.batch_norm, q.role): readings[q.batch_norm, q.role] for q in self.quantizers}

    def _computed(self, name: str) -> np.ndarray:
        """Return the value that the training function computes in a name scope, from its variables alone."""
        graph, last = self._scope_graph(f"{name}/")
        nodes: dict[str, Node] = {}
        values = {}
        pending = [last]
        while pending:
            node = graph.nodes[pending.pop()]
            if node.op == "ReadVariableOp":
                (key,) = (o.key for o in origins(self.source, graph.name, node.inputs[0]) if isinstance(o, VariableKey))
                values[node.name] = self.variables[key].numpy()
                node = Node(node.name, ARG, attrs={"T": op_defs.attribute(node, "dtype")})
            # Control inputs lead out of the part that is computed here.
            nodes[node.name] = replace(node, after=())
            pending += [v.node for v in node.inputs if v.node not in nodes]
        part = Graph(MAIN, nodes, tuple(values), (Result(name, Value(last), ""),))
        return run(part, list(values.values()))

    def _scope_graph(self, within: str) -> tuple[Graph, str]:
        """Return the graph with a name scope, and the scope's result: its only node that no other node there uses."""
        for function in self.source.analysis(call_graph).reached(self.entry.function):
            graph = self.source.graphs[function]
            scope_nodes = [node for node in graph.nodes.values() if node.name.startswith(within)]
            used = {value.node for node in scope_nodes for value in node.inputs}
            ends = [node.name for node in scope_nodes if node.name not in used]
            if len(ends) == 1:
                return graph, ends[0]
        raise Error(f"{self.path} does not read its control variables as bnqat wrote it; rewrite the float model again")


def _quantizers(model: Model) -> Iterator[_Quantizer]:
    for bn in model.analysis(batch_norms):
        for role, key in bn.variables.items():
            tag = next((t for s in bn.sites for t in s.binding.quantized if t["role"] == role), None)
            if tag is None or tag["scheme"] not in SCHEMES:
                continue
            shape = (np.asarray(model.value_of(key)).size,)
            scheme = SCHEMES[tag["scheme"]](range=RANGES[tag["range"]], narrow_range=tag["narrow_range"])
            yield _Quantizer(bn.name, role, key, tag["row"], QuantizerSpec(scheme.within(bn.sites[0].epsilon), shape))
