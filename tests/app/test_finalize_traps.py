"""Models that tempt ``bnqat finalize``: shared filters, tables that change, functions that assign, marks by others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner
from tensorflow.core.protobuf import saved_model_pb2

import bnqat
from rewriter.app.cli import main
from rewriter.app.finalize_schema import FinalizeReport
from tests import harness
from tests.app.test_finalize import assert_plain, assert_same, served
from tests.conftest import once

IMAGES = [tf.TensorSpec([None, 3, 3, 4], name="x")]


class Norm(tf.Module):
    """A batch norm of four channels, in inference."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(1)
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            values = np.abs(rng.normal(1, 0.4, 4)).astype("float32")
            setattr(self, name, tf.Variable(values, trainable=not name.startswith("moving"), name=name))

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        parameters = (self.gamma, self.beta, self.moving_mean, self.moving_variance)
        return tf.compat.v1.nn.fused_batch_norm(x, *parameters, is_training=False)[0]


class FiltersBefore(tf.Module):
    """Filters that an earlier layer without a batch norm uses as well."""

    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable(np.random.default_rng(0).normal(size=(3, 3, 4, 4)).astype("float32"))
        self.bn = Norm()

    @tf.function(input_signature=IMAGES)
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        x = tf.nn.relu(tf.nn.conv2d(x, self.w, 1, "SAME"))
        return self.bn(tf.nn.conv2d(x, self.w, 1, "SAME"))


class Table(tf.Module):
    """A table whose contents are in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = Norm()
        self.table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, 0.5)
        self.table.insert(tf.constant([0], tf.int64), tf.constant([3.0]))

    @tf.function(input_signature=IMAGES)
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.bn(x) * self.table.lookup(tf.constant([0], tf.int64))


class Helpers(tf.Module):
    """A root with three functions beside the serving one: one takes gamma, one changes it, one reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = Norm()

    @tf.function(input_signature=IMAGES)
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.norm(x, self.bn.gamma)

    @tf.function(input_signature=[*IMAGES, tf.TensorSpec([4], name="gamma")])
    def norm(self, x: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
        parameters = (self.bn.beta, self.bn.moving_mean, self.bn.moving_variance)
        return tf.compat.v1.nn.fused_batch_norm(x, gamma, *parameters, is_training=False)[0]

    @tf.function(input_signature=[tf.TensorSpec([4], name="gamma")])
    def reset(self, gamma: tf.Tensor) -> None:
        self.bn.gamma.assign(gamma)

    @tf.function(input_signature=[])
    def size(self) -> tf.Tensor:
        return tf.reduce_sum(self.bn.gamma**2)


class Unknown(tf.Module):
    """A variable whose shape is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = Norm()
        self.bn.gamma = tf.Variable(self.bn.gamma.numpy(), shape=[None])

    @tf.function(input_signature=IMAGES)
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.bn(x)


def finalized(module: Any, folder: Path, **options: Any) -> FinalizeReport:
    tf.saved_model.save(module, str(folder / "m"), signatures=module.serve)
    bnqat.rewrite(folder / "m", folder / "q", bits=4)
    report = bnqat.finalize(folder / "q", folder / "final", **options)
    before, after = (tf.saved_model.load(str(folder / n)) for n in ("q", "final"))
    assert_same(served(before), served(after))
    assert_plain(folder / "final")
    return report


def test_filters_that_are_used_before_are_not_scaled(tmp_path: Path) -> None:
    report = finalized(FiltersBefore(), tmp_path, fold=True)
    assert not report.folded
    assert report.not_folded


def test_contents_of_tables_stay(tmp_path: Path) -> None:
    tf.saved_model.save(module := Table(), str(tmp_path / "m"), signatures=module.serve)
    bnqat.rewrite(tmp_path / "m", tmp_path / "q", bits=4)
    loaded = tf.saved_model.load(str(tmp_path / "q"))
    tf.saved_model.save(loaded, str(tmp_path / "tuned"), signatures={"s": loaded.signatures["serving_default"]})
    for source, name in (("q", "a"), ("tuned", "b")):
        bnqat.finalize(tmp_path / source, tmp_path / name)
        assert_same(*(served(tf.saved_model.load(str(tmp_path / n))) for n in (source, name)))
        stored = {key for key, _ in tf.train.list_variables(str(tmp_path / name / "variables/variables"))}
        assert sum(key.rpartition("-")[2] in ("keys", "values") for key in stored) == 2


def test_functions_that_change_or_are_given_what_is_quantised_go(tmp_path: Path) -> None:
    report = finalized(Helpers(), tmp_path)
    assert "norm is left out, as its caller gives it what it quantises" in report.notes
    final = tf.saved_model.load(str(tmp_path / "final"))
    assert not any(hasattr(final, name) for name in ("norm", "reset", "train", "quantization"))
    assert [b.variable for b in report.baked if b.added] == ["quantized/gamma"]
    before = tf.saved_model.load(str(tmp_path / "q"))
    np.testing.assert_array_equal(final.size(), before.size())
    assert {v.name for v in final.variables} >= {"gamma:0", "quantized/gamma:0"}
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "final"), signature_keys=["serving_default"])
    assert converter.convert()


def test_a_variable_of_unknown_shape_is_baked(tmp_path: Path) -> None:
    assert len(finalized(Unknown(), tmp_path).baked) == 4


def test_other_meta_graphs_are_left_out_and_said_to_be(model: Callable[[str], Path], tmp_path: Path) -> None:
    bnqat.rewrite(model("module"), tmp_path / "q")
    file = tmp_path / "q/saved_model.pb"
    proto = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    proto.meta_graphs.add().CopyFrom(proto.meta_graphs[0])
    proto.meta_graphs[1].meta_info_def.tags[:] = ["serve", "gpu"]
    file.write_bytes(proto.SerializeToString())
    report = bnqat.finalize(tmp_path / "q", tmp_path / "final", tags=["serve"])
    assert "1 other meta graphs of the source are left out" in report.other_changes
    proto = saved_model_pb2.SavedModel.FromString((tmp_path / "final/saved_model.pb").read_bytes())
    assert [list(m.meta_info_def.tags) for m in proto.meta_graphs] == [["serve"]]
    assert tf.saved_model.load(str(tmp_path / "final"), tags=["serve"]).signatures


def damaged(source: Path, target: Path, change: Callable[[Any], None]) -> Path:
    """Return a copy of a rewritten model in which the first quantiser's node is changed."""
    once(target, lambda path: bnqat.rewrite(source, path, bits=4))
    file = target / "saved_model.pb"
    proto = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    functions = proto.meta_graphs[0].graph_def.library.function
    change(next(n for f in functions for n in f.node_def if "_bnqat" in n.attr))
    file.write_bytes(proto.SerializeToString())
    return target


def tag(node: Any, **fields: Any) -> None:
    mark = {**json.loads(node.attr["_bnqat"].s), **fields}
    node.attr["_bnqat"].s = json.dumps({k: v for k, v in mark.items() if v is not None}).encode()


DAMAGE: dict[str, Callable[[Any], Any]] = {
    "no JSON": lambda n: setattr(n.attr["_bnqat"], "s", b"{"),
    "a list": lambda n: setattr(n.attr["_bnqat"], "s", b"[1]"),
    "no text": lambda n: setattr(n.attr["_bnqat"], "s", b"\xff\xfe"),
    "a number": lambda n: setattr(n.attr["_bnqat"], "i", 3),
    "no role": lambda n: tag(n, role=None),
    "no name of a role": lambda n: tag(n, role="a role"),
    "a scheme that is a table": lambda n: tag(n, scheme={"a": 1}),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_marks_of_others_are_one_line(
    change: Callable[[Any], None], model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = damaged(model("module"), tmp_path / "q", change)
    hashes = harness.digest(path)
    for command in (["finalize", str(path), str(tmp_path / "x")], ["inspect", str(path)]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2
        (line,) = [each for each in result.output.splitlines() if each.startswith("bnqat: error")]
        assert "is marked as a quantiser, but not by bnqat; rewrite the float model again" in line
    assert not (tmp_path / "x").exists()
    assert harness.digest(path) == hashes
