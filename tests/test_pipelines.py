"""Custom quantisers: a user's function on the variables becomes part of the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from rewriter.savedmodel.read import load
from tests import harness
from tests.ports import ports
from tests.reliability.forks import Call, Server

Paths = Callable[..., Path]
ROLES = ("gamma", "beta", "moving_mean", "moving_variance")
X = harness.images((None, 8, 8, 3))
STEPS = {"gamma": 4.0, "beta": 8.0, "moving_mean": 16.0, "moving_variance": 32.0}


@tf.custom_gradient
def rounded(v: Any) -> Any:
    """Round with a gradient of 3, which tells it from every other gradient."""
    return tf.round(v), lambda upstream: 3.0 * upstream


def fixed_point(vector: Any, context: Any) -> Any:
    """Fixed-point quantiser with a step for each role; epsilon is the least variance."""
    steps = STEPS[context.role]
    values = rounded(vector * steps) / steps
    return tf.maximum(values, context.epsilon) if context.role == "moving_variance" else values


@tf.function
def inner(v: Any) -> Any:
    """Quantiser that calls a function with a conditional."""
    return tf.cond(tf.reduce_max(tf.abs(v)) > 1.0, lambda: rounded(v), lambda: rounded(v * 4.0) / 4.0)


def nested(vector: Any, context: Any) -> Any:  # noqa: ARG001  it treats all alike
    """Quantiser that does not depend on role and layer."""
    return inner(vector)


def expected(raw: np.ndarray, role: str) -> np.ndarray:
    values = np.round(raw * np.float32(STEPS[role])) / np.float32(STEPS[role])
    return np.maximum(values, np.float32(1e-3)) if role == "moving_variance" else values


def test_every_vector_passes_through_the_function(model: Paths, tmp_path: Path) -> None:
    report = bnqat.rewrite(model("module_train"), tmp_path / "out", quantizer=fixed_point)
    assert report.sites_rewritten == report.sites_found
    bnqat.rewrite(model("module_train"), tmp_path / "twin", quantizer=fixed_point)
    assert harness.digest(tmp_path / "out") == harness.digest(tmp_path / "twin")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    for function in (loaded.serve, loaded.quantization.train):
        all_ports = ports(harness.concrete(function), [X])
        assert {(p.tag["role"], p.tag["layer"]) for p in all_ports} == {(r, layer) for r in ROLES for layer in (0, 1)}
        for port in all_ports:
            assert port.tag["scheme"] == "pipeline fixed_point"
            np.testing.assert_array_equal(port.got, expected(port.raw, port.tag["role"]))
            assert not np.array_equal(port.got, port.raw)


@pytest.mark.parametrize("function", [fixed_point, nested])
def test_gradients_pass_through_the_function(function: Any, model: Paths, tmp_path: Path) -> None:
    """Custom gradients pass, also after saving again; switched off, the gradient is the source's."""
    roles = {"gamma": function, "beta": function}
    bnqat.rewrite(model("module_train"), tmp_path / "out", quantizer=roles, bits={"moving_mean": 16})
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    tf.saved_model.save(loaded, str(tmp_path / "again"))
    for reloaded in (loaded, tf.saved_model.load(str(tmp_path / "again"))):
        train, gammas = reloaded.quantization.train, [n.gamma for n in reloaded.norms]

        def gradients(train: Any = train, gammas: Any = gammas) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(train(X) ** 2)
            return tape.gradient(loss, gammas)

        custom = gradients()
        values = [p.got for p in ports(harness.concrete(train), [X]) if p.tag["role"] == "gamma"]
        betas = [p.got for p in ports(harness.concrete(train), [X]) if p.tag["role"] == "beta"]
        reloaded.quantization.start_step.assign(2**40)
        for norm, gamma, beta in zip(reloaded.norms, values, betas, strict=True):
            norm.gamma.assign(gamma)
            norm.beta.assign(beta)
        for gradient, plain in zip(custom, gradients(), strict=True):
            np.testing.assert_allclose(gradient, 3.0 * plain, rtol=1e-4, atol=1e-5)


def test_switch_width_and_ramp(model: Paths, tmp_path: Path) -> None:
    bnqat.rewrite(model("module"), tmp_path / "out", quantizer=fixed_point, start_step=2, ramp_steps=2)
    source, loaded = (tf.saved_model.load(str(p)) for p in (model("module"), tmp_path / "out"))
    body = harness.concrete(loaded.serve)
    for step, amount in ((0, 0.0), (2, 0.0), (3, 0.5), (4, 1.0)):
        loaded.quantization.step.assign(step)
        for port in ports(body, [X]):
            blend = expected(port.raw, port.tag["role"]) * np.float32(amount) + port.raw * np.float32(1 - amount)
            np.testing.assert_allclose(port.got, blend, rtol=1e-6, atol=1e-7)
        assert np.array_equal(loaded.serve(X), source.serve(X)) is (step <= 2)
    for role in ROLES:
        getattr(loaded.quantization.bits, role).assign(0)
    np.testing.assert_array_equal(loaded.serve(X), source.serve(X))


def test_it_is_traced_once_for_each_size_and_context(model: Paths, tmp_path: Path) -> None:
    """Equal traced functions are merged. (TensorFlow runs a function twice to trace it.)"""
    traces = []

    def noted(vector: Any, context: Any) -> Any:
        traces.append((context, vector.shape[0]))
        return vector * 0.5

    bnqat.rewrite(model("keras_save"), tmp_path / "out", quantizer=noted)
    assert len(traces) == 2 * len(set(traces)) == 2 * 2 * 4
    assert {c.role for c, _ in traces} == set(ROLES)
    assert {c.layer for c, _ in traces} == {"batch_normalization", "batch_normalization_1"}
    graphs = [name for name in load(tmp_path / "out").graphs if name.startswith("bnqat_pipeline")]
    assert len(graphs) == len({size for _, size in traces})


def test_rules_choose_it_for_some_layers(model: Paths, tmp_path: Path) -> None:
    rules = [{"match": "norm_1|_1", "gamma": {"quantizer": fixed_point}, "beta": {"scheme": "none"}}]
    bnqat.rewrite(model("module"), tmp_path / "out", config={"rules": rules})
    tags = [tag for bn in bnqat.inspect(tmp_path / "out").batch_norms for s in bn.sites for tag in s.quantizers]
    kinds = {(t["layer"], t["role"]): t["scheme"] for t in tags}
    assert kinds == {
        **dict.fromkeys([(0, "gamma"), (0, "beta"), (0, "moving_mean"), (1, "moving_mean")], "affine"),
        **dict.fromkeys([(0, "moving_variance"), (1, "moving_variance")], "log"),
        (1, "gamma"): "pipeline fixed_point",
    }


VARIABLE = tf.Variable(2.0)


@tf.custom_gradient
def _clipped(v: Any) -> Any:
    """Clip with a custom gradient: straight-through where the value is small."""
    return tf.round(v), lambda upstream: tf.where(tf.abs(v) < 1, upstream, 0.0)


def _fails(vector: Any, context: Any) -> Any:  # noqa: ARG001
    raise RuntimeError(f"not for {context.role}")


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (_fails, "pipeline _fails fails for gamma of .*: RuntimeError: not for gamma"),
        (lambda vector, context: _clipped(vector), "uses tensors other than its own arguments"),  # noqa: ARG005
        (lambda vector, context: vector[:2], "gives float32 .2,. .* and not float32"),  # noqa: ARG005
        (lambda vector, context: tf.cast(vector, tf.float64), "gives float64"),  # noqa: ARG005
        (lambda vector, context: (vector, vector), "gives no tensor"),  # noqa: ARG005
        (lambda vector, context: vector * VARIABLE, "uses a variable or tensor from outside"),  # noqa: ARG005
        (lambda vector, context: vector + tf.random.normal([vector.shape[0]]), "uses RandomStandardNormal"),  # noqa: ARG005
        (lambda vector, context: tf.py_function(abs, [vector], tf.float32), "pipeline"),  # noqa: ARG005
    ],
)
def test_functions_that_cannot_be_part_of_the_graph(function: Any, match: str, model: Paths, tmp_path: Path) -> None:
    with pytest.raises(bnqat.Error, match=match):
        bnqat.rewrite(model("module"), tmp_path / "out", quantizer=function)
    assert not (tmp_path / "out").exists()


def test_the_first_format_is_declined(model: Paths, tmp_path: Path) -> None:
    with pytest.raises(bnqat.Error, match="a pipeline needs a model in TensorFlow 2's format"):
        bnqat.rewrite(model("v1_by_hand"), tmp_path / "out", quantizer=fixed_point)


OWN = """
import tensorflow as tf

@tf.custom_gradient
def halves(v):
    return tf.round(v * 2) / 2, lambda upstream: upstream

def mine(vector, context):
    return halves(vector) if context.role in ("gamma", "beta") else vector
"""
USER = """
import sys
for name in ("bnqat", "rewriter", "passes", "own"):
    sys.modules[name] = None  # cannot be imported
import tensorflow as tf
m = tf.saved_model.load(sys.argv[1])
x = tf.random.stateless_normal([4, 8, 8, 3], [1, 2])
with tf.GradientTape() as tape:
    loss = tf.reduce_sum(m.quantization.train(x) ** 2)
gradients = tape.gradient(loss, list(m.quantization.trainable_variables))
print(all(g is not None and bool(tf.reduce_any(g != 0)) for g in gradients))
"""


def test_from_the_command_line_by_name_and_loaded_without_it(
    forks: Server, plain_forks: Server, model: Paths, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    here = [Call("os:chdir", [str(tmp_path)])]
    done = forks.cli("rewrite", model("module"), "out", "--quantizer", "own:mine", before=here)
    assert done.code == 0, done.err
    used = plain_forks.python(USER, "out", cwd=tmp_path)
    assert used.out == "True\n", used.err[-2000:]
    for name, message in (("own:none", "there is no own:none"), ("nowhere:f", "there is no nowhere:f")):
        done = forks.cli("rewrite", model("module"), "x", "--quantizer", name, before=here)
        assert done.code == 2
        assert message in done.err
        assert len(done.err.splitlines()) == 1
