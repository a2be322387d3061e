"""Damaged models and configurations: done, or one sentence; never a traceback, a hang, or what does not load."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from rewriter.savedmodel.main_graph import OBJECT_GRAPH_KEY
from tests.mutate import function_with, mutated, nodes_of, with_value
from tests.reliability.damage import damage_configuration, damaged
from tests.reliability.forks import Server
from tests.reliability.trials import fresh, judged, loads, trial

KERNEL = "FusedBatchNormV3"

MODELS = ("keras_export", "v1_two_fused", "module_train", "module_silu", "if", "nested")
"""Small ones of each format, some with several functions; `make soak` goes on for an hour."""


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for one trial after the other."""
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.parametrize("name", MODELS)
def test_undamaged(forks: Server, model: Callable[[str], Path], space: Path, name: str) -> None:
    """Every step of a trial is done if nothing is damaged."""
    outcomes = list(trial(forks, model(name), fresh(space)))
    assert {"inspect done", "rewrite done", "rewrite loads", "diff done"} <= set(outcomes), outcomes


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(random=st.randoms(use_true_random=True), name=st.sampled_from(MODELS))
def test_damaged_models(forks: Server, model: Callable[[str], Path], space: Path, random: Random, name: str) -> None:
    source = fresh(space) / "source"
    damaged(model(name), source, random)
    (space / "out").mkdir()
    list(trial(forks, source, space / "out"))


@settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(random=st.randoms(use_true_random=True))
def test_damaged_rewritten_models(forks: Server, rewritten: Callable[..., Path], space: Path, random: Random) -> None:
    source = fresh(space) / "source"
    damaged(rewritten("keras_export"), source, random)
    for arguments in (("inspect", source), ("finalize", source, space / "final")):
        judged(forks.cli(*arguments, limit=10, mib=3000), str(arguments))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(random=st.randoms(use_true_random=True))
def test_damaged_configurations(forks: Server, space: Path, random: Random) -> None:
    file = fresh(space) / "bnqat.toml"
    written = forks.cli("rewrite", "--bits", "gamma=4,beta=8", "--print-config")
    assert written.code == 0
    file.write_bytes(damage_configuration(written.out.encode(), random))
    judged(forks.cli("rewrite", "--config", file, "--print-config", limit=10, mib=3000), "--print-config")


def _functions(meta: Any) -> Any:
    return meta.graph_def.library.function


def _layers(meta: Any) -> Any:
    return function_with(meta, KERNEL)


def _kernel(meta: Any) -> Any:
    return next(nodes_of(_layers(meta), KERNEL))


def _cyclic_nodes(meta: Any) -> None:
    node = _layers(meta).node_def[-1]
    node.input.append(f"^{node.name}")


def _cyclic_calls(meta: Any) -> None:
    for function in _functions(meta):
        for node in function.node_def:
            if "f" in node.attr:
                node.attr["f"].func.name = function.signature.name


def _unknown_function(meta: Any) -> None:
    next(n for n in meta.graph_def.node if "f" in n.attr).attr["f"].func.name = "nowhere"


def _unknown_op(meta: Any) -> None:
    _layers(meta).node_def[0].op = "NoSuchOp"


def _dangling_input(meta: Any) -> None:
    node = next(n for n in _layers(meta).node_def if n.input)
    node.input[0] = "nowhere:output:0"


def _no_such_output(meta: Any) -> None:
    node = _kernel(meta)
    user = next(n for n in _layers(meta).node_def if f"{node.name}:y:0" in n.input)
    user.input[list(user.input).index(f"{node.name}:y:0")] = f"{node.name}:y:1"


def _duplicate_names(meta: Any) -> None:
    _layers(meta).node_def[1].name = _layers(meta).node_def[0].name


def _duplicate_functions(meta: Any) -> None:
    _functions(meta).add().CopyFrom(_functions(meta)[0])


def _wrong_type(meta: Any) -> None:
    _kernel(meta).attr["T"].type = 9


def _wrong_attribute(meta: Any) -> None:
    _kernel(meta).attr["epsilon"].s = b"small"


def _huge_constant(meta: Any) -> None:
    for node in _layers(meta).node_def:
        if node.op == "Const":
            for size in (1 << 40, 1 << 20):
                node.attr["value"].tensor.tensor_shape.dim.add().size = size


def _huge_list(meta: Any) -> None:
    node = _layers(meta).node_def.add(name="many", op="Pack")
    node.attr["N"].i = 1 << 60
    node.attr["T"].type = 1


def _wrong_shape(meta: Any) -> None:
    next(n for n in meta.object_graph_def.nodes if n.HasField("variable")).variable.shape.dim[0].size += 1


def _wrong_dtype(meta: Any) -> None:
    next(n for n in meta.object_graph_def.nodes if n.HasField("variable")).variable.dtype = 9


def _no_such_object(meta: Any) -> None:
    next(iter(meta.object_graph_def.concrete_functions.values())).bound_inputs[0] = 10_000


def _no_such_tensor(meta: Any) -> None:
    next(iter(meta.signature_def["serving_default"].outputs.values())).name = "nowhere:0"


def _misread(meta: Any) -> None:
    shapes = next(nodes_of(_layers(meta), "ReadVariableOp")).attr["_output_shapes"].list
    del shapes.shape[0].dim[:]


def _no_such_aggregation(meta: Any) -> None:
    next(n for n in meta.object_graph_def.nodes if n.HasField("variable")).variable.aggregation = 9999


def _no_such_port(meta: Any) -> None:
    node = next(n for n in meta.graph_def.node if n.input)
    node.input[0] = f"{node.input[0]}:abc"


def _mixed_list(meta: Any) -> None:
    node = next(n for f in _functions(meta) for n in f.node_def if "Tin" in n.attr)
    node.attr["Tin"].list.shape.add()


def _no_such_constant(meta: Any) -> None:
    meta.object_graph_def.nodes[-1].constant.operation = "nowhere"


def _no_keywords(meta: Any) -> None:
    function = next(iter(meta.object_graph_def.concrete_functions.values()))
    del function.canonicalized_input_signature.tuple_value.values[1]


def _function_called_as_an_op(meta: Any) -> None:
    _functions(meta)[0].signature.name = "VarHandleOp"


def _argument_outside_of_functions(meta: Any) -> None:
    next(n for n in meta.graph_def.node if n.op == "VarHandleOp").op = "Arg"


DAMAGE = {
    "depends on itself": _cyclic_nodes,
    "calls itself": _cyclic_calls,
    "calls nowhere, which does not exist": _unknown_function,
    "the op NoSuchOp is neither registered": _unknown_op,
    "the input nowhere:output:0 does not exist": _dangling_input,
    "has no output y:1": _no_such_output,
    "there are two nodes called": _duplicate_names,
    "two functions called": _duplicate_functions,
    "none of the values it may have": _wrong_type,
    "is not of the type float": _wrong_attribute,
    "does not hold what its dtype and shape say": _huge_constant,
    "has 0 inputs and takes": _huge_list,
    "and the checkpoint holds float32 of shape": _wrong_shape,
    "of shape": _wrong_dtype,
    "is object 10000": _no_such_object,
    "and is said to have the shape []": _misread,
    "is not of the type list(type)": _mixed_list,
    "is the constant 'nowhere', which the graph does not hold": _no_such_constant,
    "is no pair of arguments and keywords": _no_keywords,
    "the aggregation of object": _no_such_aggregation,
    "'abc' is not the number of an output": _no_such_port,
    "which the graph does not compute": _no_such_tensor,
    "which is the name of an op": _function_called_as_an_op,
    "is of the op Arg": _argument_outside_of_functions,
}


@pytest.mark.parametrize("why", sorted(DAMAGE))
def test_what_is_wrong_is_said(forks: Server, model: Callable[[str], Path], tmp_path: Path, why: str) -> None:
    source = mutated(model("keras_export"), tmp_path / "source", DAMAGE[why])
    for arguments in (("inspect", source), ("rewrite", source, tmp_path / "target"), ("diff", source, source)):
        outcome = forks.cli(*arguments, limit=10, mib=3000)
        assert judged(outcome, str(arguments)) == "refused"
        assert why in outcome.err, outcome.err


@pytest.mark.parametrize(("kind", "why"), [("input_arg", "which takes"), ("output_arg", "values, and")])
def test_functions_that_take_or_return_less_than_a_call(
    forks: Server, model: Callable[[str], Path], tmp_path: Path, kind: str, why: str
) -> None:
    """A branch of If without an argument that it does not use, or without a result."""

    def edit(meta: Any) -> None:
        branches = {n.attr[k].func.name for n in meta.graph_def.node for k in n.attr if k.endswith("_branch")}
        for function in _functions(meta):
            used = {name.partition(":")[0] for n in function.node_def for name in n.input} | set(function.ret.values())
            for argument in getattr(function.signature, kind) if function.signature.name in branches else ():
                if argument.name not in used:
                    getattr(function.signature, kind).remove(argument)
                    function.ret.pop(argument.name, None)
                    return
        raise AssertionError

    source = mutated(model("v1_by_hand_if"), tmp_path / "source", edit)
    for arguments in (("inspect", source), ("rewrite", source, tmp_path / "target"), ("diff", source, source)):
        outcome = forks.cli(*arguments, limit=10, mib=3000)
        assert judged(outcome, str(arguments)) == "refused"
        assert why in outcome.err, outcome.err


def test_no_such_gradient(forks: Server, model: Callable[[str], Path], tmp_path: Path) -> None:
    def edit(meta: Any) -> None:
        meta.graph_def.library.registered_gradients[0].gradient_func = "nowhere"

    source = mutated(model("module_silu"), tmp_path / "source", edit)
    outcome = forks.cli("rewrite", source, tmp_path / "target")
    assert judged(outcome, "rewrite") == "refused"
    assert "is the function nowhere, which does not exist" in outcome.err


def test_more_objects_in_the_checkpoint(forks: Server, model: Callable[[str], Path], tmp_path: Path) -> None:
    """New objects need the same numbers in the model and in its checkpoint."""
    more = TrackableObjectGraph(nodes=[TrackableObjectGraph.TrackableObject()] * 100).SerializeToString()
    source = with_value(model("keras_export"), tmp_path / "source", OBJECT_GRAPH_KEY, lambda value: value + more)
    outcome = forks.cli("rewrite", source, tmp_path / "target")
    assert judged(outcome, "rewrite") == "refused"
    assert "objects, and its checkpoint has" in outcome.err


def test_corrupt_collections(forks: Server, model: Callable[[str], Path], tmp_path: Path) -> None:
    """TensorFlow 1's variables and assets are bytes in collections."""

    def edit(meta: Any) -> None:
        for name in ("variables", "trainable_variables"):
            values = meta.collection_def[name].bytes_list.value
            values[:] = [b"\xff" * len(data) for data in values]

    def edit_contexts(meta: Any) -> None:
        meta.collection_def["cond_context"].bytes_list.value[0] = b"\xff"

    source = mutated(model("v1_two_fused"), tmp_path / "source", edit)
    for arguments in (("inspect", source), ("rewrite", source, tmp_path / "target")):
        outcome = forks.cli(*arguments)
        assert judged(outcome, str(arguments)) == "refused"
        assert "the collection 'trainable_variables' holds something other than variables" in outcome.err
    source = mutated(model("v1_two_fused"), tmp_path / "contexts", edit_contexts)
    outcome = forks.cli("rewrite", source, tmp_path / "target")
    assert judged(outcome, "contexts") == "refused"
    assert "the collection 'cond_context' holds something other than loops and conditionals" in outcome.err


def test_an_output_without_a_port(forks: Server, model: Callable[[str], Path], tmp_path: Path) -> None:
    """TensorFlow takes an output without a port for an op; bnqat leaves such a signature as it is."""

    def edit(meta: Any) -> None:
        meta.signature_def["other"].CopyFrom(meta.signature_def["serving_default"])
        for info in meta.signature_def["other"].outputs.values():
            info.name = info.name.partition(":")[0]

    source, target = mutated(model("v1_two_fused"), tmp_path / "source", edit), tmp_path / "target"
    assert judged(forks.cli("rewrite", source, target), "rewrite") == "done"
    assert loads(forks, source, target, "rewrite") == "rewrite loads"
    before, after = (
        saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs[0].signature_def
        for path in (source, target)
    )
    assert before["other"] == after["other"]
    assert before["serving_default"] == after["serving_default"]


def test_stale_shapes_of_calls(forks: Server, rewritten: Callable[..., Path], tmp_path: Path) -> None:
    """TensorFlow ignores stale shapes, and does not update them when a call gets more outputs."""

    def edit(meta: Any) -> None:
        for function in _functions(meta):
            for node in function.node_def:
                if "f" in node.attr and "_output_shapes" in node.attr:
                    node.attr["_output_shapes"].list.shape.add()

    source, target = mutated(rewritten("while"), tmp_path / "source", edit), tmp_path / "target"
    assert judged(forks.cli("finalize", source, target), "finalize") == "done"
    assert loads(forks, source, target, "finalize") == "finalize loads"


def test_a_variable_that_holds_the_root(forks: Server, rewritten: Callable[..., Path], tmp_path: Path) -> None:
    """Children of a captured object are kept, except the root, which would keep everything."""

    def edit(meta: Any) -> None:
        variable = next(n for n in meta.object_graph_def.nodes if n.HasField("variable"))
        variable.children.add(node_id=0, local_name="owner")

    source, target = mutated(rewritten("keras_export"), tmp_path / "source", edit), tmp_path / "target"
    assert judged(forks.cli("finalize", source, target), "finalize") == "done"
    assert loads(forks, source, target, "finalize") == "finalize loads"
    (proto,) = saved_model_pb2.SavedModel.FromString((target / "saved_model.pb").read_bytes()).meta_graphs
    assert not any(c.local_name == "quantization" for c in proto.object_graph_def.nodes[0].children)


def test_text_with_numbers_that_are_none(forks: Server, model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model("as_text"), source)
    file = source / "saved_model.pbtxt"
    file.write_text(file.read_text().replace("DT_FLOAT", "9" * 11, 1))
    outcome = forks.cli("inspect", source)
    assert judged(outcome, "enum") == "refused"
    assert "saved_model.pbtxt cannot be read" in outcome.err


def test_names_that_are_saved(
    forks: Server, model: Callable[[str], Path], rewritten: Callable[..., Path], tmp_path: Path
) -> None:
    """The saver has one name more than tensors."""

    def edit(meta: Any) -> None:
        node = next(n for f in _functions(meta) for n in f.node_def if n.name == "SaveV2/tensor_names")
        names = [*tf.make_ndarray(node.attr["value"].tensor).ravel(), b"more"]
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(names))

    for command, known in (("rewrite", model("keras_export")), ("finalize", rewritten("keras_export"))):
        source = mutated(known, tmp_path / command, edit)
        outcome = forks.cli(command, source, tmp_path / "target")
        assert judged(outcome, command) == "refused"
        assert "is no constant with a string for each tensor of SaveV2" in outcome.err


def test_signatures_that_the_graph_and_the_objects_have_otherwise(
    forks: Server, model: Callable[[str], Path], tmp_path: Path
) -> None:
    def edit(meta: Any) -> None:
        (outer,) = (f for f in _functions(meta) if f.signature.name.startswith("__inference_signature_wrapper_serve"))
        inner = next(n for n in outer.node_def if n.op.endswith("PartitionedCall")).attr["f"].func.name
        for node in meta.graph_def.node:
            if node.attr["f"].func.name == outer.signature.name:
                node.attr["f"].func.name = inner

    source = mutated(model("module_train"), tmp_path / "source", edit)
    outcome = forks.cli("rewrite", source, tmp_path / "target")
    assert judged(outcome, "rewrite") == "refused"
    assert "among the objects" in outcome.err


@pytest.mark.parametrize(
    "file", ["saved_model.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"]
)
@pytest.mark.parametrize("how", ["truncated", "empty", "absent", "garbage"])
def test_damaged_files(forks: Server, model: Callable[[str], Path], tmp_path: Path, file: str, how: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(model("keras_export"), source)
    path = source / file
    data = path.read_bytes()
    path.unlink()
    if how != "absent":
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "garbage": data[::-1]}[how])
    outcome = forks.cli("rewrite", source, tmp_path / "target", limit=10, mib=3000)
    assert judged(outcome, how) == "refused"
    assert path.name.partition(".data")[0].removesuffix(".index") in outcome.err
    assert not (tmp_path / "target").exists()
