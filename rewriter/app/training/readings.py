"""Readings of a loaded model's quantisers: their blend weight, widths, limits and errors.

Control values are computed as the training function computes them: that part of its graph is run on the values of its
variables. Quantised values of batch norms are those of bnqat's own functions; those of others, such as weights, are
computed by the quantisers of the functions that serve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from passes.batch_norm.batch_norms import batch_norms
from passes.batch_norm.roles import ROLES
from passes.deploy.quantized_values import Quantized, some_values, tagged
from passes.entries.training import only_training
from passes.quantization.node_marks import ORIGIN, SCALE, ZERO_POINT
from passes.quantization.quantizer_marks import tag_of
from passes.quantization.quantizers import QuantizerSpec, fake_quantize_function
from passes.quantization.ranges import DYNAMIC, Ema, Fixed, Learned, Range
from passes.quantization.roles import MIN_BITS
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
        low: the lowest level, of all channels; for the scheme log, that of log(v + epsilon).
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
    """Reader of a loaded model's quantisers; those that are a user's own function are left out.

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
        tags = [tag_of(self.source.graphs[graph].nodes[node]) for graph, node in tagged(self.source)]
        self.has_others = any(tag["role"] not in ROLES and tag["scheme"] in SCHEMES for tag in tags)
        if not self.quantizers and not self.has_others:
            raise Error(f"{filepath} has no quantisers to read; a function of your own is not read")

    def amount(self) -> float:
        """Return the blend weight: 0 before the start step, 1 from the ramp's end on."""
        return float(self._computed("quantization_amount"))

    def __call__(self) -> dict[tuple[str, str], Reading]:
        """Return the readings by the layer's name and the role."""
        return {**(self._batch_norms() if self.quantizers else {}), **(self._others() if self.has_others else {})}

    def _batch_norms(self) -> dict[tuple[str, str], Reading]:
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

    def _others(self) -> dict[tuple[str, str], Reading]:
        """Return the readings of weights, and of other values that are no batch norm's."""
        live = replace(self.source, assigned={key: v.numpy() for key, v in self.variables.items()})
        training = live.analysis(only_training)
        found: dict[tuple[str, str], dict[str, Quantized]] = {}
        for value in some_values(live, lambda graph, tag: tag["role"] not in ROLES and graph not in training):
            if SCALE in value.parts and value.tag["scheme"] in SCHEMES:
                found.setdefault((value.tag["layer_name"], value.tag["role"]), {}).setdefault(value.variable, value)
        return {key: _reading(list(values.values())) for key, values in found.items()}

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


def _reading(values: list[Quantized]) -> Reading:
    """Return the reading of the values of one layer: one variable, or several that share a function."""
    levels = []
    for value in values:
        scheme, zero = SCHEMES[value.tag["scheme"]], value.parts.get(ZERO_POINT, 0)
        # A quantiser that is off has the levels of the least width.
        codes = scheme(narrow_range=value.tag["narrow_range"]).codes(max(value.bits, MIN_BITS))
        levels += [(code - zero) * value.parts[SCALE] + value.parts.get(ORIGIN, 0) for code in codes]
    before = np.concatenate([value.raw.ravel() for value in values]).astype(np.float64)
    after = np.concatenate([value.value.ravel() for value in values]).astype(np.float64)
    finite = np.isfinite(before)
    norm = float(np.linalg.norm(before[finite]))
    difference = float(np.linalg.norm(after[finite] - before[finite]))
    low, high = (float(extreme([extreme(level) for level in levels])) for extreme in (np.min, np.max))
    return Reading(values[0].bits, low, high, difference / norm if norm else 0.0)


def _quantizers(model: Model) -> Iterator[_Quantizer]:
    for bn in model.analysis(batch_norms):
        for role, key in bn.variables.items():
            tag = next((t for s in bn.sites for t in s.binding.quantized if t["role"] == role), None)
            if tag is None or tag["scheme"] not in SCHEMES:
                continue
            shape = (np.asarray(model.value_of(key)).size,)
            scheme = SCHEMES[tag["scheme"]](range=RANGES[tag["range"]], narrow_range=tag["narrow_range"])
            yield _Quantizer(bn.name, role, key, tag["row"], QuantizerSpec(scheme.within(bn.sites[0].epsilon), shape))
