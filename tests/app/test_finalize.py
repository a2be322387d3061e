"""Tests of ``bnqat finalize``: outputs are unchanged, nothing trains any more, and the table gives the same values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

import bnqat
from passes.batch_norm.sites import sites
from rewriter.app.cli import main
from rewriter.ops import STAND_IN
from rewriter.savedmodel.read import load
from tests import harness

Rewritten = Callable[..., Path]
FAR = 2**40
ROLES = ("gamma", "beta", "moving_mean", "moving_variance")


def trained(path: Path, target: Path, *, by_gradients: bool = False, plain: bool = False) -> Any:
    """Train a rewritten model for some steps, save it by TensorFlow, and return it.

    Averages, ranges and the step move in the training function. Other variables change as an optimizer might change
    them, or by the gradients, which takes as long as the rest.
    """
    model = tf.saved_model.load(str(path))
    variables = list(model.quantization.trainable_variables)
    rng = np.random.default_rng(7)
    for step in range(3):
        specs = harness.concrete(model.quantization.train).structured_input_signature[0]
        x = [harness.images(spec.shape, seed=step) for spec in specs]
        if by_gradients:
            with tf.GradientTape() as tape:
                loss = sum(tf.reduce_mean(y**2) for y in tf.nest.flatten(model.quantization.train(*x)))
            changes = tape.gradient(loss, variables)
        else:
            model.quantization.train(*x)
            changes = [tf.constant(rng.normal(size=v.shape), v.dtype) for v in variables]
        for variable, change in zip(variables, changes, strict=True):
            if change is not None:
                variable.assign_sub(0.05 * change)
    signatures = {k: v for k, v in model.signatures.items() if k != "train"}
    tf.saved_model.save(model, str(target), signatures=None if plain else signatures)
    return model


def served(model: Any, batch: int = 4) -> dict[tuple[str, str], np.ndarray]:
    """Return the outputs of every signature except `train`, by signature and output name."""
    values: dict[tuple[str, str], np.ndarray] = {}
    for name in sorted(set(model.signatures) - {"train"}):
        outputs = model.signatures[name](**harness.inputs_of(model.signatures[name], batch))
        values |= {(name, key): value.numpy() for key, value in outputs.items()}
    return values


def assert_same(before: Mapping[Any, np.ndarray], after: Mapping[Any, np.ndarray]) -> None:
    assert before.keys() == after.keys() != set()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key], str(key))


def assert_plain(path: Path) -> None:
    """Assert that no node of the graphs quantises, trains or controls, and that nothing else is left behind."""
    model = load(path)
    nodes = [n for g in model.graphs.values() for n in g.nodes.values()]
    assert not [n.name for n in nodes if STAND_IN in n.attrs or n.op.startswith("FakeQuant")]
    assert not [
        n.name
        for g, graph in model.graphs.items()
        if g in model.entries
        for n in graph.nodes.values()
        if n.op.startswith("Assign")
    ]
    assert not [v.name for v in model.variables.values() if v.name.startswith("quantization")]
    captured = {c for e in model.entries.values() for c in e.captures}
    assert set(model.variables) <= captured
    stored = {name for name, _ in tf.train.list_variables(str(path / "variables/variables"))}
    assert stored == {*model.variables, "_CHECKPOINTABLE_OBJECT_GRAPH"}


def first_call(model: Any, x: list[tf.Tensor]) -> tuple[dict[int, np.ndarray], Mapping[str, int]]:
    """Return the outputs of `serve` in its first call, and the kernels that it executes, with their counts."""
    outputs: list[Any] = []
    harness.batch_norm_kernels(lambda: None)  # forget what ran before
    kernels = harness.batch_norm_kernels(lambda: outputs.append(model.serve(*x)))
    return {i: y.numpy() for i, y in enumerate(tf.nest.flatten(outputs))}, kernels


SAVED = [
    *("module", "module_train", "module_shared", "keras_save", "keras_export", "nested", "if", "while"),
    *("no_signature", "form_v3_half", "form_v3_video", "form_shared", "form_by_hand", "form_float64"),
    *("two_layers_of_vectors", "keras_two_axes"),
]


@pytest.mark.parametrize("name", SAVED)
def test_outputs_are_those_of_the_fine_tuned_model(name: str, rewritten: Rewritten, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    before = trained(rewritten(name, bits=5), tuned, by_gradients=name in ("module_train", "keras_save"))
    hashes = harness.digest(tuned)
    report = bnqat.finalize(tuned, tmp_path / "final")
    assert report.baked
    assert harness.digest(tuned) == hashes
    after = tf.saved_model.load(str(tmp_path / "final"))
    x = [harness.images(spec.shape) for spec in harness.concrete(before.serve).structured_input_signature[0]]
    outputs, kernels = first_call(before, x)
    final_outputs, final_kernels = first_call(after, x)
    assert_same(outputs, final_outputs)
    if before.signatures:
        assert_same(served(before), served(after))
    assert_plain(tmp_path / "final")
    assert kernels == final_kernels
    assert bool(kernels) == (name not in ("form_float64", "keras_two_axes"))  # the kernel has no float64


def test_what_bnqat_wrote_needs_no_training(rewritten: Rewritten, tmp_path: Path) -> None:
    path = rewritten("module", bits=3)
    report = bnqat.finalize(path, tmp_path / "final")
    assert "the signature train trains, or changes its mode or variables, and is left out" in report.notes
    before, after = (tf.saved_model.load(str(p)) for p in (path, tmp_path / "final"))
    assert_same(served(before), served(after))
    assert sorted(p.name for p in (tmp_path / "final" / "assets.extra").iterdir()) == ["bnqat.json"]


def test_a_session_of_tensorflow_1_gives_the_same(rewritten: Rewritten, tmp_path: Path) -> None:
    """Keras 3 holds each variable twice: its export's main graph and its functions use different copies."""
    path = rewritten("keras3", bits=4)
    bnqat.finalize(path, tmp_path / "final")
    model = tf.saved_model.load(str(path))
    expected = served(model)
    ((name, x),) = harness.inputs_of(model.signatures["serving_default"]).items()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.load(session, ["serve"], str(tmp_path / "final"))
        signature = loaded.signature_def["serving_default"]
        for key, info in signature.outputs.items():
            output = session.run(info.name, {signature.inputs[name].name: x.numpy()})
            np.testing.assert_array_equal(output, expected["serving_default", key])


def test_a_keras_3_export(rewritten: Rewritten, tmp_path: Path) -> None:
    layer = keras.layers.TFSMLayer(rewritten("module", bits=4), call_endpoint="serve", call_training_endpoint="train")
    x = keras.Input((8, 8, 3))
    model = keras.Model(x, layer(x))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    data = harness.images((None, 8, 8, 3), 16).numpy()
    model.fit(data, np.ones(model.predict(data, verbose=0).shape), epochs=2, verbose=0)
    model.export(tmp_path / "tuned", verbose=False)
    expected = model.predict(data, verbose=0, batch_size=16)
    report = bnqat.finalize(tmp_path / "tuned", tmp_path / "final")
    assert {b.role for b in report.baked} == set(ROLES)
    final = tf.saved_model.load(str(tmp_path / "final"))
    np.testing.assert_array_equal(final.serve(data), expected)
    assert_plain(tmp_path / "final")


def test_a_plain_save_gets_its_signature_back(model: Callable[[str], Path], tmp_path: Path) -> None:
    bnqat.rewrite(model("module_train"), tmp_path / "q", bits=4)
    before = trained(tmp_path / "q", tmp_path / "tuned", plain=True)
    report = bnqat.finalize(tmp_path / "tuned", tmp_path / "final")
    assert report.signatures == ["serving_default"]
    assert "the signature serving_default is made from the model's serve" in report.notes
    after = tf.saved_model.load(str(tmp_path / "final"))
    signature = after.signatures["serving_default"]
    ((name, x),) = harness.inputs_of(signature).items()
    (output,) = signature(**{name: x}).values()
    np.testing.assert_array_equal(output, before.serve(x))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        signatures = tf.compat.v1.saved_model.load(session, ["serve"], str(tmp_path / "final")).signature_def
        ((_, fed),), ((_, info),) = (
            signatures["serving_default"].inputs.items(),
            signatures["serving_default"].outputs.items(),
        )
        np.testing.assert_array_equal(session.run(info.name, {fed.name: x.numpy()}), output.numpy())


class Many(tf.Module):
    """Two inputs whose order is not that of their names, and twelve outputs."""

    def __init__(self) -> None:
        self.gamma = tf.Variable([0.9, -1.1], name="gamma")
        self.beta = tf.Variable([0.3, 0.1], name="beta")
        self.mean = tf.Variable([0.2, -0.4], trainable=False, name="moving_mean")
        self.variance = tf.Variable([0.5, 1.5], trainable=False, name="moving_variance")

    @tf.function
    def serve(self, z: tf.Tensor, a: tf.Tensor) -> list[tf.Tensor]:
        y, *_ = tf.compat.v1.nn.fused_batch_norm(z, self.gamma, self.beta, self.mean, self.variance, is_training=False)
        return [y * float(i) + a for i in range(12)]


def test_a_signature_made_for_many_inputs_and_outputs_has_them_in_order(tmp_path: Path) -> None:
    module = Many()
    specs = [tf.TensorSpec([None, 2, 2, 2], name="z"), tf.TensorSpec([], name="a")]
    concrete = module.serve.get_concrete_function(*specs)
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=None)
    del concrete
    bnqat.rewrite(tmp_path / "m", tmp_path / "q")
    again = tf.saved_model.load(str(tmp_path / "q"))
    del again.train  # else TensorFlow makes a signature of what it finds
    plain = tf.Module()
    plain.serve, plain.other, plain.quantization = again.serve, again.quantization.train, again.quantization
    tf.saved_model.save(plain, str(tmp_path / "tuned"))
    bnqat.finalize(tmp_path / "tuned", tmp_path / "final")
    signature = tf.saved_model.load(str(tmp_path / "final")).signatures["serving_default"]
    z, a = harness.images((None, 2, 2, 2)), tf.constant(7.0)
    outputs = signature(z=z, a=a)
    for index, expected in enumerate(again.serve(z, a)):
        np.testing.assert_array_equal(outputs[f"output_{index}"], expected)


QUANTIZERS: dict[str, dict[str, dict[str, Any]]] = {
    "linear": {
        "gamma": {"bits": 3},
        "beta": {"bits": 4, "narrow_range": True},
        "moving_mean": {"bits": 16},
        "moving_variance": {"bits": 8, "scheme": "affine"},
    },
    "symmetric": {
        "gamma": {"bits": 4, "scheme": "symmetric"},
        "beta": {"bits": 5, "scheme": "power_of_two"},
        "moving_mean": {"bits": 2, "scheme": "symmetric", "narrow_range": False},
        "moving_variance": {"bits": 3},
    },
    "ranges": {
        "gamma": {"bits": 6, "range": (-1, 2)},
        "beta": {"bits": 4, "range": "learned"},
        "moving_mean": {"bits": 4, "range": "ema"},
        "moving_variance": {"bits": 6, "range": (0.01, 3)},
    },
    "stochastic": {role: {"bits": 4, "rounding": "stochastic"} for role in ROLES},
    "one off": {
        "gamma": {"bits": 4, "range": "ema"},
        "beta": {"scheme": "none"},
        "moving_mean": {"bits": 3, "narrow_range": True, "range": "ema"},
        "moving_variance": {"bits": 16, "narrow_range": True, "range": "ema"},
    },
}
"""Options of each role; the values of a variable depend on its own role's alone."""


def values_of(variable: Mapping[str, Any]) -> Any:
    """Return a variable's values from its codes, as docs/deployment.md says, without using bnqat."""
    codes = np.asarray(variable["codes"])
    if variable["scheme"] == "log":
        wide = np.exp(codes * float(variable["scale"]) + float(variable["origin"]))
        values: np.ndarray = np.maximum(wide.astype(np.float32) - np.float32(variable["epsilon"]), np.float32(0))
    else:
        values = (codes - variable["zero_point"]).astype(np.float32) * np.float32(variable["scale"])
    for position, value in variable["exceptions"].items():
        values[int(position)] = value
    return values


@pytest.mark.parametrize("name", QUANTIZERS)
def test_codes_give_exactly_what_is_in_the_variables(name: str, rewritten: Rewritten, tmp_path: Path) -> None:
    options = QUANTIZERS[name]
    average = "stored" if name == "one off" else "statistic"
    tuned = tmp_path / "tuned"
    before = trained(rewritten("module", config={"defaults": options}, quantize_average=average), tuned)
    bnqat.finalize(tuned, tmp_path / "final", params=tmp_path / "p.json")
    bnqat.finalize(tuned, tmp_path / "again", params=tmp_path / "p.npz")
    assert harness.digest(tmp_path / "final") == harness.digest(tmp_path / "again")
    assert_same(served(before), served(tf.saved_model.load(str(tmp_path / "final"))))
    reader = tf.train.load_checkpoint(str(tmp_path / "final/variables/variables"))
    table = json.loads((tmp_path / "p.json").read_text())["variables"]
    arrays = np.load(tmp_path / "p.npz")
    assert list(arrays["variables"]) == [v["variable"] for v in table]
    assert len(table) == (6 if name == "one off" else 8)
    for variable in table:
        full_name = variable["variable"]
        bits = options[variable["role"]]["bits"]
        stored = reader.get_tensor(variable["checkpoint_key"])
        assert (variable["bits"], full_name) == (bits, f"{variable['layer_name']}/{variable['role']}")
        np.testing.assert_array_equal(values_of(variable), stored)
        assert not variable["exceptions"]
        codes = arrays[f"{full_name}.codes"]
        assert codes.dtype == np.int32
        np.testing.assert_array_equal(codes, variable["codes"])
        assert codes.max() - codes.min() < 2**bits - variable["narrow_range"]
        assert arrays[f"{full_name}.scale"] == variable["scale"]
        np.testing.assert_array_equal(arrays[f"{full_name}.value"], stored)


def test_the_switch_counts_as_on(rewritten: Rewritten, tmp_path: Path) -> None:
    """Finalize quantises a model even if it was saved before its start step or on its ramp."""
    path = rewritten("module", bits=3, start_step=FAR, ramp_steps=10)
    bnqat.finalize(path, tmp_path / "final")
    model, final = (tf.saved_model.load(str(p)) for p in (path, tmp_path / "final"))
    off = served(model)
    model.quantization.step.assign(FAR + 10)
    assert_same(served(model), served(final))
    assert any(np.any(off[key] != value) for key, value in served(final).items())


def test_widths_in_force_count_and_zero_is_off(rewritten: Rewritten, tmp_path: Path) -> None:
    model = tf.saved_model.load(str(rewritten("module", bits=8)))
    model.quantization.bits.gamma.assign(2)
    model.quantization.bits.beta.assign(0)
    model.quantization.layer_bits.gamma.assign([-1, 5])
    tf.saved_model.save(model, str(tmp_path / "tuned"), signatures={"s": model.signatures["serving_default"]})
    report = bnqat.finalize(tmp_path / "tuned", tmp_path / "final", params=tmp_path / "p.json")
    assert sorted(b.bits for b in report.baked) == [0, 0, 2, 5, 8, 8, 8, 8]
    assert all(b.error == 0 for b in report.baked if b.role == "beta")
    variables = {b["variable"]: b for b in json.loads((tmp_path / "p.json").read_text())["variables"]}
    for baked in variables.values():
        assert (baked["codes"] is None) == (baked["role"] == "beta")
    before, after = (tf.saved_model.load(str(tmp_path / n)) for n in ("tuned", "final"))
    assert_same(served(before), served(after))


def test_values_that_are_no_numbers_are_listed(rewritten: Rewritten, tmp_path: Path) -> None:
    model = tf.saved_model.load(str(rewritten("module", bits=4)))
    gamma = next(v for v in model.quantization.variables if "gamma" in v.name and v.shape.rank == 1)
    gamma.assign(tf.tensor_scatter_nd_update(gamma, [[1], [3]], [np.nan, -np.inf]))
    tf.saved_model.save(model, str(tmp_path / "tuned"), signatures={"s": model.signatures["serving_default"]})
    bnqat.finalize(tmp_path / "tuned", tmp_path / "final", params=tmp_path / "p.json")
    table = json.loads((tmp_path / "p.json").read_text())["variables"]
    assert [v["exceptions"] for v in table if v["exceptions"]] == [{"1": "nan", "3": "-inf"}]


class Twice(tf.Module):
    """Two batch norms that share gamma and the variance but have different epsilons; gamma is also used directly."""

    def __init__(self, again: bool) -> None:
        rng = np.random.default_rng(3)
        for name in (*ROLES, "other_mean", "other_beta"):
            values = np.abs(rng.normal(1, 0.5, 6)).astype("float32")
            setattr(self, name, tf.Variable(values, trainable=name in ("gamma", "beta", "other_beta"), name=name))
        self.again = again

    @tf.function(input_signature=[tf.TensorSpec([None, 3, 3, 6], name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        apply = tf.compat.v1.nn.fused_batch_norm
        y, *_ = apply(x, self.gamma, self.beta, self.moving_mean, self.moving_variance, 0.001, is_training=False)
        y = tf.nn.relu(y)
        y, *_ = apply(y, self.gamma, self.other_beta, self.other_mean, self.moving_variance, 0.5, is_training=False)
        return y + (self.gamma if self.again else 0.0)


@pytest.mark.parametrize("again", [False, True])
def test_what_is_used_in_two_ways_becomes_a_variable_of_its_own(again: bool, tmp_path: Path) -> None:
    module = Twice(again)
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.serve)
    bnqat.rewrite(tmp_path / "m", tmp_path / "q", bits=3)
    report = bnqat.finalize(tmp_path / "q", tmp_path / "final")
    before, after = (tf.saved_model.load(str(tmp_path / n)) for n in ("q", "final"))
    assert_same(served(before), served(after))
    added = sorted((b.role, b.added) for b in report.baked)
    assert [a for a in added if a[0] == "gamma"] == [("gamma", again)]
    # One of the two quantisers of the variance has another epsilon.
    assert [a for a in added if a[0] == "moving_variance"] == [("moving_variance", True)] * 2
    assert {v.name for v in after.variables} >= ({"gamma:0"} if again else set())


def halved(vector: tf.Tensor, context: Any) -> tf.Tensor:  # noqa: ARG001  what a quantiser of one's own is given
    return tf.round(vector * 2.0) * 0.5


def with_erf(vector: tf.Tensor, context: Any) -> tf.Tensor:  # noqa: ARG001  see above
    return tf.math.erf(vector)


def test_ops_that_are_not_known_need_trust(model: Callable[[str], Path], tmp_path: Path) -> None:
    bnqat.rewrite(model("module"), tmp_path / "known", quantizer={"gamma": halved})
    bnqat.rewrite(model("module"), tmp_path / "unknown", quantizer={"gamma": with_erf})
    report = bnqat.finalize(tmp_path / "known", tmp_path / "a", params=tmp_path / "p.json")
    assert {b.scheme for b in report.baked if b.role == "gamma"} == {"pipeline halved"}
    with pytest.raises(bnqat.Error, match=r"a quantiser computes with Erf .* pass --trust"):
        bnqat.finalize(tmp_path / "unknown", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    bnqat.finalize(tmp_path / "unknown", tmp_path / "b", trust=True)
    for name, final in (("known", "a"), ("unknown", "b")):
        assert_same(*(served(tf.saved_model.load(str(tmp_path / n))) for n in (name, final)))


class Writes(tf.Module):
    """A model that leaves a trace whenever anything of it runs."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.bn = [tf.Variable(v, name=n) for n, v in zip(ROLES, ([0.7], [0.2], [0.1], [1.3]), strict=True)]
        self.table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer([0], [1.0]), 0.0)

    @tf.function(input_signature=[tf.TensorSpec([None, 2, 2, 1], name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        tf.io.write_file(self.file, "run")
        y, *_ = tf.compat.v1.nn.fused_batch_norm(x, *self.bn, is_training=False)
        return y + self.table.lookup(tf.constant([0]))


def test_a_model_is_never_executed_and_keeps_its_tables(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    module = Writes(str(trace))
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.serve)
    bnqat.rewrite(tmp_path / "m", tmp_path / "q", bits=2)
    bnqat.finalize(tmp_path / "q", tmp_path / "final", fold=True)
    assert not trace.exists()
    before, after = (tf.saved_model.load(str(tmp_path / n)) for n in ("q", "final"))
    assert_same(served(before), served(after))
    assert trace.read_text() == "run"
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.load(session, ["serve"], str(tmp_path / "final"))
        signature = loaded.signature_def["serving_default"]
        x = np.ones((1, 2, 2, 1), np.float32)
        assert session.run(signature.outputs["output_0"].name, {signature.inputs["x"].name: x}).shape == (1, 2, 2, 1)


FOLDED = {"module": (4, 0), "keras_save": (10, 0), "keras_export": (6, 0), "module_shared": (2, 3)}
FOLDED_LAYERS = {
    "module": ["batch_norm", "batch_norm_1"],
    "keras_save": ["batch_normalization", "batch_normalization_1"],
    "keras_export": ["batch_normalization", "batch_normalization_1"],
    "module_shared": ["batch_norm"],
}


@pytest.mark.parametrize("name", FOLDED)
def test_folding_changes_outputs_by_rounding_alone(name: str, rewritten: Rewritten, tmp_path: Path) -> None:
    path = rewritten(name, bits=6)
    report = bnqat.finalize(path, tmp_path / "folded", fold=True)
    assert (len(report.folded), len(report.not_folded)) == FOLDED[name]
    assert report.folded_layers == FOLDED_LAYERS[name]
    assert {group.reason for group in report.skipped_layers} == {site.reason for site in report.not_folded}
    before, after = (served(tf.saved_model.load(str(p))) for p in (path, tmp_path / "folded"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_allclose(after[key], value, rtol=0, atol=2e-6 * np.abs(value).max())
    kernels = [n for g in load(tmp_path / "folded").graphs.values() for n in g.nodes.values() if "FusedBatch" in n.op]
    assert bool(kernels) == bool(report.not_folded)
    assert all("comes from" in s.reason for s in report.not_folded)


def printed(*arguments: object) -> list[str]:
    return CliRunner().invoke(main, [str(a) for a in arguments]).stdout.splitlines()


def test_what_is_printed_names_each_layer_once(rewritten: Rewritten, tmp_path: Path) -> None:
    arguments = ("finalize", rewritten("keras_save", bits=4), tmp_path / "final", "--fold", "--dry-run")
    lines = printed(*arguments)
    folding = "2 batch norms folded into the convolution before them: batch_normalization, batch_normalization_1"
    assert [line for line in lines if "folded" in line] == [folding]
    assert lines[-1] == "dry run: nothing was written"
    with_sites = [line for line in printed(*arguments, "-v") if "folded" in line]
    assert with_sites[0] == folding
    assert len([line for line in with_sites if line.startswith("folded: ")]) == 10
    shared = ("finalize", rewritten("module_shared", bits=4), tmp_path / "final", "--fold", "--dry-run")
    assert [line for line in printed(*shared) if "folded" in line] == [
        "1 batch norm folded into the convolution before it: batch_norm",
        "not folded, batch_norm_1: what it normalises comes from Relu, and not from a convolution",
        "not folded, batch_norm_2: what it normalises comes from Arg, and not from a convolution",
    ]


class Shares(tf.Module):
    """A convolution whose filters are used twice, before two batch norms."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.w = tf.Variable(rng.normal(size=(1, 1, 3, 3)).astype("float32"), name="w")
        self.bn = [
            [tf.Variable(np.abs(rng.normal(1, 0.3, 3)).astype("float32"), name=f"{i}/{n}") for n in ROLES]
            for i in (0, 1)
        ]

    @tf.function(input_signature=[tf.TensorSpec([None, 4, 4, 3], name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        for parameters in self.bn:
            x, *_ = tf.compat.v1.nn.fused_batch_norm(tf.nn.conv2d(x, self.w, 1, "SAME"), *parameters, is_training=False)
        return x


def test_filters_that_are_shared_are_not_scaled(tmp_path: Path) -> None:
    module = Shares()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.serve)
    bnqat.rewrite(tmp_path / "m", tmp_path / "q")
    report = bnqat.finalize(tmp_path / "q", tmp_path / "final", fold=True)
    assert not report.folded
    assert {s.reason for s in report.not_folded} == {
        "the convolution's filters, or the variable for its bias, are used elsewhere as well"
    }
    assert_same(*(served(tf.saved_model.load(str(tmp_path / n))) for n in ("q", "final")))


V1 = (
    "function_op",
    "v1_by_hand",
    "v1_two_fused",
    "v1_two_fused_references",
    "v1_layers_fused_if",
    "v1_layers_plain",
    "v1_loop",
)


@pytest.mark.parametrize("name", V1)
def test_models_of_tensorflow_1_that_were_saved_again(name: str, rewritten: Rewritten, tmp_path: Path) -> None:
    path = rewritten(name, bits=5)
    with pytest.raises(bnqat.Error, match=r"in TensorFlow 1's format; load it with tf\.saved_model\.load"):
        bnqat.finalize(path, tmp_path / "direct")
    model = tf.saved_model.load(str(path))
    signatures = {k: v for k, v in model.signatures.items() if k != "train"}
    tf.saved_model.save(model, str(tmp_path / "tuned"), signatures=signatures)
    report = bnqat.finalize(tmp_path / "tuned", tmp_path / "final")
    assert not any(b.added for b in report.baked)
    before, after = served(model), served(tf.saved_model.load(str(tmp_path / "final")))
    if any("may differ in the last bit" in note for note in report.notes):
        for key, value in before.items():  # the kernel is merged into the convolution now, which nothing stands between
            np.testing.assert_allclose(after[key], value, rtol=0, atol=2e-7 * np.abs(value).max())
    else:
        assert_same(before, after)
    assert_plain(tmp_path / "final")
    assert not any(site.training for site in load(tmp_path / "final").analysis(sites))


def command(*args: Any) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(a) for a in ("finalize", *args)])
    return result.exit_code, result.output


def test_the_command(rewritten: Rewritten, model: Callable[[str], Path], tmp_path: Path) -> None:
    path = rewritten("module", bits=4)
    final, report = tmp_path / "final", tmp_path / "r.json"
    code, said = command(path, final, "--dry-run", "--report", report)
    assert (code, final.exists()) == (0, False)
    assert "dry run: nothing was written" in said
    code, said = command(path, final, "--params", tmp_path / "p.npz", "--report", report)
    assert code == 0, said
    assert "8 variables quantised for good; signatures: serving_default" in said
    assert "removed: 11 variables of the quantisation and " in said
    assert json.loads(report.read_text())["variables_removed"]
    assert command(path, final)[0] == 2
    assert command(path, final, "--overwrite", "--fold")[0] == 0
    with pytest.raises(bnqat.Error, match="would lie in the model"):
        bnqat.finalize(path, tmp_path / "x", params=path / "p.npz")
    for args, sentence in (
        ((model("module"), tmp_path / "x"), "no quantiser was found"),
        ((path, path / "inside"), "overlap"),
        ((path, tmp_path / "x", "--params", tmp_path / "p.txt"), "ends with .npz or .json"),
        ((path, tmp_path / "x", "--params", path / "p.npz"), "would lie in the model"),
        ((path, tmp_path / "x", "--params", tmp_path / "p.npz", "--dry-run"), "leave out one of them"),
        ((path, tmp_path / "x", "--params", tmp_path / "p.npz", "--fold"), "finalize once with each"),
        ((tmp_path / "nowhere", tmp_path / "x"), "does not exist"),
    ):
        code, said = command(*args)
        assert (code, (tmp_path / "x").exists()) == (2, False)
        assert sentence in said
        assert len([line for line in said.splitlines() if line.startswith("bnqat: error")]) == 1
    code, said = command(final, tmp_path / "x")
    assert (code, "is finalised already" in said) == (2, True)


def test_a_finalised_model_is_told_as_such(model: Rewritten, rewritten: Rewritten, tmp_path: Path) -> None:
    source, result, final = model("module"), rewritten("module", bits=4), tmp_path / "final"
    bnqat.finalize(result, final)
    for before in (source, result):
        difference = bnqat.diff(before, final)
        assert difference.headline == "2 batch norms hold their 4-bit values for good: the model is finalised."
        assert [(layer.status, layer.bits) for layer in difference.report.layers] == [("finalised", [4])] * 2
        assert difference.report.skipped == {}
        with pytest.raises(bnqat.Error, match="is a finalised model, whose variables hold quantised values; verify"):
            bnqat.verify(before, final)
    assert bnqat.diff(result, source).headline == "2 batch norms are no longer quantised."
    with pytest.raises(bnqat.NothingToRewriteError, match="is finalised already; there is nothing to bake in"):
        bnqat.finalize(final, tmp_path / "again")
    notes = bnqat.rewrite(final, tmp_path / "q", dry_run=True).notes
    assert notes[0].startswith("the source is a finalised model: its values are rounded already")
    assert not bnqat.rewrite(source, tmp_path / "q", dry_run=True).notes[0].startswith("the source is a finalised")
