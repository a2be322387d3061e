"""Schedule of quantisers: start, ramp and widths; and the second phase of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests import harness
from tests.ports import assert_equal, ports

Paths = Callable[..., Path]
EPSILON = 1e-3
ROLES = ("gamma", "beta", "moving_mean", "moving_variance")
X = harness.images((None, 8, 8, 3))


def controls(loaded: Any) -> dict[str, Any]:
    """The control variables by name."""
    return {v.name.partition(":")[0]: v for v in loaded.quantization.variables if v.name.startswith("quantization/")}


def moving(loaded: Any) -> list[np.ndarray]:
    return [v.numpy() for n in loaded.norms for v in (n.moving_mean, n.moving_variance)]


def test_the_ramp_blends_and_is_exact_at_its_ends(model: Paths, rewritten: Paths) -> None:
    source = tf.saved_model.load(str(model("module")))
    whole = tf.saved_model.load(str(rewritten("module", bits=2)))
    result = tf.saved_model.load(str(rewritten("module", bits=2, start_step=3, ramp_steps=4)))
    outputs = {}
    for step in range(2, 9):
        result.quantization.step.assign(step)
        outputs[step] = result.serve(X).numpy()
        for port in ports(harness.concrete(result.serve), [X]):
            assert port.amount == np.clip((step - 3) / 4, 0, 1)
            assert_equal(port, EPSILON)
    for step in (2, 3):
        np.testing.assert_array_equal(outputs[step], source.serve(X))
    for step in (7, 8):
        np.testing.assert_array_equal(outputs[step], whole.serve(X))
    for step in (4, 5, 6):
        assert not np.array_equal(outputs[step], outputs[step - 1])
    result.quantization.step.assign(5)
    result.quantization.ramp_steps.assign(0)
    np.testing.assert_array_equal(result.serve(X), whole.serve(X))
    result.quantization.start_step.assign(2**63 - 1)
    np.testing.assert_array_equal(result.serve(X), source.serve(X))


def test_gradients_on_the_ramp(rewritten: Paths) -> None:
    result = tf.saved_model.load(str(rewritten("module_train", bits=3, ramp_steps=4)))
    for step in range(5):
        result.quantization.step.assign(step)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(result.quantization.train(X) ** 2)
        gradients = tape.gradient(loss, list(result.quantization.trainable_variables))
        assert all(g is not None and np.isfinite(g).all() and np.any(g) for g in gradients)


@pytest.mark.parametrize("role", ROLES)
def test_widths_by_role_and_by_layer(role: str, model: Paths, rewritten: Paths) -> None:
    """One model takes every width, for each layer by itself; 0 is off, bit for bit."""
    source = tf.saved_model.load(str(model("module")))
    result = tf.saved_model.load(str(rewritten("module")))
    bits, layer_bits = (getattr(getattr(result.quantization, name), role) for name in ("bits", "layer_bits"))
    for other in ROLES:
        getattr(result.quantization.bits, other).assign(0)
    np.testing.assert_array_equal(result.serve(X), source.serve(X))
    body = harness.concrete(result.serve)
    for width in (16, 8, 4, 3, 2, 0):
        bits.assign(width)
        for port in ports(body, [X]):
            assert port.bits == (width if port.tag["role"] == role else 0)
            assert_equal(port, EPSILON)
    for layer in range(2):
        widths = [-1, -1]
        widths[layer] = 4
        layer_bits.assign(widths)
        all_ports = ports(body, [X])
        assert {(p.tag["role"], p.tag["layer"]) for p in all_ports if p.bits} == {(role, layer)}
        for port in all_ports:
            assert_equal(port, EPSILON)
        assert not np.array_equal(result.serve(X), source.serve(X))
    bits.assign(4)
    layer_bits.assign([0, 0])
    np.testing.assert_array_equal(result.serve(X), source.serve(X))


def test_a_width_that_is_assigned_equals_one_that_was_given(rewritten: Paths) -> None:
    result = tf.saved_model.load(str(rewritten("module")))
    before = [v.numpy() for v in result.quantization.variables]
    for width in (16, 8, 4, 2):
        for variable, value in zip(result.quantization.variables, before, strict=True):
            variable.assign(value)
        for role in ROLES:
            getattr(result.quantization.bits, role).assign(width)
        rewritten_at_width = tf.saved_model.load(str(rewritten("module", bits=width)))
        np.testing.assert_array_equal(result.serve(X), rewritten_at_width.serve(X))
        np.testing.assert_array_equal(result.quantization.train(X), rewritten_at_width.quantization.train(X))


def test_widths_out_of_range_count_as_the_nearest(model: Paths, rewritten: Paths) -> None:
    source = tf.saved_model.load(str(model("module")))
    result = tf.saved_model.load(str(rewritten("module")))
    outputs = {}
    for width in (-5, -1, 0, 1, 2, 16, 17, 2**31 - 1):
        result.quantization.layer_bits.gamma.assign([-1, -1])
        for role in ROLES:
            getattr(result.quantization.bits, role).assign(width)
        outputs[width] = result.serve(X).numpy()
        result.quantization.layer_bits.gamma.assign([-7, width])
        np.testing.assert_array_equal(result.serve(X), outputs[width])
    for width, like in ((-5, 0), (-1, 0), (1, 2), (17, 16), (2**31 - 1, 16)):
        np.testing.assert_array_equal(outputs[width], outputs[like])
    np.testing.assert_array_equal(outputs[0], source.serve(X))


def test_controls_survive_saving_and_serving_moves_none(rewritten: Paths, tmp_path: Path) -> None:
    result = tf.saved_model.load(str(rewritten("module", start_step=1, ramp_steps=3, freeze_step=8)))
    for _ in range(2):
        result.quantization.train(X)
    result.quantization.bits.gamma.assign(5)
    result.quantization.layer_bits.beta.assign([3, 0])
    served = result.serve(X)
    tf.saved_model.save(result, str(tmp_path / "again"))
    again = tf.saved_model.load(str(tmp_path / "again"))
    np.testing.assert_array_equal(again.serve(X), served)
    old, new = controls(result), controls(again)
    assert set(old) == set(new)
    for name, variable in old.items():
        np.testing.assert_array_equal(new[name], variable)
    assert new["quantization/step"].numpy() == 2
    for _ in range(3):
        again.serve(X)
    for name, variable in controls(again).items():
        np.testing.assert_array_equal(variable, old[name])


@pytest.mark.parametrize("name", ["module", "module_train", "keras_dropout"])
def test_frozen_statistics_are_used_and_stay(name: str, rewritten: Paths) -> None:
    result = tf.saved_model.load(str(rewritten(name, bits=4, freeze_step=2)))
    variables = [v for v in result.quantization.variables if not v.name.startswith("quantization/")]
    averages = [v for v in variables if "moving" in v.name]
    x = X
    assert averages
    for step in range(4):
        before, served = [v.numpy() for v in averages], result.serve(x).numpy()
        with tf.GradientTape() as tape:
            trained = result.quantization.train(x)
            loss = tf.reduce_sum(trained**2)
        gradients = tape.gradient(loss, list(result.quantization.trainable_variables))
        assert all(g is not None and np.any(g) for g in gradients)
        moved = [not np.array_equal(v, old) for v, old in zip(averages, before, strict=True)]
        assert all(moved) if step < 2 else not any(moved)
        if name != "keras_dropout":
            assert np.array_equal(trained, served) is (step >= 2)
        assert result.quantization.step.numpy() == step + 1
    result.quantization.freeze_step.assign(100)
    before = [v.numpy() for v in averages]
    result.quantization.train(x)
    assert all(not np.array_equal(v, old) for v, old in zip(averages, before, strict=True))


def test_only_the_chosen_phase_runs(rewritten: Paths) -> None:
    path = str(rewritten("module", freeze_step=2))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], path)
        signature = meta.signature_def["train"]
        feed = {t.name: X.numpy() for t in signature.inputs.values()}
        fetches = [t.name for t in signature.outputs.values()]
        kernels = []
        for _ in range(4):
            metadata = tf.compat.v1.RunMetadata()
            options = tf.compat.v1.RunOptions(trace_level=3, output_partition_graphs=True)
            session.run(fetches, feed, options, metadata)
            executed = {n.node_name for d in metadata.step_stats.dev_stats for n in d.node_stats}
            nodes = [n for g in metadata.partition_graphs for n in g.node if n.name in executed]
            fused = [n for n in nodes if b"FusedBatchNorm" in n.attr["fused_ops"].list.s]
            kernels.append(
                [n.attr["is_training"].b for n in nodes if n.op == "FusedBatchNormV3"] + [False] * len(fused)
            )
        assert kernels == [[True] * 2, [True] * 2, [False] * 2, [False] * 2]


def test_the_signature_train_has_both_phases(rewritten: Paths) -> None:
    result = tf.saved_model.load(str(rewritten("module", freeze_step=1)))
    train, serve = result.signatures["train"], result.signatures["serving_default"]
    (name,) = serve.structured_input_signature[1]
    for step in range(3):
        served, trained = serve(**{name: X}), train(**{name: X})
        same = all(np.array_equal(served[k], trained[k]) for k in served)
        assert same is (step >= 1)


def test_freezing_needs_a_training_function(model: Paths, tmp_path: Path) -> None:
    with pytest.raises(bnqat.Error, match="needs a model in TensorFlow 2's format"):
        bnqat.rewrite(model("v1_by_hand"), tmp_path / "out", freeze_step=3)
    assert not (tmp_path / "out").exists()


def test_stochastic_rounding_follows_from_the_step(rewritten: Paths, tmp_path: Path) -> None:
    """A resumed run has the noise of an unbroken one. Each step has its own noise, and serving has none."""
    path = str(rewritten("module_train", bits=3, rounding="stochastic"))
    whole, half = tf.saved_model.load(path), tf.saved_model.load(path)
    outputs = [whole.quantization.train(X).numpy() for _ in range(4)]
    for step in range(2):
        np.testing.assert_array_equal(half.quantization.train(X), outputs[step])
    tf.saved_model.save(half, str(tmp_path / "half"))
    rest = tf.saved_model.load(str(tmp_path / "half"))
    for step in (2, 3):
        np.testing.assert_array_equal(rest.quantization.train(X), outputs[step])
    for a, b in zip(moving(rest), moving(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(outputs[0], outputs[1])  # gamma and beta did not change: the noise did
    np.testing.assert_array_equal(whole.serve(X), whole.serve(X))
    for port in ports(harness.concrete(whole.serve), [X]):
        assert port.noise is None
        assert_equal(port, EPSILON)
    all_ports = ports(harness.concrete(whole.quantization.train), [X])
    assert len({p.noise.tobytes() for p in all_ports if p.noise is not None}) == len(all_ports)
    for port in all_ports:
        assert_equal(port, EPSILON)


def test_under_xla_the_numbers_are_the_same(rewritten: Paths) -> None:
    """XLA sums in another order: outputs differ by rounding, quantised values of unequal statistics by a step."""
    path = str(rewritten("module_train", bits=8, quantize_average="none"))
    plain, compiled = tf.saved_model.load(path), tf.saved_model.load(path)
    train = tf.function(lambda x: compiled.quantization.train(x), jit_compile=True)  # noqa: PLW0108
    for _ in range(3):
        np.testing.assert_allclose(train(X), plain.quantization.train(X), rtol=1e-4, atol=1e-5)
    for a, b in zip(moving(compiled), moving(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_under_xla_stochastic_rounding_follows_from_the_step_too(rewritten: Paths) -> None:
    """Under XLA the noise differs: TensorFlow's generator gives other numbers when it is compiled."""
    loaded = tf.saved_model.load(str(rewritten("module_train", bits=3, rounding="stochastic")))
    variables = list(loaded.quantization.variables)
    before = [v.numpy() for v in variables]
    train = tf.function(lambda x: loaded.quantization.train(x), jit_compile=True)  # noqa: PLW0108
    outputs = []
    for _ in range(2):
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        outputs.append([train(X).numpy() for _ in range(3)])
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0][0], outputs[0][1])
