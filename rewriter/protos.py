"""Values of attributes: dtypes, shapes, tensors and functions as ``AttrValue`` protos, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python.framework import dtypes, tensor_util

from rewriter.ir import Error


def with_functions(value: Any, names: Mapping[str, str]) -> Any:
    """Return an attribute with functions' names replaced; the same object if it has none of the names."""
    if not any(name in names for name in functions_in(value)):
        return value
    copy = type(value)()
    copy.CopyFrom(value)
    for function in copy.list.func if copy.WhichOneof("value") == "list" else (copy.func,):
        function.name = names.get(function.name, function.name)
    return copy


def functions_in(value: Any) -> Iterator[str]:
    """Yield the names of the functions that an attribute refers to."""
    kind = value.WhichOneof("value")
    if kind == "func":
        yield value.func.name
    elif kind == "list":
        for func in value.list.func:
            yield func.name


@cache
def dtype_name(number: int) -> str:
    """Return the name of a dtype by its ``types_pb2.DataType`` number: 1 is "float32"."""
    try:
        return str(dtypes.as_dtype(number).name)
    except TypeError as e:
        raise Error(f"unknown dtype number {number}; the model needs a newer TensorFlow") from e


@cache
def dtype_number(name: str) -> int:
    """Return the ``types_pb2.DataType`` number of a dtype by its name."""
    return int(dtypes.as_dtype(name).as_datatype_enum)


class Dtype(str):
    """A dtype by name. `attr` makes a type attribute of it, but a bytes attribute of a plain string."""

    __slots__ = ()


@cache
def dtype_attr(name: str) -> Any:
    """Return a dtype as an ``AttrValue``; one proto per dtype, as protos are never changed."""
    return attr(Dtype(name))


def more_dtypes(dtypes: Any, names: list[str]) -> Any:
    """Return a list of dtypes, an ``AttrValue``, with more dtypes at its end."""
    longer = attr_value_pb2.AttrValue()
    longer.CopyFrom(dtypes)
    longer.list.type.extend(dtype_number(n) for n in names)
    return longer


def more_shapes(shapes: Any, added: Sequence[tuple[int, ...] | None]) -> Any:
    """Return a list of shapes, an ``AttrValue``, with more shapes at its end; None is an unknown rank."""
    longer = attr_value_pb2.AttrValue()
    longer.CopyFrom(shapes)
    longer.list.shape.extend(shapes_attr([*added]).list.shape)
    return longer


class Func(str):
    """A function by name. `attr` makes a function attribute of it."""

    __slots__ = ()


def attr(value: bool | int | float | str | bytes | np.ndarray | list[Dtype] | list[Func]) -> Any:
    """Return a Python value as an ``AttrValue``."""
    proto = attr_value_pb2.AttrValue()
    # The order matters: a bool is an int, and `Dtype` and `Func` are texts.
    if isinstance(value, bool):
        proto.b = value
    elif isinstance(value, int):
        proto.i = value
    elif isinstance(value, float):
        proto.f = value
    elif isinstance(value, Dtype):
        proto.type = dtype_number(value)
    elif isinstance(value, Func):
        proto.func.name = value
    elif isinstance(value, str | bytes):
        proto.s = value.encode() if isinstance(value, str) else value
    elif isinstance(value, np.ndarray | np.generic):
        proto.tensor.CopyFrom(tensor_util.make_tensor_proto(value))
    else:
        for element in value:
            if isinstance(element, Func):
                proto.list.func.add(name=element)
            else:
                proto.list.type.append(dtype_number(element))
    return proto


def shape_attr(shape: tuple[int, ...]) -> Any:
    """Return a shape as an ``AttrValue``."""
    proto = attr_value_pb2.AttrValue()
    proto.shape.SetInParent()
    for size in shape:
        proto.shape.dim.add().size = size
    return proto


def shapes_attr(shapes: list[tuple[int, ...] | None]) -> Any:
    """Return a list of shapes as an ``AttrValue``; None is an unknown rank."""
    proto = attr_value_pb2.AttrValue()
    proto.list.SetInParent()
    for shape in shapes:
        shape_proto = proto.list.shape.add()
        if shape is None:
            shape_proto.unknown_rank = True
        else:
            for size in shape:
                shape_proto.dim.add().size = size
    return proto


def text(data: bytes) -> str:
    """Return bytes of an attribute or a constant as text; bytes that are no UTF-8 become escape sequences."""
    return data.decode(errors="backslashreplace")
