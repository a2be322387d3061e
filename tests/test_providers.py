"""A provider of the tests' own quantises biases: through options, reports, proof and deployment, with nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner, Result

import bnqat
import passes
from passes.quantization.custom import Quantizer
from passes.quantization.points import Provider, QuantizationPoint, QuantizedLayer, Quantizers
from passes.quantization.ranges import Ema, Fixed, Learned
from passes.quantization.roles import Role
from passes.quantization.schemes import Affine, Log
from passes.quantize import Quantize
from rewriter.app.cli import main
from rewriter.ir import Model
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests import harness, reference
from tests.models import FusedBatchNorm, save_module
from tests.passes.quantization.bias_points import BIAS, BiasPoints

F = np.float32


class Biased(tf.Module):
    """Convolution, bias, batch norm, and a classifier with a bias; the biases are called `first` and `second`."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(5)
        self.kernel = tf.Variable(rng.normal(0, 0.3, (3, 3, 3, 8)).astype(F), name="kernel")
        self.first = tf.Variable(rng.normal(0, 1, 8).astype(F), name="first")
        self.norm = FusedBatchNorm(8)
        self.weights = tf.Variable(rng.normal(0, 1, (8, 5)).astype(F), name="weights")
        self.second = tf.Variable(rng.normal(0, 1, 5).astype(F), name="second")

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        hidden = tf.nn.bias_add(tf.nn.conv2d(x, self.kernel, 1, "SAME"), self.first)
        hidden = tf.nn.relu(self.norm(hidden, training))
        return tf.nn.bias_add(tf.reduce_mean(hidden, [1, 2]) @ self.weights, self.second)

    @tf.function(input_signature=[tf.TensorSpec((None, 6, 6, 3), name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.call(x, training=False)


@pytest.fixture(autouse=True)
def provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(passes.PROVIDERS, f"{BiasPoints.__module__}:{BiasPoints.__name__}", (BIAS,))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_module(Biased(), tmp_path_factory.mktemp("biased") / "m")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


def values(path: Path) -> dict[str, np.ndarray]:
    """Return the values of variables by name."""
    model = load(path)
    return {v.name: np.asarray(model.value_of(key)) for key, v in model.variables.items()}


def quantized_biases(path: Path, bits: dict[str, int]) -> dict[str, np.ndarray]:
    before = values(path)
    return {name: reference.quantize("affine", before[name], n, 0.0).value for name, n in bits.items()}


def test_biases_are_quantised_by_the_reference(source: Path, tmp_path: Path) -> None:
    result = run("rewrite", source, tmp_path / "q", "--bits", "bias=4").output
    assert "also quantised: 2 biases to 4 bits" in result
    root = tf.saved_model.load(str(tmp_path / "q"))
    expected = quantized_biases(source, {"first": 4, "second": 4})
    for function in (root.serve, root.quantization.train):
        body = harness.concrete(function)
        nodes = {tag["layer_name"]: n for n, tag in harness.tags(body).items() if tag["role"] == "bias"}
        outputs = [body.graph.get_operation_by_name(nodes[name]).outputs[0].name for name in expected]
        got = harness.fetch(body, [harness.images((None, 6, 6, 3))], outputs)
        for value, wanted in zip(got, expected.values(), strict=True):
            np.testing.assert_array_equal(value, wanted)


def test_they_have_controls_of_their_own(source: Path, tmp_path: Path) -> None:
    """Widths of the role and of its layers; a schedule in common; off is the source, bit for bit."""
    bnqat.rewrite(
        source, tmp_path / "q", bits={"bias": 3}, scheme=dict.fromkeys(passes.roles(), "none") | {"bias": "symmetric"}
    )
    x = harness.images((None, 6, 6, 3))
    float_model, root = (tf.saved_model.load(str(p)) for p in (source, tmp_path / "q"))
    bits, layer_bits = root.quantization.bits.bias, root.quantization.layer_bits.bias
    assert (int(bits), layer_bits.numpy().tolist()) == (3, [-1, -1])
    wanted, on = float_model.serve(x), root.serve(x)
    assert not np.array_equal(on, wanted)
    bits.assign(0)
    np.testing.assert_array_equal(root.serve(x), wanted)
    layer_bits.assign([3, 3])
    np.testing.assert_array_equal(root.serve(x), on)
    root.quantization.start_step.assign(1)
    np.testing.assert_array_equal(root.serve(x), wanted)
    root.quantization.train(x)
    assert int(root.quantization.step) == 1
    assert not np.array_equal(root.serve(x), wanted)


def test_every_command_knows_them(source: Path, tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text(
        """
        [defaults.bias]
        bits = 5
        [[rules]]
        match = "second"
        bias.bits = 2
        """
    )
    run("rewrite", source, tmp_path / "q", "--config", tmp_path / "options.toml")
    report = bnqat.inspect(tmp_path / "q")
    assert [(q.role, q.layer_name, q.bits, q.scheme) for q in report.quantizers] == [
        ("bias", "first", 5, "affine"),
        ("bias", "second", 2, "affine"),
    ]
    assert "what else is quantised" in run("inspect", tmp_path / "q").output
    assert ">second</td><td>bias</td>" in report.to_html()
    assert "holds           off: " in run("verify", source, tmp_path / "q").output
    np.savez(tmp_path / "x.npz", x=harness.images((None, 6, 6, 3)))
    rows = json.loads(run("sensitivity", tmp_path / "q", "--inputs", tmp_path / "x.npz", "--json").stdout)["rows"]
    errors = {row["name"]: row["error"] for row in rows if row["role"] == "bias"}
    assert errors["first"]["2"] > errors["first"]["8"] > 0

    run("finalize", tmp_path / "q", tmp_path / "f", "--params", tmp_path / "p.json")
    expected = quantized_biases(source, {"first": 5, "second": 2})
    got = values(tmp_path / "f")
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)
    table = json.loads((tmp_path / "p.json").read_text())["variables"]
    assert {(row["layer_name"], row["bits"]) for row in table if row["role"] == "bias"} == {("first", 5), ("second", 2)}
    x = harness.images((None, 6, 6, 3))
    tuned, final = (tf.saved_model.load(str(tmp_path / name)) for name in ("q", "f"))
    np.testing.assert_array_equal(final.serve(x), tuned.serve(x))


@pytest.mark.parametrize("range_", ["ema", "learned", [-1.0, 1.0]])
def test_ranges_that_are_kept(source: Path, tmp_path: Path, range_: Any) -> None:
    """A moving range starts at the values and follows them; a learned one is trained; a fixed one clips."""
    bnqat.rewrite(source, tmp_path / "q", range={"bias": range_})
    root = tf.saved_model.load(str(tmp_path / "q"))
    x = harness.images((None, 6, 6, 3))
    held = {v.name.removesuffix(":0"): v for v in root.quantization.variables}
    first = values(source)["first"]
    if range_ == "ema":
        limits = held["quantization/range/bias"]
        np.testing.assert_array_equal(limits[0], [min(first.min(), 0), max(first.max(), 0)])
        root.first.assign(first * 2)
        root.serve(x)
        np.testing.assert_array_equal(limits[0], [min(first.min(), 0), max(first.max(), 0)])
        root.quantization.train(x)
        np.testing.assert_allclose(limits[0], [first.min() * 1.01, first.max() * 1.01], rtol=1e-6)
    elif range_ == "learned":
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(root.quantization.train(x) ** 2)
        assert np.any(tape.gradient(loss, held["quantization/scale/bias"]))
    else:
        expected = reference.quantize("affine", first, 8, 0.0, limits=np.array(range_, F)).value
        run("finalize", tmp_path / "q", tmp_path / "f")
        np.testing.assert_array_equal(values(tmp_path / "f")["first"], expected)


def test_without_their_name_they_stay_float(source: Path, tmp_path: Path) -> None:
    for number, options in enumerate(({}, {"bits": 4}, {"scheme": "symmetric"})):
        report = bnqat.rewrite(source, tmp_path / str(number), **options)  # type: ignore[arg-type]
        assert report.quantizers == []
        assert not any(name.endswith("/bias") for name in report.variables_added)
    assert "bias" not in run("rewrite", "--bits", "4", "--print-config").output
    assert "[defaults.bias]" in run("rewrite", "--bits", "bias=4", "--print-config").output


def test_a_width_for_all_roles_is_for_those_that_are_named_too(source: Path, tmp_path: Path) -> None:
    report = bnqat.rewrite(source, tmp_path / "q", bits=6, scheme={"bias": "symmetric"})
    assert {q.bits for q in report.quantizers} == {6}


def test_options_that_do_not_suit_them(source: Path, tmp_path: Path) -> None:
    with pytest.raises(bnqat.Error, match="bias: the scheme log is for values above zero"):
        bnqat.rewrite(source, tmp_path / "q", scheme={"bias": "log"})
    with pytest.raises(
        bnqat.Error, match="'bia' is no role; there are gamma, beta, moving_mean, moving_variance, weight, bias"
    ):
        bnqat.rewrite(source, tmp_path / "q", bits={"bia": 4})
    assert not (tmp_path / "q").exists()


def test_what_cannot_be_quantised_is_named(tmp_path: Path) -> None:
    """One function adds two biases, so no quantiser of its own could serve either; training has a copy of it."""
    module = Biased()
    add = tf.function(tf.nn.bias_add)
    module.third = tf.Variable(np.ones(5, F), name="third")
    call = module.call
    module.serve = tf.function(
        lambda x: add(add(call(x, False), module.third), module.second),
        input_signature=[tf.TensorSpec((None, 6, 6, 3), name="x")],
    )
    report = bnqat.rewrite(save_module(module, tmp_path / "m"), tmp_path / "q", bits={"bias": 4})
    assert [s.reason for s in report.skipped] == ["its function adds several biases"] * 2
    assert {q.layer_name for q in report.quantizers} == {"first", "second"}


class Odd(tf.Module):
    """Values that have no codes: whole numbers, and a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = FusedBatchNorm(3)
        self.whole = tf.Variable(np.array([-130, 20, 2200], np.int32), name="whole")

    @tf.function(input_signature=[tf.TensorSpec((None, 6, 6, 3), name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.norm(x, training=False) * tf.cast(
            tf.nn.bias_add(tf.zeros([1, 3], tf.int32), self.whole), tf.float32
        )


def test_whole_numbers_are_not_quantised(tmp_path: Path) -> None:
    report = bnqat.rewrite(save_module(Odd(), tmp_path / "m"), tmp_path / "q", bits={"bias": 4})
    assert {s.reason for s in report.skipped} == {"its values are int32, and only floating-point values are quantised"}
    assert "no value of the role bias was quantised: the model has none, or none that can be" in report.notes


@dataclass(frozen=True)
class ReluPoints(BiasPoints):
    """The outputs of every Relu, as a provider that knows neither variables nor shapes would have them."""

    shape: tuple[int, ...] = (-1,) * 4
    axis: int | None = None

    def layers(self, _: Model) -> Sequence[QuantizedLayer]:
        return [QuantizedLayer("relu", ())]

    def points(self, model: Model, _: Quantizers) -> Iterator[QuantizationPoint]:
        for graph in model.graphs.values():
            for value, edge in graph.edges():
                if value.node and graph.nodes[value.node].op == "Relu":
                    yield QuantizationPoint(edge, "bias", 0, "relu", self.shape, self.axis)


@pytest.mark.parametrize(
    ("quantizer", "points", "reason"),
    [
        (Affine(range=Learned()), ReluPoints(), "its shape is not known, which learned ranges and functions"),
        (Affine(range=Ema()), ReluPoints(), "no variable holds its values, with which a range that is ema would begin"),
        (
            Affine(range=Ema()),
            ReluPoints(axis=-1),
            "a range that is ema is one for all values",
        ),
        (Affine(), ReluPoints(shape=()), "it is a single number"),
        (Log(), ReluPoints(), "the scheme log needs an epsilon"),
    ],
)
def test_what_a_value_cannot_have_is_said(source: Path, quantizer: Quantizer, points: Provider, reason: str) -> None:
    role = Role("bias", unsuited={})
    object.__setattr__(points, "roles", (role,))
    _, (step,) = Pipeline([Quantize(quantizers={"bias": quantizer}, providers=(points,))]).run(load(source))
    assert step.skipped
    assert all(skip.reason.startswith(reason) for skip in step.skipped)


def test_a_given_range_needs_no_variable(source: Path, tmp_path: Path) -> None:
    quantize = Quantize(quantizers={"bias": Affine(4, Fixed(0.0, 3.0))}, providers=(ReluPoints(),))
    bnqat.rewrite(source, tmp_path / "q", passes=[quantize])
    root = tf.saved_model.load(str(tmp_path / "q"))
    body = harness.concrete(root.serve)
    (name,) = harness.tags(body)
    node = body.graph.get_operation_by_name(name)
    got, raw = harness.fetch(body, [harness.images((None, 6, 6, 3))], [node.outputs[0].name, node.inputs[-1].name])
    wanted = reference.quantize("affine", raw, 4, 0.0, limits=np.array([0, 3], F)).value
    np.testing.assert_array_equal(got, wanted)


def test_providers_that_meet_are_refused(source: Path) -> None:
    with pytest.raises(bnqat.Error, match="two providers have the role bias"):
        Quantize(providers=(BiasPoints(), BiasPoints()))
    other = ReluPoints()
    object.__setattr__(other, "roles", (Role("other"),))
    model = load(source)
    points = [p for p in BiasPoints().points(model, {}) if isinstance(p, QuantizationPoint)]
    object.__setattr__(other, "points", lambda *_: (replace(p, role="other", layer=0) for p in points))
    both = Quantize(quantizers={"bias": Affine(), "other": Affine()}, providers=(BiasPoints(), other))
    with pytest.raises(bnqat.Error, match="two providers quantise input 1 of BiasAdd"):
        Pipeline([both]).run(model)


def test_a_role_that_only_a_rule_names(source: Path, tmp_path: Path) -> None:
    """It is quantised in the layers of the rule, also as printed and read again; a direct option counts over it."""
    config = {"rules": [{"match": "second", "bias": {"bits": 2}}]}
    report = bnqat.rewrite(source, tmp_path / "q", config=config)
    assert [(q.layer_name, q.bits) for q in report.quantizers] == [("second", 2)]
    (tmp_path / "a.toml").write_text('[[rules]]\nmatch = "second"\nbias.bits = 2\n')
    printed = run("rewrite", "--config", tmp_path / "a.toml", "--print-config").output
    (tmp_path / "b.toml").write_text(printed)
    report = bnqat.rewrite(source, tmp_path / "r", config=tmp_path / "b.toml")
    assert [(q.layer_name, q.bits) for q in report.quantizers] == [("second", 2)]
    report = bnqat.rewrite(source, tmp_path / "s", config=config, bits=6)
    assert {q.bits for q in report.quantizers} == {6}


def test_without_its_provider_a_result_is_still_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("rewrite", source, tmp_path / "q", "--bits", "bias=4")
    monkeypatch.undo()
    assert "bias" not in passes.roles()
    assert {q.role for q in bnqat.inspect(tmp_path / "q").quantizers} == {"bias"}
    np.savez(tmp_path / "x.npz", x=harness.images((None, 6, 6, 3)))
    rows = json.loads(run("sensitivity", tmp_path / "q", "--inputs", tmp_path / "x.npz", "--json").stdout)["rows"]
    assert [row["role"] for row in rows if row["layer"] == 0][-1] == "bias"
    run("finalize", tmp_path / "q", tmp_path / "f")
    for name, value in quantized_biases(source, {"first": 4, "second": 4}).items():
        np.testing.assert_array_equal(values(tmp_path / "f")[name], value)


def test_a_model_in_which_nothing_trains(tmp_path: Path) -> None:
    class Plain(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = tf.Variable(np.arange(3, dtype=F), name="first")

        @tf.function(input_signature=[tf.TensorSpec((None, 3), name="x")])
        def serve(self, x: tf.Tensor) -> tf.Tensor:
            return tf.nn.bias_add(x, self.first)

    report = bnqat.rewrite(save_module(Plain(), tmp_path / "m"), tmp_path / "q", bits={"bias": 2}, passes=["quantize"])
    assert any(note.startswith("nothing counts steps, as there is no training function") for note in report.notes)
    root = tf.saved_model.load(str(tmp_path / "q"))
    np.testing.assert_array_equal(
        root.serve(np.zeros((1, 3), F))[0], reference.quantize("affine", np.arange(3, dtype=F), 2, 0.0).value
    )


def test_a_provider_that_cannot_be_loaded(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(passes.PROVIDERS, "no_such_module:Points", ())
    with pytest.raises(bnqat.Error, match="cannot load no_such_module:Points: No module named"):
        bnqat.rewrite(source, tmp_path / "q")
    with pytest.raises(bnqat.Error, match="'my role' is no name of a role"):
        Role("my role")


def test_the_provider_fits_in_sixty_lines() -> None:
    text = (Path(__file__).parent / "passes/quantization/bias_points.py").read_text()
    assert len(text.splitlines()) <= 60
