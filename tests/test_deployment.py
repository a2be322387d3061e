"""Deployment of a public float model: rewrite, train, save, finalise, LiteRT. Each stage's numbers are compared.

test_mlperf_tiny.py goes the same way with the reference models of MLPerf Tiny.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

import bnqat
from tests.conftest import PUBLIC

FLOAT = 1e-5
"""LiteRT computes in float32, with batch norm folded into convolutions: largest difference, to the largest output."""

INTEGERS = 0.06
"""Eight bits for weights and activations: the norm of the difference to that of the outputs. 0.003 to 0.03 seen."""


class Case:
    """One model and suitable data.

    Attributes:
        train: the training function of the rewritten model, called with the inputs by name.
        variables: its trainable variables.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.signature = next(s for n, s in sorted(model.signatures.items()) if n != "train")
        self.name = next(n for n in sorted(model.signatures) if n != "train")
        has_quantization = hasattr(model, "quantization")  # TensorFlow 1's format has signatures alone
        self.train = model.signatures["train"]
        self.variables = list(
            model.quantization.trainable_variables
            if has_quantization
            else model.signatures["train"].trainable_variables
        )

    def inputs(self, seed: int, batch: int) -> dict[str, tf.Tensor]:
        """A random batch, from 0 to 1."""
        rng = np.random.default_rng(seed)
        specs = self.signature.structured_input_signature[1]
        return {k: tf.constant(rng.random([batch, *s.shape[1:]]), s.dtype) for k, s in specs.items()}


def only(outputs: dict[str, Any]) -> np.ndarray:
    (output,) = outputs.values()
    return np.asarray(output)


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")  # the converter's own use of it
@pytest.mark.corpus
@pytest.mark.parametrize("name", ["JetBrains+KotlinDL+1", "intel-analytics+analytics-zoo+1"])
def test_a_public_model_reaches_the_device(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if not PUBLIC:
        pytest.skip("corpus absent: BNQAT_CORPUS is not set")
    source: Path = request.getfixturevalue("corpus") / name
    bnqat.rewrite(source, tmp_path / "q", bits=6)
    case = Case(tf.saved_model.load(str(tmp_path / "q")))
    x = case.inputs(99, 4)
    float_outputs = only(tf.saved_model.load(str(source)).signatures[case.name](**x))
    quantized = only(case.signature(**x))
    assert np.linalg.norm(quantized - float_outputs) < 0.2 * np.linalg.norm(float_outputs)

    before = [v.numpy() for v in case.variables]
    for step in range(10):
        with tf.GradientTape() as tape:
            loss = sum(tf.reduce_mean((y - 0.1) ** 2) for y in case.train(**case.inputs(step, 8)).values())
        for variable, gradient in zip(case.variables, tape.gradient(loss, case.variables), strict=True):
            if gradient is not None:  # a variable of the source that serving has no use for
                variable.assign_sub(1e-3 * tf.clip_by_norm(gradient, 1.0))
    moved = [bool(np.any(old != v.numpy())) for old, v in zip(before, case.variables, strict=True)]
    assert sum(moved) > len(moved) / 2  # a bias before a batch norm has none, nor what leads to dead units
    tuned = only(case.signature(**x))
    assert np.any(tuned != quantized)
    tf.saved_model.save(case.model, str(tmp_path / "tuned"), signatures={case.name: case.signature})

    report = bnqat.finalize(tmp_path / "tuned", tmp_path / "final", params=tmp_path / "p.npz")
    table = np.load(tmp_path / "p.npz")
    assert any(b.error > 0 for b in report.baked)
    assert all(table[f"{b.variable}.bits"] == 6 for b in report.baked)
    final = tf.saved_model.load(str(tmp_path / "final")).signatures[case.name]
    settled = any("may differ in the last bit" in note for note in report.notes)  # as in TensorFlow 1's graphs
    bound = 2e-7 * np.abs(tuned).max() if settled else 0
    np.testing.assert_allclose(only(final(**x)), tuned, rtol=0, atol=bound)

    lite = converted(tmp_path / "final", case.name)
    assert np.abs(run(lite, case.name, x) - tuned).max() < FLOAT * np.abs(tuned).max()
    integers = converted(tmp_path / "final", case.name, lambda seed: case.inputs(1000 + seed, 1))
    assert len(integers) < 0.6 * len(lite)
    assert np.linalg.norm(run(integers, case.name, x) - tuned) < INTEGERS * np.linalg.norm(tuned)


def converted(path: Path, signature: str, data: Callable[[int], dict[str, tf.Tensor]] | None = None) -> bytes:
    """Convert to LiteRT in float, or, with calibration data, to integers with float inputs and outputs."""
    converter = tf.lite.TFLiteConverter.from_saved_model(str(path), signature_keys=[signature])
    if data is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: (data(seed) for seed in range(30))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    content: bytes = converter.convert()
    return content


def run(content: bytes, signature: str, inputs: dict[str, tf.Tensor]) -> np.ndarray:
    """Return the only output, computed row by row."""
    runner = Interpreter(model_content=content).get_signature_runner(signature)
    rows = zip(*(value.numpy() for value in inputs.values()), strict=True)
    return np.concatenate([only(runner(**{k: v[None] for k, v in zip(inputs, row, strict=True)})) for row in rows])
