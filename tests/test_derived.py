"""Derived training against the training that the same module has of its own, for every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests.models.forms import FORMS, IMAGE, Form, assign_sub, fused, library

OFF = 2**40
TOLERANCE = 5e-6
HALF = 2e-2
"""In half precision single ops round after each, and the kernel once; two layers of some ten ops."""
TRAINED = [name for name in FORMS if not name.endswith(("debiased", "tensor"))]


@pytest.mark.parametrize("name", TRAINED)
def test_derived_training_equals_the_modules_own(name: str, tmp_path: Path) -> None:
    """Outputs, gradients and statistics agree over three batches; the source has no momentum, so one is given."""
    module = FORMS[name]()
    module.serve.get_concrete_function()
    serving = tf.Module()
    serving.layers, serving.mix, serving.serve = module.layers, module.mix, module.serve
    tf.saved_model.save(serving, str(tmp_path / "float"), signatures={"serving_default": module.serve})
    bnqat.rewrite(tmp_path / "float", tmp_path / "qat", start_step=OFF, momentum=0.9)
    loaded = tf.saved_model.load(str(tmp_path / "qat"))
    own_training = tf.function(lambda x: module.call(x, training=True))
    (spec,) = module.serve.input_signature
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = tf.constant(rng.normal(0.3, 1.5, [8, *spec.shape[1:]]).astype("float32"))
        results = [
            step(call, layers, x) for call, layers in ((own_training, module), (loaded.quantization.train, loaded))
        ]
        for a, b in zip(*results, strict=True):
            tolerance = HALF if name == "form_mixed" else TOLERANCE
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(a).max())


def step(call: Any, module: Any, x: tf.Tensor) -> list[np.ndarray]:
    """The outputs, the gradients of all trainable variables, and the statistics after one step."""
    layers = list({id(layer): layer for layer in module.layers}.values())
    parameters = [
        module.mix,
        *(getattr(v, r) for v in layers for r in ("gamma", "beta") if getattr(v, r, None) is not None),
    ]
    with tf.GradientTape() as tape:
        y = call(x)
        loss = tf.reduce_mean(tf.square(y - 0.3))
    gradients = [g.numpy() for g in tape.gradient(loss, parameters)]
    return [y.numpy(), *gradients, *(s.numpy() for v in layers for s in (v.moving_mean, v.moving_variance))]


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
