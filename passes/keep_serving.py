"""The functions of a fine-tuned model that serve, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from passes.entries import trains
from rewriter.edit import AddSignature, Clone, Edit, Keep, Note
from rewriter.ir import Endpoint, Entry, Error, Model

DEFAULT = "serving_default"
CALLS = ("serve", "__call__")
"""Attributes of the root that a signature is made from where there is none, in this order."""

_MADE_UP = re.compile(r"unknown(_\d+)?|tensor(_\d+)?")
"""Names that TensorFlow gives to tensors that have none."""


@dataclass(frozen=True)
class KeepServing:
    """Keep the signatures and the root's functions that normalise with the moving statistics alone.

    Where a plain ``tf.saved_model.save`` left no signature, `serving_default` is made from the root's function `serve`,
    or from its call.
    """

    def edits(self, model: Model) -> Iterable[Edit]:
        """What serves.

        Raises:
            Error: the model is in TensorFlow 1's format, or nothing in it serves.
        """
        if not model.object_based:
            raise Error(
                "the model is in TensorFlow 1's format; load it with tf.saved_model.load, save it with "
                "tf.saved_model.save(model, path, signatures=...) without the signature train, and finalize that"
            )
        serving = serves(model)
        if not serving:
            raise Error(
                "no signature and no function of the root normalises with the moving statistics alone: each trains, or "
                "takes its mode as an argument; save the model with a signature that fixes training=False"
            )
        names = [n for n, s in model.signatures.items() if s.entry in {e.function for e in serving}]
        kept = [e.function for e in serving]
        if not names:
            source = _called(serving)
            if source is None:
                raise Error(
                    "the model has no signature, and no serve or call to make one from; save it with signatures"
                )
            name = f"{source.function}_{DEFAULT}"
            inputs, outputs = _names(source)
            yield Clone(source.function, name, inputs=_order(inputs), outputs=_order(outputs))
            yield AddSignature(DEFAULT, Endpoint(name, source.function, source.function, inputs, outputs))
            yield Note(f"the signature {DEFAULT} is made from the model's {source.paths[0]}")
            kept.append(name)
        for name in sorted(set(model.signatures) - set(names)):
            yield Note(f"the signature {name} trains, and is left out")
        yield Keep(tuple(kept))


def serves(model: Model) -> list[Entry]:
    """What signatures compute, and the root's functions, as far as they normalise with the moving statistics alone."""
    signed = {s.entry for s in model.signatures.values()}
    held = [e for e in model.entries.values() if e.function in signed or any("." not in p for p in e.paths)]
    return [e for e in held if not trains(model, e.function)]


def _called(serving: Iterable[Entry]) -> Entry | None:
    """The function that a signature is made from: of several traces, the one with the fewest inputs."""
    found = [e for name in CALLS for e in serving if name in e.paths]
    first = [e for e in found if e.paths[0] == found[0].paths[0]]
    return min(first, key=lambda e: len(e.inputs), default=None)


def _names(entry: Entry) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a signature calls the inputs and outputs of a function: by their own names, or as TensorFlow would."""
    return _distinct([s.name for s in entry.inputs], "input"), _distinct([s.name for s in entry.outputs], "output")


def _distinct(names: list[str], kind: str) -> tuple[str, ...]:
    known = all(name.isidentifier() and not _MADE_UP.fullmatch(name) for name in names)
    return tuple(names) if known and len(set(names)) == len(names) else tuple(f"{kind}_{i}" for i in range(len(names)))


def _order(names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(names)), key=names.__getitem__))
