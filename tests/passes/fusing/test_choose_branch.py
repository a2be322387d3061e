"""Tests of the graph's text before and after; tests/test_fused_v1.py and tests/test_fused_gates.py test its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf

from passes.fusing.choose_branch import ChooseBranch
from rewriter.ir import MAIN, Graph, Model
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests.models.v1 import EPSILON, save_v1, two_fused, v1, variables
from tests.passes.singles import line_of

SHOWN = ("FusedBatchNormV3", "Merge", "Switch", "StatelessIf")


def lines(graph: Graph) -> list[str]:
    """Return the first layer's kernels and choices as text, without attributes."""
    nodes = [n for n in graph.nodes.values() if n.op in SHOWN and (n.name.startswith("norm_0") or graph.name)]
    return [line_of(node).replace("norm_0/", "") for node in nodes]


def chosen(before: Model) -> Model:
    after, (step,) = Pipeline([ChooseBranch()]).run(before)
    assert not step.skipped
    again, _ = Pipeline([ChooseBranch()]).run(after)
    assert again is after
    return after


def test_what_a_kernel_takes_is_switched_and_its_statistics_are_merged(tmp_path: Path) -> None:
    before = load(save_v1(tmp_path / "m", two_fused))
    trained, inferred, *rest = lines(before.graphs[MAIN])
    assert trained == "FusedBatchNormV3 = FusedBatchNormV3(Conv2D, ReadVariableOp, ReadVariableOp_1, Const, Const_1)"
    assert inferred == (
        "FusedBatchNormV3_1 = FusedBatchNormV3(Conv2D, ReadVariableOp_6, ReadVariableOp_7, "
        "FusedBatchNormV3_1/ReadVariableOp, FusedBatchNormV3_1/ReadVariableOp_1)"
    )
    after = lines(chosen(before).graphs[MAIN])
    assert after[:2] == [
        "FusedBatchNormV3 = FusedBatchNormV3(FusedBatchNormV3/Switch:1, FusedBatchNormV3/Switch_1:1, "
        "FusedBatchNormV3/Switch_2:1, Const, Const_1)",
        "FusedBatchNormV3_1 = FusedBatchNormV3(FusedBatchNormV3_1/Switch, FusedBatchNormV3_1/Switch_1, "
        "FusedBatchNormV3_1/Switch_2, FusedBatchNormV3_1/Switch_3, FusedBatchNormV3_1/Switch_4)",
    ]
    assert after[2 : 2 + len(rest)] == rest
    assert after[2 + len(rest) :] == [
        "FusedBatchNormV3/Switch = Switch(Conv2D, is_training)",
        "FusedBatchNormV3/Switch_1 = Switch(ReadVariableOp, is_training)",
        "FusedBatchNormV3/Switch_2 = Switch(ReadVariableOp_1, is_training)",
        "FusedBatchNormV3/Merge = Merge(FusedBatchNormV3:1, FusedBatchNormV3/Reshape)",
        "FusedBatchNormV3/Merge_1 = Merge(FusedBatchNormV3:2, FusedBatchNormV3/Mul)",
        "FusedBatchNormV3_1/Switch = Switch(Conv2D, is_training)",
        "FusedBatchNormV3_1/Switch_1 = Switch(ReadVariableOp_6, is_training)",
        "FusedBatchNormV3_1/Switch_2 = Switch(ReadVariableOp_7, is_training)",
        "FusedBatchNormV3_1/Switch_3 = Switch(FusedBatchNormV3_1/ReadVariableOp, is_training)",
        "FusedBatchNormV3_1/Switch_4 = Switch(FusedBatchNormV3_1/ReadVariableOp_1, is_training)",
    ]


def without_updates(x: tf.Tensor, training: Any) -> tf.Tensor:
    gamma, beta, moving_mean, moving_variance = variables(x.shape[-1])
    trained, *_ = v1.nn.fused_batch_norm(x, gamma, beta, epsilon=EPSILON, is_training=True)
    moving = {"mean": moving_mean, "variance": moving_variance}
    inferred, *_ = v1.nn.fused_batch_norm(x, gamma, beta, **moving, epsilon=EPSILON, is_training=False)
    return v1.cond(training, lambda: tf.identity(trained), lambda: tf.identity(inferred))


def test_a_kernel_that_one_branch_uses_is_computed_there(tmp_path: Path) -> None:
    before = load(save_v1(tmp_path / "m", without_updates, control_flow_v2=True))
    assert lines(before.graphs[MAIN])[2:] == ["cond = StatelessIf(is_training, FusedBatchNormV3, FusedBatchNormV3_1)"]
    after = chosen(before)
    assert lines(after.graphs[MAIN]) == [
        "cond = StatelessIf(is_training, Conv2D, Conv2D, Conv2D, FusedBatchNormV3_1/ReadVariableOp, "
        "FusedBatchNormV3_1/ReadVariableOp_1, ReadVariableOp, ReadVariableOp_1, ReadVariableOp_2, ReadVariableOp_3)"
    ]
    node = after.graphs[MAIN].nodes["norm_0/cond"]
    for key, training in (("then_branch", True), ("else_branch", False)):
        (kernel,) = (n for n in after.graphs[node.attrs[key].func.name].nodes.values() if n.op == "FusedBatchNormV3")
        assert ("is_training" not in kernel.attrs or kernel.attrs["is_training"].b) == training
