"""Models without batch norms: every command takes them where other values are quantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
import passes
from passes.entries.training import only_training
from passes.quantization.training_functions import TRAIN
from passes.training.derive_training import DeriveTraining
from rewriter.app.pass_list import pass_list
from rewriter.app.settings import settings
from rewriter.ir import Model
from rewriter.savedmodel.read import load
from tests import harness
from tests.conftest import once
from tests.models.plain import INPUTS, PLAIN_MODELS, Plain
from tests.passes.quantization.bias_points import BIAS, BiasPoints

OFF = 10**9
BITS = {"weight": 4, "bias": 4}
V2 = [name for name in PLAIN_MODELS if not name.startswith("v1")]
V1 = [name for name in PLAIN_MODELS if name.startswith("v1")]
COUNT = "AssignAddVariableOp"
HINT = "so there is nothing to rewrite; --bits weight=8 quantises weights"


@pytest.fixture(autouse=True)
def provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(passes.PROVIDERS, f"{BiasPoints.__module__}:{BiasPoints.__name__}", (BIAS,))


@pytest.fixture
def plain(shared: Path) -> Callable[[str], Path]:
    return lambda name: once(shared / "plain" / name, PLAIN_MODELS[name])


def batch(seed: int = 0) -> tf.Tensor:
    return harness.images((None, INPUTS), 8, seed)


def outputs(root: Any) -> dict[str, np.ndarray]:
    """Return the first output of each signature that serves."""
    served = {}
    for name, signature in root.signatures.items():
        if name != "train":
            specs = set(signature.structured_input_signature[1])
            mode = {"is_training": tf.constant(value=False)} if "is_training" in specs else {}
            fed = dict.fromkeys(specs - set(mode), batch())
            served[name] = next(iter(signature(**fed, **mode).values())).numpy()
    return served


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("name", V2)
def test_a_model_is_rewritten_trained_and_finalised(name: str, plain: Callable[[str], Path], tmp_path: Path) -> None:
    report = bnqat.rewrite(plain(name), tmp_path / "q", bits=BITS)
    assert {(q.role, q.bits) for q in report.quantizers} == set(BITS.items())
    assert report.layers == []
    source, root = (tf.saved_model.load(str(p)) for p in (plain(name), tmp_path / "q"))
    expected = outputs(source)
    assert not any(np.array_equal(value, expected[key]) for key, value in outputs(root).items())
    root.quantization.start_step.assign(OFF)
    assert_same(outputs(root), expected)
    root.quantization.start_step.assign(0)

    variables = root.quantization.trainable_variables
    assert len(variables) == 4
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(root.quantization.train(batch()) ** 2)
    assert int(root.quantization.step) == 1
    for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
        assert np.isfinite(gradient).all()
        assert np.any(gradient), variable.name
        variable.assign_sub(0.01 * gradient)
    root.signatures["train"](batch())
    assert int(root.quantization.step) == 2

    tf.saved_model.save(root, str(tmp_path / "tuned"), signatures=dict(root.signatures))
    for tuned in ("q", "tuned"):
        report_final = bnqat.finalize(tmp_path / tuned, tmp_path / f"{tuned}_f")
        assert {row.role for row in report_final.baked} == set(BITS)
        assert sorted(row.values for row in report_final.baked) == [3, 8, 24, 48]
        final = tf.saved_model.load(str(tmp_path / f"{tuned}_f"))
        assert_same(outputs(final), outputs(tf.saved_model.load(str(tmp_path / tuned))))
        kept = load(tmp_path / f"{tuned}_f")
        assert not {n.op for graph in kept.graphs.values() for n in graph.nodes.values()} & {"RandomUniform", COUNT}


@pytest.mark.parametrize("name", [*V2, *V1])
def test_verify_holds(name: str, plain: Callable[[str], Path], tmp_path: Path) -> None:
    bnqat.rewrite(plain(name), tmp_path / "q", bits=BITS)
    verification = bnqat.verify(plain(name), tmp_path / "q")
    claims = {claim.name: claim for claim in verification.claims}
    assert verification.ok, str(verification)
    assert {claims[c].status for c in ("signatures", "off", "on", "statistics", "gradients")} == {"holds"}
    assert claims["statistics"].detail.startswith("a call of the training function counts one step; no run of ")
    assert claims["gradients"].detail == "finite for 2 weights and 2 biases"


@pytest.mark.parametrize("name", [*V2, *V1])
def test_refusals(name: str, plain: Callable[[str], Path], tmp_path: Path) -> None:
    """Without options; a second time; for a role that no value has. Nothing is written."""
    with pytest.raises(bnqat.NothingToRewriteError, match=HINT):
        bnqat.rewrite(plain(name), tmp_path / "none")
    with pytest.raises(bnqat.NothingToRewriteError, match=HINT):
        bnqat.rewrite(plain(name), tmp_path / "none", bits=4)
    bnqat.rewrite(plain(name), tmp_path / "q", bits={"weight": 4})
    for options in ({"bits": {"weight": 4}}, {}):
        with pytest.raises(
            bnqat.NothingToRewriteError,
            match=r"q is quantised already \(2 weights to 4 bits\); there is nothing to add",
        ):
            bnqat.rewrite(tmp_path / "q", tmp_path / "none", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "none").exists()


class Unbiased(Plain):
    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        del training
        return x @ self.kernels[0] + self.biases[0]


class Whole(Plain):
    """The only biases are whole numbers."""

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        del training
        return x + tf.cast(tf.nn.bias_add(tf.zeros([1, INPUTS], tf.int32), self.whole), tf.float32)

    def __init__(self) -> None:
        super().__init__()
        self.whole = tf.Variable(np.arange(INPUTS, dtype=np.int32), name="whole")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (Unbiased, "m holds no batch norm and no value of the role bias, so there is nothing to rewrite"),
        (Whole, "no value of the role bias of .*m can be quantised: its values are int32, and only floating-point"),
    ],
)
def test_a_role_that_no_value_has(make: type[Plain], sentence: str, tmp_path: Path) -> None:
    """Nothing is written, though a training function could be made."""
    module = make()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    with pytest.raises(bnqat.NothingToRewriteError, match=sentence):
        bnqat.rewrite(tmp_path / "m", tmp_path / "q", bits={"bias": 4})
    assert not (tmp_path / "q").exists()


def test_reports_speak_of_what_is_quantised(plain: Callable[[str], Path], tmp_path: Path) -> None:
    text = "quantised: 2 weights to 8 bits, 2 biases to 4 bits"
    report = bnqat.rewrite(plain("module"), tmp_path / "q", bits={"weight": 8, "bias": 4}, start_step=5)
    assert str(report).splitlines()[:3] == [
        "no batch norm found",
        text,
        "train is derived from serving: dropout and regularisers of the original are absent",
    ]
    assert report.headline == text
    inspection = bnqat.inspect(tmp_path / "q")
    assert inspection.headline == f"q, {text}"
    assert "what is quantised" in str(inspection)
    compared = bnqat.diff(plain("module"), tmp_path / "q")
    assert compared.headline == (
        "2 weights were quantised to 8 bits; 2 biases were quantised to 4 bits; "
        "outputs are unchanged until step 5 of training."
    )
    assert compared.report.verdict.other_changes == 0
    bnqat.finalize(tmp_path / "q", tmp_path / "f")
    finalized = bnqat.diff(plain("module"), tmp_path / "f").headline
    assert finalized == "2 weights and 2 biases hold their 4- and 8-bit values for good: the model is finalised."
    released = bnqat.diff(tmp_path / "q", plain("module")).headline
    assert released == "2 weights and 2 biases are no longer quantised."
    rows = bnqat.sensitivity(tmp_path / "q", {"x": batch().numpy()}, bits=[8, 2]).rows
    assert sorted(row.role for row in rows) == ["bias", "bias", "weight", "weight"]
    assert all(row.error[2] > row.error[8] > 0 for row in rows)


def test_dropout_of_the_trace_acts_in_training_alone(plain: Callable[[str], Path], tmp_path: Path) -> None:
    report = bnqat.rewrite(plain("keras2"), tmp_path / "q", bits={"weight": 8})
    assert report.train_note.startswith("train is the source's training trace, __inference_sequential_layer_call")
    root = tf.saved_model.load(str(tmp_path / "q"))
    for function, drops in ((root.train, True), (root.serve, False)):
        assert drops is not np.array_equal(function(batch()), function(batch()))


class Sampled(Plain):
    """Other functions of the root draw random numbers, and take and return what serving does."""

    @tf.function(input_signature=[tf.TensorSpec((None, INPUTS), name="x")])
    def sample(self, x: tf.Tensor) -> tf.Tensor:
        return self.call(x + tf.random.normal(tf.shape(x)), training=False)


class Trained(Sampled):
    @tf.function(input_signature=[tf.TensorSpec((None, INPUTS), name="x")])
    def training(self, x: tf.Tensor) -> tf.Tensor:
        return self.call(x, training=True)


class Random(Plain):
    """Serving draws random numbers itself."""

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        return super().call(x + tf.random.normal(tf.shape(x)), training)


@pytest.mark.parametrize(
    ("make", "note", "kept"),
    [
        (Sampled, "train is derived from serving: dropout and regularisers of the original are absent", {"sample"}),
        (Trained, "train is the source's training trace, __inference_training_", {"sample"}),
        (Random, "train is derived from serving: regularisers of the original are absent", set()),
    ],
)
def test_what_train_is_made_of(make: type[Plain], note: str, kept: set[str], tmp_path: Path) -> None:
    """A function that draws random numbers trains if its name says so; else it serves, and is deployed."""
    module = make()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    report = bnqat.rewrite(tmp_path / "m", tmp_path / "q", bits={"weight": 8})
    assert report.train_note.startswith(note)
    bnqat.finalize(tmp_path / "q", tmp_path / "f")
    final = tf.saved_model.load(str(tmp_path / "f"))
    assert {name for name in ("sample", "training", "train") if hasattr(final, name)} == kept


@pytest.mark.parametrize("name", ["module", "called", "keras2"])
def test_rounding_is_stochastic_in_training_alone(name: str, plain: Callable[[str], Path], tmp_path: Path) -> None:
    """Also in functions that the source's serving and training share, as layers of Keras 2 are."""
    bnqat.rewrite(plain(name), tmp_path / "q", bits={"weight": 3, "bias": 3}, rounding="stochastic")
    root = tf.saved_model.load(str(tmp_path / "q"))
    model = load(tmp_path / "q")
    held = {role for g in model.analysis(only_training) for role in _roles(model, g)}
    assert held == {"weight", "bias"}
    np.testing.assert_array_equal(root.serve(batch()), root.serve(batch()))
    if name != "keras2":  # where dropout differs at every call
        assert not np.array_equal(root.train(batch()), root.train(batch()))


def _roles(model: Model, graph: str) -> set[str]:
    marked = (node for node in model.graphs[graph].nodes.values() if harness.TAG in node.attrs)
    return {json.loads(node.attrs[harness.TAG].s)["role"] for node in marked}


def test_a_moving_range_follows_in_shared_functions(plain: Callable[[str], Path], tmp_path: Path) -> None:
    bnqat.rewrite(plain("keras2"), tmp_path / "q", range={"bias": "ema"})
    root = tf.saved_model.load(str(tmp_path / "q"))
    (limits,) = [v for v in root.quantization.variables if v.name.startswith("quantization/range/bias")]
    before = limits.numpy()
    for variable in root.quantization.trainable_variables:
        variable.assign(variable * 2)
    root.serve(batch())
    np.testing.assert_array_equal(limits, before)
    root.train(batch())
    np.testing.assert_allclose(limits, before * 1.01, rtol=1e-5)


def test_serving_and_training_are_both_differentiated(plain: Callable[[str], Path], tmp_path: Path) -> None:
    """Each has its own functions in the conditional: TensorFlow cannot differentiate two callers of one."""
    bnqat.rewrite(plain("called"), tmp_path / "q", bits={"weight": 8})
    root = tf.saved_model.load(str(tmp_path / "q"))
    slopes = []
    for function in (root.serve, root.train):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(function(batch()) ** 2)
        slopes.append(tape.gradient(loss, root.kernels[1]))
    np.testing.assert_array_equal(*slopes)
    assert np.any(slopes[0])


class Several(Plain):
    """Signatures that compute with variables, and one that does not."""

    @tf.function(input_signature=[tf.TensorSpec((None, INPUTS), name="x")])
    def features(self, x: tf.Tensor) -> tf.Tensor:
        return x @ self.kernels[0]

    @tf.function(input_signature=[tf.TensorSpec((None, INPUTS), name="x")])
    def doubled(self, x: tf.Tensor) -> tf.Tensor:
        return x * 2


@pytest.mark.parametrize(
    ("names", "trained"),
    [
        ({"serving_default": "serve", "a": "features", "b": "doubled"}, "serve"),
        ({"serving_default": "doubled", "b": "features"}, "features"),
    ],
)
def test_the_signature_with_variables_is_trained(names: dict[str, str], trained: str, tmp_path: Path) -> None:
    module = Several()
    signatures = {name: getattr(module, function) for name, function in names.items()}
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=signatures)
    bnqat.rewrite(tmp_path / "m", tmp_path / "q", bits={"weight": 8})
    root = tf.saved_model.load(str(tmp_path / "q"))
    (output,) = root.signatures["train"](batch()).values()
    np.testing.assert_array_equal(output, getattr(root, trained)(batch()))
    assert int(root.quantization.step) == 1


def test_options_for_batch_norms_have_no_effect(plain: Callable[[str], Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"momentum": 0.5, "train_batch_norm": "none", "freeze_step": 3, "start_step": 5}
    report = bnqat.rewrite(plain("module"), tmp_path / "q", bits={"weight": 8}, **options)
    assert "--momentum and --train-batch-norm have no effect, as no batch norm of the model can train" in report.notes
    no_freezing = "--freeze-step has no effect, as train computes no batch norm whose statistics could be frozen"
    assert no_freezing in report.notes
    assert not [note for note in report.notes if note.startswith("statistics are frozen")]
    assert "freeze_step" not in report.schedule
    assert not hasattr(tf.saved_model.load(str(tmp_path / "q")).quantization, "freeze_step")
    rule = {"match": "kernel", "momentum": 0.5}
    with pytest.raises(bnqat.Error, match="the rule 'kernel' matches no layer and no variable; there is no batch norm"):
        bnqat.rewrite(plain("module"), tmp_path / "r", bits={"weight": 8}, config={"rules": [rule]})


def test_there_are_no_statistics(plain: Callable[[str], Path], tmp_path: Path) -> None:
    bnqat.rewrite(plain("module"), tmp_path / "q", bits={"weight": 8})
    root = tf.saved_model.load(str(tmp_path / "q"))
    with pytest.raises(bnqat.Error, match="holds no batch norm, so there are no moving statistics to re-estimate"):
        bnqat.reestimate_statistics(root, [batch()], 1)
    inputs = {"x": np.zeros((100, INPUTS), np.float32)}
    report = bnqat.finalize(tmp_path / "q", tmp_path / "f", inputs=inputs)
    assert "the inputs have no use, as the model has no batch norm whose statistics could be compared" in report.notes


@pytest.mark.parametrize(
    ("config", "beyond"),
    [
        ({}, False),
        ({"defaults": {"bits": 4}}, False),
        ({"defaults": {"weight": {"bits": 4}}}, True),
        ({"defaults": {"weight": {"scheme": "none"}}}, False),
        ({"rules": [{"match": "x", "weight": {"bits": 4}}]}, True),
        ({"rules": [{"match": "x", "bits": 4}]}, False),
        ({"defaults": {"weight": {"scheme": "none"}}, "rules": [{"match": "x", "weight": {"bits": 4}}]}, False),
    ],
)
def test_training_is_made_for_roles_that_are_quantised(config: dict[str, Any], beyond: bool) -> None:
    (derive,) = [p for p in pass_list(settings(config, {})) if isinstance(p, DeriveTraining)]
    assert derive.beyond_batch_norm is beyond


@pytest.mark.parametrize(("name", "noted"), [("v1", True), ("module", False)])
def test_rounding_that_stays_to_nearest_is_said(
    name: str, noted: bool, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    """In TensorFlow 1's format, training and serving share the nodes that read a weight."""
    report = bnqat.rewrite(plain(name), tmp_path / "q", bits={"weight": 8}, rounding="stochastic", dry_run=True)
    note = "rounding of the role weight is to nearest, as training shares these values with serving"
    assert (note in report.notes) is noted


@pytest.mark.parametrize("name", V1)
def test_a_graph_of_tensorflow_1(name: str, plain: Callable[[str], Path], tmp_path: Path) -> None:
    report = bnqat.rewrite(plain(name), tmp_path / "q", bits=BITS)
    chosen = name in ("v1_default", "v1_placeholder")
    derived = "train is derived from serving: dropout and regularisers of the original are absent"
    assert report.train_note == ("train is the source's own graph with is_training = True" if chosen else derived)
    source, root = (tf.saved_model.load(str(p)) for p in (plain(name), tmp_path / "q"))
    by_name = {v.name: v for v in root.variables}
    start, step = by_name["quantization/start_step:0"], by_name["quantization/step:0"]
    train = root.signatures["train"]
    mode = {"is_training": tf.constant(value=False)} if name == "v1_placeholder" else {}
    trainable = [v for v in root.variables if v.trainable and not v.name.startswith("quantization")]
    assert len(trainable) == 4
    with tf.GradientTape() as tape:
        first = train(x=batch(), **mode)["logits"]
        loss = tf.reduce_sum(first**2)
    assert int(step) == 1
    assert all(np.any(g) for g in tape.gradient(loss, trainable))
    start.assign(OFF)
    assert_same(outputs(root), outputs(source))
    assert chosen is not np.array_equal(train(x=batch(), **mode)["logits"], outputs(root)["serving_default"])
    assert int(step) == 2
    start.assign(0)
    kept = {k: v for k, v in root.signatures.items() if k != "train"}
    tf.saved_model.save(root, str(tmp_path / "saved"), signatures=kept)
    bnqat.finalize(tmp_path / "saved", tmp_path / "f")
    assert_same(outputs(tf.saved_model.load(str(tmp_path / "f"))), outputs(root))


def test_a_function_of_its_own_for_training(plain: Callable[[str], Path], tmp_path: Path) -> None:
    """Training calls nothing that serving calls."""
    bnqat.rewrite(plain("called"), tmp_path / "q", bits={"weight": 8})
    model = load(tmp_path / "q")
    assert TRAIN in model.analysis(only_training)
    assert any(name.endswith("_train") for name in model.analysis(only_training))
