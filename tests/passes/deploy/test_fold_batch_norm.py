from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from passes.deploy.fold_batch_norm import FoldBatchNorm
from rewriter.pipeline import Pipeline
from tests.models import FusedBatchNorm, perturb
from tests.passes.layered import SHAPE, computing, saved, serving


class Folded(tf.Module):
    """A convolution and a batch norm in one function; optionally it uses the filters again."""

    def __init__(self, *, again: bool = False) -> None:
        super().__init__()
        kernel = np.random.default_rng(0).normal(0, 0.3, (1, 1, 3, 6))
        self.kernel = tf.Variable(kernel.astype(np.float32), name="kernel")
        self.norm = FusedBatchNorm(6)
        perturb((self.norm.gamma, self.norm.beta, self.norm.moving_mean, self.norm.moving_variance))
        self.again = again

    @tf.function(input_signature=[tf.TensorSpec(SHAPE, name="x")])
    def serve(self, x: Any) -> Any:
        y = self.norm(tf.nn.conv2d(x, self.kernel, 1, "SAME"), training=False)
        return tf.add(y, tf.reduce_sum(self.kernel)) if self.again else y


def test_filters_are_scaled_and_beta_becomes_a_bias(tmp_path: Path) -> None:
    module = Folded()
    before = saved(tmp_path / "m", module)
    after, (step,) = Pipeline([FoldBatchNorm()]).run(before)
    assert step.skipped == ()
    read = "FusedBatchNormV3/ReadVariableOp"
    assert computing(serving(before)) == [
        "Conv2D = Conv2D(x, Conv2D/ReadVariableOp)",
        f"FusedBatchNormV3 = FusedBatchNormV3(Conv2D, {read}, {read}_1, {read}_2, {read}_3)",
    ]
    convolution, bias = computing(serving(after))
    assert convolution == "Conv2D = Conv2D(x, Conv2D/ReadVariableOp)"
    assert bias.endswith(f"= BiasAdd(Conv2D, {read}_1)")
    values = {v.name: after.value_of(key) for key, v in after.variables.items()}
    assert values.keys() == {"kernel", "beta"}
    gamma, beta, mean, variance = (
        np.asarray(v, np.float64)
        for v in (module.norm.gamma, module.norm.beta, module.norm.moving_mean, module.norm.moving_variance)
    )
    scale = gamma / np.sqrt(variance + 1e-3)
    np.testing.assert_array_equal(values["kernel"], (module.kernel.numpy() * scale).astype(np.float32))
    np.testing.assert_array_equal(values["beta"], (beta - mean * scale).astype(np.float32))


def test_filters_that_something_else_uses_stay(tmp_path: Path) -> None:
    before = saved(tmp_path / "m", Folded(again=True))
    after, (step,) = Pipeline([FoldBatchNorm()]).run(before)
    assert after is before
    (skipped,) = step.skipped
    assert skipped.reason == "the convolution's filters, or the variable for its bias, are used elsewhere as well"
