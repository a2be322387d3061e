"""Signatures whose keys are the names of tensors, as ``dense/Softmax:0``, which no node may be called."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

import bnqat
from rewriter.draft import Draft
from rewriter.ir import MAIN, Graph, Node
from rewriter.savedmodel.read import load
from tests.models.forms import IMAGE

OUTPUT = "dense/Softmax:0"
NODE = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*")
"""TensorFlow's names of nodes (``tensorflow/python/framework/ops.py``)."""


def given(seed: int) -> dict[str, tf.Tensor]:
    """Random inputs of the model of TensorFlow 1, in inference mode."""
    x = np.random.default_rng(seed).normal(size=(4, 8, 8, 3))
    return {"x:0": tf.constant(x, tf.float32), "is_training:0": tf.constant(value=False)}


def checked(source: Path, target: Path) -> Any:
    """Rewrite a model, check the result by verify and diff, and return it loaded."""
    bnqat.rewrite(source, target, bits=4)
    verified = bnqat.verify(source, target)
    assert verified.ok, verified.claims
    assert bnqat.diff(source, target).report.other == []
    written = load(target)
    assert all(OUTPUT in signature.outputs for signature in written.signatures.values())
    assert all(NODE.fullmatch(node) for graph in written.graphs.values() for node in graph.nodes)
    return tf.saved_model.load(str(target))


def test_of_tensorflow_1(model: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = checked(model("v1_tensor_names"), tmp_path / "target")
    serve, train = loaded.signatures["serving_default"], loaded.signatures["train"]
    moving = [v for v in loaded.variables if "moving" in v.name and "quantization" not in v.name]
    before = [v.numpy() for v in moving]
    for seed in range(3):
        assert OUTPUT in train(**given(seed))
    assert len(moving) == 4
    assert all(np.any(v.numpy() != old) for v, old in zip(moving, before, strict=True))

    # TensorFlow 2 saves no function with an argument x:0.
    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], name="x")])
    def again(x: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs: dict[str, tf.Tensor] = serve(**{**given(0), "x:0": x})
        return outputs

    tf.saved_model.save(loaded, str(tmp_path / "tuned"), signatures={"serving_default": again})
    bnqat.finalize(tmp_path / "tuned", tmp_path / "final")
    final = tf.saved_model.load(str(tmp_path / "final")).signatures["serving_default"]
    tuned, x = serve(**given(9))[OUTPUT], given(9)["x:0"]
    np.testing.assert_allclose(final(x=x)[OUTPUT], tuned, rtol=0, atol=2e-7)  # kernels may be merged


def test_of_tensorflow_2(model: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = checked(model("tensor_names"), tmp_path / "target")
    serve = loaded.signatures["serving_default"]
    x = tf.constant(np.random.default_rng(0).normal(size=(4, *IMAGE)), tf.float32)
    before = serve(x=x)[OUTPUT].numpy()
    assert sorted(loaded.quantization.train(x)) == [OUTPUT, "dense/Softmax:1"]
    tuned = serve(x=x)[OUTPUT]
    assert np.any(tuned != before)
    tf.saved_model.save(loaded, str(tmp_path / "tuned"), signatures={"serving_default": serve})
    bnqat.finalize(tmp_path / "tuned", tmp_path / "final")
    final = tf.saved_model.load(str(tmp_path / "final")).signatures["serving_default"]
    np.testing.assert_array_equal(final(x=x)[OUTPUT], tuned)


def test_names_that_are_minted_are_names_of_nodes() -> None:
    draft = Draft(Graph(MAIN, {"a_b": Node("a_b", "NoOp")}), entry=True)
    assert draft.mint("train/outputs/dense/Softmax:0/Identity") == "train/outputs/dense/Softmax_0/Identity"
    assert [draft.mint("a:b"), draft.mint("a b"), draft.mint("größe")] == ["a_b_1", "a_b_2", "gr__e"]
