from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests import harness
from tests.ports import ports

Paths = Callable[..., Path]
BATCHES = [harness.images((None, 8, 8, 3), seed=seed) for seed in range(5)]
AVERAGED = ("moving_mean", "moving_variance")


def statistics(loaded: Any, role: str) -> list[np.ndarray]:
    return [getattr(norm, role).numpy() for norm in loaded.norms]


@pytest.mark.parametrize("average", ["statistic", "none"])
@pytest.mark.parametrize("name", ["module", "module_train"])
def test_statistics_are_the_average_of_all_batches(name: str, average: str, rewritten: Paths) -> None:
    """The batches' statistics are those of training with gamma and beta quantised; earlier averages do not count."""
    loaded = tf.saved_model.load(str(rewritten(name, bits=3, quantize_average=average, start_step=100, freeze_step=0)))
    quantized = tf.saved_model.load(str(rewritten(name, bits=3, quantize_average=average)))
    body = harness.concrete(quantized.quantization.train)
    kernels = [op for op in body.graph.get_operations() if op.type == "FusedBatchNormV3"]
    batch_statistics: dict[tuple[int, str], list[np.ndarray]] = {}
    for x in BATCHES:
        if average == "statistic":
            for port in ports(body, [x]):
                if port.tag["use"] == "statistic":
                    batch_statistics.setdefault((port.tag["layer"], port.tag["role"]), []).append(port.got)
        else:
            names = [k.outputs[port].name for k in kernels for port in (1, 2)]
            base = [k.inputs[port].name for k in kernels for port in (3, 4)]
            factor = [np.float32(k.get_attr("exponential_avg_factor")) for k in kernels for _ in AVERAGED]
            values = harness.fetch(body, [x], [*names, *base])
            for index, weight in enumerate(factor):
                batch = (values[index] - values[index + 4] * (1 - weight)) / weight if weight != 1 else values[index]
                batch_statistics.setdefault((index // 2, AVERAGED[index % 2]), []).append(batch)
    before = [(v, v.numpy()) for v in loaded.quantization.variables if not v.name.startswith(AVERAGED)]
    bnqat.reestimate_statistics(loaded, BATCHES, len(BATCHES))
    for layer, norm in enumerate(loaded.norms):
        for role in AVERAGED:
            mean = np.mean(np.array(batch_statistics[layer, role], np.float64), 0)
            np.testing.assert_allclose(getattr(norm, role), mean, rtol=2e-5 if average == "none" else 1e-6, atol=1e-6)
    for variable, old in before:
        np.testing.assert_array_equal(variable, old)


def test_stored_averages_are_estimated_in_float(rewritten: Paths) -> None:
    options: dict[str, Any] = {"range": dict.fromkeys(AVERAGED, "ema"), "bits": 4}
    stored = tf.saved_model.load(str(rewritten("module", quantize_average="stored", **options)))
    plain = tf.saved_model.load(str(rewritten("module", quantize_average="none", **options)))
    for loaded in (stored, plain):
        bnqat.reestimate_statistics(loaded, BATCHES, 3)
    for role in AVERAGED:
        for a, b in zip(statistics(stored, role), statistics(plain, role), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert stored.quantization.bits.moving_mean.numpy() == 4


def test_it_takes_a_dataset_and_leaves_a_model_that_saves(rewritten: Paths, tmp_path: Path) -> None:
    loaded = tf.saved_model.load(str(rewritten("keras_save", bits=4)))
    x = tf.concat(BATCHES, 0)
    before = loaded.serve(x)
    bnqat.reestimate_statistics(loaded, tf.data.Dataset.from_tensor_slices(x).batch(4), 4)
    after = loaded.serve(x)
    assert not np.array_equal(before, after)
    assert loaded.quantization.step.numpy() == 0
    tf.saved_model.save(loaded, str(tmp_path / "again"))
    again = tf.saved_model.load(str(tmp_path / "again"))
    np.testing.assert_array_equal(again.serve(x), after)


def test_what_cannot_be_estimated(model: Paths, rewritten: Paths) -> None:
    loaded = tf.saved_model.load(str(rewritten("module")))
    before = [v.numpy() for v in loaded.quantization.variables]
    with pytest.raises(bnqat.Error, match="the dataset holds 5 batches, not 6"):
        bnqat.reestimate_statistics(loaded, BATCHES, 6)
    with pytest.raises(bnqat.Error, match="at least one batch"):
        bnqat.reestimate_statistics(loaded, BATCHES, 0)
    for variable, old in zip(loaded.quantization.variables, before, strict=True):
        np.testing.assert_array_equal(variable, old)
    with pytest.raises(bnqat.Error, match="needs a model that bnqat rewrote"):
        bnqat.reestimate_statistics(tf.saved_model.load(str(model("module"))), BATCHES, 1)
