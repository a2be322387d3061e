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
    return [average.assign(average * DECAY + new * (1 - DECAY)) for average, new in pairs]


def updated_first(m: One, x: tf.Tensor) -> tf.Tensor:
    """The normalising statistics are read after the averages are updated."""
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


def its_end_waits(m: One, x: tf.Tensor) -> tf.Tensor:
    """Only the last of the single ops waits for the averages."""
    v, (mean, variance) = m.layers[0], moments(x)
    beta, scaled = tf.convert_to_tensor(v.beta), (x - mean) * (tf.math.rsqrt(variance + EPSILON) * v.gamma)
    with tf.control_dependencies(averaged(v, mean, variance)):
        return scaled + beta


def each_waits_for_the_other(m: One, x: tf.Tensor) -> tf.Tensor:
    """Two batch norms, each of which waits for the averages of the other."""
    (v, w), z = m.layers, tf.nn.relu(x)
    first, second = moments(x), moments(z)
    updates = averaged(v, *first), averaged(w, *second)
    with tf.control_dependencies(updates[1]):
        y = norm(x, v, *first)
    with tf.control_dependencies(updates[0]):
        return y + norm(z, w, *second)


def one_after_the_other(m: One, x: tf.Tensor) -> tf.Tensor:
    """The first batch norm has neither gamma nor beta, so it looks like the beginning of the second."""
    (v, w), (mean, variance) = m.layers, moments(x)
    y = (x - mean) * tf.math.rsqrt(variance + EPSILON)
    averaged(v, mean, variance)
    return norm(y, w, *moving(w))


def updated_in_few_digits(m: One, x: tf.Tensor) -> tf.Tensor:
    """The averages take the batch's statistics rounded to bfloat16."""
    v, (mean, variance) = m.layers[0], moments(x)
    averaged(v, *(tf.cast(tf.cast(s, tf.bfloat16), tf.float32) for s in (mean, variance)))
    return norm(x, v, mean, variance)


def penalty_by_another_conditional(m: One, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Another conditional of the same boolean differentiates the batch's variance."""
    v, pair, many = m.layers[0], moments(x), tf.shape(x)[0] > 1
    chosen = tf.cond(many, lambda: pair, lambda: moving(v))
    return norm(x, v, *chosen), tf.cond(many, lambda: tf.reduce_sum(tf.square(pair[1])), lambda: 0.0)


def two_conditionals(m: One, x: tf.Tensor) -> tf.Tensor:
    """Mean and variance are chosen apart, and TensorFlow lets each branch wait for its read."""
    v, many, (mean, variance) = m.layers[0], tf.shape(x)[0] > 1, moments(x)
    chosen = tf.cond(many, lambda: mean, v.moving_mean.read_value)
    return norm(x, v, chosen, tf.cond(many, lambda: variance, v.moving_variance.read_value))


def moments_in_more_digits(m: One, x: tf.Tensor) -> tf.Tensor:
    v, wide = m.layers[0], tf.cast(x, tf.float64)
    mean, variance = (tf.cast(s, tf.float32) for s in moments(wide))
    averaged(v, mean, variance)
    return norm(x, v, mean, variance)


FUSED = (two_conditionals, moments_in_more_digits)


@pytest.mark.parametrize("body", FUSED)
def test_what_only_looks_different_is_fused(body: Body, tmp_path: Path) -> None:
    module = One(body)
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    report = bnqat.rewrite(tmp_path / "m", tmp_path / "f", passes=FUSING)
    assert (report.sites_found, report.sites_fused, report.declined) == (1, 1, [])


BODIES = (
    *FUSED,
    penalty_by_another_conditional,
    its_end_waits,
    each_waits_for_the_other,
    one_after_the_other,
    updated_in_few_digits,
    updated_first,
    flag_changes,
    one_choice_for_two,
    average_in_the_loss,
    penalty_in_the_branch,
    mask,
)


def seen(module: Any, x: tf.Tensor) -> list[np.ndarray]:
    """Return outputs, gradients of x and all trained variables, and all variables afterwards."""
    trained = [p for v in module.layers for p in (v.gamma, v.beta)]
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = tf.nest.flatten(module.serve(x))
        # A random weighting: batch norm in training would cancel the gradient of squares up to float rounding.
        loss = sum(tf.reduce_sum(y * tf.random.stateless_normal(tf.shape(y), (1, 2))) for y in outputs)
    gradients = tape.gradient(loss, [x, *trained], unconnected_gradients="zero")
    averages = [s for v in module.layers for s in (v.moving_mean, v.moving_variance)]
    tensors = [*outputs, *gradients, *averages, tf.cast(module.flag, tf.float32)]
    return [t.numpy() for t in tensors]


@pytest.mark.parametrize("body", BODIES)
def test_values_gradients_and_variables_are_the_sources(body: Body, tmp_path: Path) -> None:
    module = One(body)
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    bnqat.rewrite(tmp_path / "m", tmp_path / "f", passes=FUSING)
    loaded = tf.saved_model.load(str(tmp_path / "f"))
    for index in range(4):
        assert difference(seen(loaded, batch(index, IMAGE)), seen(module, batch(index, IMAGE))) < TOLERANCE


def test_batch_norms_one_after_the_other_are_two(tmp_path: Path) -> None:
    module = One(one_after_the_other)
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    report = bnqat.rewrite(tmp_path / "m", tmp_path / "f", passes=FUSING)
    assert (report.sites_found, report.sites_fused, report.declined) == (2, 2, [])


def _rounded(value: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return tf.cast(tf.cast(value, dtype), tf.float32)


def few_digits_of_gamma(m: One, x: tf.Tensor) -> tf.Tensor:
    v = m.layers[0]
    return tf.nn.batch_normalization(x, *moving(v), v.beta, _rounded(v.gamma, tf.int8), EPSILON)


def few_digits_of_the_mean(m: One, x: tf.Tensor) -> tf.Tensor:
    v, (mean, variance) = m.layers[0], moments(x)
    averaged(v, mean, variance)
    return norm(x, v, _rounded(mean, tf.bfloat16), variance)


def few_digits_inside(m: One, x: tf.Tensor) -> tf.Tensor:
    v = m.layers[0]
    normalised = (x - v.moving_mean) * tf.math.rsqrt(v.moving_variance + EPSILON)
    return _rounded(normalised, tf.bfloat16) * v.gamma + v.beta


def statistics_of_few_digits(m: One, x: tf.Tensor) -> tf.Tensor:
    v, (mean, variance) = m.layers[0], moments(_rounded(x, tf.bfloat16))
    averaged(v, mean, variance)
    return norm(x, v, mean, variance)


def statistics_of_more_digits(m: One, x: tf.Tensor) -> tf.Tensor:
    v, half = m.layers[0], tf.float16
    mean, variance = moments(x)
    averaged(v, mean, variance)
    parameters = (tf.cast(p, half) for p in (mean, variance, v.beta, v.gamma))
    return tf.cast(tf.nn.batch_normalization(tf.cast(x, half), *parameters, EPSILON), tf.float32)


def one_statistic_in_the_branch(m: One, x: tf.Tensor) -> tf.Tensor:
    v, mean = m.layers[0], tf.reduce_mean(x, [0, 1, 2])
    chosen = tf.cond(
        m.flag, lambda: (mean, tf.reduce_mean(tf.math.squared_difference(x, mean), [0, 1, 2])), lambda: moving(v)
    )
    return norm(x, v, *chosen)


def chosen_twice(m: One, x: tf.Tensor) -> tf.Tensor:
    v = m.layers[0]
    many = tf.shape(x)[0] > 1
    chosen = tf.cond(m.flag, lambda: tf.cond(many, lambda: moments(x), lambda: moving(v)), lambda: moving(v))
    return norm(x, v, *chosen)


def moments_of_the_branch(m: One, x: tf.Tensor) -> tf.Tensor:
    v = m.layers[0]
    return norm(x, v, *tf.cond(m.flag, lambda: moments(tf.square(x)), lambda: moving(v)))


DECLINED: dict[Body, str] = {
    moments_of_the_branch: "its statistics are those of cond/Square, which a branch of cond computes",
    waits_for_its_choice: "waits for cond",
    few_digits_of_gamma: "rounds to int8, which the kernel does not",
    few_digits_of_the_mean: "rounds to bfloat16, which the kernel does not",
    few_digits_inside: "rounds to bfloat16, which the kernel does not",
    statistics_of_few_digits: "casts x to bfloat16, but not both for its statistics and to normalise it",
    statistics_of_more_digits: "casts x to float16, but not both for its statistics and to normalise it",
    one_statistic_in_the_branch: "one of its mean and its variance is computed in a branch of cond, the other not",
    chosen_twice: "one of the choices is not the batch's in a known form",
}


@pytest.mark.parametrize("body", DECLINED)
def test_what_the_kernel_does_not_compute_is_declined(body: Body, tmp_path: Path) -> None:
    module = One(body)
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    with pytest.raises(bnqat.NothingToRewriteError, match=DECLINED[body]):
        bnqat.rewrite(tmp_path / "m", tmp_path / "f", passes=["fuse-batch-norm"])


def test_statistics_of_a_caller_keep_their_gradient(tmp_path: Path) -> None:
    """A function that the model calls with its moving statistics can be called with others too."""
    module = One(lambda m, x: m.apply(x, m.layers[0].moving_mean, m.layers[0].moving_variance))
    specs = [tf.TensorSpec((None, *IMAGE)), tf.TensorSpec((6,)), tf.TensorSpec((6,))]
    module.apply = tf.function(lambda x, mean, variance: norm(x, module.layers[0], mean, variance), specs)
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    with pytest.raises(bnqat.NothingToRewriteError, match="moving mean may come from a caller"):
        bnqat.rewrite(tmp_path / "m", tmp_path / "f", passes=FUSING)


def tutorial(x: tf.Tensor, training: Any) -> tf.Tensor:  # noqa: ARG001
    """The classic form of TensorFlow 1: the normalisation has the updates as control inputs."""
    gamma, beta, moving_mean, moving_variance = variables(x.shape[-1])
    mean, variance = tf.nn.moments(x, [0, 1, 2])
    updates = [
        v1.assign(average, average * DECAY + new * (1 - DECAY))
        for average, new in ((moving_mean, mean), (moving_variance, variance))
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
        x_tensor, logits = (session.graph.get_tensor_by_name(f"{name}:0") for name in ("x", "logits"))
        gradients = v1.gradients(v1.reduce_sum(logits**2), v1.trainable_variables())
        values = session.run([logits, *gradients], {x_tensor: x})
        for _ in range(times):
            session.run(logits, {x_tensor: x})
        return [*values, *session.run(v1.global_variables())]


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
                flags = [v for v in v1.global_variables() if v.op.name.endswith("flag")]
                assert len([*modes, *flags]) == 1
                for flag in flags:
                    flag.load(bool(mode), session)
                logits.append(session.run("logits:0", fed))
        assert difference(logits[1:], logits[:1]) < TOLERANCE
