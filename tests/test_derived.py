"""Derived training against the training that the same module has of its own, for every form."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests.models.forms import FORMS, IMAGE, SEQUENCE, VECTOR, VIDEO, Form, assign_sub, fused, library

OFF = 2**40
TOLERANCE = 5e-6
HALF = 2e-2
"""In half precision single ops round after each, and the kernel once; two layers of some ten ops."""
TRAINED = [name for name in FORMS if not name.endswith(("debiased", "tensor"))]


SHAPES = [IMAGE, VIDEO, VECTOR, SEQUENCE, (6, 4, 4), (6, 3, 4, 4), (6, 6, 6)]


@cache
def names_by_shape() -> dict[tuple[int, ...], list[str]]:
    """Names of the forms by the shape of their input, without the batch."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name in TRAINED:
        (spec,) = FORMS[name]().serve.input_signature
        by_shape.setdefault(tuple(spec.shape[1:]), []).append(name)
    return by_shape


def test_every_form_has_one_of_the_shapes() -> None:
    assert sorted(names_by_shape()) == sorted(SHAPES)


class SideBySide(tf.Module):
    """Forms side by side in one function, which only serves."""

    def __init__(self, forms: Mapping[str, Form]) -> None:
        super().__init__()
        self.parts = {}
        for name, form in forms.items():
            self.parts[name] = part = tf.Module()
            part.layers, part.mix = form.layers, form.mix
        specs = next(iter(forms.values())).serve.input_signature
        outputs = lambda x: {name: form.call(x, training=False) for name, form in forms.items()}  # noqa: E731
        self.serve = tf.function(outputs, input_signature=specs, autograph=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_derived_training_equals_the_modules_own(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Outputs, gradients and statistics agree over three batches; the source has no momentum, so one is given."""
    forms = {name: FORMS[name]() for name in names_by_shape()[shape]}
    serving = SideBySide(forms)
    tf.saved_model.save(serving, str(tmp_path / "float"), signatures={"serving_default": serving.serve})
    bnqat.rewrite(tmp_path / "float", tmp_path / "qat", start_step=OFF, momentum=0.9)
    loaded = tf.saved_model.load(str(tmp_path / "qat"))
    train = lambda x: {name: form.call(x, training=True) for name, form in forms.items()}  # noqa: E731
    own_training = tf.function(train, autograph=False)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = tf.constant(rng.normal(0.3, 1.5, [8, *shape]).astype("float32"))
        expected, derived = step(own_training, forms, x), step(loaded.quantization.train, loaded.parts, x)
        for name in forms:
            tolerance = HALF if name == "form_mixed" else TOLERANCE
            for a, b in zip(expected[name], derived[name], strict=True):
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(a).max(), err_msg=name)


def step(call: Any, forms: Mapping[str, Any], x: tf.Tensor) -> dict[str, list[np.ndarray]]:
    """For each form the outputs, the gradients of all trainable variables, and the statistics after one step."""
    layers = {name: list({id(layer): layer for layer in form.layers}.values()) for name, form in forms.items()}
    parameters = {
        name: [
            form.mix,
            *(getattr(v, r) for v in layers[name] for r in ("gamma", "beta") if getattr(v, r, None) is not None),
        ]
        for name, form in forms.items()
    }
    with tf.GradientTape() as tape:
        outputs = call(x)
        loss = tf.add_n([tf.reduce_mean(tf.square(outputs[name] - 0.3)) for name in forms])
    gradients = tape.gradient(loss, parameters)
    return {
        name: [
            outputs[name].numpy(),
            *(g.numpy() for g in gradients[name]),
            *(s.numpy() for v in layers[name] for s in (v.moving_mean, v.moving_variance)),
        ]
        for name in forms
    }


def test_the_fused_variance_is_bessel_corrected_and_the_decomposed_is_not(tmp_path: Path) -> None:
    x = tf.constant(np.random.default_rng(0).normal(0, 1, [2, *IMAGE]).astype("float32"))
    for norm, correction in ((fused("FusedBatchNormV3", assign_sub), 32 / 31), (library, 1.0)):
        module = Form(norm, IMAGE)
        name = "fused" if correction > 1 else "library"
        tf.saved_model.save(module, str(tmp_path / name), signatures={"serving_default": module.serve})
        bnqat.rewrite(tmp_path / name, tmp_path / f"{name}_qat", start_step=OFF, momentum=0.75)
        before = module.layers[0].moving_variance.numpy()
        loaded = tf.saved_model.load(str(tmp_path / f"{name}_qat"))
        loaded.train(x)
        batch = (x.numpy() @ module.mix.numpy()).var(axis=(0, 1, 2)) * correction
        after = loaded.layers[0].moving_variance.numpy()
        np.testing.assert_allclose(after, 0.75 * before + 0.25 * batch, rtol=2e-6)
