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
        """Those of the inputs."""
        return [s.name for s in self.specs]

    @property
    def dtype(self) -> str:
        """That of the first input of real numbers; float32 without one."""
        return next((s.dtype.name for s in self.specs if s.dtype.is_floating), "float32")

    def __call__(self, inputs: Any) -> Any:
        """Arguments and keywords.

        Raises:
            Error: there are other inputs than the function takes.
        """
        values = iter(self._ordered(inputs))
        filled = [next(values) if isinstance(s, tf.TypeSpec) else s for s in tf.nest.flatten(self.structure)]
        return tf.nest.pack_sequence_as(self.structure, filled)

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
    """A loaded function's variables by their keys in the file; under a strategy, those of all replicas."""
    known: dict[int, Any] = {}
    for variable in concrete.graph.variables:
        known[id(variable)] = variable
        if not hasattr(variable, "values"):
            known[id(variable.handle)] = variable
    pairs = zip(entry.captures, concrete.captured_inputs, strict=True)
    return {key: known[id(held)] for key, held in pairs if isinstance(key, str) and id(held) in known}


def replicas(variable: Any) -> tuple[Any, ...]:
    """A variable's copies on the replicas of its strategy; without one, the variable itself."""
    return tuple(getattr(variable, "values", (variable,)))


def assign_replicas(variable: Any, value: Any) -> None:
    """Assign a value to a variable on every replica."""
    for replica in replicas(variable):
        replica.assign(value)
