"""Runs of single quantisers: through a real SavedModel, under XLA, and op by op."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context, execute

from passes.quantization.quantizers import QuantizerSpec, fake_quantize_function, range_update_function
from rewriter.draft import define
from rewriter.edit import Define, Edit, Rewire
from rewriter.expr import Function, Port, Use
from rewriter.ir import ARG, Edge, Model, Value
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from rewriter.savedmodel.write import save

DTYPES = {"float32": tf.float32, "half": tf.float16, "int32": tf.int32, "int64": tf.int64}


@dataclass(frozen=True)
class Put:
    """Let `serve` return a function's results for its arguments."""

    function: Function

    def edits(self, model: Model) -> Iterable[Edit]:
        (entry,) = model.root_entries("serve")
        pairs = zip(self.function.parameters, model.graphs[entry.function].arguments, strict=True)
        inputs = [Use(parameter.dtype, Value(argument)) for parameter, argument in pairs]
        yield Define(self.function)
        call = self.function(*inputs)
        for i, result in enumerate(self.function.results):
            yield Rewire(Edge(entry.function, "", i), Port(result.dtype, call, i) if i else call, "test")


@cache
def _folder() -> Path:
    """Return a folder that lasts as long as the process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def _source(specs: tuple[tf.TensorSpec, ...], results: int) -> Model:
    """Return a model that TensorFlow saved, whose `serve` returns the last of its arguments."""
    module = tf.Module()

    def last(*inputs: tf.Tensor) -> Any:
        outputs = [tf.identity(value) for value in inputs[-results:]]
        return outputs if results > 1 else outputs[0]

    module.serve = tf.function(last, input_signature=specs, autograph=False)
    path = Path(tempfile.mkdtemp(dir=_folder())) / "source"
    tf.saved_model.save(module, str(path))
    return load(path)


@cache
def saved(spec: QuantizerSpec, rows: int = 0, observe: bool = False) -> Any:
    """Return a spec's function, loaded from a real SavedModel; it takes the control inputs and the value."""
    return saved_function((range_update_function if observe else fake_quantize_function)(spec, rows))


def saved_function(function: Function) -> Any:
    """Return a function, loaded from a real SavedModel; it gives a list of its results if there are several."""
    specs = tuple(
        tf.TensorSpec([None] if shape is None else shape, DTYPES[p.dtype])
        for p, shape in zip(function.parameters, function.shapes, strict=True)
    )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "target"
        save(Pipeline([Put(function)]).run(_source(specs, len(function.results)))[0], target)
        loaded = tf.saved_model.load(str(target))
    loaded.serve.owner = loaded
    return loaded.serve


@cache
def compiled(spec: QuantizerSpec, jit: bool = True, rows: int = 0) -> Any:
    """Return a spec's function inside another function, optionally compiled by XLA."""
    serve = saved(spec, rows)
    return tf.function(lambda *inputs: serve(*inputs), jit_compile=jit, autograph=False)  # noqa: PLW0108  keeps `serve` alive


def eager(spec: QuantizerSpec, inputs: Sequence[Any]) -> Any:
    """Run a spec's function op by op, without a graph."""
    return eager_function(fake_quantize_function(spec), inputs)[0]


def eager_function(function: Function, inputs: Sequence[Any]) -> list[Any]:
    """Run a function op by op, without a graph, and return its results."""
    graph = define(function)
    values = dict(zip(graph.arguments, ([tf.convert_to_tensor(i)] for i in inputs), strict=True))
    waiting = [n for n in graph.nodes.values() if n.op != ARG]
    while waiting:
        node = next(n for n in waiting if all(v.node in values for v in n.inputs))
        waiting.remove(node)
        operands = [values[v.node][v.port] for v in node.inputs]
        op_attrs = {name: proto for name, proto in node.attrs.items() if name[0] != "_"}  # the others are for graphs
        attrs = tuple(part for name, proto in op_attrs.items() for part in (name, _plain(proto)))
        if node.op == "Const":
            values[node.name] = [tf.constant(tf.make_ndarray(node.attrs["value"].tensor))]
        else:
            count = node.attrs["num"].i if node.op == "Unpack" else 1
            values[node.name] = execute.execute(node.op.encode(), count, operands, attrs, context.context())
    return [values[result.value.node][result.value.port] for result in graph.results]


def _plain(proto: Any) -> Any:
    return getattr(proto, proto.WhichOneof("value"))


def function_inputs(
    spec: QuantizerSpec, v: Any, bits: int, *, amount: float = 1.0, limits: Any = None, noise: Any = None
) -> list[Any]:
    """Return the inputs of a spec's function for one vector."""
    inputs = [np.float32(amount), np.array([bits], np.int32)]
    if spec.scheme.range.name != "dynamic":
        inputs.append(np.asarray(limits, np.float32))
    if spec.stochastic:
        inputs.append(np.asarray(noise, np.float32))
    return [tf.constant(i) for i in (*inputs, v)]
