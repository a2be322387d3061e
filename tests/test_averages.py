"""Quantisation of the moving averages' updates: of the statistic, or of the stored average."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests import harness
from tests.models import FusedBatchNorm, save_module
from tests.ports import ports

Paths = Callable[..., Path]
STATISTICS = ("moving_mean", "moving_variance")
MEANS = np.array([0.98, -0.6, 0.31], np.float32)


class OneNorm(tf.Module):
    """A single batch norm of momentum 0.99, whose averages are far from the statistics of its training data."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = FusedBatchNorm(3, factor=0.01)

    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 3), name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.norm(x, training=False)

    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 3), name="x")])
    def train(self, x: tf.Tensor) -> tf.Tensor:
        return self.norm(x, training=True)


def trained(tmp_path: Path, steps: int, **options: Any) -> np.ndarray:
    """Return the moving mean after some steps on one batch with the means `MEANS`, at 8 bits from -1 to 1."""
    source = save_module(OneNorm(), tmp_path / "m")
    bnqat.rewrite(source, tmp_path / "out", range={"moving_mean": [-1, 1], "moving_variance": [0, 4]}, **options)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    x = np.random.default_rng(0).normal(0, 1, (64, 4, 4, 3)).astype(np.float32)
    x = tf.constant(x - x.mean((0, 1, 2)) + MEANS)
    for _ in range(steps):
        loaded.quantization.train(x)
    mean: np.ndarray = loaded.norm.moving_mean.numpy()
    return mean


def test_rounding_a_stored_average_to_nearest_stalls_it(tmp_path: Path) -> None:
    """The average stalls where 0.01 of the distance is less than half of a quantisation step, 2 / 255."""
    mean = trained(tmp_path, 1500, quantize_average="stored")
    dead_zone = 2 / 255 / 2 / 0.01
    assert (np.abs(mean - MEANS) > 0.25).any()
    assert (np.abs(mean - MEANS) <= dead_zone * 1.05).all()


def test_stochastic_rounding_of_a_stored_average_gets_there(tmp_path: Path) -> None:
    """The average then varies by a few quantisation steps around the mean."""
    mean = trained(tmp_path, 1500, quantize_average="stored", rounding="stochastic")
    np.testing.assert_allclose(mean, MEANS, rtol=0, atol=0.08)
    codes = mean / (2 / 255)
    np.testing.assert_allclose(codes, np.round(codes), rtol=0, atol=1e-3)


@pytest.mark.parametrize("average", ["statistic", "none"])
def test_a_float_average_gets_there(average: str, tmp_path: Path) -> None:
    """The average reaches the statistic or its quantised value, which is at most half a step away."""
    mean = trained(tmp_path, 1500, quantize_average=average)
    np.testing.assert_allclose(mean, MEANS, rtol=0, atol=1e-5 if average == "none" else 1 / 255 + 1e-5)


def test_the_dead_zone_is_said(tmp_path: Path) -> None:
    source = save_module(OneNorm(), tmp_path / "m")
    options: Any = {"range": {"moving_mean": [-1, 1], "moving_variance": [0, 4]}, "quantize_average": "stored"}
    notes = bnqat.rewrite(source, tmp_path / "out", dry_run=True, **options).notes
    (note,) = [n for n in notes if "stored moving_mean" in n]
    assert f"up to {2 / 255 / 2 / 0.01:.3g}" in note
    assert "stochastic rounding" in note
    quiet = bnqat.rewrite(source, tmp_path / "out", dry_run=True, rounding="stochastic", **options).notes
    assert not any("stored" in n for n in quiet)


FORMS = ["form_update_assign_sub", "form_update_assign", "form_update_debiased", "module_train", "keras_save"]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_update_stores_what_is_quantised(name: str, model: Paths, tmp_path: Path) -> None:
    options: Any = {"range": dict.fromkeys(STATISTICS, "ema"), "quantize_average": "stored"}
    bnqat.rewrite(model(name), tmp_path / "out", bits=4, **options)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    train = loaded.quantization.train
    averages = [v for v in loaded.quantization.variables if any(r in v.name for r in STATISTICS)]
    averages = [v for v in averages if not v.name.startswith("quantization/") and "biased" not in v.name]
    assert averages
    before = [v.numpy() for v in averages]
    body = harness.concrete(train)
    x = harness.images(next(t.shape for t in body.graph.inputs if t.dtype == tf.float32))
    average_ports = [p for p in ports(body, [x]) if p.tag["use"] == "average"]
    for v, old in zip(averages, before, strict=True):
        v.assign(old)
    train(x)
    after = [v.numpy() for v in averages]
    if average_ports:  # where the updates are in the function's own body
        assert len(average_ports) == len(averages)
        assert {p.got.tobytes() for p in average_ports} == {v.tobytes() for v in after}
    for old, new in zip(before, after, strict=True):
        assert not np.array_equal(old, new)
        assert len(np.unique(new)) <= 16


@pytest.mark.parametrize("float_roles", [("moving_mean",), ("moving_variance",), STATISTICS], ids="+".join)
def test_an_average_that_is_left_float_moves_as_in_the_source(float_roles: tuple[str, ...], tmp_path: Path) -> None:
    """The kernel, which computes the source's averages, gives statistics where one of them is quantised."""
    source = save_module(OneNorm(), tmp_path / "m")
    bnqat.rewrite(source, tmp_path / "out", scheme=dict.fromkeys(float_roles, "none"), bits=2)
    before, after = (tf.saved_model.load(str(path)) for path in (source, tmp_path / "out"))
    x = tf.constant(np.random.default_rng(0).normal(0.4, 1.3, (64, 4, 4, 3)).astype(np.float32))
    for _ in range(3):
        before.train(x)
        after.quantization.train(x)
    for role in STATISTICS:
        wanted, got = (getattr(m.norm, role).numpy() for m in (before, after))
        if role in float_roles:
            # Two factors in float32: the kernel's a + (b - a) f, and bnqat's a (1 - f) + b f.
            np.testing.assert_allclose(got, wanted, rtol=1e-6)
        else:
            assert not np.allclose(got, wanted, rtol=1e-4)
