"""Passes, and running them one after the other."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rewriter.apply import apply
from rewriter.check import check
from rewriter.edit import Edit, Note, Skip
from rewriter.ir import Error, Model


@runtime_checkable
class Pass(Protocol):
    """A rewrite of a model. A frozen dataclass whose fields are its options does well.

    A pass proposes edits and changes nothing; a model is valid before and after each pass. Its class may have a
    `name`, which logs and messages use.
    """

    def edits(self, model: Model) -> Iterable[Edit]:
        """What to change in `model`.

        Raises:
            Error: the pass cannot do its work on this model; the message says why.
        """
        ...


def pass_name(by: Pass) -> str:
    """Return the name of a pass: that of its class where it has none of its own."""
    return str(getattr(type(by), "name", type(by).__name__))


@dataclass(frozen=True)
class Step:
    """What one pass did: models before and after, the edits it proposed, and the seconds it took."""

    by: Pass
    before: Model
    after: Model
    edits: tuple[Edit, ...]
    seconds: float

    @property
    def name(self) -> str:
        """The pass's name."""
        return pass_name(self.by)

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """What the pass declined to change, with reasons."""
        return tuple(e for e in self.edits if isinstance(e, Skip))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the pass wants the user to know."""
        return tuple(e.text for e in self.edits if isinstance(e, Note))


Observer = Callable[[Step], None]
"""Called after each pass: for timing, dumps, progress. It cannot change anything."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. Every result is checked, and the pass that broke the model is named."""

    passes: Sequence[Pass]
    observers: Sequence[Observer] = ()

    def run(self, model: Model) -> tuple[Model, list[Step]]:
        """The rewritten model, and what each pass did.

        Raises:
            Error: a pass declined the model, or left it malformed.
        """
        steps = []
        for each in self.passes:
            name = pass_name(each)
            start = time.perf_counter()
            edits = tuple(each.edits(model))
            after = apply(model, edits)
            try:
                check(after, model)
            except Error as e:
                raise Error(f"the pass {name} left the model malformed: {e}") from e
            step = Step(each, model, after, edits, time.perf_counter() - start)
            steps.append(step)
            for observe in self.observers:
                observe(step)
            model = after
        return model, steps


def load_pass(name: str) -> Pass:
    """The pass `module:Class`, made with its default options.

    Raises:
        Error: the module or the class cannot be found, needs options, or is no pass.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise Error(f"a pass is named module:Class, not {name!r}")
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as e:
        raise Error(f"cannot make the pass {name}: {e}") from e
    if not isinstance(made, Pass):
        raise Error(f"{name} is no pass: it has no method edits(model)")
    return made
