"""Vectors that are quantised by one batched call, against the reference and against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from passes.deploy.quantized_values import quantized_values
from passes.quantization.batched import BLOCK_SIZE, GENERAL, batch_function, layout
from passes.quantization.quantizers import QuantizerSpec
from passes.quantization.schemes import Affine, Log, PowerOfTwo, Scheme, Symmetric
from passes.quantize import Quantize
from rewriter import evaluation, ops, protos
from rewriter.draft import define
from rewriter.ir import ARG, MAIN, Error, Graph, Model, Node
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests import reference

EPSILON = 1e-3
ON = 1
SCHEMES = [
    Affine(),
    Affine(narrow_range=True),
    Symmetric(),
    Symmetric(narrow_range=False),
    PowerOfTwo(),
    PowerOfTwo(narrow_range=False),
    Log(),
    Log(narrow_range=True),
]


def vectors() -> list[np.ndarray]:
    """Return vectors with sizes near the block size, and with values of every sort."""
    rng = np.random.default_rng(0)
    plain = [
        rng.normal(0.3, 1.5, n).astype(np.float32)
        for n in (1, 2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE)
    ]
    odd = rng.normal(0, 2, 40).astype(np.float32)
    odd[[0, 7, 39]] = np.inf, np.nan, -np.inf
    return [
        *plain,
        *(np.abs(v) for v in plain),
        *(-np.abs(v) for v in plain),
        odd,
        np.zeros(5, np.float32),
        np.full(9, 0.7, np.float32),
        np.full(3, np.nan, np.float32),
        np.full(6, 1e-40, np.float32),
        np.array([-1.0, 2.0, 3e38], np.float32) / 4,
    ]


def computed(
    specs: Sequence[QuantizerSpec], index: int, bits: int, values: Sequence[np.ndarray], amount: float = 1
) -> list[Any]:
    """Return the vectors that an execution mode gives."""
    graph = define(batch_function(tuple(specs), index))
    counts = [len(row.places) for row in layout(specs)]
    arguments = [np.float32(amount), *(np.full((n, 1), bits, np.int64) for n in counts), *values]
    feeds: dict[str, np.ndarray] = dict(zip(graph.arguments, map(np.asarray, arguments), strict=True))
    nodes = {name: node if node.op != ARG else _placeholder(node, feeds[name]) for name, node in graph.nodes.items()}
    return evaluation.run(Graph(MAIN, nodes), feeds, [result.value for result in graph.results])


def _placeholder(node: Node, value: np.ndarray) -> Node:
    return Node(node.name, "Placeholder", attrs={"dtype": node.attrs["T"], "shape": protos.shape_attr(np.shape(value))})


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.name} {s.narrow}")
def test_both_ways_give_the_numbers_of_each_vector_by_itself(scheme: Scheme) -> None:
    arrays = vectors()
    specs = [QuantizerSpec(scheme.within(EPSILON), v.shape).function_key for v in arrays]
    assert len(layout(specs)) == 1
    for bits in (2, 3, 5, 8, 11, 16):
        on, partly = (computed(specs, index, bits, arrays) for index in (ON, GENERAL))
        for v, short, whole in zip(arrays, on, partly, strict=True):
            expected = reference.quantize(scheme.name, v, bits, EPSILON, narrow=scheme.narrow).value
            np.testing.assert_array_equal(short, whole)
            if scheme.name == "log":
                counted = reference.counted("log", v)
                np.testing.assert_array_equal(short[~counted], v[~counted])
                ulp = np.spacing(expected[counted] + np.float32(EPSILON))
                assert (np.abs(short[counted] - expected[counted]) <= ulp).all()
            else:
                np.testing.assert_array_equal(short, expected)


@pytest.mark.parametrize("dtype", ["half", "bfloat16", "float64"])
def test_other_dtypes(dtype: str) -> None:
    arrays = [v.astype(tf.as_dtype(dtype).as_numpy_dtype) for v in vectors()[:-2]]
    specs = [
        QuantizerSpec(scheme.within(EPSILON), v.shape, dtype=dtype).function_key
        for scheme in (Affine(), Log())
        for v in arrays
    ]
    on, partly = (computed(specs, index, 4, [*arrays, *arrays]) for index in (ON, GENERAL))
    for v, short, whole in zip([*arrays, *arrays], on, partly, strict=True):
        assert short.dtype == v.dtype
        np.testing.assert_array_equal(short.astype(np.float64), whole.astype(np.float64))
    affine = reference.affine(np.asarray(arrays[5], np.float32), 4).astype(arrays[5].dtype)
    np.testing.assert_array_equal(on[5], affine)


def test_off_and_a_width_of_zero_and_an_amount_of_zero_give_the_same_bits() -> None:
    arrays = [*vectors(), np.array([-0.0, 0.0], np.float32)]
    specs = [QuantizerSpec(Affine(), v.shape).function_key for v in arrays]
    for results in (computed(specs, 0, 8, arrays), computed(specs, GENERAL, 0, arrays)):
        assert [m.tobytes() for m in results] == [v.tobytes() for v in arrays]


def quantized(path: Path) -> Model:
    return Pipeline([Quantize()]).run(load(path))[0]


def changed(model: Model, op: str, change: Callable[[Node], Node]) -> Model:
    """Return a model with all nodes of an op changed."""
    graphs = {}
    for name, graph in model.graphs.items():
        nodes = {n.name: change(n) if n.op == op else n for n in graph.nodes.values()}
        graphs[name] = replace(graph, nodes=nodes)
    return replace(model, graphs=graphs)


def test_what_only_looks_like_a_quantizer_is_refused_in_a_sentence(model: Callable[[str], Path]) -> None:
    """A value is read only where bnqat would have put it, and no made-up size is allocated."""
    whole = quantized(model("module"))
    assert len(quantized_values(whole)) == 8
    for wrong in ("x", 7, -1):
        case = changed(whole, "StatelessCase", lambda n, w=wrong: n.with_attrs(**{ops.GENERAL_BRANCH: protos.attr(w)}))  # type: ignore[misc]
        with pytest.raises(Error, match="rewrite the float model again"):
            quantized_values(case)
    huge = protos.attr(np.array([8], np.int32))
    huge.tensor.tensor_shape.dim[0].size = 2**40
    for sizes in (
        huge,
        protos.attr(np.array([], np.int32)),
        protos.attr(np.array(["a"], object)),
        protos.attr(np.array([3.5])),
    ):
        for op, position in (("SplitV", 1), ("Slice", 1), ("Slice", 2)):
            graphs = {}
            for name, graph in whole.graphs.items():
                constants = {n.inputs[position].node for n in graph.nodes.values() if n.op == op}
                nodes = {n: g.with_attrs(value=sizes) if n in constants else g for n, g in graph.nodes.items()}
                graphs[name] = replace(graph, nodes=nodes)
            with pytest.raises(Error, match="rewrite the float model again"):
                quantized_values(replace(whole, graphs=graphs))
