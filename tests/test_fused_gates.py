"""TensorFlow 1's graphs in which a batch norm, its statistics and their consumers run under different conditions.

Outputs, and variables after each update has been run by itself, are the source's for either value of the condition.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests.models.v1 import DECAY, EPSILON, Options, settings, v1, variables, write
from tests.test_fused import FUSING, TOLERANCE, difference
from tests.test_v1 import session_of

Graph = Callable[[Any, Any], dict[str, Any]]
"""Outputs of x and a condition."""


def moments(x: Any) -> Any:
    return tf.nn.moments(x, [0, 1, 2])


def norm(x: Any, mean: Any, variance: Any, gamma: Any, beta: Any) -> Any:
    return v1.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)


def update(*pairs: tuple[Any, Any]) -> None:
    for average, new in pairs:
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, v1.assign(average, average * DECAY + new * (1 - DECAY)))


def switched(value: Any, p: Any, port: int) -> Any:
    return tf.raw_ops.Switch(data=tf.identity(value), pred=p)[port]


def kernels(x: Any) -> Any:
    """Kernels of both modes; the batch's statistics are averaged."""
    gamma, beta, moving_mean, moving_variance = variables(6)
    trained, mean, variance = v1.nn.fused_batch_norm(x, gamma, beta, epsilon=EPSILON, is_training=True)
    moving = {"mean": moving_mean, "variance": moving_variance}
    inferred, *_ = v1.nn.fused_batch_norm(x, gamma, beta, **moving, epsilon=EPSILON, is_training=False)
    update((moving_mean, mean), (moving_variance, variance))
    return trained, inferred


def norms_in_branches(x: Any, p: Any) -> dict[str, Any]:
    """The statistics are computed and averaged outside of the branches that normalise."""
    gamma, beta, moving_mean, moving_variance = variables(6)
    mean, variance = moments(x)
    update((moving_mean, mean), (moving_variance, variance))
    train = lambda: norm(x, mean, variance, gamma, beta)  # noqa: E731  as people write it
    return {"y": v1.cond(p, train, lambda: norm(x, moving_mean, moving_variance, gamma, beta))}


def statistics_switched(x: Any, p: Any) -> dict[str, Any]:
    """Only the statistics pass a Switch, and x does not."""
    gamma, beta, moving_mean, moving_variance = variables(6)
    mean, variance = moments(x)
    trained = norm(x, switched(mean, p, 1), switched(variance, p, 1), gamma, beta)
    inferred = norm(x, switched(moving_mean, p, 0), switched(moving_variance, p, 0), gamma, beta)
    update((moving_mean, mean), (moving_variance, variance))
    return {"y": tf.raw_ops.Merge(inputs=[inferred, trained])[0]}


def update_switched(x: Any, p: Any) -> dict[str, Any]:
    """An update runs or not as the statistic that it takes passes a Switch."""
    gamma, beta, moving_mean, moving_variance = variables(6)
    mean, variance = moments(x)
    update((moving_mean, switched(mean, p, 1)), (moving_variance, switched(variance, p, 1)))
    return {"y": norm(x, mean, variance, gamma, beta)}


def conditions_of_one_op(x: Any, p: Any) -> dict[str, Any]:
    """Two outputs of one op choose the statistics and gate their averaging."""
    gamma, beta, moving_mean, moving_variance = variables(6)
    chooses, averages = tf.unstack(tf.stack([p, tf.logical_not(p)]))
    batch = moments(x)
    moving = (moving_mean, moving_variance)
    mean, variance = v1.cond(chooses, lambda: batch, lambda: tuple(tf.identity(m) for m in moving))

    def average() -> Any:
        with tf.control_dependencies(
            [v1.assign(m, m * DECAY + b * (1 - DECAY)) for m, b in zip(moving, batch, strict=True)]
        ):
            return tf.constant(1)

    v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, v1.cond(averages, average, lambda: tf.constant(0)))
    return {"y": norm(x, mean, variance, gamma, beta)}


def statistics_before_a_loop(x: Any, p: Any) -> dict[str, Any]:
    """A while loop normalises with statistics that are computed and averaged outside of it."""
    gamma, beta, moving_mean, moving_variance = variables(6)
    mean, variance = moments(x)
    update((moving_mean, mean), (moving_variance, variance))
    rounds = tf.where(p, 3, 1)
    body = lambda i, a: (i + 1, a + norm(x, mean, variance, gamma, beta))  # noqa: E731  as people write it
    return {"y": v1.while_loop(lambda i, _: i < rounds, body, (tf.constant(0), tf.zeros_like(x)))[1]}


def another_output(x: Any, p: Any) -> dict[str, Any]:
    """The output of the training kernel is the model's output in either mode."""
    trained, inferred = kernels(x)
    return {"y": v1.cond(p, lambda: tf.nn.relu(trained), lambda: tf.nn.relu(inferred)), "z": tf.reduce_mean(trained)}


def a_summary(x: Any, p: Any) -> dict[str, Any]:
    """A collection holds what is computed from the kernel's output."""
    trained, inferred = kernels(x)
    v1.summary.scalar("trained", tf.reduce_mean(trained))
    return {"y": v1.cond(p, lambda: tf.nn.relu(trained), lambda: tf.nn.relu(inferred))}


def a_counter_after(x: Any, p: Any) -> dict[str, Any]:
    """A counter waits for the kernel."""
    trained, inferred = kernels(x)
    count = v1.get_variable("count", [], initializer=v1.zeros_initializer(), trainable=False)
    with tf.control_dependencies([trained]):
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, v1.assign_add(count, 1.0))
    return {"y": v1.cond(p, lambda: tf.nn.relu(trained), lambda: tf.nn.relu(inferred))}


def a_counter_before(x: Any, p: Any) -> dict[str, Any]:
    """The op after the kernel waits for a counter."""
    trained, inferred = kernels(x)
    count = v1.get_variable("count", [], initializer=v1.zeros_initializer(), trainable=False)
    with tf.control_dependencies([v1.assign_add(count, 1.0)]):
        inferred = tf.identity(inferred)
    return {"y": v1.cond(p, lambda: tf.nn.relu(trained), lambda: tf.nn.relu(inferred))}


SWITCHED = "its statistics are there only if p is True, and x always"
USED = " uses it whatever the mode is"
WITHOUT = "its averages are updated before cond chooses, or without it"
OUTSIDE = "its mean or its variance comes from outside of the function that normalises with it"
GRAPHS: dict[Graph, tuple[tuple[int, str], tuple[int, str]]] = {
    norms_in_branches: ((2, ""), (1, OUTSIDE)),
    statistics_switched: ((1, SWITCHED), (1, SWITCHED)),
    update_switched: ((1, ""), (1, "")),
    conditions_of_one_op: ((1, ""), (1, "")),
    statistics_before_a_loop: ((1, ""), (0, "holds no batch norm")),
    another_output: ((0, USED), (0, USED)),
    a_summary: ((0, USED), (0, USED)),
    a_counter_after: ((0, USED), (0, USED)),
    a_counter_before: ((0, ""), (0, WITHOUT)),
}
"""How many sites are fused, and how the reason ends with which one is left: with Switch and Merge, and with If and
While, in whose body a batch norm is not found whose statistics are computed outside."""


def run(path: Path, condition: bool) -> list[np.ndarray]:
    """Outputs, summaries, and all variables after each update."""
    x = np.random.default_rng(0).normal(0.3, 1.5, (5, 4, 4, 6)).astype("float32")
    with session_of(path) as (session, meta):
        feed = {"x:0": x, "p:0": condition}
        outputs = meta.signature_def["serving_default"].outputs
        values = session.run([outputs[name].name for name in sorted(outputs)], feed)
        summaries = [session.run(s, feed) for s in v1.get_collection(v1.GraphKeys.SUMMARIES)]
        for update_op in v1.get_collection(v1.GraphKeys.UPDATE_OPS):
            # Fetching an update that a Switch stops would fail, so its op is run instead.
            session.run(update_op.op if isinstance(update_op, tf.Tensor) else update_op, feed)
        variable_values = session.run(v1.global_variables())
    return [*values, *(np.array(len(s), np.float32) for s in summaries), *variable_values]


@pytest.mark.parametrize("control_flow_v2", [False, True])
@pytest.mark.parametrize("graph", GRAPHS)
def test_each_condition_computes_and_updates_what_it_did(graph: Graph, control_flow_v2: bool, tmp_path: Path) -> None:
    with settings(Options(control_flow_v2=control_flow_v2)):
        x, p = v1.placeholder(tf.float32, [None, 4, 4, 6], name="x"), v1.placeholder(tf.bool, [], name="p")
        write(tmp_path / "m", {"x": x, "p": p}, graph(x, p))
    fused, reason = GRAPHS[graph][control_flow_v2]
    if (graph, control_flow_v2) == (statistics_before_a_loop, True):
        with pytest.raises(bnqat.NothingToRewriteError, match=reason):
            bnqat.rewrite(tmp_path / "m", tmp_path / "f", passes=FUSING)
        return
    report = bnqat.rewrite(tmp_path / "m", tmp_path / "f", passes=FUSING)
    assert report.sites_fused == fused
    assert all(reason and declined.reason.endswith(reason) for declined in report.declined)
    assert bool(report.declined) == bool(reason)
    for condition in (True, False):
        assert difference(run(tmp_path / "f", condition), run(tmp_path / "m", condition)) < TOLERANCE


@pytest.mark.parametrize("fuse", [False, True])
def test_a_batch_norm_in_a_branch_is_trained_with_statistics_from_outside(fuse: bool, tmp_path: Path) -> None:
    with settings(Options(control_flow_v2=True)):
        x, p = v1.placeholder(tf.float32, [None, 4, 4, 6], name="x"), v1.placeholder(tf.bool, [], name="p")
        write(tmp_path / "m", {"x": x, "p": p}, norms_in_branches(x, p))
    report = bnqat.rewrite(tmp_path / "m", tmp_path / "q", fuse=fuse, start_step=1, bits=2)
    assert (report.sites_found, report.sites_rewritten) == (2, 2)
    expected = run(tmp_path / "m", condition=True)
    with session_of(tmp_path / "q") as (session, meta):
        feed = {"x:0": np.random.default_rng(0).normal(0.3, 1.5, (5, 4, 4, 6)).astype("float32"), "p:0": False}
        output = meta.signature_def["train"].outputs["y"].name
        y = session.run(output, feed)
        by_name = {v.op.name: v for v in v1.global_variables()}
        moving = session.run([by_name["moving_mean"], by_name["moving_variance"]])
        quantised = session.run(output, feed)
    assert difference([y, *moving], [expected[0], *expected[-2:]]) < TOLERANCE
    assert difference([quantised], [y]) > 0.01


@pytest.mark.parametrize("references", [False, True])
def test_updates_that_only_the_choice_of_statistics_waits_for_still_run(references: bool, tmp_path: Path) -> None:
    """In no collection: they run because `tf.where`, which chooses mean and variance, waits for them."""
    with settings(Options(references=references)):
        x, p = v1.placeholder(tf.float32, [None, 4, 4, 6], name="x"), v1.placeholder(tf.bool, [], name="p")
        gamma, beta, *moving = variables(6)
        batch = moments(x)
        updates = [
            v1.cond(p, lambda a=a, b=b: v1.assign(a, a * DECAY + b * (1 - DECAY)), lambda a=a: tf.identity(a))
            for a, b in zip(moving, batch, strict=True)
        ]
        with tf.control_dependencies(updates):
            mean, variance = (tf.where(p, b, a) for a, b in zip(moving, batch, strict=True))
        write(tmp_path / "m", {"x": x, "p": p}, {"y": norm(x, mean, variance, gamma, beta)})
    report = bnqat.rewrite(tmp_path / "m", tmp_path / "f", start_step=2**40)
    assert report.sites_fused == 1
    for condition in (True, False):
        before, after = (run(tmp_path / name, condition) for name in ("m", "f"))
        assert difference(after[: len(before)], before) < TOLERANCE
    moved = run(tmp_path / "f", condition=True)[3:5]
    assert all(not np.allclose(average, start, atol=0.01) for average, start in zip(moved, (0.0, 1.0), strict=True))
