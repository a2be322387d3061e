from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from passes.control_flow.settle_choices import SettleChoices
from passes.deploy.inline_decided_calls import InlineDecidedCalls
from rewriter.pipeline import Pipeline, Step
from tests.passes.layered import SHAPE, Layered, computing, saved, serving


class Moded(Layered):
    """A net whose batch norm is in a function that takes its mode, called by way of another function."""

    def __init__(self, mode: Any) -> None:
        super().__init__()
        norm = tf.function(
            lambda x, training: tf.cond(
                training, lambda: self.norm(x, training=True), lambda: self.norm(x, training=False)
            )
        )
        self.mode = mode
        self._functions["layer"] = tf.function(lambda x, training: norm(x * 1.0, training))

    @tf.function(input_signature=[tf.TensorSpec(SHAPE, name="x")])
    def serve(self, x: Any) -> Any:
        """Convolve, normalise in the mode, double."""
        y: Any = tf.nn.conv2d(x, self.kernel, 1, "SAME")
        return self._functions["double"](self._functions["layer"](y, tf.convert_to_tensor(self.mode)))


def test_a_constant_mode_comes_to_the_choice_through_calls(tmp_path: Path) -> None:
    model = saved(tmp_path / "m", Moded(mode=False))
    runs: list[Step] = []
    while not runs or runs[-1].edits:
        model, (step,) = Pipeline([InlineDecidedCalls()]).run(model)
        runs.append(step)
    assert [bool(step.edits) for step in runs] == [True, True, False]
    ops = sorted(line.split(" = ")[1].split("(")[0] for line in computing(serving(model)))
    assert ops == ["Conv2D", "If", "Mul", "PartitionedCall"]  # `double` holds no batch norm, so its call stays
    settled, _ = Pipeline([SettleChoices()]).run(model)
    nodes = [node for node in serving(settled).nodes.values() if node.op == "FusedBatchNormV3"]
    assert [node.attrs["is_training"].b for node in nodes] == [False]
    assert not [node for node in serving(settled).nodes.values() if node.op == "If"]


@pytest.mark.parametrize("mode", [True, "variable", None])
def test_calls_that_decide_no_training_are_left(mode: Any, tmp_path: Path) -> None:
    """A variable decides nothing while the graph stands still, and a function without a mode takes no constant."""
    if mode is True:  # the constant belongs to a function that cannot train
        module: Any = Layered()
        layer = module._functions["layer"]
        chosen = tf.function(lambda x, flag: tf.cond(flag, lambda: layer(x), lambda: x))
        module._functions["layer"] = lambda x: chosen(x, tf.constant(value=True))
    else:
        module = Moded(tf.Variable(initial_value=False)) if mode == "variable" else Layered()
    before = saved(tmp_path / "m", module)
    after, _ = Pipeline([InlineDecidedCalls()]).run(before)
    assert after is before
