"""The functions of a fine-tuned model that serve, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from passes.batch_norm.batch_norms import batch_norms
from passes.batch_norm.updates import ASSIGNING
from passes.control_flow.running_graphs import running_from
from passes.entries.serving import has_batch_norms
from passes.entries.training import trains
from passes.quantization.quantizer_marks import TAG
from rewriter.dataflow import Argument, VariableKey, origins
from rewriter.edit import AddSignature, Clone, Edit, Keep, Note
from rewriter.ir import Endpoint, Entry, Error, Model

DEFAULT = "serving_default"
CALLS = ("serve", "__call__")
"""Attributes of the root that a signature is made from where there is none, in this order."""

_MADE_UP = re.compile(r"unknown(_\d+)?|tensor(_\d+)?")
"""Names that TensorFlow makes up for tensors without one."""


@dataclass(frozen=True)
class KeepServing:
    """Keep the signatures and the root's functions that serve: they normalise with the moving statistics alone.

    Where a plain ``tf.saved_model.save`` left no signature, `serving_default` is made from the root's function `serve`,
    or from its call.
    """

    name: ClassVar[str] = "keep-serving"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Keep the functions that serve, and make a signature where there is none.

        Raises:
            Error: the model is in TensorFlow 1's format, or nothing in it serves.
        """
        if not model.object_based:
            raise Error(
                "the model is in TensorFlow 1's format; load it with tf.saved_model.load, save it with "
                "tf.saved_model.save(model, path, signatures=...) without the signature train, and finalize that"
            )
        candidates, helpers = model.analysis(serves), _helpers(model)
        left_out = [e for e in candidates if e in helpers]
        serving = [e for e in candidates if e not in left_out]
        if not serving:
            if not model.analysis(has_batch_norms):
                raise Error(
                    "no signature and no function of the root only serves: each trains or counts steps; save the model "
                    "with a signature that serves"
                )
            raise Error(
                "no signature and no function of the root normalises with the moving statistics alone: each trains, "
                "takes its mode as an argument, or changes variables of batch norms; save the model with a signature "
                "that fixes training=False (of a bnqat.KerasLayer, save its model; of a TensorFlow 1 graph, a function "
                "that calls its signature with is_training=False)"
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
            # A signature takes and returns in the order of the names.
            yield Clone(source.function, name, inputs=_order(inputs), outputs=_order(outputs))
            yield AddSignature(DEFAULT, Endpoint(name, source.function, source.function, inputs, outputs))
            yield Note(f"the signature {DEFAULT} is made from the model's {source.paths[0]}")
            kept.append(name)
        for name in sorted(set(model.signatures) - set(names)):
            yield Note(f"the signature {name} trains, or changes its mode or variables, and is left out")
        for entry in left_out:
            yield Note(f"{entry.paths[0]} is left out, as its caller gives it what it quantises")
        yield Keep(tuple(kept))


def serves(model: Model) -> list[Entry]:
    """Return the functions of signatures and of the root that normalise with the moving statistics alone.

    In a model without batch norms, they are those that do not train. Functions that change a variable of a batch norm
    or of the quantisation are left out.
    """
    signed = {s.entry for s in model.signatures.values()}
    candidates = [e for e in model.entries.values() if e.function in signed or any("." not in p for p in e.paths)]
    fixed = {key for bn in model.analysis(batch_norms) for key in bn.variables.values()}
    fixed |= {key for key, v in model.variables.items() if v.name.startswith("quantization")}
    return [e for e in candidates if not trains(model, e.function) and not _changes(model, e.function, fixed)]


def _changes(model: Model, function: str, fixed: Collection[str]) -> bool:
    """Return true if a function assigns one of some variables."""
    for name, assumptions in running_from(model, function).items():
        for node in model.graphs[name].nodes.values():
            if (
                node.op.startswith(ASSIGNING)
                and node.inputs
                and any(assumed.runs(node.name) for assumed in assumptions)
            ):
                variable_origins = origins(model, name, node.inputs[0])
                if any(isinstance(o, VariableKey) and o.key in fixed for o in variable_origins):
                    return True
    return False


def _helpers(model: Model) -> list[Entry]:
    """Return the root's functions, without those of signatures, that quantise values of their caller, as helpers do."""
    signed = {s.entry for s in model.signatures.values()}
    functions = {
        o.graph
        for graph in model.graphs.values()
        for node in graph.nodes.values()
        if TAG in node.attrs and node.inputs
        for o in origins(model, graph.name, node.inputs[-1])
        if isinstance(o, Argument)
    }
    return [e for e in model.entries.values() if e.function in functions - signed]


def _called(serving: Iterable[Entry]) -> Entry | None:
    """Return the function that a signature is made from: of several traces, the one with the fewest inputs."""
    candidates = [e for name in CALLS for e in serving if name in e.paths]
    first = [e for e in candidates if e.paths[0] == candidates[0].paths[0]]
    return min(first, key=lambda e: len(e.inputs), default=None)


def _names(entry: Entry) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a signature's names for the inputs and outputs of a function: their own, or ``input_0`` and so on."""
    return _distinct([s.name for s in entry.inputs], "input"), _distinct([s.name for s in entry.outputs], "output")


def _distinct(names: list[str], kind: str) -> tuple[str, ...]:
    usable = all(name.isidentifier() and not _MADE_UP.fullmatch(name) for name in names)
    return tuple(names) if usable and len(set(names)) == len(names) else tuple(f"{kind}_{i}" for i in range(len(names)))


def _order(names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(names)), key=names.__getitem__))
