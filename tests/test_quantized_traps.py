"""Former defects: combined options, layers that are used twice, dtypes, gradients inside the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests import harness
from tests.models import Net, Trainable, save_module
from tests.models.chosen import CHOSEN_MODELS
from tests.models.forms import IMAGE, VECTOR, Form, Variables, library, mixed, save
from tests.ports import assert_equal, ports
from tests.test_v1 import batch, session_of

Paths = Callable[..., Path]
X = harness.images((None, 8, 8, 3))
STATISTICS = ("moving_mean", "moving_variance")


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": {"gamma": "stochastic"}},
        {"rounding": {"beta": "stochastic"}, "range": {"gamma": "ema"}},
        {"rounding": {"gamma": "stochastic"}, "range": "ema"},
        {"rounding": {"beta": "stochastic"}, "range": {"gamma": "learned"}},
        {"range": "ema", "range_momentum": {"gamma": 0.9, "beta": 0.90000001}},
        {"range": {"gamma": "ema"}, "narrow_range": {"gamma": True}, "scheme": {"beta": "symmetric"}},
    ],
)
def test_options_that_differ_by_role(options: dict[str, Any], rewritten: Paths) -> None:
    loaded = tf.saved_model.load(str(rewritten("module_train", bits=4, **options)))
    for function in (loaded.serve, loaded.quantization.train):
        for port in ports(harness.concrete(function), [X]):
            assert_equal(port, 1e-3)


def test_the_noise_of_quantizers_has_nothing_in_common(rewritten: Paths) -> None:
    loaded = tf.saved_model.load(str(rewritten("module_train", bits=3, rounding="stochastic")))
    all_ports = ports(harness.concrete(loaded.quantization.train), [X])
    numbers = np.concatenate([p.noise for p in all_ports if p.noise is not None])
    assert len(numbers) > 50
    assert len(np.unique(numbers)) == len(numbers)


class OwnStep(Net):
    """Model that trains itself: the gradient and the weights' update are in the function."""

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), name="x")])
    def train(self, x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            y = self.call(x, training=True)
            loss = tf.reduce_sum(y**2)
        for kernel, gradient in zip(self.kernels, tape.gradient(loss, self.kernels), strict=True):
            kernel.assign_sub(1e-4 * gradient)
        return y


def test_statistics_are_not_frozen_where_the_graph_holds_gradients(tmp_path: Path) -> None:
    source = save_module(OwnStep(), tmp_path / "m")
    with pytest.raises(bnqat.Error, match="holds its own gradients"):
        bnqat.rewrite(source, tmp_path / "out", freeze_step=3)
    bnqat.rewrite(source, tmp_path / "out")


def test_statistics_of_another_dtype_are_frozen(tmp_path: Path) -> None:
    half = Form(library, VECTOR, dtype=tf.float16, train=True)
    half.layers = [Variables(VECTOR[-1], dtype=tf.float16) for _ in half.layers]
    for name, form, fuse in (("mixed", Form(mixed, IMAGE, train=True), False), ("half", half, True)):
        bnqat.rewrite(save(form, tmp_path / name), tmp_path / f"{name}_out", freeze_step=1, fuse=fuse)
        loaded = tf.saved_model.load(str(tmp_path / f"{name}_out"))
        train = loaded.quantization.train
        spec = harness.concrete(train).inputs[0]
        x = tf.cast(harness.images(spec.shape), spec.dtype)
        for step in range(3):
            same = np.allclose(train(x), loaded.serve(x), rtol=1e-2, atol=1e-3)
            assert same or step == 0


def test_statistics_are_frozen_in_all_sites_or_none(tmp_path: Path) -> None:
    with pytest.raises(bnqat.Error, match="it chooses its mode while it runs"):
        bnqat.rewrite(
            CHOSEN_MODELS["chosen_moments_inside"](tmp_path / "m"), tmp_path / "out", freeze_step=3, fuse=False
        )


def test_gamma_is_trained_in_the_second_phase_too(rewritten: Paths) -> None:
    """Gamma's range moves and its rounding is stochastic; the averages' ranges stay."""
    options: dict[str, Any] = {"range": "ema", "range_momentum": 0.5, "rounding": "stochastic"}
    loaded = tf.saved_model.load(str(rewritten("module_train", freeze_step=0, **options)))
    ranges = loaded.quantization.range
    before = {role: getattr(ranges, role).numpy() for role in ("gamma", *STATISTICS)}
    for norm in loaded.norms:
        norm.gamma.assign(10 * norm.gamma)
    outputs = [loaded.quantization.train(X).numpy() for _ in range(12)]
    np.testing.assert_allclose(ranges.gamma, 10 * before["gamma"], rtol=1e-2)
    for role in STATISTICS:
        np.testing.assert_array_equal(getattr(ranges, role), before[role])
    assert not np.array_equal(outputs[-1], outputs[-2])


def test_ranges_do_not_follow_what_is_trained_twice_in_a_step(model: Paths, tmp_path: Path) -> None:
    """The order of two updates of one range would be chance."""
    for name in ("module_shared", "form_shared"):
        with pytest.raises(bnqat.NothingToRewriteError, match="an ema range cannot follow"):
            bnqat.rewrite(model(name), tmp_path / "out", range="ema")


def test_stored_averages_of_a_layer_used_twice(model: Paths, tmp_path: Path) -> None:
    """Switched off, both updates count, as in the source."""
    limits = {"moving_mean": [-8, 8], "moving_variance": [0, 64]}
    bnqat.rewrite(model("form_shared"), tmp_path / "s", quantize_average="stored", range=limits, start_step=2**40)
    bnqat.rewrite(model("form_shared"), tmp_path / "n", quantize_average="none", start_step=2**40)
    stored, plain = (tf.saved_model.load(str(tmp_path / name)) for name in "sn")
    x = harness.images(harness.concrete(plain.quantization.train).inputs[0].shape)
    for _ in range(3):
        for loaded in (stored, plain):
            loaded.quantization.train(x)
    averages = [
        {v.name: v.numpy() for v in loaded.quantization.variables if v.name.startswith(("moving", "v/moving"))}
        for loaded in (stored, plain)
    ]
    assert averages[0].keys() == averages[1].keys()
    for name, value in averages[0].items():
        np.testing.assert_allclose(value, averages[1][name], rtol=1e-6)


V1_WITH_COPIES = ["v1_updated_first", "v1_layers_fused", "v1_layers_fused_if", "v1_layers_plain_references"]


@pytest.mark.parametrize("name", V1_WITH_COPIES)
def test_ranges_move_with_the_copy_that_trains(name: str, rewritten: Any) -> None:
    """The main graph holds the source's training and a copy of it."""
    with session_of(rewritten(name, range={"beta": "ema"}, range_momentum=0.5, bits=4)) as (session, meta):
        train = meta.signature_def["train"]
        fed = {t.name: np.zeros([], bool) if k != "x" else batch(0)[0] for k, t in train.inputs.items()}
        variables = {v.op.name: v for v in tf.compat.v1.global_variables()}
        ranges = variables["quantization/range/beta"]
        session.run(ranges.assign(np.full(ranges.shape, 7, np.float32)))
        session.run([t.name for t in train.outputs.values()], fed)
        limits = session.run(ranges)
        assert (limits != 7).all(1).any()


def test_a_pipeline_that_is_off_lets_no_gradient_through(tmp_path: Path) -> None:
    net = Trainable()
    beta: Any = net.norms[0].beta
    beta.assign(tf.zeros_like(beta))

    def power(v: Any, context: Any) -> Any:  # noqa: ARG001
        return tf.where(v == 0, 0.0, tf.sign(v) * tf.exp(tf.math.log(tf.abs(v))))

    bnqat.rewrite(save_module(net, tmp_path / "m"), tmp_path / "out", quantizer={"beta": power}, start_step=1000)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    source = tf.saved_model.load(str(tmp_path / "m"))
    gradients = []
    for train, norms in ((loaded.quantization.train, loaded.norms), (source.train, source.norms)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(train(X) ** 2)
        gradients.append(tape.gradient(loss, norms[0].beta))
    np.testing.assert_array_equal(*gradients)


def test_a_second_rewrite_adds_no_layers(model: Paths, tmp_path: Path) -> None:
    rules = [{"match": "batch_norm_1", "scheme": "none"}]
    bnqat.rewrite(model("module"), tmp_path / "first", config={"rules": rules})
    with pytest.raises(bnqat.Error, match="rewrite the float model to quantise more"):
        bnqat.rewrite(tmp_path / "first", tmp_path / "second", bits=2)
    with pytest.raises(bnqat.Error, match="quantised already"):
        bnqat.rewrite(tmp_path / "first", tmp_path / "second", passes=["freeze-statistics"], freeze_step=1)


@pytest.mark.parametrize("name", ["form_shared", "form_update_debiased"])
def test_averages_that_are_no_single_update_are_not_estimated(name: str, rewritten: Paths) -> None:
    loaded = tf.saved_model.load(str(rewritten(name)))
    x = harness.images(harness.concrete(loaded.quantization.train).inputs[0].shape)
    with pytest.raises(bnqat.Error, match="batches' statistics cannot be told apart"):
        bnqat.reestimate_statistics(loaded, [x], 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"range_momentum": 0.5}, "range_momentum has no effect, as no range is 'ema'"),
        ({"config": {"rules": [{"match": "", "range_momentum": 0.5}]}}, "rules.0.gamma.range_momentum has no effect"),
        ({"quantizer": abs, "scheme": "symmetric"}, "so scheme has no effect"),
        ({"quantizer": abs, "rounding": {"gamma": "stochastic"}}, "so rounding has no effect"),
        ({"range": [3, 1]}, "the first limit is less than the second"),
        ({"passes": ["quantize"], "freeze_step": 3}, "freeze_step is an option of freeze-statistics"),
        ({"passes": ["freeze-statistics"], "bits": 3}, "is an option of quantize"),
    ],
)
def test_options_without_effect_are_refused(options: Any, match: str, model: Paths, tmp_path: Path) -> None:
    with pytest.raises(bnqat.Error, match=match):
        bnqat.rewrite(model("module_train"), tmp_path / "out", **options)


def test_a_rules_range_keeps_the_momentum_of_the_defaults(model: Paths, tmp_path: Path) -> None:
    config = {
        "defaults": {"gamma": {"range": "ema", "range_momentum": 0.25}},
        "rules": [{"match": "batch_norm_1", "gamma": {"range": "ema"}}],
    }
    bnqat.rewrite(model("module_train"), tmp_path / "out", config=config)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    before = loaded.quantization.range.gamma.numpy()
    for norm in loaded.norms:
        norm.gamma.assign(2 * norm.gamma)
    loaded.quantization.train(X)
    np.testing.assert_allclose(loaded.quantization.range.gamma, before * (0.25 + 2 * 0.75), rtol=1e-6)
