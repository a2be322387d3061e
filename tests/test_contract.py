"""The contract of a rewritten SavedModel, on real models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests import harness
from tests.models import Trainable, mobilenet_short, save_module, small_keras
from tests.reference import reference
from tests.reliability.forks import Server

Paths = Callable[..., Path]
ALL = ["module", "module_train", "module_shared", "keras_save", "keras_dropout", "keras_export"]
OFF = 10**9

PLAIN_USER = """
import sys
import numpy as np, tensorflow as tf
for name in ("bnqat", "rewriter", "passes", "tf_keras"):
    sys.modules[name] = None  # cannot be imported
path, again = sys.argv[1:]
m = tf.saved_model.load(path)
signature = m.signatures["serving_default"]
specs = signature.structured_input_signature[1]
size = lambda s: [3, *s.shape[1:]] if s.shape.rank > 1 else [15600]  # a second of sound
x = [tf.random.stateless_normal(size(s), [1, i]) for i, (_, s) in enumerate(sorted(specs.items()))]
before = tf.nest.flatten(m.serve(*x))
variables = m.quantization.trainable_variables
moving = {v.ref(): v.numpy() for v in m.quantization.variables
          if "moving" in v.name and not v.name.startswith("quantization/")}
assert variables and moving
optimizer = tf.keras.optimizers.SGD(0.01)
with tf.GradientTape() as tape:
    y = m.quantization.train(*x)
    loss = tf.add_n([tf.reduce_mean(v**2) for v in tf.nest.flatten(y)])
gradients = tape.gradient(loss, list(variables))
used = [(g, v) for g, v in zip(gradients, variables) if g is not None]
assert len(used) >= len(variables) - 2, [v.name for g, v in zip(gradients, variables) if g is None]
for g, v in used:
    v.assign_sub(0.01 * tf.convert_to_tensor(g))
assert all(not np.array_equal(v.deref().numpy(), old) for v, old in moving.items())
assert m.quantization.step.numpy() == 1
after = tf.nest.flatten(m.serve(*x))
assert any(not np.array_equal(a, b) for a, b in zip(before, after))
tf.saved_model.save(m, again, signatures={k: m.signatures[k] for k in ("serving_default", "train")})
n = tf.saved_model.load(again)
for a, b in zip(after, tf.nest.flatten(n.serve(*x))):
    np.testing.assert_array_equal(a, b)
assert n.quantization.step.numpy() == 1
n.quantization.train(*x)
assert n.quantization.step.numpy() == 2
n.signatures["train"](**dict(zip(sorted(specs), x)))
assert n.quantization.step.numpy() == 3
print("fine")
"""


@pytest.mark.parametrize("name", [*ALL, "mobilenet_short_save"])
def test_a_user_without_bnqat_loads_serves_trains_and_saves(
    name: str, plain_forks: Server, rewritten: Paths, tmp_path: Path
) -> None:
    done = plain_forks.python(PLAIN_USER, rewritten(name, bits=4), tmp_path / "again")
    assert done.out == "fine\n", done.err[-2000:]


@pytest.mark.parametrize("name", [*ALL, "mobilenet_short_save"])
def test_switched_off_every_signature_is_bit_identical(name: str, model: Paths, rewritten: Paths) -> None:
    source = tf.saved_model.load(str(model(name)))
    result = tf.saved_model.load(str(rewritten(name, start_step=OFF)))
    for key, signature in source.signatures.items():
        x = harness.inputs_of(signature)
        for output, value in signature(**x).items():
            np.testing.assert_array_equal(value, result.signatures[key](**x)[output])
    assert set(result.signatures) == {*source.signatures, "train"}


def test_switched_off_training_is_bit_identical_to_the_sources_own(model: Paths, rewritten: Paths) -> None:
    source = tf.saved_model.load(str(model("module_train")))
    result = tf.saved_model.load(str(rewritten("module_train", start_step=OFF)))
    x = harness.images((None, 8, 8, 3))

    def step(module: Any, train: Any) -> Any:
        variables = [*module.kernels, *(v for n in module.norms for v in (n.gamma, n.beta))]
        with tf.GradientTape() as tape:
            y = train(x)
            loss = tf.reduce_sum(y * tf.range(1.0, 17.0))
        return y, tape.gradient(loss, variables)

    for _ in range(3):
        (y, gradients), (z, others) = step(source, source.train), step(result, result.quantization.train)
        np.testing.assert_array_equal(y, z)
        for a, b in zip(gradients, others, strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(source.norms, result.norms, strict=True):
        for role in ("moving_mean", "moving_variance"):
            old, new = getattr(a, role).numpy(), getattr(b, role).numpy()
            np.testing.assert_allclose(new, old, rtol=0, atol=1e-6 * np.abs(old).max())


@pytest.mark.parametrize("name", ["module", "module_train", "keras_export"])
def test_switched_on_every_port_and_every_statistic_equals_the_reference(name: str, rewritten: Paths) -> None:
    result = tf.saved_model.load(str(rewritten(name, bits=4)))
    for function in (result.serve, result.quantization.train):
        body = harness.concrete(function)
        x = [harness.images(t.shape) for t in body.graph.inputs if t.dtype == tf.float32]
        tags = harness.tags(body)
        kernels = [op for op in body.graph.get_operations() if op.type == "FusedBatchNormV3"]
        assert len(kernels) == 2
        training = function is result.quantization.train
        assert len(tags) == 8
        for kernel in kernels:
            for port, role in enumerate(("gamma", "beta", "moving_mean", "moving_variance"), start=1):
                quantised = kernel.inputs[port].op
                if training and port > 2:
                    assert quantised.name not in tags
                    users = [u.name for u in kernel.outputs[port - 2].consumers() if u.name in tags]
                    assert [tags[u]["role"] for u in users] == [role]
                    output_name, input_name = users[0] + ":0", kernel.outputs[port - 2].name
                else:
                    assert tags[quantised.name]["role"] == role
                    output_name, input_name = quantised.outputs[0].name, quantised.inputs[-1].name
                tag = tags[output_name.partition(":")[0]]
                assert tag["bits"] == 4
                assert tag["scheme"] == ("log" if role == "moving_variance" else "affine")
                output, raw = harness.fetch(body, x, [output_name, input_name])
                epsilon = kernel.get_attr("epsilon")
                expected = reference(tag["scheme"])(raw, 4, epsilon)
                if tag["scheme"] == "affine":
                    np.testing.assert_array_equal(output, expected)
                else:
                    np.testing.assert_array_less(
                        np.abs(output - expected), 1.01 * np.spacing(expected + np.float32(epsilon))
                    )
                assert len(np.unique(output)) <= 16
                assert not np.array_equal(output, raw)


def test_switched_on_outputs_equal_the_source_on_quantised_parameters(model: Paths, rewritten: Paths) -> None:
    source = tf.saved_model.load(str(model("module")))
    result = tf.saved_model.load(str(rewritten("module", bits=4)))
    x = harness.images((None, 8, 8, 3))
    float_output = source.serve(x)
    for norm in source.norms:
        for role, scheme in (
            ("gamma", "affine"),
            ("beta", "affine"),
            ("moving_mean", "affine"),
            ("moving_variance", "log"),
        ):
            variable = getattr(norm, role)
            variable.assign(reference(scheme)(variable.numpy(), 4, 1e-3))
    np.testing.assert_allclose(result.serve(x), source.serve(x), rtol=1e-6, atol=1e-6)
    assert np.abs(result.serve(x) - float_output).max() > 1e-3


def test_the_switch_turns_at_its_step_and_only_training_counts(model: Paths, rewritten: Paths) -> None:
    source = tf.saved_model.load(str(model("module")))
    result = tf.saved_model.load(str(rewritten("module", bits=2, start_step=2)))
    x = harness.images((None, 8, 8, 3))
    variables = [v for n in result.norms for v in (n.gamma, n.beta, n.moving_mean, n.moving_variance)]
    start = [v.numpy() for v in variables]
    outputs = []
    for step in range(4):
        assert result.quantization.step.numpy() == step
        for v, value in zip(variables, start, strict=True):
            v.assign(value)
        same = np.array_equal(result.serve(x), source.serve(x))
        result.serve(x)
        assert same is (step < 2)
        outputs.append(result.train(x).numpy())
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[2], outputs[3])
    assert not np.array_equal(outputs[1], outputs[2])
    result.quantization.start_step.assign(100)
    assert np.array_equal(result.train(x), outputs[0])


@pytest.mark.parametrize("name", ["keras_save", "keras_export"])
def test_training_equals_keras(name: str, rewritten: Paths) -> None:
    """The source's trace and a derived one train as the layers do in Keras itself."""
    keras = small_keras()
    result = tf.saved_model.load(str(rewritten(name, start_step=OFF, momentum=0.9)))
    assert_trains_alike(keras, result, (8, 8, 3), steps=10)


def test_derived_training_of_mobilenet_equals_keras(rewritten: Paths) -> None:
    keras = mobilenet_short()
    result = tf.saved_model.load(str(rewritten("mobilenet_short_export", start_step=OFF, momentum=0.999)))
    assert_trains_alike(keras, result, (32, 32, 3), steps=50)


def assert_trains_alike(keras: Any, result: Any, shape: tuple[int, ...], steps: int) -> None:
    """Assert that Keras and a result train alike.

    Outputs and gradients agree to 1e-6 relative, moving statistics to 1e-6 of the largest after `steps` batches.
    """
    by_name = {v.name.removesuffix(":0"): v for v in result.quantization.variables}
    pairs = [(v, by_name[v.name.removesuffix(":0")]) for v in keras.trainable_variables]
    runs = [(partial(keras, training=True), [a for a, _ in pairs]), (result.train, [b for _, b in pairs])]
    weights = tf.range(1.0, 11.0)

    @tf.function
    def step(x: Any) -> Any:
        outputs = []
        for train, variables in runs:
            with tf.GradientTape() as tape:  # one for each: a persistent one would trace second derivatives, too
                y = train(x)
                loss = tf.reduce_mean(y * weights)
            outputs.append((y, tape.gradient(loss, variables)))
        return outputs

    for seed in range(steps):
        (y, gradients), (z, others) = step(harness.images((None, *shape), batch=8, seed=seed))
    np.testing.assert_allclose(z, y, rtol=1e-6, atol=1e-6 * np.abs(y).max())
    for a, b in zip(gradients, others, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * np.abs(a).max())
    moving = [v for v in keras.weights if "moving" in v.name]
    assert moving
    for v in moving:
        expected = v.numpy()
        np.testing.assert_allclose(
            by_name[v.name.removesuffix(":0")], expected, rtol=0, atol=1e-6 * np.abs(expected).max()
        )


@tf.function
def repeat(train: Any, x: Any) -> None:
    for _ in tf.range(2000):
        train(x)


def test_averages_reach_the_quantised_statistic(rewritten: Paths) -> None:
    """After 2,000 times the same batch, no dead zone remains; stored quantised averages would have one."""
    result = tf.saved_model.load(str(rewritten("module_train", bits=8)))
    x = harness.images((None, 8, 8, 3))
    body = harness.concrete(result.quantization.train)
    kernel = next(op for op in body.graph.get_operations() if op.type == "FusedBatchNormV3")
    mean, variance = harness.fetch(body, [x], [kernel.outputs[1].name, kernel.outputs[2].name])
    repeat(result.quantization.train, x)
    for variable, value, expected in (
        (result.norms[0].moving_mean, mean, reference("affine")(mean, 8, 1e-3)),
        (result.norms[0].moving_variance, variance, reference("log")(variance, 8, 1e-3)),
    ):
        np.testing.assert_allclose(variable, expected, rtol=0, atol=1e-5 * np.ptp(value))
        assert np.abs(variable - value).max() > 1e-4 * np.ptp(value)


def test_unquantised_averages_are_those_of_the_float_run(model: Paths, rewritten: Paths) -> None:
    result = tf.saved_model.load(str(rewritten("module_train", bits=8, quantize_average="none")))
    source = tf.saved_model.load(str(model("module_train")))
    x = harness.images((None, 8, 8, 3))
    for function in (result.quantization.train, source.train):
        repeat(function, x)
    # gamma and beta are quantised, so from the second layer on the batches differ
    for role in ("moving_mean", "moving_variance"):
        np.testing.assert_array_equal(getattr(result.norms[0], role), getattr(source.norms[0], role))


EXTREMES: dict[str, dict[str, Any]] = {
    "gamma all ones": {"gamma": np.ones(8)},
    "gamma all zeros": {"gamma": np.zeros(8)},
    "gamma negative": {"gamma": -np.linspace(0.5, 1.5, 8)},
    "beta and mean all zeros": {"beta": np.zeros(8), "moving_mean": np.zeros(8)},
    "variance with zeros": {"moving_variance": [0, 0, 1, 1, 2, 2, 3, 3]},
    "variance with dead channels": {"moving_variance": [4e-38, 4e-38, 1, 1, 2, 2, 3, 3]},
    "variance of many magnitudes": {"moving_variance": [1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 900]},
}


@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_parameters(case: str, rewritten: Paths) -> None:
    """Outputs stay finite and near the float ones, and the gradient reaches the original variable."""
    result = tf.saved_model.load(str(rewritten("module", bits=8)))
    norm = result.norms[0]
    for role, value in EXTREMES[case].items():
        getattr(norm, role).assign(np.asarray(value, "float32"))
    x = harness.images((None, 8, 8, 3))
    on = result.serve(x).numpy()
    result.quantization.start_step.assign(OFF)
    off = result.serve(x).numpy()
    result.quantization.start_step.assign(0)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(result.train(x) * tf.range(1.0, 17.0))
    gradients = tape.gradient(loss, [norm.gamma, norm.beta])
    assert np.isfinite(on).all()
    np.testing.assert_allclose(on, off, rtol=0, atol=0.05 * np.abs(off).max())
    for g in gradients:
        assert np.isfinite(g).all()
        assert np.abs(g).max() > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("role", ["gamma", "beta", "moving_mean"])
def test_nan_and_infinity_reach_the_kernel_alone(bad: float, role: str, rewritten: Paths) -> None:
    """The bad value passes as it is, in its own channel; the others are quantised as if it were not there."""
    result = tf.saved_model.load(str(rewritten("module", bits=4)))
    variable = getattr(result.norms[0], role)
    value = variable.numpy()
    value[3] = bad
    variable.assign(value)
    body = harness.concrete(result.serve)
    node = next(
        n for n, t in harness.tags(body).items() if t["role"] == role and t["layer_name"].endswith("batch_norm")
    )
    (quantised,) = harness.fetch(body, [harness.images((None, 8, 8, 3))], [f"{node}:0"])
    others = np.arange(8) != 3
    np.testing.assert_array_equal(quantised[3], value[3])
    np.testing.assert_array_equal(quantised[others], reference("affine")(value[others], 4, 0))


@pytest.mark.parametrize("name", ["module_train", "keras_save", "mobilenet_short_export"])
def test_v1_sessions_restore_and_run_every_signature(name: str, rewritten: Paths) -> None:
    path = str(rewritten(name, bits=4))
    eager = tf.saved_model.load(path)
    x = harness.inputs_of(eager.signatures["serving_default"])
    expected = eager.signatures["serving_default"](**x)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        signatures = tf.compat.v1.saved_model.load(session, ["serve"], path).signature_def
        moving = [
            v for v in session.graph.get_operations() if v.type == "VarHandleOp" and v.name.endswith("moving_mean")
        ]
        moving = [v for v in moving if "bits" not in v.name]
        reads = [tf.raw_ops.ReadVariableOp(resource=v.outputs[0], dtype=tf.float32) for v in moving]
        step = tf.raw_ops.ReadVariableOp(
            resource=session.graph.get_tensor_by_name("quantization/step:0"), dtype=tf.int64
        )
        before = session.run(reads)
        for key in ("serving_default", "train"):
            feed = {signatures[key].inputs[k].name: v.numpy() for k, v in x.items()}
            fetches = {k: t.name for k, t in signatures[key].outputs.items()}
            outputs = session.run(fetches, feed)
            if key == "serving_default":
                for k, v in expected.items():
                    np.testing.assert_allclose(outputs[k], v, rtol=1e-5, atol=1e-6)
        assert session.run(step) == 1
        assert all(not np.array_equal(a, b) for a, b in zip(before, session.run(reads), strict=True))


@pytest.mark.parametrize("name", ["module_train", "keras_save", "mobilenet_short_save"])
def test_executed_batch_norm_kernels_are_the_sources(name: str, model: Paths, rewritten: Paths) -> None:
    source = tf.saved_model.load(str(model(name)))
    result = tf.saved_model.load(str(rewritten(name, bits=4)))
    x = harness.inputs_of(source.signatures["serving_default"])
    signatures = [m.signatures["serving_default"] for m in (source, result)]
    serving = [harness.batch_norm_kernels(partial(signature, **x)) for signature in signatures]
    assert serving[0] == serving[1]
    assert serving[0].total() > 0
    (value,) = x.values()
    train = source.train if name == "module_train" else lambda v: source(v, training=True)

    def step(function: Any, module: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(function(value) ** 2)
        return tape.gradient(loss, module.signatures["serving_default"].trainable_variables)

    training = [
        harness.batch_norm_kernels(lambda: step(train, source)),
        harness.batch_norm_kernels(lambda: step(result.quantization.train, result)),
    ]
    assert training[0] == training[1]
    assert training[0]["FusedBatchNormGradV3"] > 0


def test_training_then_serving_in_one_function_sees_the_update(rewritten: Paths) -> None:
    result = tf.saved_model.load(str(rewritten("module", bits=4)))
    x = harness.images((None, 8, 8, 3))

    @tf.function
    def both() -> Any:
        before = result.serve(x)
        result.train(x)
        return before, result.serve(x)

    before, after = both()
    np.testing.assert_array_equal(after, result.serve(x))
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("name", ["module", "keras_save"])
def test_compiled_by_xla(name: str, rewritten: Paths) -> None:
    result = tf.saved_model.load(str(rewritten(name, bits=4)))
    x = harness.images((None, 8, 8, 3))
    compiled = tf.function(lambda v: result.serve(v), jit_compile=True)  # noqa: PLW0108  bound methods are not compiled
    np.testing.assert_allclose(compiled(x), result.serve(x), rtol=1e-4, atol=1e-5)
    train = tf.function(lambda v: result.train(v), jit_compile=True)  # noqa: PLW0108
    train(x)
    assert result.quantization.step.numpy() == 1


def test_dropout_of_the_sources_trace_is_kept(model: Paths, tmp_path: Path) -> None:
    report = bnqat.rewrite(model("keras_dropout"), tmp_path / "out")
    assert any("training trace" in note for note in report.notes)
    result = tf.saved_model.load(str(tmp_path / "out"))
    x = harness.images((None, 8, 8, 3))
    assert not np.array_equal(result.train(x), result.train(x))


def test_rewriting_again_adds_nothing(rewritten: Paths, tmp_path: Path) -> None:
    with pytest.raises(bnqat.NothingToRewriteError, match="quantised already"):
        bnqat.rewrite(rewritten("module"), tmp_path / "again")
    loaded = tf.saved_model.load(str(rewritten("keras_save", bits=4)))
    tf.saved_model.save(loaded, str(tmp_path / "saved"))
    with pytest.raises(bnqat.NothingToRewriteError, match="quantised already"):
        bnqat.rewrite(tmp_path / "saved", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_source_is_not_touched(tmp_path: Path) -> None:
    source = save_module(Trainable(), tmp_path / "source")
    before = harness.digest(source)
    bnqat.inspect(source)
    bnqat.rewrite(source, tmp_path / "target")
    assert harness.digest(source) == before


def test_keras_load_model_runs_the_rewritten_graph(model: Paths, rewritten: Paths) -> None:
    """Keras must not rebuild the layers from metadata, as they would have no quantisers."""
    import tf_keras

    x = harness.images((None, 8, 8, 3))
    loaded = tf_keras.models.load_model(str(rewritten("keras_save", bits=2)))
    plain = tf.saved_model.load(str(rewritten("keras_save", bits=2)))
    served = plain.serve(x)
    np.testing.assert_array_equal(loaded(x, training=False), served)
    source = tf_keras.models.load_model(str(model("keras_save")))
    assert np.abs(source(x, training=False) - served).max() > 1e-3


def test_a_layer_normalisation_is_left_alone_and_the_trace_is_the_sources(model: Paths, rewritten: Paths) -> None:
    assert {site.kind for bn in bnqat.inspect(model("keras_layer_norm")).batch_norms for site in bn.sites} == {"fused"}
    assert [bn.name for bn in bnqat.inspect(model("keras_layer_norm")).batch_norms] == ["batch_normalization"]
    loaded = tf.saved_model.load(str(rewritten("keras_layer_norm", start_step=OFF)))
    x = harness.images((None, 8, 8, 3))
    assert np.abs(loaded.train(x) - loaded.train(x)).max() > 0  # dropout
    assert np.abs(loaded.train(x) - loaded.serve(x)).max() > 0
