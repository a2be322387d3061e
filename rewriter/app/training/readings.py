"""What the quantisers of a loaded model do just now: whether they act, their widths, limits and errors.

Control values are what the training function itself reads of its variables: that part of its graph is run on their
values. Quantised values are those of bnqat's own functions.
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
from passes.roles import ROLES
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
    """One quantiser.

    Attributes:
        bits: the width in force, 0: off.
        low: the least level's place; of the scheme log, log(v + epsilon).
        high: the greatest's.
        error: that of the quantised variable, as `ValuesReport.expected_error` has it, where it acts wholly.
    """

    bits: int
    low: float
    high: float
    error: float


class _Quantizer(NamedTuple):
    """What one quantiser is: the variable that it works on, by its key, and its layer's number."""

    batch_norm: str
    role: str
    key: str
    layer: int
    kind: QuantizerSpec


class Readings:
    """Reads the quantisers of a loaded model; one of a function of your own is left out.

    Args:
        model: as `tf.saved_model.load` gave it.
        filepath: from where, as it was then.

    Raises:
        Error: it has no quantisers.
    """

    def __init__(self, model: Any, filepath: str | Path) -> None:
        self.path = filepath
        self.source = load(Path(filepath))
        meta = self.source.source.proto.meta_graphs[self.source.source.index]
        functions = dict(held_functions(meta.object_graph_def))
        self.entry = self.source.entries[functions.get("quantization.train") or functions["train"]]
        self.variables = variables_by_key(model.quantization.train.concrete_functions[0], self.entry)
        self.quantizers = tuple(_quantizers(self.source))
        if not self.quantizers:
            raise Error(f"{filepath} has no quantisers to read; those of a function of your own are not read")

    def amount(self) -> float:
        """From 0, before the start step, to 1 from the ramp's end on."""
        return float(self._of("quantization_amount"))

    def __call__(self) -> dict[tuple[str, str], Reading]:
        """By the batch norm's name and the role."""
        bits = self._of("quantization_bits")
        bound = any(q.kind.scheme.range is not DYNAMIC for q in self.quantizers)
        given = self._of("quantization_limits") if bound else np.zeros((len(bits), 2), np.float32)
        layers = len(bits) // len(ROLES)
        found = {}
        for kind in dict.fromkeys(q.kind for q in self.quantizers):
            own = [q for q in self.quantizers if q.kind == kind]
            vectors = [self.variables[q.key].numpy().astype(np.float32).ravel() for q in own]
            rows = [ROLES.index(q.role) * layers + q.layer for q in own]
            limits = given[rows]
            inputs = [np.array(1, np.float32), bits[rows][:, None]]
            if kind.scheme.range is DYNAMIC:
                limits = np.array([kind.scheme.limits_of(v, kind.epsilon) for v in vectors])
            else:
                inputs.append(limits)
            quantized = run(define(fake_quantize_function(kind, len(own))), [*inputs, np.stack(vectors)])
            for q, row, v, (low, high), after in zip(own, rows, vectors, limits, quantized, strict=True):
                found[q.batch_norm, q.role] = Reading(int(bits[row]), float(low), float(high), error(kind, v, after))
        return {(q.batch_norm, q.role): found[q.batch_norm, q.role] for q in self.quantizers}

    def _of(self, name: str) -> np.ndarray:
        """What the training function computes first, of its variables alone, under a name."""
        graph, last = self._place(f"{name}/")
        nodes: dict[str, Node] = {}
        values = {}
        waiting = [last]
        while waiting:
            node = graph.nodes[waiting.pop()]
            if node.op == "ReadVariableOp":
                (key,) = (o.key for o in origins(self.source, graph.name, node.inputs[0]) if isinstance(o, VariableKey))
                values[node.name] = self.variables[key].numpy()
                node = Node(node.name, ARG, attrs={"T": op_defs.attribute(node, "dtype")})
            nodes[node.name] = replace(node, after=())
            waiting += [v.node for v in node.inputs if v.node not in nodes]
        part = Graph(MAIN, nodes, tuple(values), (Result(name, Value(last), ""),))
        return run(part, list(values.values()))

    def _place(self, within: str) -> tuple[Graph, str]:
        """The graph that computes it, and the node in which it ends: the only one that no other there uses."""
        for function in self.source.analysis(call_graph).reached(self.entry.function):
            graph = self.source.graphs[function]
            own = [node for node in graph.nodes.values() if node.name.startswith(within)]
            used = {value.node for node in own for value in node.inputs}
            ends = [node.name for node in own if node.name not in used]
            if len(ends) == 1:
                return graph, ends[0]
        raise Error(f"{self.path} does not read its control variables as bnqat wrote it; rewrite the float model again")


def _quantizers(model: Model) -> Iterator[_Quantizer]:
    for bn in model.analysis(batch_norms):
        for role, key in bn.variables.items():
            tag = next((t for s in bn.sites for t in s.quantized if t["role"] == role), None)
            if tag is None or tag["scheme"] not in SCHEMES:
                continue
            size = np.asarray(model.value_of(key)).size
            scheme = SCHEMES[tag["scheme"]](range=RANGES[tag["range"]], narrow_range=tag["narrow_range"])
            yield _Quantizer(bn.name, role, key, tag["layer"], QuantizerSpec(scheme, bn.sites[0].epsilon, size))
