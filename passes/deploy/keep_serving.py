"""The functions of a fine-tuned model that serve, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from passes.batch_norm.batch_norms import batch_norms
from passes.batch_norm.entries import running_from, trains
from passes.batch_norm.updates import ASSIGNING
from passes.quantization.quantizer_marks import TAG
from rewriter.dataflow import Argument, VariableKey, origins
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

    name: ClassVar[str] = "keep-serving"

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
        found, helpers = model.analysis(serves), _given(model)
        given = [e for e in found if e in helpers]
        serving = [e for e in found if e not in given]
        if not serving:
            raise Error(
                "no signature and no function of the root normalises with the moving statistics alone: each trains, "
                "takes its mode as an argument, or changes variables of batch norms; save the model with a signature "
                "that fixes training=False (of a bnqat.KerasLayer, save its model)"
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
            yield Note(f"the signature {name} trains, or changes its mode or variables, and is left out")
        for entry in given:
            yield Note(f"{entry.paths[0]} is left out, as its caller gives it what it quantises")
        yield Keep(tuple(kept))


def serves(model: Model) -> list[Entry]:
    """What signatures compute, and the root's functions, as far as they only normalise with the moving statistics."""
    signed = {s.entry for s in model.signatures.values()}
    held = [e for e in model.entries.values() if e.function in signed or any("." not in p for p in e.paths)]
    fixed = {key for bn in model.analysis(batch_norms) for key in bn.variables.values()}
    fixed |= {key for key, v in model.variables.items() if v.name.startswith("quantization")}
    return [e for e in held if not trains(model, e.function) and not _changes(model, e.function, fixed)]


def _changes(model: Model, function: str, fixed: Collection[str]) -> bool:
    """Whether a function assigns one of some variables."""
    for name, known in running_from(model, function).items():
        for node in model.graphs[name].nodes.values():
            if node.op.startswith(ASSIGNING) and node.inputs and any(assumed.runs(node.name) for assumed in known):
                found = origins(model, name, node.inputs[0])
                if any(isinstance(o, VariableKey) and o.key in fixed for o in found):
                    return True
    return False


def _given(model: Model) -> list[Entry]:
    """Functions of the root, no signature's, that quantise what their caller gives them, as a helper does."""
    signed = {s.entry for s in model.signatures.values()}
    given = {
        o.graph
        for graph in model.graphs.values()
        for node in graph.nodes.values()
        if TAG in node.attrs and node.inputs
        for o in origins(model, graph.name, node.inputs[-1])
        if isinstance(o, Argument)
    }
    return [e for e in model.entries.values() if e.function in given - signed]


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
