"""Values of the variables of batch norms, and the error that rounding them would make.

Nothing of a model is executed: its checkpoint is read, and bnqat's own quantisers run on the values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from passes import roles
from passes.batch_norm.batch_norms import BatchNorm
from passes.quantization.quantizers import QuantizerSpec, fake_quantize_function
from passes.quantization.schemes import SCHEMES, Log
from rewriter import evaluation
from rewriter.app.report_schema import ValuesReport
from rewriter.draft import define
from rewriter.ir import ARG, MAIN, Error, Graph, Model, Node
from rewriter.op_defs import argument_dtype
from rewriter.protos import dtype_attr, shape_attr

WIDTHS = (8, 6, 4, 3, 2)
BINS = 12

Key = tuple[str, str]
"""A batch norm's name and a role."""


def values_of(model: Model, batch_norms: Sequence[BatchNorm]) -> Mapping[Key, ValuesReport]:
    """Return a report of the values in the checkpoint, for every batch norm and role that has numbers there."""
    vectors: dict[Key, np.ndarray] = {}
    keys_by_spec: dict[QuantizerSpec, list[Key]] = {}
    for bn in batch_norms:
        for role, variable in bn.variables.items():
            try:
                vector = np.asarray(model.value_of(variable)).astype(np.float32).ravel()
            except (Error, ValueError):  # a variable that is in no checkpoint, or no number
                continue
            if vector.size:
                vectors[bn.name, role] = vector
                scheme = SCHEMES[roles()[role].scheme]()
                spec = QuantizerSpec(scheme.within(bn.sites[0].epsilon), vector.shape)
                keys_by_spec.setdefault(spec, []).append((bn.name, role))
    errors: dict[Key, dict[int, float]] = {}
    for spec, keys in keys_by_spec.items():
        errors.update(zip(keys, _errors(spec, [vectors[key] for key in keys]), strict=True))
    return {key: replace(_described(vector), expected_error=errors[key]) for key, vector in vectors.items()}


def _described(vector: np.ndarray) -> ValuesReport:
    """Return the report of a vector, without expected errors."""
    finite = vector[np.isfinite(vector)].astype(np.float64)
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    counts, _ = np.histogram(finite, bins=BINS, range=(low, high) if high > low else (low - 0.5, low + 0.5))
    return ValuesReport(
        channels=vector.size,
        least=low,
        greatest=high,
        mean=float(finite.mean()) if finite.size else 0.0,
        zeros=int((vector == 0).sum()),
        not_finite=vector.size - finite.size,
        histogram=[int(count) for count in counts],
        expected_error={},
    )


def _errors(spec: QuantizerSpec, vectors: Sequence[np.ndarray]) -> Iterator[dict[int, float]]:
    """Return the errors that a quantiser of this spec makes, by width, for each vector."""
    rows = np.repeat(np.stack(vectors), len(WIDTHS), axis=0)
    bits = np.tile(np.array(WIDTHS, np.int32), len(vectors))[:, None]
    quantized = run(define(fake_quantize_function(spec, len(rows))), [np.array(1, np.float32), bits, rows])
    for index, vector in enumerate(vectors):
        quantized_rows = quantized[index * len(WIDTHS) : (index + 1) * len(WIDTHS)]
        yield {n: error(spec, vector, row) for n, row in zip(WIDTHS, quantized_rows, strict=True)}


def error(spec: QuantizerSpec, vector: np.ndarray, quantized: np.ndarray) -> float:
    """Return the relative error of a quantised vector, as ``ValuesReport.expected_error`` defines it."""
    finite = np.isfinite(vector)
    v, q = vector[finite].astype(np.float64), quantized[finite].astype(np.float64)
    if isinstance(spec.scheme, Log):
        epsilon = spec.scheme.epsilon
        shifted = np.maximum(v + epsilon, np.finfo(np.float32).tiny)
        return float(np.sqrt(np.mean((np.sqrt(shifted / np.maximum(q + epsilon, 1e-38)) - 1) ** 2)))
    norm = float(np.sqrt(np.sum(v**2)))
    return float(np.sqrt(np.sum((q - v) ** 2))) / norm if norm else 0.0


def run(graph: Graph, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the result of one of bnqat's own functions, or of another that calls none and reads no variables."""
    feeds = dict(zip(graph.arguments, inputs, strict=True))
    nodes = {
        name: _placeholder(node, feeds[name].shape) if node.op == ARG else node for name, node in graph.nodes.items()
    }
    (result,) = graph.results
    output: np.ndarray
    (output,) = evaluation.run(Graph(MAIN, nodes), feeds, [result.value])
    return output


def _placeholder(node: Node, shape: tuple[int, ...]) -> Node:
    """Return a placeholder in place of an argument, as a graph without arguments is evaluated."""
    return Node(node.name, "Placeholder", attrs={"dtype": dtype_attr(argument_dtype(node)), "shape": shape_attr(shape)})
