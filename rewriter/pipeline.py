"""Passes, and the pipeline that runs them one after the other."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rewriter.apply import apply
from rewriter.check import check
from rewriter.edit import Edit, Note, Skip
from rewriter.ir import Error, Model


@runtime_checkable
class Pass(Protocol):
    """A rewrite of a model, best written as a frozen dataclass whose fields are its options.

    A pass proposes edits and changes nothing itself. A model is valid before and after each pass. The pass's class may
    have a `name`, which logs and messages use.
    """

    def edits(self, model: Model) -> Iterable[Edit]:
        """Return the edits to make in `model`.

        Raises:
            Error: the pass cannot do its work on this model; the message says why.
        """
        ...


def pass_name(by: Pass) -> str:
    """Return the name of a pass: its class's `name`, or else the name of its class."""
    return str(getattr(type(by), "name", type(by).__name__))


@dataclass(frozen=True)
class Step:
    """The record of one pass: the models before and after it, its edits, and its duration in seconds."""

    by: Pass
    before: Model
    after: Model
    edits: tuple[Edit, ...]
    seconds: float

    @property
    def name(self) -> str:
        """Name of the pass."""
        return pass_name(self.by)

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """Nodes that the pass declined to change, with reasons."""
        return tuple(e for e in self.edits if isinstance(e, Skip))

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that the pass has for the user."""
        return tuple(e.text for e in self.edits if isinstance(e, Note))


Observer = Callable[[Step], None]
"""Callback after each pass, for timing, dumps and progress. An observer cannot change anything."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. The pipeline checks every result, and its error names the pass that broke the model."""

    passes: Sequence[Pass]
    observers: Sequence[Observer] = ()

    def run(self, model: Model) -> tuple[Model, list[Step]]:
        """Return the rewritten model, and the record of each pass.

        Raises:
            Error: a pass declined the model, or left it malformed.
        """
        steps = []
        for current_pass in self.passes:
            name = pass_name(current_pass)
            start = time.perf_counter()
            edits = tuple(current_pass.edits(model))
            after = apply(model, edits)
            try:
                check(after, model)
            except Error as e:
                raise Error(f"the pass {name} left the model malformed: {e}") from e
            step = Step(current_pass, model, after, edits, time.perf_counter() - start)
            steps.append(step)
            for observe in self.observers:
                observe(step)
            model = after
        return model, steps


def load_pass(name: str, **options: Any) -> Pass:
    """Return an instance of the pass `module:Class`, with its default options where none are given.

    Raises:
        Error: the module or the class is not found, or the class needs options or is no pass.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise Error(f"a pass is named module:Class, not {name!r}")
    try:
        instance = getattr(importlib.import_module(module), attribute)(**options)
    except (ImportError, AttributeError, TypeError) as e:
        raise Error(f"cannot make the pass {name}: {e}") from e
    if not isinstance(instance, Pass):
        raise Error(f"{name} is no pass: it has no method edits(model)")
    return instance
