from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf

from passes.batch_norm.batch_norms import batch_norms
from passes.batch_norm.sites import sites
from rewriter.savedmodel.read import load
from tests.models.chosen import Chosen, _moments, _moving, _update
from tests.models.forms import FORMS, VECTOR, Form, Variables, assign_sub, save

Paths = Callable[[str], Path]
DECOMPOSED = [n for n in FORMS if n.startswith(("form_library", "form_channels", "form_centred", "form_divided"))]
DECOMPOSED += ["form_by_hand", "form_mixed", "form_float64", "form_shared"]


@pytest.mark.parametrize("name", DECOMPOSED)
def test_each_form_is_found_with_its_variables(name: str, model: Paths) -> None:
    read = load(model(name))
    absent = {r for r, word in (("gamma", "no_scale"), ("beta", "no_centre")) if word in name or "bare" in name}
    norms = read.analysis(batch_norms)
    assert len(norms) == (1 if name == "form_shared" else 2)
    for bn in norms:
        assert set(bn.variables) == {"gamma", "beta", "moving_mean", "moving_variance"} - absent
        assert [*bn.epsilons] == pytest.approx([1e-3], rel=1e-3)  # half rounds it
        assert {s.kind for s in bn.sites} == {"decomposed"}
        assert all(set(s.binding.parameters) == set(bn.variables) for s in bn.sites if s.mode == "inference")
        assert bn.weight == (pytest.approx(0.1) if any(s.training for s in bn.sites) else None)


@pytest.mark.parametrize("name", ["v1_by_hand", "v1_by_hand_if", "v1_layers_plain", "v1_updated_first_if"])
def test_what_is_chosen_while_running_has_both_modes(name: str, model: Paths) -> None:
    for site in load(model(name)).analysis(sites):
        assert (site.mode, site.training, site.inference) == ("both", True, True)
        assert set(site.binding.parameters) == {"gamma", "beta", "moving_mean", "moving_variance"}
        assert all(site.binding.statistics[r] for r in ("moving_mean", "moving_variance"))


def layer_norm(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:  # noqa: ARG001
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    return tf.nn.batch_normalization(x, mean, variance, v.beta, v.gamma, 1e-3)


def residual(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:  # noqa: ARG001
    """A batch norm without beta, to which another layer's output is added."""
    y = (x - v.moving_mean) * tf.math.rsqrt(v.moving_variance + 1e-3) * v.gamma
    return y + tf.nn.tanh(x)


def test_a_layer_normalisation_is_no_batch_norm(tmp_path: Path) -> None:
    assert load(save(Form(layer_norm, VECTOR), tmp_path / "m")).analysis(sites) == ()


def test_a_residual_is_no_beta(tmp_path: Path) -> None:
    norms = load(save(Form(residual, VECTOR, center=False), tmp_path / "m")).analysis(batch_norms)
    assert [set(bn.variables) for bn in norms] == [{"gamma", "moving_mean", "moving_variance"}] * 2


@pytest.mark.parametrize(("shape", "role"), [((), "gamma"), ((4, 4, VECTOR[-1]), "beta")])
def test_gamma_and_beta_have_one_element_for_each_channel(shape: tuple[int, ...], role: str, tmp_path: Path) -> None:
    """A learned scalar scale or a position embedding after a batch norm is neither gamma nor beta."""
    factor_or_shift = tf.Variable(tf.fill(shape, 1.5), name="other")

    def norm(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:  # noqa: ARG001
        y = (x - v.moving_mean) * tf.math.rsqrt(v.moving_variance + 1e-3)
        return y * factor_or_shift if role == "gamma" else y * v.gamma + factor_or_shift

    form = Form(norm, (4, 4, VECTOR[-1]), scale=role == "beta", center=False)
    form.other = factor_or_shift
    norms = load(save(form, tmp_path / "m")).analysis(batch_norms)
    expected = {"moving_mean", "moving_variance"} | ({"gamma"} if role == "beta" else set())
    assert [set(bn.variables) for bn in norms] == [expected] * 2


def test_a_near_match_is_listed_in_every_mode(tmp_path: Path) -> None:
    """Gamma is applied to the mean twice; the search looks through choices and a batch's statistics."""

    def applied(x: tf.Tensor, v: Variables, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
        inv = tf.math.rsqrt(variance + 1e-3) * v.gamma
        return x * inv - mean * inv * v.gamma + v.beta

    def chosen(x: tf.Tensor, v: Variables, training: tf.Tensor) -> tf.Tensor:
        batch = _moments(x)
        tf.cond(training, lambda: _update(v, *batch), lambda: tf.constant(0))
        return applied(x, v, *tf.cond(training, lambda: batch, lambda: _moving(v)))

    def trained(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:
        mean, variance = _moments(x) if training else _moving(v)
        if training:
            assign_sub(v, mean, variance)
        return applied(x, v, mean, variance)

    module = Chosen(chosen)
    tf.saved_model.save(module, str(tmp_path / "c"), signatures={"serving_default": module.serve})
    for path, count in ((tmp_path / "c", 2), (save(Form(trained, VECTOR, train=True), tmp_path / "t"), 4)):
        reasons = [site.reason for site in load(path).analysis(sites)]
        assert len(reasons) == count
        assert all(reason.startswith("it begins like a batch norm") for reason in reasons)
