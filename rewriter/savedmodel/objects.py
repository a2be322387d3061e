"""The object graph: reads its concrete functions and variables, and adds the attributes and signatures of passes.

Source: ``tensorflow/core/protobuf/{saved_object_graph,trackable_object_graph,struct}.proto``. The
checkpoint has an object graph of its own, which numbers its nodes as the SavedModel's does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tensorflow.core.protobuf import saved_object_graph_pb2, struct_pb2

from rewriter import op_defs, protos
from rewriter.ir import Endpoint, Entry, Error, Graph, Model, Spec, Variable, VariablesOf

VALUE = "VARIABLE_VALUE"
GENERIC = "_generic_user_object"


def read_variables(objects: Any, trackables: Any) -> dict[int, Variable]:
    """Return the variables by their number in the object graph."""
    variables = {}
    frozen = _frozen(objects)
    for number, node in enumerate(objects.nodes):
        if node.WhichOneof("kind") != "variable":
            continue
        saved = node.variable
        attributes = trackables.nodes[number].attributes if number < len(trackables.nodes) else ()
        keys = [a.checkpoint_key for a in attributes if a.name == VALUE]
        variables[number] = Variable(
            keys[0] if keys else f"object {number}",
            saved.name,
            protos.dtype_name(saved.dtype),
            _shape(saved.shape),
            saved.trainable,
            saved.synchronization,
            saved.aggregation,
            frozen=number in frozen,
        )
    return variables


def _frozen(objects: Any) -> set[int]:
    """Return the numbers of the variables that objects list as variables, and none lists as trainable."""
    listed: dict[str, set[int]] = {"variables": set(), "trainable_variables": set()}
    for node in objects.nodes:
        lists = {
            child.local_name: objects.nodes[child.node_id] for child in node.children if child.local_name in listed
        }
        # One list without the other says nothing about frozen variables.
        if lists.keys() == listed.keys():
            for name, wrapper in lists.items():
                listed[name] |= {child.node_id for child in wrapper.children}
    return listed["variables"] - listed["trainable_variables"]


def read_entries(objects: Any, graphs: Mapping[str, Graph], variables: Mapping[int, Variable]) -> dict[str, Entry]:
    """Return the concrete functions by the name of their graph."""
    paths = _paths(objects)
    entries = {}
    for name in sorted(objects.concrete_functions):
        proto = objects.concrete_functions[name]
        if name not in graphs:
            raise Error(f"the concrete function {name} has no function in the graph library")
        graph = graphs[name]
        captures = tuple(variables[n].key if n in variables else n for n in proto.bound_inputs)
        count = len(graph.arguments) - len(captures)
        dtypes = [op_defs.argument_dtype(graph.nodes[a]) for a in graph.arguments[:count]]
        inputs = tuple(tensor_specs(proto.canonicalized_input_signature))
        # A composite tensor, such as a ragged one, is several arguments, for which there are no specs.
        if len(inputs) != count:
            inputs = tuple(Spec(a, d, None) for a, d in zip(graph.arguments[:count], dtypes, strict=True))
        outputs = tuple(tensor_specs(proto.output_signature))
        keys = _keys(proto.output_signature) if len(outputs) == len(graph.results) else ()
        if len(outputs) != len(graph.results):
            outputs = tuple(Spec(r.name, r.dtype, None) for r in graph.results)
        flags = tuple(_flags(proto.canonicalized_input_signature))
        entries[name] = Entry(name, inputs, outputs, captures, tuple(paths.get(name, ())), keys, flags)
    return entries


def _keys(value: Any) -> tuple[str, ...]:
    """Return the keys of a dict of tensors, in the order of its tensors; nothing if it holds other values."""
    fields = value.dict_value.fields
    plain = all(fields[key].WhichOneof("kind") in ("tensor_spec_value", "bounded_tensor_spec_value") for key in fields)
    return tuple(sorted(fields)) if plain else ()


def _flags(value: Any) -> Iterator[bool]:
    """Yield the Python booleans among a function's arguments, which stand beside its tensors."""
    kind = value.WhichOneof("kind")
    if kind == "bool_value":
        yield value.bool_value
    elif kind == "dict_value":
        for key in sorted(value.dict_value.fields):
            yield from _flags(value.dict_value.fields[key])
    elif kind in ("tuple_value", "list_value"):
        for item in getattr(value, kind).values:
            yield from _flags(item)


def _paths(objects: Any) -> dict[str, list[str]]:
    paths: dict[str, list[str]] = {}
    for child in objects.nodes[0].children:
        node = objects.nodes[child.node_id]
        for name in functions_of(node):
            paths.setdefault(name, []).append(child.local_name)
        if node.WhichOneof("kind") == "user_object" and node.user_object.identifier == "signature_map":
            for signature in node.children:
                for name in functions_of(objects.nodes[signature.node_id]):
                    paths.setdefault(name, []).append(f"{child.local_name}.{signature.local_name}")
    return paths


def object_paths(objects: Any) -> dict[int, str]:
    """Return the shortest path from the root to each object below it, as ``layers.0.gamma``; the root's is ""."""
    paths = {0: ""} if objects.nodes else {}
    waiting = deque(paths)
    while waiting:
        number = waiting.popleft()
        for child in sorted(objects.nodes[number].children, key=lambda c: str(c.local_name)):
            if child.node_id not in paths:
                paths[child.node_id] = f"{paths[number]}.{child.local_name}".lstrip(".")
                waiting.append(child.node_id)
    return paths


def held_functions(objects: Any) -> Iterator[tuple[str, str]]:
    """Yield (path, function) for every concrete function that an object holds."""
    for number, path in object_paths(objects).items():
        for name in functions_of(objects.nodes[number]):
            yield path, name


def belongings(objects: Any, number: int) -> set[int]:
    """Return the numbers of a captured object and of all objects that belong to it.

    The root does not belong to it, even if the object refers to the root.
    """
    members: set[int] = set()
    waiting = [number]
    while waiting:
        member = waiting.pop()
        if member and member not in members:
            members.add(member)
            node = objects.nodes[member]
            waiting += [c.node_id for c in node.children]
            for saveable in node.saveable_objects.values():
                waiting += [saveable.save_function, saveable.restore_function]
    return members


def owned(objects: Any) -> dict[int, tuple[str, ...]]:
    """Return the concrete functions that belong to each captured object but variables, by the object's number."""
    captured = {n for f in objects.concrete_functions.values() for n in f.bound_inputs}
    functions = {}
    for number in sorted(captured):
        if objects.nodes[number].WhichOneof("kind") != "variable":
            names = [f for n in sorted(belongings(objects, number)) for f in functions_of(objects.nodes[n])]
            functions[number] = tuple(dict.fromkeys(names))
    return functions


def make_user_object(node: Any, identifier: str = GENERIC) -> None:
    """Make a ``SavedObject`` a plain object or, by its identifier, a list."""
    # TensorFlow revives an object as a list only from producer version 1 on (``revived_types.py``).
    node.user_object.identifier = identifier
    node.user_object.version.producer = node.user_object.version.min_consumer = 1


def functions_of(node: Any) -> list[str]:
    """Return the concrete functions of an object that is a function; nothing for any other object."""
    kind = node.WhichOneof("kind")
    if kind == "function":
        return list(node.function.concrete_functions)
    return [node.bare_concrete_function.concrete_function_name] if kind == "bare_concrete_function" else []


def tensor_specs(value: Any) -> Iterator[Spec]:
    """Yield the tensors of a ``StructuredValue``, in the order of ``tf.nest.flatten``."""
    kind = value.WhichOneof("kind")
    if kind in ("tensor_spec_value", "bounded_tensor_spec_value"):
        spec = getattr(value, kind)
        yield Spec(spec.name, protos.dtype_name(spec.dtype), _shape(spec.shape))
    elif kind == "dict_value":
        for key in sorted(value.dict_value.fields):
            yield from tensor_specs(value.dict_value.fields[key])
    elif kind in ("tuple_value", "list_value"):
        for item in getattr(value, kind).values:
            yield from tensor_specs(item)
    elif kind == "named_tuple_value":
        for pair in value.named_tuple_value.values:
            yield from tensor_specs(pair.value)


def synchronized_otherwise(model: Model) -> list[str]:
    """Return the keys of the source's variables whose synchronisation or aggregation a pass changed."""
    source = model.source
    nodes = source.proto.meta_graphs[source.index].object_graph_def.nodes
    saved = {key: nodes[number].variable for key, number in source.numbers.items()}
    variables = {key: variable for key, variable in model.variables.items() if key in saved}
    return [
        key
        for key, now in variables.items()
        if (saved[key].synchronization, saved[key].aggregation) != (now.synchronization, now.aggregation)
    ]


def _holds_tensors(value: Any) -> bool:
    """Return true if an argument is, or contains, tensors: plain ones or composites such as ragged tensors."""
    kind = value.WhichOneof("kind")
    if kind == "dict_value":
        return any(_holds_tensors(v) for v in value.dict_value.fields.values())
    if kind in ("tuple_value", "list_value"):
        return any(_holds_tensors(v) for v in getattr(value, kind).values)
    return kind in ("tensor_spec_value", "bounded_tensor_spec_value", "type_spec_value", "named_tuple_value")


def _shape(proto: Any) -> tuple[int, ...] | None:
    return None if proto.unknown_rank else tuple(d.size for d in proto.dim)


class Additions:
    """Adds a model's new variables, attributes and signatures to both object graphs.

    Attributes:
        model: the model, with its additions.
        objects: the object graph of the SavedModel.
        trackables: the object graph of the checkpoint.
        numbers: the object number of each variable, by key.
    """

    def __init__(self, model: Model, objects: Any, trackables: Any, numbers: Mapping[str, int]) -> None:
        self.model = model
        self.objects = objects
        self.trackables = trackables
        self.numbers = dict(numbers)
        self._functions: dict[str, int] = {}

    def add(self) -> None:
        """Add variables, attributes and signatures, and extend the captures of concrete functions."""
        # The checkpoint may have fewer objects, as it saves no functions; a new object has one number in both.
        while len(self.trackables.nodes) < len(self.objects.nodes):
            self.trackables.nodes.add()
        for key in self.numbers.keys() & self.model.variables.keys():
            saved, variable = self.objects.nodes[self.numbers[key]].variable, self.model.variables[key]
            saved.synchronization, saved.aggregation = variable.synchronization, variable.aggregation
        # Variables first, as lists refer to their numbers.
        for path, value in self.model.attributes.items():
            if isinstance(value, Variable):
                self._attach(path, self._new_variable(value))
        for path, value in self.model.attributes.items():
            if isinstance(value, Endpoint):
                self._attach(path, self._new_function(value))
            elif isinstance(value, VariablesOf):
                self._attach(path, self._new_list(self.model.captured(value)))
        for name, endpoint in self.model.new_signatures.items():
            self._attach(f"signatures.{name}", self._new_signature(endpoint))
        for gradient in self.model.gradients.values():
            if gradient.signature is not None and gradient.function not in self.objects.concrete_functions:
                self.objects.concrete_functions[gradient.function].CopyFrom(gradient.signature)
        for entry in self.model.entries.values():
            proto = self.objects.concrete_functions[entry.function]
            del proto.bound_inputs[:]
            proto.bound_inputs.extend(self.numbers[c] if isinstance(c, str) else c for c in entry.captures)

    def _new_object(self) -> int:
        self.objects.nodes.add()
        self.trackables.nodes.add()
        return len(self.objects.nodes) - 1

    def _new_user_object(self, identifier: str) -> int:
        number = self._new_object()
        make_user_object(self.objects.nodes[number], identifier)
        return number

    def _child(self, parent: int, name: str) -> int | None:
        for child in self.objects.nodes[parent].children:
            if child.local_name == name:
                return int(child.node_id)
        return None

    def _link(self, parent: int, name: str, number: int) -> None:
        for graph in (self.objects, self.trackables):
            graph.nodes[parent].children.add(node_id=number, local_name=name)

    def _attach(self, path: str, number: int) -> None:
        *parents, name = path.split(".")
        owner = 0
        for parent in parents:
            child = self._child(owner, parent)
            if child is None:
                child = self._new_user_object("signature_map" if path.startswith("signatures.") else GENERIC)
                self._link(owner, parent, child)
            owner = child
        if self._child(owner, name) is not None:
            raise Error(f"the model has an attribute {path} of its own")
        self._link(owner, name, number)

    def _new_variable(self, variable: Variable) -> int:
        number = self._new_object()
        saved = self.objects.nodes[number].variable
        saved.dtype = protos.dtype_number(variable.dtype)
        saved.shape.SetInParent()
        for size in variable.shape or ():
            saved.shape.dim.add().size = size
        saved.name = variable.name
        saved.trainable = variable.trainable
        saved.synchronization = variable.synchronization
        saved.aggregation = variable.aggregation
        node = self.trackables.nodes[number]
        node.attributes.add(name=VALUE, full_name=variable.name, checkpoint_key=variable.key)
        self.numbers[variable.key] = number
        return number

    def _new_list(self, variables: tuple[Variable, ...]) -> int:
        number = self._new_user_object("trackable_list_wrapper")
        for index, variable in enumerate(variables):
            self._link(number, str(index), self.numbers[variable.key])
        return number

    def _new_function(self, endpoint: Endpoint) -> int:
        """Add a function with positional arguments, and return its object number.

        The arguments are those of the concrete function that `endpoint.like` names. Keyword arguments become
        positional, in the order of their names.
        """
        if endpoint.function in self._functions:
            return self._functions[endpoint.function]
        like = self.objects.concrete_functions[endpoint.like]
        specs = self.model.entries[endpoint.like].inputs
        concrete = self.objects.concrete_functions[endpoint.function]
        like_signature = like.canonicalized_input_signature.tuple_value.values
        if like_signature:
            arguments, keywords = like_signature
            fields = keywords.dict_value.fields
            values = [*arguments.tuple_value.values, *(fields[name] for name in sorted(fields))]
            # Other arguments, such as training=False, were fixed when the function was traced.
            values = [v for v in values if _holds_tensors(v)]
        else:
            values = [_tensor_spec(s) for s in specs]
        signature = concrete.canonicalized_input_signature.tuple_value.values
        positional = signature.add().tuple_value
        positional.values.extend(values)
        positional.SetInParent()
        signature.add().dict_value.SetInParent()
        output = _dict_of_tensors(endpoint.returns) if endpoint.returns else like.output_signature
        if not output.WhichOneof("kind"):
            output = _tensor_or_list(self.model.entries[endpoint.like].outputs)
        # A function that is made of a signature with one output returns that tensor, not a dict.
        if (
            not endpoint.returns
            and output.WhichOneof("kind") == "dict_value"
            and len(output.dict_value.fields) == 1
            and self._takes_keywords_only(like)
        ):
            (output,) = output.dict_value.fields.values()
        concrete.output_signature.CopyFrom(output)
        number = self._new_object()
        function = self.objects.nodes[number].function
        function.concrete_functions.append(endpoint.function)
        # An argument that holds several tensors has no name among the specs.
        named_specs = specs if len(specs) == len(values) else [Spec("", "", None)] * len(values)
        names = [_identifier(s.name, i) for i, s in enumerate(named_specs)]
        function.function_spec.CopyFrom(_function_spec(names, []))
        self._functions[endpoint.function] = number
        return number

    @staticmethod
    def _takes_keywords_only(concrete: Any) -> bool:
        """Return true if a concrete function takes keywords only, as signatures do."""
        signature = concrete.canonicalized_input_signature.tuple_value.values
        if not signature:
            return False
        arguments, keywords = signature
        return not arguments.tuple_value.values and bool(keywords.dict_value.fields)

    def _new_signature(self, endpoint: Endpoint) -> int:
        """Add a function that takes keywords and returns a dict of outputs, and return its object number."""
        concrete = self.objects.concrete_functions[endpoint.function]
        if endpoint.inputs:
            entry = self.model.entries[endpoint.function]
            keywords = [s.name for s in entry.inputs]
            signature = concrete.canonicalized_input_signature.tuple_value.values
            signature.add().tuple_value.SetInParent()
            signature.add().CopyFrom(_dict_of_tensors(entry.inputs))
            concrete.output_signature.CopyFrom(_dict_of_tensors(entry.outputs))
        else:
            keywords = list(self.model.signature_of(endpoint.like).inputs)
            concrete.CopyFrom(self.objects.concrete_functions[endpoint.like])
            if endpoint.returns:
                concrete.output_signature.CopyFrom(_dict_of_tensors(endpoint.returns))
        number = self._new_object()
        bare = self.objects.nodes[number].bare_concrete_function
        bare.concrete_function_name = endpoint.function
        bare.argument_keywords.extend(keywords)
        # As in TensorFlow's own signatures: the order of several inputs is ambiguous, that of one is not.
        bare.allowed_positional_arguments = 1 if len(keywords) == 1 else 0
        bare.function_spec.CopyFrom(_function_spec([], keywords))
        return number


def _tensor_spec(spec: Spec) -> Any:
    value = struct_pb2.StructuredValue()
    value.tensor_spec_value.name = spec.name
    value.tensor_spec_value.dtype = protos.dtype_number(spec.dtype)
    if spec.shape is None:
        value.tensor_spec_value.shape.unknown_rank = True
    else:
        value.tensor_spec_value.shape.SetInParent()
        for size in spec.shape:
            value.tensor_spec_value.shape.dim.add().size = size
    return value


def _dict_of_tensors(specs: Sequence[Spec]) -> Any:
    """Return the structure of a dict of tensors by their names."""
    value = struct_pb2.StructuredValue()
    value.dict_value.SetInParent()
    for spec in specs:
        value.dict_value.fields[spec.name].CopyFrom(_tensor_spec(spec))
    return value


def _tensor_or_list(specs: tuple[Spec, ...]) -> Any:
    """Return the structure of one tensor, or of a list of tensors."""
    if len(specs) == 1:
        return _tensor_spec(specs[0])
    return struct_pb2.StructuredValue(list_value=struct_pb2.ListValue(values=[_tensor_spec(s) for s in specs]))


def _identifier(name: str, index: int) -> str:
    """Return a valid name of a Python parameter for an input."""
    return name if name.isidentifier() else f"input_{index}"


def _string_list(names: list[str]) -> Any:
    value = struct_pb2.StructuredValue()
    value.list_value.SetInParent()
    for name in names:
        value.list_value.values.add().string_value = name
    return value


def _function_spec(positional: list[str], keywords: list[str]) -> Any:
    """Return the ``FunctionSpec`` of a function with these parameters and no defaults."""
    nothing = struct_pb2.StructuredValue(none_value=struct_pb2.NoneValue())
    fields = {
        "args": _string_list(positional),
        "varargs": nothing,
        "varkw": nothing,
        "defaults": nothing,
        "kwonlyargs": _string_list(keywords),
        "kwonlydefaults": nothing,
        "annotations": struct_pb2.StructuredValue(dict_value=struct_pb2.DictValue()),
    }
    spec = saved_object_graph_pb2.FunctionSpec()
    full = spec.fullargspec.named_tuple_value
    full.name = "FullArgSpec"
    for key, value in fields.items():
        pair = full.values.add()
        pair.key = key
        pair.value.CopyFrom(value)
    spec.input_signature.none_value.SetInParent()
    return spec
