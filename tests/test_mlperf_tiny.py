"""The reference models of MLPerf Tiny: rewritten, verified, trained, saved, finalised, converted to LiteRT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests import weight_reference as reference
from tests.models.weights.case import DEPTHWISE, LAST
from tests.test_deployment import FLOAT, INTEGERS, converted, run
from tests.test_weights import stored

ROBUST = ("vww96", "mlcommons+tiny+1")
"""The visual wake words and the keyword spotting; the others take noise to values that integers are too coarse for."""


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")  # the converter's own use of it
@pytest.mark.mlperf_tiny
def test_a_reference_model_goes_all_the_way(mlperf_tiny: Path, tmp_path: Path) -> None:
    report = bnqat.rewrite(mlperf_tiny, tmp_path / "target", bits={"weight": 8})
    weights = {q.layer_name for q in report.quantizers}
    assert len(weights) == {"ad01": 10, "vww96": 28}.get(mlperf_tiny.name, 10)
    names = {bn.name for bn in bnqat.inspect(mlperf_tiny).batch_norms}
    assert report.sites_found == report.sites_rewritten > 0
    verified = bnqat.verify(mlperf_tiny, tmp_path / "target")
    assert verified.ok, verified.claims

    model = tf.saved_model.load(str(tmp_path / "target"))
    serve, train = model.signatures["serving_default"], model.signatures["train"]
    ((key, spec),) = serve.structured_input_signature[1].items()
    rng = np.random.default_rng(0)
    x = tf.constant(rng.random([8, *spec.shape[1:]]), spec.dtype)
    (output,) = serve(**{key: x})
    before = serve(**{key: x})[output]
    variables = model.quantization.trainable_variables
    moving = [v for v in model.quantization.variables if "moving" in v.name and not v.name.startswith("quantization/")]
    averages = [v.numpy() for v in moving]
    for _ in range(2):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((train(**{key: x})[output] - 0.1) ** 2)
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            if gradient is not None:  # a variable of the source that serving has no use for
                assert np.all(np.isfinite(gradient))
                variable.assign_sub(1e-3 * tf.clip_by_norm(gradient, 1.0))
    assert int(model.quantization.step) == 2
    assert len(moving) == 2 * len(names)
    assert all(np.any(old != v.numpy()) for old, v in zip(averages, moving, strict=True))
    tuned = serve(**{key: x})[output]
    assert np.any(tuned != before)

    tf.saved_model.save(model, str(tmp_path / "tuned"), signatures={"serving_default": serve})
    baked = bnqat.finalize(tmp_path / "tuned", tmp_path / "final").baked
    assert {b.layer_name for b in baked} == names | weights
    held, deployed = stored(tmp_path / "tuned"), stored(tmp_path / "final")
    for name in weights:
        expected = reference.quantize_weight("symmetric", held[name], 8, DEPTHWISE if "depthwise" in name else LAST)
        np.testing.assert_array_equal(deployed[name], expected.value)
    final = tf.saved_model.load(str(tmp_path / "final")).signatures["serving_default"]
    np.testing.assert_array_equal(final(**{key: x})[output], tuned)

    lite = converted(tmp_path / "final", "serving_default")
    assert np.abs(run(lite, "serving_default", {key: x}) - tuned).max() < FLOAT * np.abs(tuned).max()
    if mlperf_tiny.name in ROBUST:
        examples = rng.random([30, 1, *spec.shape[1:]]).astype("float32")
        integers = converted(tmp_path / "final", "serving_default", lambda seed: {key: tf.constant(examples[seed])})
        assert len(integers) < 0.6 * len(lite)
        difference = np.linalg.norm(run(integers, "serving_default", {key: x}) - tuned)
        assert difference < INTEGERS * np.linalg.norm(tuned)
