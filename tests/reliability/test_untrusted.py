"""Untrusted models: bnqat runs nothing in them, reads nothing outside of them, and treats their strings as text."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from tensorflow.core.framework import op_def_pb2, types_pb2
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2
from tensorflow.python.client import pywrap_tf_session

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
            reached: tf.Tensor = tf.py_function(lambda x: x, [tf.io.read_file(name)], tf.string)
            return reached

    module = Reaching()
    module.variable = tf.Variable(1.0)
    tf.saved_model.save(module, str(tmp_path / "model"))
    reached = {(r.op, r.what) for r in reaching(load(tmp_path / "model"))}
    assert reached == {("ReadFile", "files"), ("EagerPyFunc", "Python"), ("PrintV2", "files")}


@pytest.mark.parametrize("name", ["keras_export", "v1_two_fused"])
def test_a_saver_that_a_signature_runs_is_reach(model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Serving such a signature writes or reads a file of the caller's choice."""

    def edit(meta: Any) -> None:
        saver = meta.saver_def
        signature = meta.signature_def["save"]
        signature.inputs["path"].name = saver.filename_tensor_name
        signature.inputs["path"].dtype = types_pb2.DT_STRING
        signature.outputs["path"].name = saver.save_tensor_name
        signature.outputs["path"].dtype = types_pb2.DT_STRING
        signature.method_name = "tensorflow/serving/predict"

    reached = reaching(load(mutated(model(name), tmp_path / "source", edit)))
    assert "SaveV2" in {r.op for r in reached}


def _saving(meta: Any, path: str) -> Any:
    """Add a node to the main graph that writes a file; it is used only by name."""
    for name, text in (("evil_file", path), ("evil_name", "x"), ("evil_data", "content")):
        node = meta.graph_def.node.add(name=name, op="Const")
        node.attr["dtype"].type = types_pb2.DT_STRING
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto([text] if name == "evil_name" else text))
    node = meta.graph_def.node.add(name="evil", op="Save", input=["evil_file", "evil_name", "evil_data"])
    node.attr["T"].list.type.append(types_pb2.DT_STRING)
    return node


def _collection(meta: Any, name: str) -> None:
    meta.collection_def[name].node_list.value.append("evil")


RUN_BY_LOADING: dict[str, Callable[[Any], Any]] = {
    "saved_model_main_op": lambda m: _collection(m, "saved_model_main_op"),
    "legacy_init_op": lambda m: _collection(m, "legacy_init_op"),
    "__saved_model_init_op": lambda m: (
        m.signature_def["__saved_model_init_op"]
        .outputs["__saved_model_init_op"]
        .MergeFrom(meta_graph_pb2.TensorInfo(name="evil"))
    ),
    "restore": lambda m: next(n for n in m.graph_def.node if n.name == m.saver_def.restore_op_name).input.append(
        "^evil"
    ),
}


@pytest.mark.parametrize("way", sorted(RUN_BY_LOADING))
def test_what_loading_runs_is_no_saver(forks: Server, model: Callable[[str], Path], tmp_path: Path, way: str) -> None:
    written = tmp_path / "written"

    def edit(meta: Any) -> None:
        _saving(meta, str(written))
        RUN_BY_LOADING[way](meta)

    source, target = mutated(model("v1_two_fused"), tmp_path / "source", edit), tmp_path / "target"
    assert {r.op for r in reaching(load(source))} == {"Save"}
    assert judged(forks.cli("rewrite", source, target), "rewrite") == "done"
    outcome = forks.cli("verify", source, target)
    assert judged(outcome, "verify") == "refused"
    assert "files by Save (1, first evil in the main graph)" in outcome.err
    assert not written.exists()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.saved_model.load(session, ["serve"], str(source))
    assert written.exists()


@pytest.mark.parametrize("name", ["keras_export", "v1_two_fused"])
def test_a_saver_that_restores_another_file(model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    def edit(meta: Any) -> None:
        _saving(meta, str(tmp_path / "written"))
        if name == "v1_two_fused":
            next(n for n in meta.graph_def.node if n.op == "RestoreV2").input[0] = "evil_file"
            return
        restore = next(n for n in meta.graph_def.node if n.name == meta.saver_def.restore_op_name)
        restore.input[list(restore.input).index(meta.saver_def.filename_tensor_name.partition(":")[0])] = "evil_file"

    assert {r.op for r in reaching(load(mutated(model(name), tmp_path / "source", edit)))} == {"RestoreV2"}


def test_a_saver_function_that_writes(model: Callable[[str], Path], tmp_path: Path) -> None:
    """V1 sessions restore by a function, so loading would run an op in it that writes a file."""

    def edit(meta: Any) -> None:
        restore = next(n for n in meta.graph_def.node if n.name == meta.saver_def.restore_op_name)
        (function,) = (f for f in meta.graph_def.library.function if f.signature.name == restore.attr["f"].func.name)
        nodes = type(meta)()
        _saving(nodes, str(tmp_path / "written"))
        for node in nodes.graph_def.node:
            node.input[:] = [f"{name}:output:0" for name in node.input]
            function.node_def.append(node)
        function.control_ret["evil"] = "evil"
        function.signature.control_output.append("evil")

    assert {r.op for r in reaching(load(mutated(model("keras_export"), tmp_path / "source", edit)))} == {"Save"}


@pytest.mark.parametrize("name", ["keras_export", "keras_save", "module_train", "nested", "v1_by_hand", "v1_loop"])
def test_savers_of_all_kinds_are_no_reach(
    model: Callable[[str], Path], rewritten: Callable[..., Path], name: str
) -> None:
    assert not reaching(load(model(name)))
    assert not reaching(load(rewritten(name)))


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
    reached = {(r.op, r.what) for r in reaching(load(tmp_path / "model"))}
    assert reached == {("CSVDatasetV2", "files"), ("DatasetFromGraph", "files")}


def test_ops_that_take_a_name_of_something_outside_reach() -> None:
    """Ops are told by the names of their string inputs and attributes."""
    registered = op_def_pb2.OpList()
    registered.ParseFromString(pywrap_tf_session.TF_GetBuffer(pywrap_tf_session.TF_GetAllOpList()))
    assert len(registered.op) > 1000
    ops = set()
    for op in registered.op:
        texts = [a.name for a in op.input_arg if a.type in (types_pb2.DT_STRING, 0)]
        texts += [a.name for a in op.attr if a.type in ("string", "list(string)")]
        if any(OUTSIDE.search(text) for text in texts):
            ops.add(op.name)
    assert {"ReadFile", "DumpTensor", "Skipgram", "DataServiceDataset"} <= ops
    assert ops - REACHED.keys() == {"SetStatsAggregatorDataset", "ExperimentalSetStatsAggregatorDataset"}


OUTSIDE = re.compile("file|path|dir(?!ection)|address|prefix|host(?!_)|command|shared_memory|url", re.IGNORECASE)


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", f"a{ESCAPE}b"])
def test_assets_outside_are_refused(forks: Server, model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    source = mutated(model("keras_export"), tmp_path / "source", lambda m: m.asset_file_def.add(filename=name))
    _refused(forks, source, tmp_path / "target", "as an asset")


def test_assets_of_other_meta_graphs_are_refused(forks: Server, model: Callable[[str], Path], tmp_path: Path) -> None:
    """A rewrite copies the assets of all meta graphs."""
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
