"""Models from somewhere: nothing in them is run, nothing outside of them is read, what they say is only text."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry

import bnqat
from rewriter.reach import REACHED, reaching
from rewriter.savedmodel.read import load
from tests.harness import inputs_of
from tests.mutate import mutated
from tests.reliability.forks import CLI, Call, Server
from tests.reliability.hostile import CUSTOM, with_custom_ops, writing_files
from tests.reliability.trials import judged

ESCAPE = "\x1b]0;owned\x07"


@pytest.fixture
def evil(model: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    """A model that writes a file whenever it runs, and the file."""
    marker = tmp_path / "marker"
    return writing_files(model("keras_export"), tmp_path / "evil", marker), marker


def test_what_the_evil_model_does_is_seen(evil: tuple[Path, Path]) -> None:
    source, marker = evil
    signature = tf.saved_model.load(str(source)).signatures["serving_default"]
    assert not marker.exists()
    signature(**inputs_of(signature))
    assert marker.read_text() == "was here"


def test_no_command_runs_a_model(forks: Server, evil: tuple[Path, Path], tmp_path: Path) -> None:
    source, marker = evil
    target, final = tmp_path / "target", tmp_path / "final"
    for arguments in (
        ("inspect", source),
        ("rewrite", source, target, "--html", tmp_path / "page.html"),
        ("inspect", target),
        ("diff", source, target),
        ("finalize", target, final, "--params", tmp_path / "parameters.json"),
        ("finalize", target, tmp_path / "folded", "--fold"),
        ("diff", target, final),
    ):
        assert judged(forks.cli(*arguments), str(arguments)) == "done"
        assert not marker.exists(), arguments
    assert any(r.op == "WriteFile" for r in reaching(load(target)))


def test_verify_refuses_what_reaches_files(forks: Server, evil: tuple[Path, Path], tmp_path: Path) -> None:
    source, marker = evil
    target = tmp_path / "target"
    bnqat.rewrite(source, target)
    outcome = forks.cli("verify", source, target)
    assert judged(outcome, "verify") == "refused"
    assert "files by WriteFile" in outcome.err
    assert "evil_write in " in outcome.err
    assert "--trust" in outcome.err
    assert not marker.exists()
    trusted = forks.cli("verify", source, target, "--trust")
    assert trusted.code in (0, 1), trusted
    assert marker.exists()


def test_sensitivity_refuses_what_reaches_files(evil: tuple[Path, Path], tmp_path: Path) -> None:
    source, marker = evil
    bnqat.rewrite(source, tmp_path / "target")
    with pytest.raises(bnqat.Error, match="files by WriteFile"):
        bnqat.sensitivity(tmp_path / "target", {})
    assert not marker.exists()


def test_what_reaches_outside(tmp_path: Path) -> None:
    class Reaching(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
        def serve(self, name: tf.Tensor) -> tf.Tensor:
            tf.print("to a log", output_stream=f"file://{tmp_path}/log")
            tf.print("to stderr")
            found: tf.Tensor = tf.py_function(lambda x: x, [tf.io.read_file(name)], tf.string)
            return found

    module = Reaching()
    module.variable = tf.Variable(1.0)
    tf.saved_model.save(module, str(tmp_path / "model"))
    found = {(r.op, r.what) for r in reaching(load(tmp_path / "model"))}
    assert found == {("ReadFile", "files"), ("EagerPyFunc", "Python"), ("PrintV2", "files")}


@pytest.mark.parametrize("name", ["keras_export", "v1_two_fused"])
def test_the_own_saver_is_no_reach(model: Callable[[str], Path], name: str) -> None:
    assert not reaching(load(model(name)))


@pytest.mark.parametrize("name", ["keras_export", "v1_two_fused"])
def test_a_saver_that_a_signature_runs_is_reach(model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Whoever serves that signature writes a file, or reads one, whose name is the caller's."""

    def edit(meta: Any) -> None:
        saver = meta.saver_def
        signature = meta.signature_def["save"]
        signature.inputs["path"].name = saver.filename_tensor_name
        signature.inputs["path"].dtype = types_pb2.DT_STRING
        signature.outputs["path"].name = saver.save_tensor_name
        signature.outputs["path"].dtype = types_pb2.DT_STRING
        signature.method_name = "tensorflow/serving/predict"

    found = reaching(load(mutated(model(name), tmp_path / "source", edit)))
    assert "SaveV2" in {r.op for r in found}


def test_data_sets_reach_files(tmp_path: Path) -> None:
    class Reading(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
        def serve(self, name: tf.Tensor) -> tf.Tensor:
            lines = tf.data.experimental.CsvDataset(name, [tf.float32])
            numbers = tf.data.Dataset.range(2)
            graph = tf.raw_ops.DatasetToGraphV2(input_dataset=numbers._variant_tensor)
            again = tf.raw_ops.DatasetFromGraph(graph_def=graph)
            size: tf.Tensor = tf.raw_ops.DatasetCardinality(input_dataset=again)
            return tf.cast(size, tf.float32) + lines.reduce(0.0, lambda total, row: total + row)

    module = Reading()
    module.variable = tf.Variable(1.0)
    tf.saved_model.save(module, str(tmp_path / "model"))
    found = {(r.op, r.what) for r in reaching(load(tmp_path / "model"))}
    assert found == {("CSVDatasetV2", "files"), ("DatasetFromGraph", "files")}


def test_ops_that_reach_are_ops() -> None:
    """A name that is misspelled would stand for nothing; TensorFlow knows all of them."""
    assert {name for name in REACHED if op_def_registry.get(name) is None} <= ELSEWHERE


ELSEWHERE = {"RpcCall", "RpcClient", "RpcServer", "EncodeProto", "DecodeProtoV2"}
"""Ops of packages beside TensorFlow, or that only some of its builds hold."""


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", f"a{ESCAPE}b"])
def test_assets_outside_are_refused(forks: Server, model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    source = mutated(model("keras_export"), tmp_path / "source", lambda m: m.asset_file_def.add(filename=name))
    _refused(forks, source, tmp_path / "target", "as an asset")


def test_assets_of_other_meta_graphs_are_refused(forks: Server, model: Callable[[str], Path], tmp_path: Path) -> None:
    """They are copied, too."""
    source = tmp_path / "source"
    shutil.copytree(model("keras_export"), source)
    proto = saved_model_pb2.SavedModel.FromString((source / "saved_model.pb").read_bytes())
    other = proto.meta_graphs.add()
    other.meta_info_def.tags.append("other")
    other.asset_file_def.add(filename="../outside.txt")
    (source / "saved_model.pb").write_bytes(proto.SerializeToString())
    _refused(forks, source, tmp_path / "target", "as an asset")


def test_assets_of_tensorflow_1_outside_are_refused(
    forks: Server, model: Callable[[str], Path], tmp_path: Path
) -> None:
    def edit(meta: Any) -> None:
        asset = type(meta.asset_file_def.add())(filename="../outside.txt")
        del meta.asset_file_def[:]
        meta.collection_def["saved_model_assets"].any_list.value.add().Pack(asset)

    _refused(forks, mutated(model("v1_two_fused"), tmp_path / "source", edit), tmp_path / "target", "as an asset")


@pytest.mark.parametrize("place", ["assets/vocabulary", "variables/variables.data-00000-of-00001", "saved_model.pb"])
def test_links_out_of_the_model_are_refused(
    forks: Server, model: Callable[[str], Path], tmp_path: Path, place: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(model("keras_export"), source)
    outside = tmp_path / "outside"
    file = source / place
    file.parent.mkdir(exist_ok=True)
    shutil.copyfile(file if file.exists() else source / "saved_model.pb", outside)
    file.unlink(missing_ok=True)
    file.symlink_to(outside)
    _refused(forks, source, tmp_path / "target", "is a link to")


def test_links_to_directories_are_refused(forks: Server, model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model("keras_export"), source)
    (source / "assets").rmdir()
    (source / "assets").symlink_to(source)
    _refused(forks, source, tmp_path / "target", "is a link to")


def test_links_within_the_model_are_followed(forks: Server, model: Callable[[str], Path], tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(model("keras_export"), source)
    (source / "assets" / "graph").symlink_to("../saved_model.pb")
    assert judged(forks.cli("rewrite", source, target), "rewrite") == "done"
    assert not (target / "assets" / "graph").is_symlink()
    assert (target / "assets" / "graph").read_bytes() == (source / "saved_model.pb").read_bytes()


@pytest.mark.parametrize("kind", ["pipe", "name"])
def test_odd_files_are_refused(forks: Server, model: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(model("keras_export"), source)
    if kind == "pipe":
        os.mkfifo(source / "assets" / "pipe")
    else:
        (source / f"a{ESCAPE}b").touch()
    _refused(forks, source, tmp_path / "target", "neither a file" if kind == "pipe" else "unprintable")


def _rename(meta: Any, what: str) -> None:
    function = meta.graph_def.library.function[0]
    if what == "node":
        function.node_def[0].name = ESCAPE
    elif what == "function":
        function.signature.name = ESCAPE
    elif what == "signature":
        meta.signature_def[ESCAPE].CopyFrom(meta.signature_def["serving_default"])
    elif what == "variable":
        next(n for n in meta.object_graph_def.nodes if n.HasField("variable")).variable.name = ESCAPE
    else:
        meta.object_graph_def.nodes[0].children[0].local_name = ESCAPE


@pytest.mark.parametrize("what", ["node", "function", "signature", "variable", "object"])
def test_unprintable_names_are_refused(forks: Server, model: Callable[[str], Path], tmp_path: Path, what: str) -> None:
    source = mutated(model("keras_export"), tmp_path / "source", lambda m: _rename(m, what))
    _refused(forks, source, tmp_path / "target", "unprintable")


def test_text_in_attributes_cannot_reach_the_terminal(
    forks: Server, model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Attributes may hold any bytes; a comparison shows them."""

    def edit(meta: Any) -> None:
        for function in meta.graph_def.library.function:
            for node in function.node_def:
                node.attr["_note"].s = f"{ESCAPE}<script>alert(1)</script>".encode()
                node.device = ESCAPE

    source = mutated(model("keras_export"), tmp_path / "source", edit)
    outcome = forks.cli("diff", model("keras_export"), source, "--verbose")
    assert judged(outcome, "diff") == "done"
    assert "\x1b" not in outcome.out
    assert "_note" in outcome.out


def test_a_name_in_an_error_cannot_reach_the_terminal(forks: Server, tmp_path: Path) -> None:
    outcome = forks.cli("inspect", tmp_path / ESCAPE)
    assert outcome.code == 2
    assert "\x1b" not in outcome.err


def _refused(forks: Server, source: Path, target: Path, why: str) -> None:
    for arguments in (("inspect", source), ("rewrite", source, target), ("finalize", source, target)):
        outcome = forks.cli(*arguments)
        assert judged(outcome, str(arguments)) == "refused"
        assert why in outcome.err, outcome.err
    assert not target.exists()


@pytest.mark.parametrize("name", ["keras_export", "v1_two_fused"])
def test_custom_ops_are_kept(forks: Server, model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    source, target, final = tmp_path / "source", tmp_path / "target", tmp_path / "final"
    with_custom_ops(model(name), source)
    count = _custom(source)
    assert count
    assert judged(forks.cli("inspect", source), "inspect") == "done"
    assert judged(forks.cli("rewrite", source, target), "rewrite") == "done"
    assert _custom(target) >= count
    assert judged(forks.cli("diff", source, target), "diff") == "done"
    if name != "v1_two_fused":  # to be saved by TensorFlow 2 before it can be finalised
        assert judged(forks.cli("finalize", target, final), "finalize") == "done"
        assert _custom(final) >= 1


def test_custom_ops_that_nothing_describes_are_named(
    forks: Server, model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = with_custom_ops(model("keras_export"), tmp_path / "source", described=False)
    _refused(forks, source, tmp_path / "target", f"the op {CUSTOM} is neither registered")


def _custom(model: Path) -> int:
    meta = saved_model_pb2.SavedModel.FromString((model / "saved_model.pb").read_bytes()).meta_graphs[0]
    graphs = (meta.graph_def.node, *(f.node_def for f in meta.graph_def.library.function))
    return sum(node.op == CUSTOM for graph in graphs for node in graph)


def test_the_commands_are_those_of_the_shell(forks: Server) -> None:
    outcome = forks.run(Call(CLI, [["--help"]]))
    assert outcome.code == 0
    assert all(name in outcome.out for name in ("inspect", "rewrite", "diff", "finalize", "verify", "sensitivity"))
