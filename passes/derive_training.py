"""A training function for every model, whether or not its source held one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from passes.controls import increment, step
from passes.entries import Alignment, align, capturable, serving_entry, serving_signature, training_trace
from passes.sites import sites
from passes.train_functions import FunctionClones
from passes.train_main import MainGraphTraining
from rewriter.edit import AddSignature, AddVariable, Clone, Edit, Expose, Note, Run
from rewriter.ir import Endpoint, Entry, Error, Model, VariablesOf

TRAIN = "__inference_bnqat_train_0"
TRAIN_SIGNATURE = "__inference_bnqat_train_signature_0"
SERVE = "__inference_bnqat_serve_0"


@dataclass(frozen=True)
class DeriveTraining:
    """Expose `serve` and `train` at the root, `quantization.train`, and the signature `train`.

    `train` is the source's own training trace where it holds one that takes and returns what serving does,
    with its dropout. Else it is derived from serving: batch norms normalise with the batch's statistics and
    keep the moving averages; dropout and regularisers cannot be recovered. Every call counts one step.

    Attributes:
        momentum: of derived moving averages where no training site says it; None stands for 0.99, assumed.

    Raises:
        Error: the momentum is not between 0 and 1.
    """

    momentum: float | None = None

    def __post_init__(self) -> None:
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise Error(f"momentum {self.momentum}: it is at least 0 and less than 1")

    def edits(self, model: Model) -> Iterable[Edit]:
        """Nothing where there is no batch norm to train, or where the model has its training function already.

        Raises:
            Error: no function serves, or one that serves cannot be trained; the message says why.
        """
        count = step(model)
        if count.key in model.variables or not any(s.status == "float" for s in model.analysis(sites)):
            return
        yield AddVariable(count)
        if not model.object_based:
            yield from MainGraphTraining(model, self.momentum).edits()
            return
        if "quantization" in model.root_names:
            raise Error("the model has an attribute 'quantization' of its own, which is where bnqat puts its controls")
        serving = serving_entry(model)
        if "serve" not in model.root_names:
            yield Clone(serving.function, SERVE)
            yield Expose("serve", Endpoint(SERVE, serving.function, serving.function))
        trace = training_trace(model, serving)
        signed, why_not = _signed(model, trace)
        if why_not:
            yield Note(why_not)
        if trace is not None:
            own = "serving function, which chooses its mode itself" if trace is serving else "training trace"
            yield Note(f"train is the source's {own}, {trace.function}")
            if self.momentum is not None:
                yield Note("the momentum given has no influence: the training trace has its own")
            yield from _clone_trace(model, trace, serving, signed)
        else:
            tops = {TRAIN: serving.function} | ({TRAIN_SIGNATURE: signed.function} if signed is not None else {})
            clones = FunctionClones(model, tops, self.momentum)
            yield from clones.edits()
            yield from (_count(model, top) for top in tops if top == TRAIN or TRAIN not in clones.names.values())
        yield from _expose(model, serving, trace or serving, signed, trace or signed)


def _signed(model: Model, trace: Entry | None) -> tuple[Entry | None, str]:
    """The entry whose inputs and outputs the signature `train` has; if there is to be none, why."""
    signature = serving_signature(model)
    if "train" in model.signatures:
        return None, "the source has a signature 'train' of its own, which is kept; use the function quantization.train"
    if signature is None:
        return None, "no signature computes a batch norm, so there is no signature 'train'; use the function train"
    entry = model.entries[signature.entry]
    if trace is None:
        return entry, ""
    if align(model, trace, entry) is None:
        return None, "the training trace's outputs are not the signature's, so there is no signature 'train'"
    if not capturable(model, trace):
        return (
            None,
            "the training trace uses a table or constant that no signature has, so there is no signature 'train'",
        )
    return entry, ""


def _clone_trace(model: Model, trace: Entry, serving: Entry, signed: Entry | None) -> Iterator[Edit]:
    for top, like in ((TRAIN, serving), (TRAIN_SIGNATURE, signed)):
        if like is not None:
            inputs, outputs = align(model, trace, like) or Alignment((), ())
            yield Clone(trace.function, top, inputs=inputs, outputs=outputs)
            yield _count(model, top)


def _count(model: Model, graph: str) -> Run:
    """One more step, after all that the graph does."""
    return Run(graph, increment(model), "quantization/step", last=True)


def _expose(
    model: Model, serving: Entry, bound: Entry, signed: Entry | None, signature_bound: Entry | None
) -> Iterator[Edit]:
    endpoint = Endpoint(TRAIN, serving.function, bound.function)
    if "train" in model.root_names:
        yield Note(
            "the source has an attribute 'train' of its own, which is kept and counts no steps; use quantization.train"
        )
    else:
        yield Expose("train", endpoint)
    yield Expose("quantization.train", endpoint)
    yield Expose("quantization.variables", VariablesOf(TRAIN))
    yield Expose("quantization.trainable_variables", VariablesOf(TRAIN, trainable_only=True))
    if signed is not None and signature_bound is not None:
        yield AddSignature("train", Endpoint(TRAIN_SIGNATURE, signed.function, signature_bound.function))
