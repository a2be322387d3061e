"""Tests of the graph's text before and after; tests/test_fused_v1.py tests its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from passes.fusing.select_to_branch import SelectToBranch
from rewriter.ir import MAIN, Graph, Model
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests.models.forms import EPSILON, IMAGE, Variables
from tests.models.v1 import save_v1, selected, two_fused_selected, v1, variables
from tests.passes.singles import line_of

SHOWN = ("SelectV2", "Switch", "Merge", "StatelessIf")


def lines(graph: Graph) -> list[str]:
    """Return the first layer's choices as text, without attributes."""
    nodes = [n for n in graph.nodes.values() if n.op in SHOWN and not n.name.startswith("norm_1")]
    return [line_of(node).replace("norm_0/", "") for node in nodes]


def branched(before: Model) -> Model:
    after, _ = Pipeline([SelectToBranch()]).run(before)
    again, _ = Pipeline([SelectToBranch()]).run(after)
    assert again is after
    return after


def test_chosen_statistics_are_switched_and_merged_in_a_main_graph(tmp_path: Path) -> None:
    before = load(save_v1(tmp_path / "m", selected, training="placeholder"))
    assert lines(before.graphs[MAIN]) == [
        "SelectV2 = SelectV2(is_training, moments/Squeeze, SelectV2/ReadVariableOp)",
        "SelectV2_1 = SelectV2(is_training, moments/Squeeze_1, SelectV2_1/ReadVariableOp)",
    ]
    assert lines(branched(before).graphs[MAIN]) == [
        "SelectV2 = Merge(SelectV2/Switch, SelectV2/Switch_1:1)",
        "SelectV2_1 = Merge(SelectV2_1/Switch, SelectV2_1/Switch_1:1)",
        "SelectV2/Switch = Switch(SelectV2/ReadVariableOp, is_training)",
        "SelectV2/Switch_1 = Switch(moments/Squeeze, is_training)",
        "SelectV2_1/Switch = Switch(SelectV2_1/ReadVariableOp, is_training)",
        "SelectV2_1/Switch_1 = Switch(moments/Squeeze_1, is_training)",
    ]


def test_chosen_outputs_are_switched_and_merged_in_a_main_graph(tmp_path: Path) -> None:
    before = load(save_v1(tmp_path / "m", two_fused_selected, training="placeholder"))
    assert lines(before.graphs[MAIN]) == ["SelectV2 = SelectV2(is_training, FusedBatchNormV3, FusedBatchNormV3_1)"]
    assert lines(branched(before).graphs[MAIN]) == [
        "SelectV2 = Merge(SelectV2/Switch, SelectV2/Switch_1:1)",
        "SelectV2/Switch = Switch(FusedBatchNormV3_1, is_training)",
        "SelectV2/Switch_1 = Switch(FusedBatchNormV3, is_training)",
    ]


class Read(tf.Module):
    """A batch norm whose mode is read from a variable."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Variables(IMAGE[-1])
        self.training = tf.Variable(False, trainable=False, name="training")

    @tf.function(input_signature=[tf.TensorSpec((None, *IMAGE), name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        layer, batch = self.layer, tf.nn.moments(x, [0, 1, 2])
        moving = (layer.moving_mean, layer.moving_variance)
        mean, variance = (tf.where(self.training, b, m) for b, m in zip(batch, moving, strict=True))
        return tf.nn.batch_normalization(x, mean, variance, layer.beta, layer.gamma, EPSILON)


def test_a_function_has_a_conditional_with_branches_of_its_own(tmp_path: Path) -> None:
    module = Read()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    before = load(tmp_path / "m")
    (name,) = (name for name, graph in before.graphs.items() if "SelectV2" in graph.nodes)
    after = branched(before)
    assert lines(after.graphs[name]) == [
        line.replace("SelectV2(", "StatelessIf(") for line in lines(before.graphs[name])
    ]
    for node in (after.graphs[name].nodes["SelectV2"], after.graphs[name].nodes["SelectV2_1"]):
        passed = [after.graphs[node.attrs[key].func.name] for key in ("then_branch", "else_branch")]
        returned = [graph.nodes[graph.results[0].value.node].inputs[0].node for graph in passed]
        assert returned == list(passed[0].arguments)


def by_element(training: Any, batch: Any, moving: Any) -> Any:
    return tf.where(tf.logical_and(training, batch > -1e9), batch, moving)


def broadcast(training: Any, batch: Any, moving: Any) -> Any:
    return tf.where(training, batch[tf.newaxis], moving)


@pytest.mark.parametrize("choose", [by_element, broadcast])
def test_a_choice_by_element_or_of_two_shapes_stays(choose: Any, tmp_path: Path) -> None:
    def norm(x: tf.Tensor, training: Any) -> tf.Tensor:
        gamma, beta, *moving = variables(x.shape[-1])
        batch = tf.nn.moments(x, [0, 1, 2])
        mean, variance = (choose(training, b, m) for b, m in zip(batch, moving, strict=True))
        y: tf.Tensor = v1.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)
        return y

    before = load(save_v1(tmp_path / "m", norm, training="placeholder"))
    assert branched(before) is before
