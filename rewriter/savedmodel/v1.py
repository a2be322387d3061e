"""TensorFlow 1's format: collections instead of an object graph; saver and signatures in the main graph.

Source: ``tensorflow/core/protobuf/{meta_graph,saver}.proto``, ``tensorflow/core/framework/variable.proto``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorflow.core.framework import variable_pb2

from rewriter import constants, op_defs, ops, protos
from rewriter.dataflow import REFERENCES, VARIABLES
from rewriter.draft import Draft
from rewriter.expr import Apply, Expr, Use, array, op, ordered
from rewriter.ir import MAIN, Error, Graph, Model, Node, Signature, Spec, Value, Variable
from rewriter.liveness import Assumption
from rewriter.savedmodel import contexts
from rewriter.savedmodel.graphs import SPARSE, main_value, tensor_info, tensors_of
from rewriter.savedmodel.references import OPS_ALONE

VARIABLE_COLLECTIONS = (
    "variables",
    "trainable_variables",
    "local_variables",
    "model_variables",
    "moving_average_variables",
    "metric_variables",
    "global_step",
)
"""Collections of ``VariableDef``, by the keys of ``tf.compat.v1.GraphKeys``."""

ASSIGNS = ("Assign", "AssignVariableOp")


def read_variables(meta: Any, main: Graph, model: Model) -> dict[str, Variable]:
    """Return the variables by their checkpoint name, or by their node's name if the saver does not restore them."""
    checkpoint_names = _restored(meta.saver_def, main, model)
    trainable = {d.variable_name.partition(":")[0] for d in _definitions(meta, "trainable_variables")}
    variables = {}
    for node in main.nodes.values():
        if node.op in VARIABLES:
            shape = op_defs.attribute(node, "shape").shape
            key = checkpoint_names.get(node.name, node.name)
            variables[key] = Variable(
                key,
                node.name,
                op_defs.get(model, node, "dtype"),
                None if shape.unknown_rank else tuple(d.size for d in shape.dim),
                node.name in trainable,
                node=node.name,
            )
    return variables


def _definitions(meta: Any, collection: str) -> Iterator[Any]:
    for data in meta.collection_def[collection].bytes_list.value if collection in meta.collection_def else ():
        try:
            yield variable_pb2.VariableDef.FromString(data)
        except DecodeError as e:
            raise Error(f"the collection {collection!r} holds something other than variables") from e


def _restored(saver_def: Any, main: Graph, model: Model) -> dict[str, str]:
    """Return the checkpoint name of each variable that the saver restores, by the variable's node."""
    if not saver_def.restore_op_name:
        return {}
    if saver_def.restore_op_name not in main.nodes:
        raise Error(f"the saver restores by {saver_def.restore_op_name!r}, which the graph does not hold")
    checkpoint_names = {}
    for name in Assumption(model, main, {}).needed([saver_def.restore_op_name]):
        node = main.nodes[name]
        if node.op in ASSIGNS:
            value = node.inputs[1]
            while main.nodes[value.node].op in constants.VIEWS or main.nodes[value.node].op in ops.FORWARDS:
                value = main.nodes[value.node].inputs[0]
            source = main.nodes[value.node]
            names = constants.constant_of(main, source.inputs[1]) if source.op == "RestoreV2" else None
            if names is not None:
                checkpoint_names[node.inputs[0].node] = protos.text(names.ravel()[value.port])
    return checkpoint_names


def read_signatures(meta: Any, main: Graph) -> dict[str, Signature]:
    """Return the signatures whose tensors the main graph computes.

    A sparse tensor is listed as its three components. A signature is left out if one of its tensors' names has no
    port, as such a name is an op's.
    """
    signatures = {}
    for name, proto in sorted(meta.signature_def.items()):
        if name in OPS_ALONE:
            continue
        inputs = list(_tensors(proto.inputs))
        outputs = list(_tensors(proto.outputs))
        tensors = [t for _, t, _ in (*inputs, *outputs)]
        values = [main_value(t) for t in tensors]
        if outputs and all(":" in t for t in tensors) and all(v.node in main.nodes for v in values):
            signatures[name] = Signature(
                name,
                "",
                tuple(k for k, _, _ in inputs),
                tuple(k for k, _, _ in outputs),
                tuple(values[: len(inputs)]),
                tuple(values[len(inputs) :]),
                tuple(s for _, _, s in (*inputs, *outputs)),
            )
    return signatures


def _tensors(infos: Any) -> Iterator[tuple[str, str, Spec]]:
    for key in sorted(infos):
        info = infos[key]
        tensors = tensors_of(key, info)
        unknown = info.tensor_shape.unknown_rank or len(tensors) > 1  # no component has a sparse tensor's shape
        spec = Spec(
            key, protos.dtype_name(info.dtype), None if unknown else tuple(d.size for d in info.tensor_shape.dim)
        )
        for name, text in tensors.items():
            yield name, text, spec


def write_signature(meta: Any, signature: Signature) -> None:
    """Write a signature's outputs, and its new inputs, to its SignatureDef.

    A new signature starts as a copy of the SignatureDef that `signature.like` names.
    """
    proto = meta.signature_def[signature.name]
    if signature.like:
        proto.CopyFrom(meta.signature_def[signature.like])
    present_inputs = {name for key, info in proto.inputs.items() for name in tensors_of(key, info)}
    for name, value, spec in zip(signature.inputs, signature.feeds, signature.specs, strict=False):
        if name not in present_inputs:
            proto.inputs[name].CopyFrom(tensor_info(spec, value))
    tensor_names = {n: f"{v.node}:{v.port}" for n, v in zip(signature.outputs, signature.fetches, strict=True)}
    present_outputs = {name for key, info in proto.outputs.items() for name in tensors_of(key, info)}
    specs = signature.specs[len(signature.inputs) :]
    for name, value, spec in zip(signature.outputs, signature.fetches, specs, strict=True):
        if name not in present_outputs:
            proto.outputs[name].CopyFrom(tensor_info(spec, value))
    for key, info in proto.outputs.items():
        if info.WhichOneof("encoding") == "coo_sparse":
            for part in SPARSE:
                setattr(info.coo_sparse, f"{part}_tensor_name", tensor_names[f"{key}.{part}"])
        else:
            info.name = tensor_names[key]


def read_collections(meta: Any) -> dict[str, tuple[str, ...]]:
    """Return the node names in each collection: those of node lists, and those in the definitions of variables."""
    collections = {}
    for name in VARIABLE_COLLECTIONS:
        texts = [
            text
            for d in _definitions(meta, name)
            for text in (d.variable_name, d.initial_value_name, d.initializer_name, d.snapshot_name)
        ]
        if texts:
            collections[name] = tuple(dict.fromkeys(text.partition(":")[0] for text in texts if text))
    for name, collection in meta.collection_def.items():
        if collection.WhichOneof("kind") == "node_list":
            collections[name] = tuple(n.partition(":")[0] for n in collection.node_list.value)
    return collections


def extend(model: Model, meta: Any, added: list[Variable]) -> Model:
    """Add new variables to the collections, initialisers and the saver, and update the definitions of all variables.

    Copied loops and conditionals get control flow contexts of their own.

    Args:
        model: the model.
        meta: the meta graph to write; it is changed.
        added: the new variables.

    Returns:
        The model, whose main graph has the new variables.
    """
    main = Draft(model.graphs[MAIN], entry=True)
    handles = {v.key: main.var_handle(v) for v in added}
    initializers = [_initialize(main, v, handles[v.key]) for v in added]
    if added:
        _extend_groups(meta, main, initializers)
        _extend_saver(model, meta.saver_def, main, added, handles)
    for name in VARIABLE_COLLECTIONS:
        _write_definitions(meta, main, name, added if name == "variables" else _trainable(name, added))
    _write_nodes(meta, main, model)
    for prefix, nodes in model.copies:
        contexts.copy(meta, prefix, frozenset(nodes))
    graph = main.finish()
    # Last, as only the finished graph tells which nodes are new or gone.
    contexts.complete(meta, graph, lambda node: op_defs.output_count(model, node))
    return replace(model, graphs={**model.graphs, MAIN: graph})


def _write_nodes(meta: Any, main: Draft, model: Model) -> None:
    """Replace outputs in node collections that their ops no longer have by the ops."""
    for collection in meta.collection_def.values():
        values: Any = collection.node_list.value
        for index, text in enumerate(list(values)):
            value = main_value(text)
            node = main.nodes.get(value.node) if ":" in text else None
            if node is not None and value.port >= op_defs.output_count(model, node):
                values[index] = node.name


def _trainable(collection: str, added: list[Variable]) -> list[Variable]:
    return [v for v in added if v.trainable] if collection == "trainable_variables" else []


def _initialize(main: Draft, variable: Variable, resource: Value) -> str:
    """Add the nodes that ``tf.compat.v1.Variable`` makes besides the resource; return the initialiser's name."""
    handle = Use("resource", resource)
    initial = array(np.asarray(variable.initial, dtype=variable.dtype))
    main.place_as(initial, f"{variable.name}/Initializer/initial_value")
    main.place_as(op("VarIsInitializedOp", handle), f"{variable.name}/IsInitialized/VarIsInitializedOp")
    main.place_as(_read(variable, resource), f"{variable.name}/Read/ReadVariableOp")
    return main.place_as(op("AssignVariableOp", handle, initial), f"{variable.name}/Assign").node


def _read(variable: Variable, resource: Value) -> Apply:
    return op("ReadVariableOp", Use("resource", resource), dtype=protos.Dtype(variable.dtype))


def _extend_groups(meta: Any, main: Draft, initializers: list[str]) -> None:
    """Make ops that initialise all variables initialise the new ones, too."""
    source_initializers = {d.initializer_name.partition(":")[0] for d in _definitions(meta, "variables")}
    for node in list(main.nodes.values()):
        # Such an op is a group: it does nothing, but waits for all initialisers.
        if node.op == "NoOp" and source_initializers and source_initializers <= set(node.after):
            main.set_node(replace(node, after=(*node.after, *initializers)))


def _write_definitions(meta: Any, main: Draft, collection: str, added: Iterable[Variable]) -> None:
    definitions = list(_definitions(meta, collection))
    for proto in definitions:
        node = main.nodes.get(proto.variable_name.partition(":")[0])
        # A pass may have made a resource of a reference.
        proto.is_resource = node is not None and node.op not in REFERENCES
    definitions.extend(_definition(main, v) for v in added)
    if definitions:
        values = meta.collection_def[collection].bytes_list.value
        del values[:]
        values.extend(d.SerializeToString(deterministic=True) for d in definitions)


def _definition(main: Draft, variable: Variable) -> Any:
    return variable_pb2.VariableDef(
        variable_name=f"{main.var_handle(variable).node}:0",
        initial_value_name=f"{variable.name}/Initializer/initial_value:0",
        initializer_name=f"{variable.name}/Assign",
        snapshot_name=f"{variable.name}/Read/ReadVariableOp:0",
        is_resource=True,
        trainable=variable.trainable,
        synchronization=variable.synchronization,
        aggregation=variable.aggregation,
    )


def _extend_saver(
    model: Model, saver_def: Any, main: Draft, added: list[Variable], handles: Mapping[str, Value]
) -> None:
    if not saver_def.restore_op_name:
        _new_saver(saver_def, main)
    needed = Assumption(model, main.graph, {})
    save = _first(main, needed, saver_def.save_tensor_name.partition(":")[0], "SaveV2")
    restore = _first(main, needed, saver_def.restore_op_name, "RestoreV2")
    dtypes = [v.dtype for v in added]
    reads = [main.place(_read(v, handles[v.key]), f"save/{v.name}") for v in added]
    # Both ops take the prefix, the names and the slices; SaveV2 takes the tensors after them.
    for node, new_inputs in ((save, reads), (restore, [])):
        names, slices = (constants.constant_of(_graph(main), v) for v in node.inputs[1:3])
        if names is None or slices is None:
            raise Error(f"the saver's node {node.name} has names that are no constants")
        longer_strings = (
            _strings(names, [v.key for v in added]),
            _strings(slices, [""] * len(added)),
        )
        inputs = (node.inputs[0], *(main.place(e, node.name) for e in longer_strings), *node.inputs[3:], *new_inputs)
        attrs = {"dtypes": protos.more_dtypes(op_defs.attribute(node, "dtypes"), dtypes), "_output_shapes": None}
        main.set_node(replace(node.with_attrs(**attrs), inputs=inputs))
    first = len(op_defs.attribute(restore, "dtypes").list.type)
    assignments = []
    for index, v in enumerate(added):
        value = Use(v.dtype, Value(restore.name, first + index))
        assignments.append(main.place(op("AssignVariableOp", Use("resource", handles[v.key]), value), "save").node)
    main.run_after(saver_def.restore_op_name, tuple(assignments), "save")


def _graph(main: Draft) -> Graph:
    return replace(main.graph, nodes=main.nodes)


def _strings(old: np.ndarray, more: list[str]) -> Expr:
    values = np.array([*old.ravel(), *(s.encode() for s in more)], dtype=object)
    return array(values)


def _first(main: Draft, needed: Assumption, root: str, op_name: str) -> Node:
    names = [n for n in needed.needed([root]) if main.nodes[n].op == op_name] if root in main.graph.nodes else []
    names = names or [n.name for n in main.nodes.values() if n.op == op_name]
    if not names:
        raise Error(f"the saver has no {op_name}; checkpoints of this age are not supported")
    # A sharded saver has one for each shard; any of them can take more tensors.
    return main.nodes[min(names)]


def _new_saver(saver_def: Any, main: Draft) -> None:
    """Add a saver without variables, in the form that ``tf.compat.v1.train.Saver`` makes."""
    no_strings = array(np.array([], dtype=object))
    name = array(np.array(b"model", dtype=object))
    attrs = {"dtype": protos.dtype_attr("string"), "shape": protos.shape_attr(())}
    prefix = Apply("string", "PlaceholderWithDefault", (name,), attrs)
    no_dtypes: dict[str, Any] = {"dtypes": protos.attr(list[protos.Dtype]())}
    save = Apply("", "SaveV2", (prefix, no_strings, no_strings), no_dtypes)
    saved = ordered(op("Identity", prefix), [save])
    restored = Apply("", "NoOp", (), after=(Apply("", "RestoreV2", (prefix, no_strings, no_strings), no_dtypes),))
    saver_def.CopyFrom(type(saver_def)(max_to_keep=5, version=type(saver_def).V2))
    saver_def.save_tensor_name = f"{main.place_as(saved, 'save/control_dependency').node}:0"
    saver_def.restore_op_name = main.place_as(restored, "save/restore_all").node
    saver_def.filename_tensor_name = f"{main.place(prefix, 'save').node}:0"
