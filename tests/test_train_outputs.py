"""Inner tensors that a training function returns, and detectors that are trained by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from passes.quantization.training_functions import TRAIN
from rewriter.savedmodel.read import load
from tests import harness
from tests.models import Trainable, save_module, small_keras
from tests.models.detectors import DETECTORS, Detector, combined, soft
from tests.models.v1 import by_hand, save_v1

OFF = 10**9
X = (None, 8, 8, 3)


def trained(call: Callable[[tf.Tensor], Any], variables: list[Any], steps: int = 12) -> list[float]:
    """Train for some steps on targets derived from an image's mean, and return the losses."""
    x = harness.images(X, batch=4)
    positive = tf.reshape(tf.reduce_mean(x, -1) > 0.3, [4, 64, 1])
    losses = []
    for _ in range(steps):
        with tf.GradientTape() as tape:
            outputs = call(x)
            logits = tf.where(positive, outputs["scores"], 1 - outputs["scores"])
            loss = -tf.reduce_mean(tf.math.log(logits + 1e-3)) + tf.reduce_mean((outputs["boxes"] - 0.5) ** 2)
        for v, g in zip(variables, tape.gradient(loss, variables), strict=True):
            assert np.abs(g).max() > 0, v.name
            v.assign_sub(0.5 * g)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("name", [n for n in DETECTORS if n != "v1_detector"])
def test_a_detector_trains(name: str, tmp_path: Path) -> None:
    source = DETECTORS[name](tmp_path / "m")
    inner = {"boxes": "boxes", "scores": "scores"}
    report = bnqat.rewrite(source, tmp_path / "out", bits=8, train_outputs=inner, momentum=0.9)
    assert any("the gradient of train stops at" in note and "NonMaxSuppression" in note for note in report.notes)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    outputs = loaded.quantization.train(harness.images(X))
    assert sorted(outputs) == ["boxes", "detection_boxes", "detection_scores", "scores"]
    assert outputs["boxes"].shape == (4, 64, 4)
    losses = trained(loaded.quantization.train, list(loaded.quantization.trainable_variables))
    assert losses[-1] < 0.95 * losses[0]
    signed = loaded.signatures["train"].structured_outputs
    assert sorted(signed) == ["boxes", "detection_boxes", "detection_scores", "scores"]
    assert signed["boxes"].shape[1:] == (64, 4)


def test_frozen_statistics_do_not_stand_in_the_way(tmp_path: Path) -> None:
    source = save_module(Detector(nested=True), tmp_path / "m")
    bnqat.rewrite(source, tmp_path / "out", train_outputs={"boxes": "boxes"}, freeze_step=1, start_step=OFF)
    loaded, x = tf.saved_model.load(str(tmp_path / "out")), harness.images(X)
    first, second = (loaded.train(x)["boxes"].numpy() for _ in range(2))
    assert first.shape == (4, 64, 4)
    assert not np.allclose(first, second, atol=1e-3)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(loaded.train(x)["boxes"] ** 2)
    variables = list(loaded.quantization.trainable_variables)
    assert all(np.abs(g).max() > 0 for g in tape.gradient(loss, variables))
    assert bnqat.verify(source, tmp_path / "out").ok


@pytest.mark.parametrize("suppression", [combined, soft])
@pytest.mark.parametrize("nested", [False, True])
def test_inner_tensors_are_those_that_the_function_computes(suppression: Any, nested: bool, tmp_path: Path) -> None:
    source = save_module(Detector(suppression, nested), tmp_path / "m")
    bnqat.rewrite(source, tmp_path / "out", train_outputs={"zz": "boxes", "aa": "scores"}, start_step=OFF)
    loaded, detector, x = tf.saved_model.load(str(tmp_path / "out")), Detector(suppression), harness.images(X)
    features = detector.features(x, training=True)
    boxes, scores = detector.heads(features)
    expected = {"zz": boxes, "aa": scores} | suppression(boxes, scores)
    for outputs in (loaded.train(x), loaded.signatures["train"](x=x)):
        assert sorted(outputs) == sorted(expected)
        for key, value in expected.items():
            np.testing.assert_allclose(outputs[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    assert loaded.quantization.step.numpy() == 2


def test_one_tensor_becomes_a_dict_under_the_name_of_the_signature(tmp_path: Path) -> None:
    source = save_module(Trainable(), tmp_path / "m")
    bnqat.rewrite(source, tmp_path / "out", train_outputs={"features": "Relu_1"}, start_step=OFF)
    loaded, x = tf.saved_model.load(str(tmp_path / "out")), harness.images(X)
    net = Trainable()
    plain = net.train(x)
    outputs = loaded.quantization.train(x)
    np.testing.assert_array_equal(outputs["output_0"], plain)
    np.testing.assert_allclose(tf.reduce_mean(outputs["features"], [1, 2]), plain, rtol=1e-5, atol=1e-6)
    tf.saved_model.save(loaded, str(tmp_path / "again"))
    again = tf.saved_model.load(str(tmp_path / "again"))
    assert sorted(again.quantization.train(x)) == ["features", "output_0"]


def test_a_training_trace_of_keras_returns_a_layers_output(tmp_path: Path) -> None:
    from tests.models import save_keras

    source = save_keras(small_keras(0.5), tmp_path / "m")
    node = "sequential/global_average_pooling2d/Mean"
    trace = "sequential_layer_call"
    with pytest.raises(bnqat.Error, match="did you mean"):
        bnqat.rewrite(source, tmp_path / "out", train_outputs={"pooled": node + "s"})
    names = [n for g, graph in load(source).graphs.items() if trace in g for n in graph.nodes if "pooling" in n]
    report = bnqat.rewrite(source, tmp_path / "out", train_outputs={"pooled": names[-1]}, start_step=OFF)
    assert any("training trace" in note for note in report.notes)
    loaded, x = tf.saved_model.load(str(tmp_path / "out")), harness.images(X)
    for outputs in (loaded.train(x), loaded.signatures["train"](x)):
        assert sorted(outputs) == ["dense", "pooled"]
        assert outputs["pooled"].shape == (4, 8)
        assert np.mean(outputs["pooled"] == 0) < 0.1  # before dropout


def test_the_signature_of_tensorflow_1_returns_one_more(tmp_path: Path) -> None:
    bnqat.rewrite(DETECTORS["v1_detector"](tmp_path / "m"), tmp_path / "out", train_outputs={"boxes": "boxes"})
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    variables = [v for v in loaded.variables if v.trainable]
    with tf.GradientTape() as tape:
        outputs = loaded.signatures["train"](x=harness.images(X))
        loss = tf.reduce_sum(outputs["boxes"] ** 2)
    assert sorted(outputs) == ["boxes", "detection_boxes", "detection_scores", "raw_scores"]
    assert all(np.abs(g).max() > 0 for g in tape.gradient(loss, variables))
    x = harness.images(X).numpy()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        signature = tf.compat.v1.saved_model.load(session, ["serve"], str(tmp_path / "out")).signature_def["train"]
        shape = signature.outputs["boxes"].tensor_shape
        assert [d.size for d in shape.dim] == [-1, 64, 4]
        feed = {signature.inputs["x"].name: x}
        assert session.run(signature.outputs["boxes"].name, feed).shape == (4, 64, 4)


def test_the_mode_that_the_graph_chooses_reaches_inner_tensors(tmp_path: Path) -> None:
    source = save_v1(tmp_path / "m", by_hand, train_op=True)
    bnqat.rewrite(source, tmp_path / "out", train_outputs={"features": "norm_1/Relu"}, start_step=OFF)
    train = tf.saved_model.load(str(tmp_path / "out")).signatures["train"]
    features = train(x=harness.images(X))["features"].numpy()
    assert features.shape == (4, 8, 8, 8)
    serve = tf.saved_model.load(str(source)).prune("x:0", "norm_1/Relu:0")(harness.images(X)).numpy()
    assert not np.allclose(features, serve, rtol=1e-2, atol=1e-2)


CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown": ("boxess", {}, r"boxes = boxess: .* hold no node boxess; did you mean boxes"),
    "port": ("boxes:7", {}, r"boxes = boxes:7: boxes has 1 output"),
    "twice": ("boxes", {"twice": True}, r"its function .*heads.* is called at several places: .*PartitionedCall.*, "),
    "form": ("a:b:c:d", {}, "it is a node's name, perhaps with :1"),
    "resource": ("net_conv2d_readvariableop_resource", {}, "a resource is no tensor"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_returned(case: str, tmp_path: Path) -> None:
    node, options, message = CASES[case]
    source = save_module(Detector(**options), tmp_path / "m")
    if case == "resource":
        model = load(source)
        graph = model.graphs[next(e.function for e in model.entries.values() if "serve" in e.paths)]
        node = graph.arguments[-1]
    with pytest.raises(bnqat.Error, match=message):
        bnqat.rewrite(source, tmp_path / "out", train_outputs={"boxes": node})
    assert not (tmp_path / "out").exists()


def test_names(tmp_path: Path) -> None:
    source = save_module(Detector(), tmp_path / "m")
    with pytest.raises(bnqat.Error, match="train returns one of this name already"):
        bnqat.rewrite(source, tmp_path / "out", train_outputs={"detection_boxes": "boxes"})
    with pytest.raises(bnqat.Error, match="letters, digits and underscores"):
        bnqat.rewrite(source, tmp_path / "out", train_outputs={"a:b": "boxes"})


class Homonyms(Detector):
    """Two functions that hold a node `boxes` each."""

    def call(self, x: tf.Tensor, training: bool) -> dict[str, tf.Tensor]:
        scaled = tf.function(lambda v: tf.multiply(v, 0.5, name="boxes"))
        found = super().call(x, training)
        return found | {"half": scaled(found["detection_boxes"])}


def test_an_ambiguous_name_lists_places_that_can_be_given(tmp_path: Path) -> None:
    source = save_module(Homonyms(nested=True), tmp_path / "m")
    with pytest.raises(bnqat.Error, match="several nodes of this name; write one of") as error:
        bnqat.rewrite(source, tmp_path / "out", train_outputs={"boxes": "boxes"})
    place = next(p for p in str(error.value).rpartition("one of ")[2].split(", ") if "heads" in p)
    bnqat.rewrite(source, tmp_path / "out", train_outputs={"boxes": place})
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    assert loaded.train(harness.images(X))["boxes"].shape == (4, 64, 4)
    assert TRAIN in load(tmp_path / "out").graphs
