"""Functions of loaded models: the arguments that they take and the variables that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from rewriter.ir import Entry, Error


class Arguments:
    """Turns a user's inputs into the arguments of a concrete function.

    Inputs are one tensor, a list or tuple in the order of the function's inputs, or a dict by their names.
    """

    def __init__(self, function: Any) -> None:
        self.structure = function.structured_input_signature
        self.specs = [s for s in tf.nest.flatten(self.structure) if isinstance(s, tf.TypeSpec)]

    @property
    def names(self) -> list[str]:
        """Names of the inputs, in the order of the function."""
        return [s.name for s in self.specs]

    @property
    def dtype(self) -> str:
        """Dtype of the first input of floats; float32 if there is none."""
        return next((s.dtype.name for s in self.specs if s.dtype.is_floating), "float32")

    def __call__(self, inputs: Any) -> Any:
        """Return the positional and keyword arguments, as a pair.

        Raises:
            Error: the inputs are not those that the function takes.
        """
        values = iter(self._ordered(inputs))
        arguments = [next(values) if isinstance(s, tf.TypeSpec) else s for s in tf.nest.flatten(self.structure)]
        return tf.nest.pack_sequence_as(self.structure, arguments)

    def _ordered(self, inputs: Any) -> list[Any]:
        names = self.names
        if isinstance(inputs, Mapping) and (len(names) > 1 or set(inputs) == set(names)):
            if set(inputs) != set(names):
                raise Error(f"the inputs are {', '.join(map(str, inputs))}, but the model takes {', '.join(names)}")
            return [inputs[name] for name in names]
        values: list[Any] = tf.nest.flatten(inputs)
        if len(values) != len(names):
            raise Error(f"{len(values)} inputs, but the model takes {len(names)}: {', '.join(names)}")
        return values


def variables_by_key(concrete: Any, entry: Entry) -> dict[str, Any]:
    """Return a loaded function's variables by their keys in the file; under a strategy, those of all replicas."""
    # A function captures a plain variable's handle, but under a strategy the distributed variable itself.
    variable_by_id: dict[int, Any] = {}
    for variable in concrete.graph.variables:
        variable_by_id[id(variable)] = variable
        if not hasattr(variable, "values"):
            variable_by_id[id(variable.handle)] = variable
    pairs = zip(entry.captures, concrete.captured_inputs, strict=True)
    return {
        key: variable_by_id[id(capture)]
        for key, capture in pairs
        if isinstance(key, str) and id(capture) in variable_by_id
    }


def replicas(variable: Any) -> tuple[Any, ...]:
    """Return a variable's copies on the replicas of its strategy; without a strategy, the variable itself."""
    return tuple(getattr(variable, "values", (variable,)))


def assign_replicas(variable: Any, value: Any) -> None:
    """Assign a value to a variable on every replica."""
    for replica in replicas(variable):
        replica.assign(value)
