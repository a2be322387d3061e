from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf

from passes.batch_norm.batch_norms import batch_norms, channels
from passes.batch_norm.sites import sites
from rewriter.savedmodel.read import load
from tests.models import FusedBatchNorm, Net, save_module

Paths = Callable[[str], Path]


def test_layers_sites_and_roles_of_a_keras_save(model: Paths) -> None:
    norms = load(model("keras_save")).analysis(batch_norms)
    assert [bn.name for bn in norms] == ["batch_normalization", "batch_normalization_1"]
    for bn in norms:
        assert {r: k.rsplit("/", 3)[-3] for r, k in bn.variables.items()} == {
            r: r for r in ("gamma", "beta", "moving_mean", "moving_variance")
        }
        assert sum(s.training for s in bn.sites) == 2
        assert sum(not s.training for s in bn.sites) == 3
        assert bn.weight == pytest.approx(0.1)
        assert all(s.status == "float" for s in bn.sites)
    assert [e for bn in norms for e in bn.epsilons] == pytest.approx([1e-3, 1e-2])


def test_each_layer_of_mobilenet_has_two_training_sites(model: Paths) -> None:
    read = load(model("mobilenet_short_save"))
    all_sites = read.analysis(sites)
    assert len(read.graphs) == 120
    assert sum(s.training for s in all_sites) == 18
    assert len(read.analysis(batch_norms)) == 9


def test_a_function_shared_by_two_layers_is_a_site_of_both(model: Paths) -> None:
    read = load(model("module_shared"))
    called = [s for s in read.analysis(sites) if not s.reason]
    assert len(called) == 1
    assert len(called[0].binding.origins) == 2
    named = [bn for bn in read.analysis(batch_norms) if bn.variables]
    assert [bn.sites for bn in named] == [tuple(called), tuple(called)]


@pytest.mark.parametrize(("scale", "center"), [(False, True), (True, False), (False, False)])
def test_layers_without_scale_or_centre(scale: bool, center: bool, tmp_path: Path) -> None:
    read = load(save_module(Net(scale, center), tmp_path / "m"))
    for bn in read.analysis(batch_norms):
        assert ("gamma" in bn.variables, "beta" in bn.variables) == (scale, center)
        assert all(s.reason == "" for s in bn.sites)
        assert all(set(s.binding.parameters) == set(bn.variables) for s in bn.sites)


def test_channels_come_from_the_variables(model: Paths) -> None:
    assert set(load(model("module")).analysis(channels).values()) == {8, 16}


class Odd(tf.Module):
    """Batch norms that cannot be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = FusedBatchNorm(3)

    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 3), name="x"), tf.TensorSpec((3,), name="v")])
    def serve(self, x: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        norm = self.norm
        common = {"scale": norm.gamma, "offset": norm.beta, "is_training": False}
        x = tf.raw_ops.FusedBatchNormV3(x=x, mean=norm.moving_mean * 2, variance=norm.moving_variance, **common)[0]
        x = tf.raw_ops.FusedBatchNormV3(x=x, mean=norm.moving_mean, variance=v, **common)[0]
        return tf.raw_ops.FusedBatchNormV3(x=x, mean=[0.0, 0, 0], variance=norm.moving_variance, **common)[0]


def test_declined_sites_say_why(tmp_path: Path) -> None:
    assert [
        s.reason for s in load(save_module(Odd(), tmp_path / "m")).analysis(sites) if "never runs" not in s.reason
    ] == [
        "its moving mean is computed by mul (Mul), not a variable",
        "its moving variance is an input of its function, not a variable",
        "its moving mean is the constant FusedBatchNormV3_2/mean; --unfreeze-constants makes it a variable again",
    ]
