"""A small net whose layers are functions of their own, and the text of its rewritten graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from rewriter.ir import Graph, Model
from rewriter.savedmodel.read import load
from tests.models import FusedBatchNorm, perturb
from tests.passes.singles import line_of

SHAPE = (None, 4, 4, 3)


class Layered(tf.Module):
    """A convolution, a batch norm in a function of its own, and a function without any."""

    def __init__(self) -> None:
        super().__init__()
        kernel = np.random.default_rng(0).normal(0, 0.3, (1, 1, 3, 6))
        self.kernel = tf.Variable(kernel.astype(np.float32), name="kernel")
        self.norm = FusedBatchNorm(6)
        perturb((self.norm.gamma, self.norm.beta, self.norm.moving_mean, self.norm.moving_variance))
        # Python functions, so that only `serve` is an attribute that is saved.
        self._functions = {
            "layer": tf.function(lambda x: self.norm(x, training=False)),
            "double": tf.function(lambda x: x * 2.0),
        }

    @tf.function(input_signature=[tf.TensorSpec(SHAPE, name="x")])
    def serve(self, x: Any) -> Any:
        """Convolve, normalise, double."""
        y: Any = tf.nn.conv2d(x, self.kernel, 1, "SAME")
        return self._functions["double"](self._functions["layer"](y))


def saved(path: Path, module: Any) -> Model:
    """Save a module with `serve` as its default signature, and read it."""
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
    return load(path)


def serving(model: Model) -> Graph:
    """Return the graph of the root's `serve`."""
    (entry,) = model.root_entries("serve")
    return model.graphs[entry.function]


def computing(graph: Graph) -> list[str]:
    """Return a graph's lines without arguments, reads, and nodes that only pass on a value or order others."""
    left_out = ("Arg", "ReadVariableOp", "Identity", "NoOp", "Const")
    return [line_of(node) for node in graph.nodes.values() if node.op not in left_out]
