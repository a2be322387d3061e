"""Tests of loading and saving: without a pass nothing is lost; a new variable and a new function arrive everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from rewriter.edit import AddSignature, AddVariable, Clone, Edit, Expose, Rewire, Run
from rewriter.expr import Use, constant, handle, op, read
from rewriter.ir import MAIN, Edge, Endpoint, Error, Model, Variable
from rewriter.pipeline import Pipeline
from rewriter.protos import Dtype
from rewriter.savedmodel import checkpoint
from rewriter.savedmodel.graphs import definitions, write_function, write_main
from rewriter.savedmodel.read import load
from rewriter.savedmodel.write import save
from tests import harness
from tests.models import Net

COUNT = Variable("count/.ATTRIBUTES/VARIABLE_VALUE", "count", "int64", (), path="extra.count", initial=7)


def assert_lossless(source: Path, target: Path) -> None:
    assert save(load(source), target) == []
    a, b = (saved_model_pb2.SavedModel.FromString((p / "saved_model.pb").read_bytes()) for p in (source, target))
    assert a == b
    old, new = harness.digest(source), harness.digest(target)
    old.pop("saved_model.pb")
    new.pop("saved_model.pb")
    assert old == new


@pytest.mark.parametrize("name", ["module_train", "keras_save", "keras_export", "mobilenet_short_save"])
def test_load_and_save_is_lossless(name: str, model: Callable[[str], Path], tmp_path: Path) -> None:
    assert_lossless(model(name), tmp_path / "out")


@pytest.mark.corpus
def test_load_and_save_is_lossless_for_public_models(corpus_model: Path, tmp_path: Path) -> None:
    try:
        load(corpus_model)
    except Error as e:
        assert "TensorFlow 1" in str(e)  # noqa: PT017  declined, with the reason
    else:
        assert_lossless(corpus_model, tmp_path / "out")


@pytest.mark.parametrize("name", ["module_train", "keras_save"])
def test_every_proto_is_rebuilt_from_its_graph(name: str, model: Callable[[str], Path]) -> None:
    """The in-memory form holds all information; no proto is merely carried through."""
    source = load(model(name)).source
    find = definitions(source.proto.meta_graphs[0].graph_def.library, {})
    for graph, proto in source.protos.values():
        if graph.name == MAIN:
            rebuilt = write_main(graph)
            rebuilt.library.CopyFrom(proto.library)
        else:
            rebuilt = write_function(graph, find)
        assert rebuilt == proto


class WithAssets(Net):
    """A model with a table read from an asset, and a constant that functions capture."""

    def __init__(self, vocabulary: Path) -> None:
        super().__init__()
        lines = tf.lookup.TextFileInitializer(
            str(vocabulary),
            tf.string,
            tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64,
            tf.lookup.TextFileIndex.LINE_NUMBER,
        )
        self.table = tf.lookup.StaticHashTable(lines, -1)
        self.bias = tf.constant([0.25] * 16)

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), name="x"), tf.TensorSpec([None], tf.string, name="w")])
    def serve(self, x: tf.Tensor, w: tf.Tensor) -> Any:
        index = self.table.lookup(w)
        return {"features": self.call(x, training=False) + self.bias, "index": index}


@pytest.fixture
def with_assets(tmp_path: Path) -> Path:
    vocabulary = tmp_path / "vocabulary.txt"
    vocabulary.write_text("a\nb\nc\n")
    module = WithAssets(vocabulary)
    tf.saved_model.save(module, str(tmp_path / "model"), signatures={"serving_default": module.serve})
    extra = tmp_path / "model" / "assets.extra"
    extra.mkdir()
    (extra / "tf_serving_warmup_requests").write_bytes(b"\x00\x01")
    return tmp_path / "model"


def test_assets_tables_and_constants(with_assets: Path, tmp_path: Path) -> None:
    assert_lossless(with_assets, tmp_path / "same")
    after, _ = Pipeline([Counts()]).run(load(with_assets))
    save(after, tmp_path / "out")
    assert (tmp_path / "out/assets.extra/tf_serving_warmup_requests").read_bytes() == b"\x00\x01"
    x, w = harness.images((None, 8, 8, 3)), tf.constant(["b", "?"])
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    got = loaded.extra.counting(w, x)  # a signature orders its inputs by name
    np.testing.assert_array_equal(got["index"], [1, -1])
    assert loaded.extra.count.numpy() == 8
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        signature = tf.compat.v1.saved_model.load(session, ["serve"], str(tmp_path / "out")).signature_def["counting"]
        feed = {signature.inputs["x"].name: x.numpy(), signature.inputs["w"].name: [b"c"]}
        np.testing.assert_array_equal(session.run(signature.outputs["index"].name, feed), [2])


@dataclass(frozen=True)
class Counts:
    """A pass that adds a variable that every function reads, and a function that counts its calls."""

    def edits(self, model: Model) -> Iterable[Edit]:
        signature = model.signatures["serving_default"]
        yield AddVariable(COUNT)
        for name in ("counting", "counting_signature"):
            yield Clone(signature.entry, name)
            yield Run(name, op("AssignAddVariableOp", handle(COUNT), constant(1, "int64")), "count", last=True)
        yield Expose("extra.counting", Endpoint("counting", signature.entry, signature.entry))
        yield AddSignature("counting", Endpoint("counting_signature", signature.entry, signature.entry))
        for graph in model.graphs.values():
            for index, result in enumerate(graph.results):
                if result.dtype == "float32":
                    one = op("Minimum", op("Cast", read(COUNT), DstT=Dtype("float32")), 1.0)
                    yield Rewire(Edge(graph.name, "", index), Use("float32", result.value) * one, "times")


@pytest.mark.parametrize("name", ["module_train", "keras_save"])
def test_a_new_variable_and_a_new_function_arrive_everywhere(
    name: str, model: Callable[[str], Path], tmp_path: Path
) -> None:
    after, _ = Pipeline([Counts()]).run(load(model(name)))
    save(after, tmp_path / "out")
    source, loaded = tf.saved_model.load(str(model(name))), tf.saved_model.load(str(tmp_path / "out"))
    x = harness.images((None, 8, 8, 3))
    expected = tf.nest.flatten(source.signatures["serving_default"](x))[0]
    assert loaded.extra.count.numpy() == 7
    np.testing.assert_array_equal(loaded.extra.counting(x), expected)
    np.testing.assert_array_equal(tf.nest.flatten(loaded.signatures["counting"](x))[0], expected)
    assert loaded.extra.count.numpy() == 9
    loaded.extra.count.assign(0)
    assert not np.any(loaded.extra.counting(x))
    saved = tf.train.load_checkpoint(str(tmp_path / "out/variables/variables"))
    assert saved.get_tensor(COUNT.key) == 7
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(tmp_path / "out"))
        signature = meta.signature_def["counting"]
        (inputs,), (outputs,) = signature.inputs.values(), signature.outputs.values()
        np.testing.assert_allclose(session.run(outputs.name, {inputs.name: x.numpy()}), expected, rtol=1e-5)
        count = tf.raw_ops.ReadVariableOp(resource=session.graph.get_tensor_by_name("count:0"), dtype=tf.int64)
        assert session.run(count) == 8
        prefix = str(tmp_path / "v1")
        session.run(meta.saver_def.save_tensor_name, {meta.saver_def.filename_tensor_name: prefix})
        again = tf.train.load_checkpoint(prefix)
        assert again.get_tensor(COUNT.key) == 8
        assert again.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH") == saved.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")


def test_a_checkpoint_is_copied_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"v{i}": tf.random.normal([1000]) for i in range(10)} | {"text": tf.constant(["a", "bc"])}
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "a"),
        tensor_names=list(tensors),
        shape_and_slices=[""] * 11,
        tensors=list(tensors.values()),
    )
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 9000)
    source = checkpoint.Checkpoint(tmp_path / "a")
    assert [len(g) for g in source.groups(set())] == [3, 2, 2, 2, 2]
    checkpoint.copy(source, tmp_path / "out" / "b", {"new": np.int64(3), "v0": np.float32(1)})
    reader = tf.train.load_checkpoint(str(tmp_path / "out" / "b"))
    assert set(reader.get_variable_to_shape_map()) == {*tensors, "new"}
    assert reader.get_tensor("new") == 3
    assert reader.get_tensor("v0") == 1
    np.testing.assert_array_equal(reader.get_tensor("v7"), tensors["v7"])
    np.testing.assert_array_equal(reader.get_tensor("text"), [b"a", b"bc"])
    assert not list((tmp_path / "out").glob("part*"))


def test_changed_is_computed_not_claimed(model: Callable[[str], Path], tmp_path: Path) -> None:
    """A graph replaced by an equal one is written anew and is equal on disk."""
    before = load(model("module"))
    graphs = {name: replace(g) for name, g in before.graphs.items()}
    save(replace(before, graphs=graphs), tmp_path / "out")
    a, b = load(model("module")), load(tmp_path / "out")
    assert {n: g for n, g in a.graphs.items() if n} == {n: g for n, g in b.graphs.items() if n}
