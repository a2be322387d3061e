"""Folding keeps the codes of weights that are quantised per channel: the scales take up gamma / sigma."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from rewriter.savedmodel.read import load
from tests.models import FusedBatchNorm, perturb
from tests.weight_reference import quantize_weight

F = np.float32
AXES = {"conv2d": (-1,), "depthwise_conv2d": (-2, -1)}
GAMMA = np.array([0.7, -1.3, 0, 1.1, -0.01, 40], F)
SHAPES = {"conv2d": (3, 3, 3, 6), "depthwise_conv2d": (3, 3, 3, 2)}


class Normalized(tf.Module):
    """A convolution and a batch norm, some of whose gammas are negative, and one zero."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.kernel = tf.Variable(rng.normal(0, 0.3, SHAPES[kind]).astype(F), name="kernel")
        self.norm = FusedBatchNorm(6)
        perturb((self.norm.beta, self.norm.moving_mean, self.norm.moving_variance))
        self.norm.gamma = tf.Variable(GAMMA, name="gamma")
        self.kind = kind

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), name="x")])
    def serve(self, x: Any) -> Any:
        strides = 1 if self.kind == "conv2d" else [1, 1, 1, 1]
        return self.norm(getattr(tf.nn, self.kind)(x, self.kernel, strides, "SAME"), training=False)


def stored(path: Path) -> dict[str, np.ndarray]:
    model = load(path)
    return {v.name: np.asarray(model.value_of(key)) for key, v in model.variables.items()}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_folded_filter_has_the_codes_of_the_weight(kind: str, bits: int, tmp_path: Path) -> None:
    module = Normalized(kind)
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    bnqat.rewrite(tmp_path / "m", tmp_path / "q", bits={"weight": bits}, scheme={"batch_norm": "none"})
    bnqat.finalize(tmp_path / "q", tmp_path / "plain", params=tmp_path / "p.npz")
    bnqat.finalize(tmp_path / "q", tmp_path / "folded", fold=True)
    weight = quantize_weight("symmetric", module.kernel.numpy(), bits, AXES[kind])
    plain, folded = stored(tmp_path / "plain"), stored(tmp_path / "folded")
    np.testing.assert_array_equal(plain["kernel"], weight.value)
    with np.load(tmp_path / "p.npz") as parameters:
        np.testing.assert_array_equal(parameters["kernel.codes"], weight.codes)
        assert parameters["kernel.codes"].dtype == np.int8
        np.testing.assert_array_equal(parameters["kernel.scale"].ravel(), weight.scale.ravel())
    assert "gamma" not in folded
    sign = np.sign(GAMMA).astype(int).reshape(weight.scale.shape)
    again = quantize_weight("symmetric", folded["kernel"], bits, AXES[kind])
    np.testing.assert_array_equal(again.codes, weight.codes * sign)
    assert set(np.unique(sign)) == {-1, 0, 1}
    assert not folded["kernel"][np.broadcast_to(sign == 0, folded["kernel"].shape)].any()
