"""Tests of the graph's text before and after; tests/test_fused_v1.py tests its results."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from passes.fusing.merge_choices import MergeChoices
from rewriter.ir import MAIN, Graph, Model
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests.models.v1 import EPSILON, Options, layers, save_v1, settings, v1, variables, write
from tests.passes.singles import line_of


def merged(before: Model) -> tuple[Model, list[str]]:
    after, (step,) = Pipeline([MergeChoices()]).run(before)
    return after, [skip.reason for skip in step.skipped]


def lines(graph: Graph, prefix: str) -> list[str]:
    """Return the conditionals and their users as text, without attributes."""
    nodes = [n for n in graph.nodes.values() if n.name.startswith(prefix)]
    shown = [n for n in nodes if n.op == "If" or any(graph.nodes[v.node].op == "If" for v in n.inputs)]
    return [line_of(node).replace(prefix, "") for node in shown]


def test_the_conditional_of_the_variance_chooses_the_mean_too(tmp_path: Path) -> None:
    before = load(save_v1(tmp_path / "m", layers(fused=False), control_flow_v2=True))
    prefix = "norm_0/batch_normalization/"
    assert lines(before.graphs[MAIN], prefix)[:4] == [
        "cond = If(is_training, moments/Squeeze, moving_mean)",
        "cond/Identity = Identity(cond)",
        "cond_1 = If(is_training, moments/Squeeze_1, moving_variance)",
        "cond_1/Identity = Identity(cond_1)",
    ]
    after, reasons = merged(before)
    assert reasons == []
    assert lines(after.graphs[MAIN], prefix)[:3] == [
        "cond/Identity = Identity(cond_1:1)",
        "cond_1 = If(is_training, moments/Squeeze_1, moving_variance, moments/Squeeze, moving_mean)",
        "cond_1/Identity = Identity(cond_1)",
    ]
    node = after.graphs[MAIN].nodes[f"{prefix}cond_1"]
    then, otherwise = (after.graphs[node.attrs[key].func.name] for key in ("then_branch", "else_branch"))
    assert then.results[1].value.node == then.arguments[2]
    read = otherwise.nodes[otherwise.results[1].value.node]
    assert (read.op, read.inputs[0].node) == ("ReadVariableOp", otherwise.arguments[3])
    again, _ = merged(after)
    assert again is after


def norm_with(second: Any) -> Any:
    """A batch norm whose variance is chosen by a second conditional."""

    def norm(x: Any, training: Any) -> Any:
        gamma, beta, moving_mean, moving_variance = variables(x.shape[-1])
        batch = tf.nn.moments(x, [0, 1, 2])
        mean = v1.cond(training, lambda: batch[0], lambda: tf.identity(moving_mean))
        variance = second(training, batch[1], moving_variance, mean)
        return v1.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)

    return norm


def other_boolean(training: Any, batch: Any, moving: Any, mean: Any) -> Any:  # noqa: ARG001
    return v1.cond(tf.logical_or(training, False), lambda: batch, lambda: tf.identity(moving))


def after_the_first(training: Any, batch: Any, moving: Any, mean: Any) -> Any:
    return v1.cond(training, lambda: batch + 0.0 * mean, lambda: tf.identity(moving))


REFUSED = {
    other_boolean: "which choose its statistics, do not choose by the same boolean",
    after_the_first: "which choose its statistics, run one after the other",
}


@pytest.mark.parametrize("second", REFUSED)
def test_what_is_not_chosen_alike_stays(second: Any, tmp_path: Path) -> None:
    before = load(save_v1(tmp_path / "m", norm_with(second), control_flow_v2=True))
    after, reasons = merged(before)
    assert after is before
    assert all(reason.endswith(REFUSED[second]) for reason in reasons)
    assert len(reasons) == 2


def updating_with(beside: Any = tf.shape, used: bool = False) -> Any:
    """A batch norm whose statistics are chosen by two conditionals, each of which updates its average."""

    def norm(x: Any, training: Any) -> Any:
        gamma, beta, *moving = variables(x.shape[-1])
        batch = tf.nn.moments(x, [0, 1, 2])

        def updated(index: int) -> Any:
            beside(batch[index])
            with tf.control_dependencies([v1.assign_sub(moving[index], 0.1 * (moving[index] - batch[index]))]):
                return [tf.identity(batch[index]), *([tf.reduce_sum(batch[index])] if used else [])]

        def held(index: int) -> Any:
            return [tf.identity(moving[index]), *([tf.constant(0.0)] if used else [])]

        (mean, *more), (variance, *_) = (v1.cond(training, partial(updated, i), partial(held, i), True) for i in (0, 1))
        return sum(more, v1.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON))

    return norm


def test_updates_move_with_the_mean(tmp_path: Path) -> None:
    before = load(save_v1(tmp_path / "m", updating_with(), control_flow_v2=True))
    after, reasons = merged(before)
    assert reasons == []
    conditionals = [n for n in after.graphs[MAIN].nodes.values() if n.op == "If"]
    assert [node.name for node in conditionals] == ["norm_0/cond_1", "norm_1/cond_1"]
    for node in conditionals:
        then, otherwise = (after.graphs[node.attrs[key].func.name] for key in ("then_branch", "else_branch"))
        updates = {n.name for n in then.nodes.values() if n.op == "AssignSubVariableOp"}
        assert len(updates) == 2
        (mean,) = (then.nodes[r.value.node] for r in then.results[1:])
        assert set(mean.after) < updates
        assert not any("Assign" in n.op for n in otherwise.nodes.values())


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (updating_with(lambda batch: v1.Print(batch, [batch])), "(Print)"),
        (
            updating_with(used=True),
            "norm_0/cond, which updates an average, gives more than its mean",
        ),
    ],
)
def test_an_effect_that_would_be_lost_or_had_twice(norm: Any, reason: str, tmp_path: Path) -> None:
    before = load(save_v1(tmp_path / "m", norm, control_flow_v2=True))
    after, reasons = merged(before)
    assert after is before
    assert len(reasons) == 2
    assert reasons[0].endswith(reason)


def test_two_pairs_that_wait_for_each_other_are_not_both_merged(tmp_path: Path) -> None:
    with settings(Options(control_flow_v2=True)):
        x, p = v1.placeholder(tf.float32, [None, 4, 4, 6], name="x"), v1.placeholder(tf.bool, [], name="p")
        layer_variables = [variables_of(name) for name in ("a", "b")]
        batch = tf.nn.moments(x, [0, 1, 2])

        def chosen(which: int, layer: int, after: Any = None) -> Any:
            with tf.control_dependencies([] if after is None else [after]):
                statistic = tf.identity(batch[which])
            return v1.cond(p, lambda: statistic, lambda: tf.identity(layer_variables[layer][2 + which]))

        mean_a, variance_b = chosen(0, 0), chosen(1, 1)
        mean_b, variance_a = chosen(0, 1, mean_a), chosen(1, 0, variance_b)
        pairs = ((mean_a, variance_a), (mean_b, variance_b))
        y = sum(
            v1.nn.batch_normalization(x, *pair, v[1], v[0], EPSILON)
            for pair, v in zip(pairs, layer_variables, strict=True)
        )
        write(tmp_path / "m", {"x": x, "p": p}, {"y": y})
    after, reasons = merged(load(tmp_path / "m"))
    assert len(reasons) == 1
    assert reasons[0].endswith("which choose its statistics, run one after the other")
    assert sum(n.op in ("If", "StatelessIf") for n in after.graphs[MAIN].nodes.values()) == 3


def variables_of(scope: str) -> Any:
    with v1.variable_scope(scope):
        return variables(6)
