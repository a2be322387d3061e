"""Damage to a SavedModel: to its protocol buffers, and to the bytes of its files."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, MutableSequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from google.protobuf.descriptor import FieldDescriptor
from tensorflow.core.framework import attr_value_pb2, types_pb2
from tensorflow.core.protobuf import saved_model_pb2

from rewriter.savedmodel.index import entries
from tests.reliability.indexes import edit_index

INTERESTING = (0, 1, -1, 2, 7, 127, 128, 1 << 20, (1 << 31) - 1, -(1 << 31), (1 << 62), -(1 << 62))
FLOATS = (0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan"))
STRINGS = ("", " ", "x", ":", "^", "a:b:c:d", ":0", "a" * 3000, "\x1b[2J", "../../x", "\u202e", "__main__", "%s{0}")


class Place(NamedTuple):
    """A field of a message. Its kind is the path of fields that leads to it."""

    kind: str
    message: Any
    field: Any


def places(message: Any, kind: str = "", depth: int = 0) -> Iterator[Place]:
    """Yield every field, set or not, of a message and of all messages in it."""
    for field in message.DESCRIPTOR.fields:
        yield Place(f"{kind}.{field.name}", message, field)
    for field, value in message.ListFields():
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        below = f"{kind}.{field.name}"
        if _is_map(field):
            entry = field.message_type.fields_by_name["value"]
            if entry.type == FieldDescriptor.TYPE_MESSAGE:
                for key in sorted(value):
                    yield from places(value[key], below, depth + 1)
        elif field.is_repeated:
            for element in value:
                yield from places(element, below, depth + 1)
        else:
            yield from places(value, below, depth + 1)


def _is_map(field: Any) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def damage_structure(message: Any, random: Random) -> str:
    """Change one field somewhere in a message, and return a description of the change.

    Kinds of places are equally likely, or most damage would be to nodes' attributes.
    """
    by_kind: dict[str, list[Place]] = defaultdict(list)
    for place in places(message):
        by_kind[place.kind].append(place)
    place = random.choice(by_kind[random.choice(sorted(by_kind))])
    same = [p for p in by_kind[place.kind] if p.message.HasField(place.field.name)] if _has(place.field) else []
    if place.field.is_repeated:
        how = _damage_map(place, random) if _is_map(place.field) else _damage_list(place, random)
    elif place.field.type == FieldDescriptor.TYPE_MESSAGE:
        how = _damage_message(place, same, random)
    else:
        setattr(place.message, place.field.name, value := _other(place, by_kind, random))
        how = f"= {value!r:.60}"
    return f"{place.kind} {how}"


def _has(field: Any) -> bool:
    return not field.is_repeated and field.has_presence


def _damage_message(place: Place, same: list[Place], random: Random) -> str:
    if same and random.random() < 0.5:
        donor = random.choice(same)
        replacement = type(getattr(donor.message, place.field.name))()
        replacement.CopyFrom(getattr(donor.message, place.field.name))
        getattr(place.message, place.field.name).CopyFrom(replacement)
        return "as another"
    if place.message.HasField(place.field.name):
        place.message.ClearField(place.field.name)
        return "cleared"
    getattr(place.message, place.field.name).SetInParent()
    return "made"


def _damage_list(place: Place, random: Random) -> str:
    elements: MutableSequence[Any] = getattr(place.message, place.field.name)
    how = random.choice(["removed", "twice", "exchanged", "changed", "emptied"])
    if not elements or how == "emptied":
        if elements:
            del elements[:]
            return "emptied"
        if place.field.type == FieldDescriptor.TYPE_MESSAGE:
            elements.add()  # type: ignore[attr-defined]
        else:
            elements.append(_random(place.field, random))
        return "one more"
    index = random.randrange(len(elements))
    if how == "removed":
        del elements[index]
    elif how == "twice":
        elements.extend([elements[index]])
    elif place.field.type == FieldDescriptor.TYPE_MESSAGE:
        replacement = type(elements[0])()
        replacement.CopyFrom(elements[random.randrange(len(elements))])
        elements[index].CopyFrom(replacement)
    else:
        elements[index] = random.choice([*elements, _random(place.field, random)])
    return f"[{index}] {how}"


def _damage_map(place: Place, random: Random) -> str:
    mapping = getattr(place.message, place.field.name)
    keys = sorted(mapping)
    if not keys:
        return "left empty"
    key = random.choice(keys)
    if random.random() < 0.4:
        del mapping[key]
        return f"[{key!r:.40}] removed"
    donor = random.choice(keys)
    if place.field.message_type.fields_by_name["value"].type == FieldDescriptor.TYPE_MESSAGE:
        copy = type(mapping[donor])()
        copy.CopyFrom(mapping[donor])
        mapping[key].CopyFrom(copy)
    else:
        mapping[key] = mapping[donor]
    return f"[{key!r:.40}] as [{donor!r:.40}]"


def _other(place: Place, by_kind: dict[str, list[Place]], random: Random) -> Any:
    """Return another value for a field: its value elsewhere in the message, or a random one."""
    if random.random() < 0.5:
        return getattr(random.choice(by_kind[place.kind]).message, place.field.name)
    return _random(place.field, random)


def _random(field: Any, random: Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            text = random.choice(STRINGS)
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
        case FieldDescriptor.CPPTYPE_BOOL:
            return random.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return random.choice(FLOATS)
        case FieldDescriptor.CPPTYPE_ENUM:
            return random.choice([0, 1, 3, 7, 9, 20, 101, 9999])
    unsigned = field.cpp_type in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64)
    small = field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32)
    value = random.choice(INTERESTING)
    value = max(-(1 << 31), min(value, (1 << 31) - 1)) if small else value
    return abs(value) - (abs(value) == 1 << 31) if unsigned else value


ATTRIBUTES: tuple[dict[str, Any], ...] = (
    {},
    {"b": True},
    {"i": 1 << 62},
    {"f": float("nan")},
    {"s": b"x"},
    {"type": types_pb2.DT_HALF},
    {"shape": {"unknown_rank": True}},
    {"tensor": {"dtype": types_pb2.DT_FLOAT}},
    {"func": {"name": "nowhere"}},
    {"list": {}},
    {"list": {"type": [types_pb2.DT_FLOAT]}},
    {"list": {"s": [b"x"], "i": [1]}},
)
"""An attribute of each kind."""


def damage_graph(meta: Any, random: Random) -> str:
    """Change an edge, an op, an attribute, a function or an object of a meta graph, and return a description.

    The result is a well-formed message, so it gets further than the result of `damage_structure`.
    """
    kinds = [_damage_inputs, _damage_op, _damage_attribute, _damage_attribute, _damage_function, _damage_object]
    return random.choice(kinds)(meta, random)


def _node(meta: Any, random: Random) -> tuple[Any, Any]:
    """Draw a node, and return it with all nodes of its graph.

    Ops are equally likely, or most nodes would be constants.
    """
    by_op: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for nodes in (meta.graph_def.node, *(f.node_def for f in meta.graph_def.library.function)):
        for node in nodes:
            by_op[node.op].append((node, nodes))
    return random.choice(by_op[random.choice(sorted(by_op))])


def _damage_inputs(meta: Any, random: Random) -> str:
    node, nodes = _node(meta, random)
    if node.input and random.random() < 0.5:
        return f"input {node.input.pop(random.randrange(len(node.input)))} of {node.op} {node.name:.40} dropped"
    other = random.choice([n for n in nodes if n.input] or [node])
    node.input.append(random.choice([*other.input, other.name, f"^{other.name}"]))
    return f"input {node.input[-1]} added to {node.op} {node.name:.40}"


def _damage_op(meta: Any, random: Random) -> str:
    node, _ = _node(meta, random)
    other, _ = _node(meta, random)
    old, node.op = node.op, random.choice([other.op, *_functions(meta), "Arg", "NoOp", "NoSuchOp"])
    return f"{old} {node.name:.40} is a {node.op}"


def _damage_attribute(meta: Any, random: Random) -> str:
    node, _ = _node(meta, random)
    if not node.attr:
        return f"{node.op} {node.name:.40} has no attribute"
    name = random.choice(sorted(node.attr))
    del node.attr[name]
    if random.random() < 0.5:
        return f"attribute {name} of {node.op} {node.name:.40} removed"
    node.attr[name].CopyFrom(attr_value_pb2.AttrValue(**(value := random.choice(ATTRIBUTES))))
    return f"attribute {name} of {node.op} {node.name:.40} is {value}"


def _damage_function(meta: Any, random: Random) -> str:
    names = _functions(meta)
    if not names:
        return "no function"
    index = random.randrange(len(names))
    functions = meta.graph_def.library.function
    if random.random() < 0.3:
        functions[index].signature.name = random.choice([_node(meta, random)[0].op, "Arg"])
        return f"function {names[index]} is called {functions[index].signature.name}"
    arguments = random.choice([functions[index].signature.input_arg, functions[index].signature.output_arg])
    if arguments and random.random() < 0.4:
        return f"argument {arguments.pop(random.randrange(len(arguments))).name} of {names[index]} removed"
    del functions[index]
    return f"function {names[index]} removed"


def _functions(meta: Any) -> list[str]:
    return [f.signature.name for f in meta.graph_def.library.function]


def _damage_object(meta: Any, random: Random) -> str:
    children = [c for node in meta.object_graph_def.nodes for c in node.children]
    if not children:
        return "no object"
    child = random.choice(children)
    child.node_id = random.randrange(len(meta.object_graph_def.nodes))
    return f"child {child.local_name} turned to object {child.node_id}"


def damage_bytes(data: bytes, random: Random) -> tuple[bytes, str]:
    """Return damaged bytes, and a description of the damage."""
    how = random.choice(["truncated", "flipped", "zeroed", "inserted", "removed", "emptied"])
    first = random.randrange(max(1, len(data)))
    size = random.choice([1, 2, 8, 64, 1000])
    match how:
        case "truncated":
            return data[:first], f"truncated at {first} of {len(data)}"
        case "flipped":
            return b"".join((data[:first], bytes([data[first] ^ 1 << random.randrange(8)]), data[first + 1 :])), (
                f"bit flipped at {first} of {len(data)}"
            )
        case "zeroed":
            return data[:first] + bytes(size) + data[first + size :], f"{size} zeroed at {first} of {len(data)}"
        case "inserted":
            return data[:first] + random.randbytes(size) + data[first:], f"{size} inserted at {first} of {len(data)}"
        case "removed":
            return data[:first] + data[first + size :], f"{size} removed at {first} of {len(data)}"
    return b"", "emptied"


def damaged(model: Path, target: Path, random: Random) -> str:
    """Copy a model, damage the copy, and return a description of the damage."""
    shutil.copytree(model, target)
    return _damage(target, random)


def _damage(model: Path, random: Random) -> str:
    """Damage a model in place, and return a description of the damage."""
    graph = model / "saved_model.pb"
    if graph.exists() and random.random() < 0.75:
        proto = saved_model_pb2.SavedModel.FromString(graph.read_bytes())
        count = random.choice([1, 1, 1, 2, 4])
        if random.random() < 0.5:
            done = [damage_graph(random.choice(proto.meta_graphs), random) for _ in range(count)]
        else:
            done = [damage_structure(proto, random) for _ in range(count)]
        graph.write_bytes(proto.SerializeToString())
        return "; ".join(done)
    index = model / "variables" / "variables.index"
    if index.exists() and random.random() < 0.3:
        return f"index: {_damage_index(index, random)}"
    file = random.choice(sorted(p for p in model.rglob("*") if p.is_file() and p.name != "fingerprint.pb"))
    data, done_ = damage_bytes(file.read_bytes(), random)
    file.write_bytes(data)
    return f"{file.relative_to(model)}: {done_}"


def _damage_index(file: Path, random: Random) -> str:
    """Damage an entry or the header of an index, and correct the checksums."""
    chosen = random.choice(sorted(key for key, _ in entries(file)))
    done = []

    def edit(key: bytes, entry: Any) -> None:
        if key == chosen:
            done.append(f"{key!r} {damage_structure(entry, random)}")

    edit_index(file, edit)
    return done[0]


VALUES = (
    b"0",
    b"-1",
    b"17",
    b"1e400",
    b"nan",
    b'"affine"',
    b"[]",
    b"[1, 2]",
    b"{}",
    b"true",
    b'"\\u0000"',
    b"9" * 5000,
)


def damage_configuration(data: bytes, random: Random) -> bytes:
    """Return a configuration with a value exchanged, a line moved, or bytes changed."""
    lines = data.splitlines()
    how = random.choice(["value", "line", "bytes"])
    keys = [i for i, line in enumerate(lines) if b" = " in line]
    if how == "value" and keys:
        index = random.choice(keys)
        lines[index] = lines[index].partition(b" = ")[0] + b" = " + random.choice(VALUES)
        return b"\n".join(lines)
    if how == "line" and lines:
        lines.insert(random.randrange(len(lines)), random.choice([*lines, b"[rules]", b"[[rules]]", b"x = 1"]))
        return b"\n".join(lines)
    return damage_bytes(data, random)[0]
