"""The object graph: reading concrete functions and variables from it, and adding what passes exposed.

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
    """The variables by their number in the object graph."""
    found = {}
    frozen = _frozen(objects)
    for number, node in enumerate(objects.nodes):
        if node.WhichOneof("kind") != "variable":
            continue
        saved = node.variable
        attributes = trackables.nodes[number].attributes if number < len(trackables.nodes) else ()
        keys = [a.checkpoint_key for a in attributes if a.name == VALUE]
        found[number] = Variable(
            keys[0] if keys else f"object {number}",
            saved.name,
            protos.dtype_name(saved.dtype),
            _shape(saved.shape),
            saved.trainable,
            saved.synchronization,
            saved.aggregation,
            frozen=number in frozen,
        )
    return found


def _frozen(objects: Any) -> set[int]:
    """The variables, by number, that objects list among their variables and none among its trainable ones."""
    listed: dict[str, set[int]] = {"variables": set(), "trainable_variables": set()}
    for node in objects.nodes:
        lists = {
            child.local_name: objects.nodes[child.node_id] for child in node.children if child.local_name in listed
        }
        if lists.keys() == listed.keys():
            for name, held in lists.items():
                listed[name] |= {child.node_id for child in held.children}
    return listed["variables"] - listed["trainable_variables"]


def read_entries(objects: Any, graphs: Mapping[str, Graph], variables: Mapping[int, Variable]) -> dict[str, Entry]:
    """The concrete functions by the name of their graph."""
    paths = _paths(objects)
    found = {}
    for name in sorted(objects.concrete_functions):
        proto = objects.concrete_functions[name]
        if name not in graphs:
            raise Error(f"the concrete function {name} has no function in the graph library")
        graph = graphs[name]
        captures = tuple(variables[n].key if n in variables else n for n in proto.bound_inputs)
        count = len(graph.arguments) - len(captures)
        dtypes = [op_defs.argument_dtype(graph.nodes[a]) for a in graph.arguments[:count]]
        inputs = tuple(tensor_specs(proto.canonicalized_input_signature))
        if len(inputs) != count:
            inputs = tuple(Spec(a, d, None) for a, d in zip(graph.arguments[:count], dtypes, strict=True))
        outputs = tuple(tensor_specs(proto.output_signature))
        if len(outputs) != len(graph.results):
            outputs = tuple(Spec(r.name, r.dtype, None) for r in graph.results)
        keys = _keys(proto.output_signature) if len(outputs) == len(graph.results) else ()
        found[name] = Entry(name, inputs, outputs, captures, tuple(paths.get(name, ())), keys)
    return found


def _keys(value: Any) -> tuple[str, ...]:
    """The keys of a dict of tensors, in the order of its tensors."""
    fields = value.dict_value.fields
    plain = all(fields[key].WhichOneof("kind") in ("tensor_spec_value", "bounded_tensor_spec_value") for key in fields)
    return tuple(sorted(fields)) if plain else ()


def _paths(objects: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for child in objects.nodes[0].children:
        node = objects.nodes[child.node_id]
        for name in functions_of(node):
            found.setdefault(name, []).append(child.local_name)
        if node.WhichOneof("kind") == "user_object" and node.user_object.identifier == "signature_map":
            for signature in node.children:
                for name in functions_of(objects.nodes[signature.node_id]):
                    found.setdefault(name, []).append(f"{child.local_name}.{signature.local_name}")
    return found


def object_paths(objects: Any) -> dict[int, str]:
    """The shortest path from the root of each object that it reaches, as ``layers.0.gamma``; the root's is ""."""
    found = {0: ""} if objects.nodes else {}
    waiting = deque(found)
    while waiting:
        number = waiting.popleft()
        for child in sorted(objects.nodes[number].children, key=lambda c: str(c.local_name)):
            if child.node_id not in found:
                found[child.node_id] = f"{found[number]}.{child.local_name}".lstrip(".")
                waiting.append(child.node_id)
    return found


def held_functions(objects: Any) -> Iterator[tuple[str, str]]:
    """(path, function) of every concrete function that an object holds."""
    for number, path in object_paths(objects).items():
        for name in functions_of(objects.nodes[number]):
            yield path, name


def belongings(objects: Any, number: int) -> set[int]:
    """A captured object, and all that belongs to it, by their numbers; the root, which it may refer to, does not."""
    found: set[int] = set()
    waiting = [number]
    while waiting:
        each = waiting.pop()
        if each and each not in found:
            found.add(each)
            node = objects.nodes[each]
            waiting += [c.node_id for c in node.children]
            for saveable in node.saveable_objects.values():
                waiting += [saveable.save_function, saveable.restore_function]
    return found


def owned(objects: Any) -> dict[int, tuple[str, ...]]:
    """The concrete functions that belong to captured objects which are no variables, by the object's number."""
    captured = {n for f in objects.concrete_functions.values() for n in f.bound_inputs}
    found = {}
    for number in sorted(captured):
        if objects.nodes[number].WhichOneof("kind") != "variable":
            names = [f for n in sorted(belongings(objects, number)) for f in functions_of(objects.nodes[n])]
            found[number] = tuple(dict.fromkeys(names))
    return found


def make_user_object(node: Any, identifier: str = GENERIC) -> None:
    """Let a ``SavedObject`` be a plain object, or a list."""
    node.user_object.identifier = identifier
    node.user_object.version.producer = node.user_object.version.min_consumer = 1


def functions_of(node: Any) -> list[str]:
    """The concrete functions that an object is, or holds."""
    kind = node.WhichOneof("kind")
    if kind == "function":
        return list(node.function.concrete_functions)
    return [node.bare_concrete_function.concrete_function_name] if kind == "bare_concrete_function" else []


def tensor_specs(value: Any) -> Iterator[Spec]:
    """The tensors of a ``StructuredValue``, in the order in which ``tf.nest.flatten`` gives them."""
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
    """The keys of the source's variables whose synchronisation or aggregation is another one now."""
    source = model.source
    nodes = source.proto.meta_graphs[source.index].object_graph_def.nodes
    saved = {key: nodes[number].variable for key, number in source.numbers.items()}
    held = {key: variable for key, variable in model.variables.items() if key in saved}
    return [
        key
        for key, now in held.items()
        if (saved[key].synchronization, saved[key].aggregation) != (now.synchronization, now.aggregation)
    ]


def _holds_tensors(value: Any) -> bool:
    """Whether an argument is, or contains, tensors: plain ones or composites such as ragged tensors."""
    kind = value.WhichOneof("kind")
    if kind == "dict_value":
        return any(_holds_tensors(v) for v in value.dict_value.fields.values())
    if kind in ("tuple_value", "list_value"):
        return any(_holds_tensors(v) for v in getattr(value, kind).values)
    return kind in ("tensor_spec_value", "bounded_tensor_spec_value", "type_spec_value", "named_tuple_value")


def _shape(proto: Any) -> tuple[int, ...] | None:
    return None if proto.unknown_rank else tuple(d.size for d in proto.dim)


class Additions:
    """Adds to both object graphs what a model has and its source had not.

    Attributes:
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
        while len(self.trackables.nodes) < len(self.objects.nodes):
            self.trackables.nodes.add()
        for key in self.numbers.keys() & self.model.variables.keys():
            saved, variable = self.objects.nodes[self.numbers[key]].variable, self.model.variables[key]
            saved.synchronization, saved.aggregation = variable.synchronization, variable.aggregation
        for path, value in self.model.attributes.items():
            if isinstance(value, Variable):
                self._attach(path, self._variable(value))
        for path, value in self.model.attributes.items():
            if isinstance(value, Endpoint):
                self._attach(path, self._function(value))
            elif isinstance(value, VariablesOf):
                self._attach(path, self._list(self.model.captured(value)))
        for name, endpoint in self.model.new_signatures.items():
            self._attach(f"signatures.{name}", self._signature(endpoint))
        for gradient in self.model.gradients.values():
            if gradient.signature is not None and gradient.function not in self.objects.concrete_functions:
                self.objects.concrete_functions[gradient.function].CopyFrom(gradient.signature)
        for entry in self.model.entries.values():
            proto = self.objects.concrete_functions[entry.function]
            del proto.bound_inputs[:]
            proto.bound_inputs.extend(self.numbers[c] if isinstance(c, str) else c for c in entry.captures)

    def _new(self) -> int:
        self.objects.nodes.add()
        self.trackables.nodes.add()
        return len(self.objects.nodes) - 1

    def _user_object(self, identifier: str) -> int:
        number = self._new()
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
        at = 0
        for parent in parents:
            found = self._child(at, parent)
            if found is None:
                found = self._user_object("signature_map" if path.startswith("signatures.") else GENERIC)
                self._link(at, parent, found)
            at = found
        if self._child(at, name) is not None:
            raise Error(f"the model has an attribute {path} of its own")
        self._link(at, name, number)

    def _variable(self, variable: Variable) -> int:
        number = self._new()
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

    def _list(self, variables: tuple[Variable, ...]) -> int:
        number = self._user_object("trackable_list_wrapper")
        for index, variable in enumerate(variables):
            self._link(number, str(index), self.numbers[variable.key])
        return number

    def _function(self, endpoint: Endpoint) -> int:
        """A function called with positional arguments, as its model's `like` or, for a signature, by their order."""
        if endpoint.function in self._functions:
            return self._functions[endpoint.function]
        like = self.objects.concrete_functions[endpoint.like]
        specs = self.model.entries[endpoint.like].inputs
        concrete = self.objects.concrete_functions[endpoint.function]
        known = like.canonicalized_input_signature.tuple_value.values
        if known:
            arguments, keywords = known
            fields = keywords.dict_value.fields
            values = [*arguments.tuple_value.values, *(fields[name] for name in sorted(fields))]
            values = [v for v in values if _holds_tensors(v)]
        else:
            values = [_tensor(s) for s in specs]
        signature = concrete.canonicalized_input_signature.tuple_value.values
        positional = signature.add().tuple_value
        positional.values.extend(values)
        positional.SetInParent()
        signature.add().dict_value.SetInParent()
        output = _keyed(endpoint.returns) if endpoint.returns else like.output_signature
        if not output.WhichOneof("kind"):
            output = _outputs(self.model.entries[endpoint.like].outputs)
        if (
            not endpoint.returns
            and output.WhichOneof("kind") == "dict_value"
            and len(output.dict_value.fields) == 1
            and self._keyed(like)
        ):
            (output,) = output.dict_value.fields.values()
        concrete.output_signature.CopyFrom(output)
        number = self._new()
        function = self.objects.nodes[number].function
        function.concrete_functions.append(endpoint.function)
        named = specs if len(specs) == len(values) else [Spec("", "", None)] * len(values)
        names = [_identifier(s.name, i) for i, s in enumerate(named)]
        function.function_spec.CopyFrom(_function_spec(names, []))
        self._functions[endpoint.function] = number
        return number

    @staticmethod
    def _keyed(concrete: Any) -> bool:
        """Whether a concrete function takes keywords only, as signatures do."""
        known = concrete.canonicalized_input_signature.tuple_value.values
        if not known:
            return False
        arguments, keywords = known
        return not arguments.tuple_value.values and bool(keywords.dict_value.fields)

    def _signature(self, endpoint: Endpoint) -> int:
        """A function called with keywords, which gives a dict of outputs."""
        concrete = self.objects.concrete_functions[endpoint.function]
        if endpoint.inputs:
            entry = self.model.entries[endpoint.function]
            keywords = [s.name for s in entry.inputs]
            signature = concrete.canonicalized_input_signature.tuple_value.values
            signature.add().tuple_value.SetInParent()
            signature.add().CopyFrom(_keyed(entry.inputs))
            concrete.output_signature.CopyFrom(_keyed(entry.outputs))
        else:
            keywords = list(self.model.signature_of(endpoint.like).inputs)
            concrete.CopyFrom(self.objects.concrete_functions[endpoint.like])
            if endpoint.returns:
                concrete.output_signature.CopyFrom(_keyed(endpoint.returns))
        number = self._new()
        bare = self.objects.nodes[number].bare_concrete_function
        bare.concrete_function_name = endpoint.function
        bare.argument_keywords.extend(keywords)
        bare.allowed_positional_arguments = 1 if len(keywords) == 1 else 0
        bare.function_spec.CopyFrom(_function_spec([], keywords))
        return number


def _tensor(spec: Spec) -> Any:
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


def _keyed(specs: Sequence[Spec]) -> Any:
    """A dict of tensors by their names."""
    value = struct_pb2.StructuredValue()
    value.dict_value.SetInParent()
    for spec in specs:
        value.dict_value.fields[spec.name].CopyFrom(_tensor(spec))
    return value


def _outputs(specs: tuple[Spec, ...]) -> Any:
    """One tensor, or a list of them."""
    if len(specs) == 1:
        return _tensor(specs[0])
    return struct_pb2.StructuredValue(list_value=struct_pb2.ListValue(values=[_tensor(s) for s in specs]))


def _identifier(name: str, index: int) -> str:
    """A Python parameter's name for an input."""
    return name if name.isidentifier() else f"input_{index}"


def _strings(names: list[str]) -> Any:
    value = struct_pb2.StructuredValue()
    value.list_value.SetInParent()
    for name in names:
        value.list_value.values.add().string_value = name
    return value


def _function_spec(positional: list[str], keywords: list[str]) -> Any:
    """A ``FunctionSpec`` of a function with these parameters and no defaults."""
    nothing = struct_pb2.StructuredValue(none_value=struct_pb2.NoneValue())
    fields = {
        "args": _strings(positional),
        "varargs": nothing,
        "varkw": nothing,
        "defaults": nothing,
        "kwonlyargs": _strings(keywords),
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
