"""Inspection of loaded models: values inside functions, executed kernels, digests of directories."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

TAG = "_bnqat"


def images(shape: Sequence[int | None], batch: int = 4, seed: int = 0) -> tf.Tensor:
    """A batch of images whose channels differ in mean and variance."""
    rng = np.random.default_rng(seed)
    size = [batch, *(s or 1 for s in shape[1:])]
    return tf.constant(rng.normal(0.3, 1.5, size).astype("float32"))


def inputs_of(signature: Any, batch: int = 4, seed: int = 0) -> dict[str, tf.Tensor]:
    """Random inputs for a signature."""
    specs = signature.structured_input_signature[1]
    return {name: images(spec.shape, batch, seed) for name, spec in sorted(specs.items())}


def fetch(concrete: Any, inputs: Sequence[Any], names: Sequence[str]) -> list[np.ndarray]:
    """Return values of tensors inside a loaded concrete function (its own body, not that of its callees)."""
    graph_def = concrete.graph.as_graph_def()
    feeds = [t.name for t in concrete.graph.inputs]

    def body(*values: Any) -> Any:
        return tf.graph_util.import_graph_def(graph_def, dict(zip(feeds, values, strict=True)), list(names), name="")

    specs = [tf.TensorSpec(t.shape, t.dtype) for t in concrete.graph.inputs]
    values = tf.compat.v1.wrap_function(body, specs)(*inputs, *concrete.captured_inputs)
    return [v.numpy() for v in values]


def tags(concrete: Any) -> dict[str, dict[str, Any]]:
    """The quantisers in a concrete function's body: node name -> tag."""
    tag_of = {}
    for op in concrete.graph.get_operations():
        if TAG in op.node_def.attr:
            tag_of[op.name] = json.loads(op.node_def.attr[TAG].s)
    return tag_of


def concrete(function: Any) -> Any:
    """The only concrete function of a loaded function."""
    (only,) = function.concrete_functions
    return only


def batch_norm_kernels(call: Callable[[], Any]) -> collections.Counter[str]:
    """Count the executed kernels that contain batch norm, after Grappler, by op."""
    context.context().enable_graph_collection()
    context.context().enable_run_metadata()
    try:
        call()
        metadata = context.context().export_run_metadata()
    finally:
        context.context().disable_graph_collection()
        context.context().disable_run_metadata()
    kernels: collections.Counter[str] = collections.Counter()
    for graphs in metadata.function_graphs:
        for graph in graphs.partition_graphs:
            for node in graph.node:
                fused = node.attr["fused_ops"].list.s if "fused_ops" in node.attr else ()
                if "FusedBatchNorm" in node.op or b"FusedBatchNorm" in fused:
                    kernels[node.op] += 1
    return kernels


def digest(directory: Path) -> dict[str, str]:
    """Hash of every file below a directory."""
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }
