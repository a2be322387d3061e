"""Models in which fusing carelessly loses an update, a gradient or an order; each was found by breaking it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests.models.chosen import _moments as moments
from tests.models.chosen import _moving as moving
from tests.models.chosen import _update
from tests.models.forms import IMAGE, Variables, assign_sub
from tests.models.v1 import DECAY, EPSILON, Norm, by_hand, save_v1, two_fused, v1, variables
from tests.test_fused import FUSING, TOLERANCE, batch, difference
from tests.test_fused_v1 import CANCELLED
from tests.test_v1 import session_of

Body = Callable[[Any, tf.Tensor], Any]


class One(tf.Module):
    """Two layers' variables, a flag, and a function of x."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.layers = [Variables(6), Variables(6)]
        self.flag = tf.Variable(initial_value=True, trainable=False)
        self.serve = tf.function(lambda x: body(self, x), input_signature=[tf.TensorSpec((None, *IMAGE), name="x")])


def norm(x: tf.Tensor, v: Variables, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
    return tf.nn.batch_normalization(x, mean, variance, v.beta, v.gamma, EPSILON)


def averaged(v: Variables, mean: tf.Tensor, variance: tf.Tensor) -> list[Any]:
    pairs = ((v.moving_mean, mean), (v.moving_variance, variance))
    return [held.assign(held * DECAY + new * (1 - DECAY)) for held, new in pairs]


def updated_first(m: One, x: tf.Tensor) -> tf.Tensor:
    """What normalises is read after the averages are updated."""
    mean, variance = moments(x)
    with tf.control_dependencies(averaged(m.layers[0], mean, variance)):
        return norm(x, m.layers[0], mean, variance)


def waits_for_its_choice(m: One, x: tf.Tensor) -> tf.Tensor:
    """Gamma is read after something that needs the conditional."""
    mean, variance = tf.cond(m.flag, lambda: moments(x), lambda: moving(m.layers[0]))
    with tf.control_dependencies([mean]):
        return norm(x, m.layers[0], mean, variance)


def flag_changes(m: One, x: tf.Tensor) -> tf.Tensor:
    """Two conditionals read one variable, which is assigned between them."""
    (v, _), pair = m.layers, moments(x)
    chosen = tf.cond(m.flag, lambda: pair, lambda: moving(v))
    m.flag.assign(tf.logical_not(m.flag))
    tf.cond(m.flag, lambda: _update(v, *pair), lambda: tf.constant(0))
    return norm(x, v, *chosen)


def one_choice_for_two(m: One, x: tf.Tensor) -> tf.Tensor:
    """One conditional gives the statistics of two batch norms."""
    (v, w), z = m.layers, tf.nn.relu(x)
    chosen = tf.cond(m.flag, lambda: (*moments(x), *moments(z)), lambda: (*moving(v), *moving(w)))
    return norm(x, v, *chosen[:2]) + norm(z, w, *chosen[2:])


def average_in_the_loss(m: One, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The new average is returned too, and differentiated."""
    (v, _), (mean, variance) = m.layers, moments(x)
    new = v.moving_mean * DECAY + mean * (1 - DECAY)
    v.moving_mean.assign(new)
    v.moving_variance.assign(v.moving_variance * DECAY + variance * (1 - DECAY))
    return norm(x, v, mean, variance), new


def penalty_in_the_branch(m: One, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The branch for training returns something else that is computed from the statistics."""
    v = m.layers[0]

    def train() -> Any:
        mean, variance = moments(x)
        assign_sub(v, mean, variance)
        return mean, variance, tf.reduce_sum(tf.square(mean)) + tf.reduce_sum(variance)

    mean, variance, penalty = tf.cond(m.flag, train, lambda: (*moving(v), tf.constant(0.0)))
    return norm(x, v, mean, variance), penalty


def mask(m: One, x: tf.Tensor) -> tf.Tensor:
    """A Select on a boolean that is no mode."""
    return tf.where(x > 0, norm(x, m.layers[0], *moving(m.layers[0])), 0.0)


BODIES = (
    updated_first,
    flag_changes,
    one_choice_for_two,
    average_in_the_loss,
    penalty_in_the_branch,
    mask,
)


def seen(module: Any, x: tf.Tensor) -> list[np.ndarray]:
    """Outputs, gradients of x and of all that is trained, and all variables afterwards."""
    trained = [p for v in module.layers for p in (v.gamma, v.beta)]
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = tf.nest.flatten(module.serve(x))
        # Not of squares, whose gradient a batch norm in training would cancel but for rounding.
        loss = sum(tf.reduce_sum(y * tf.random.stateless_normal(tf.shape(y), (1, 2))) for y in outputs)
    gradients = tape.gradient(loss, [x, *trained], unconnected_gradients="zero")
    held = [s for v in module.layers for s in (v.moving_mean, v.moving_variance)]
    found = [*outputs, *gradients, *held, tf.cast(module.flag, tf.float32)]
    return [t.numpy() + 1e-30 for t in found]


@pytest.mark.parametrize("body", BODIES)
def test_values_gradients_and_variables_are_the_sources(body: Body, tmp_path: Path) -> None:
    module = One(body)
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    bnqat.rewrite(tmp_path / "m", tmp_path / "f", passes=FUSING)
    loaded = tf.saved_model.load(str(tmp_path / "f"))
    for index in range(4):
        assert difference(seen(loaded, batch(index, IMAGE)), seen(module, batch(index, IMAGE))) < TOLERANCE


def test_what_would_wait_for_itself_is_declined(tmp_path: Path) -> None:
    module = One(waits_for_its_choice)
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    with pytest.raises(bnqat.NothingToRewriteError, match="waits for cond"):
        bnqat.rewrite(tmp_path / "m", tmp_path / "f", passes=FUSING)


def tutorial(x: tf.Tensor, training: Any) -> tf.Tensor:  # noqa: ARG001
    """TensorFlow 1's classic: updates as control dependencies of what normalises."""
    gamma, beta, moving_mean, moving_variance = variables(x.shape[-1])
    mean, variance = tf.nn.moments(x, [0, 1, 2])
    updates = [
        v1.assign(held, held * DECAY + new * (1 - DECAY))
        for held, new in ((moving_mean, mean), (moving_variance, variance))
    ]
    with tf.control_dependencies(updates):
        return v1.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)


def guarded(x: tf.Tensor, training: Any) -> tf.Tensor:  # noqa: ARG001
    """An assertion that fails, on which only constants of the batch norm wait."""
    gamma, beta, moving_mean, moving_variance = variables(x.shape[-1])
    with tf.control_dependencies([v1.assert_greater(tf.reduce_max(x), 1e6)]):
        return v1.nn.batch_normalization(x, moving_mean, moving_variance, beta, gamma, EPSILON)


def run(path: Path, times: int = 2) -> list[np.ndarray]:
    """Logits, gradients, and all variables after several runs of the logits."""
    x = np.random.default_rng(0).normal(0.3, 1.5, (6, 8, 8, 3)).astype("float32")
    with session_of(path) as (session, _):
        given, logits = (session.graph.get_tensor_by_name(f"{name}:0") for name in ("x", "logits"))
        gradients = v1.gradients(v1.reduce_sum(logits**2), v1.trainable_variables())
        found = session.run([logits, *gradients], {given: x})
        for _ in range(times):
            session.run(logits, {given: x})
        return [*found, *session.run(v1.global_variables())]


@pytest.mark.parametrize("references", [False, True])
def test_an_update_that_something_waits_for_still_runs(references: bool, tmp_path: Path) -> None:
    source = save_v1(tmp_path / "m", tutorial, training=True, references=references)
    report = bnqat.rewrite(source, tmp_path / "f", passes=FUSING)
    assert report.sites_fused == 2
    assert difference(run(tmp_path / "f"), run(source)) < CANCELLED


@pytest.mark.parametrize("references", [False, True])
def test_an_assertion_that_something_waits_for_still_fails(references: bool, tmp_path: Path) -> None:
    source = save_v1(tmp_path / "m", guarded, training=False, references=references)
    bnqat.rewrite(source, tmp_path / "f", passes=FUSING)
    for path in (source, tmp_path / "f"):
        with pytest.raises(tf.errors.InvalidArgumentError, match="assertion failed"):
            run(path)


PREDICATES: dict[str, Callable[[], Any]] = {
    "integer": lambda: tf.cast(v1.placeholder(tf.int32, [], name="mode"), tf.bool),
    "vector": lambda: tf.reshape(v1.placeholder(tf.bool, [1], name="mode"), []),
    "variable": lambda: v1.get_variable(
        "flag", [], tf.bool, initializer=v1.ones_initializer(), trainable=False, use_resource=True
    ),
}


@pytest.mark.parametrize("predicate", PREDICATES)
@pytest.mark.parametrize("form", [by_hand, two_fused])
def test_a_predicate_is_used_as_it_is_computed(predicate: str, form: Norm, tmp_path: Path) -> None:
    made: list[Any] = []

    def chosen(x: tf.Tensor, training: Any) -> tf.Tensor:  # noqa: ARG001
        if not made:
            with v1.variable_scope("", reuse=v1.AUTO_REUSE):
                made.append(PREDICATES[predicate]())
        return form(x, made[0])

    source = save_v1(tmp_path / "m", chosen, training="default")
    bnqat.rewrite(source, tmp_path / "f", passes=FUSING)
    x = np.random.default_rng(0).normal(0.3, 1.5, (6, 8, 8, 3)).astype("float32")
    for mode in (1, 0):
        logits = []
        for path in (source, tmp_path / "f"):
            with session_of(path) as (session, _):
                modes = [op.outputs[0] for op in session.graph.get_operations() if op.name.endswith("/mode")]
                fed: dict[Any, Any] = {"x:0": x} | {m: np.reshape(mode, m.shape) for m in modes}
                logits.append(session.run("logits:0", fed))
        assert difference(logits[1:], logits[:1]) < TOLERANCE
