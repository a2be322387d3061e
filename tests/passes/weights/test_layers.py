"""Layers of weights: whether a batch norm follows, so that a learned range is a fraction of the weights' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

import bnqat
from passes.weights.layers import weight_layers
from rewriter.savedmodel.read import load
from tests.models import FusedBatchNorm, mobilenet_short, save_keras


class Net(tf.Module):
    """A convolution with a batch norm; another function returns what `other` computes from the convolution."""

    def __init__(self, between: Any, other: Any) -> None:
        super().__init__()
        self.kernel = tf.Variable(tf.random.stateless_normal([3, 3, 3, 4], [1, 2]), name="kernel")
        self.norm = FusedBatchNorm(4)
        self.between, self.other = between, other

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.norm(self.between(tf.nn.conv2d(x, self.kernel, 1, "SAME")), training=False)

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], name="x")])
    def features(self, x: tf.Tensor) -> tf.Tensor:
        return self.other(tf.nn.conv2d(x, self.kernel, 1, "SAME"))


def biased(y: tf.Tensor) -> tf.Tensor:
    return tf.nn.bias_add(y, tf.ones([4]))


def test_layer_functions_of_a_keras_save_do_not_hide_the_batch_norm(tmp_path: Path) -> None:
    """Each layer has functions of its own, which return a convolution; only the whole net's show what follows."""
    source, target = save_keras(mobilenet_short(), tmp_path / "source"), tmp_path / "target"
    layers = weight_layers(load(source)).layers
    normalized = {layer.name: layer.normalized for layer in layers}
    assert len(normalized) == 10
    assert [name for name, value in normalized.items() if not value] == ["dense/kernel"]
    options: dict[str, Any] = {"bits": {"weight": 3}, "range": {"weight": "learned"}}
    bnqat.rewrite(
        source, target, scheme=dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), "none"), **options
    )
    limits = tf.saved_model.load(str(target)).quantization.limit.weight.numpy()
    fractions = limits[:-10]  # the last ten are those of the matrix
    assert ((fractions * 40).round() == (fractions * 40).round(4)).all()
    assert fractions.max() <= 1


@pytest.mark.parametrize(
    ("between", "other", "normalized"),
    [(biased, biased, True), (tf.nn.relu, biased, False), (biased, tf.nn.relu, False)],
    ids=["batch norm", "activation before it", "activation elsewhere"],
)
def test_batch_norm_follows_wherever_the_result_is_used(
    between: Any, other: Any, normalized: bool, tmp_path: Path
) -> None:
    """A function that only returns the result, with a bias added, does not count."""
    net = Net(between, other)
    tf.saved_model.save(net, str(tmp_path / "net"), signatures={"serving_default": net.serve, "f": net.features})
    (layer,) = weight_layers(load(tmp_path / "net")).layers
    assert layer.normalized == normalized
