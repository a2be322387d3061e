"""A training function for every model, whether or not its source held one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from passes.batch_norm.entries import (
    SERVE,
    TRAIN,
    TRAIN_SIGNATURE,
    Alignment,
    align,
    capturable,
    computed,
    serving_entry,
    serving_signature,
    training_trace,
)
from passes.batch_norm.layers import layers_of_sites
from passes.batch_norm.sites import Site, sites
from passes.quantization.controls import step
from passes.training.frozen_layers import counted
from passes.training.functions import FunctionClones, Switched, derived_sites, switched_sites
from passes.training.main_graph import MainGraphTraining
from passes.training.notes import derived, frozen, unfrozen
from passes.training.options import Trained, TrainingOptions, TrainingRule
from passes.training.outputs import InnerOutputs, inner_tensor, output_names, refuse_taken
from rewriter.edit import AddSignature, AddVariable, Clone, Edit, Expose, Note, Run
from rewriter.ir import Endpoint, Entry, Error, Model, VariablesOf


@dataclass(frozen=True)
class DeriveTraining:
    """Expose `serve` and `train` at the root, `quantization.train`, and the signature `train`.

    `train` is the source's own training trace where it holds one that takes and returns what serving does,
    with its dropout. Else it is derived from serving: batch norms normalise with the batch's statistics and
    keep the moving averages; dropout and regularisers cannot be recovered. Every call counts one step.

    Attributes:
        momentum: of derived moving averages where no training site says it; None stands for that of the others, or
            0.99, assumed.
        train_batch_norm: which batch norms train: "as-source", those that the source does not say are frozen; "all";
            or "none".
        rules: other options for some layers.
        outputs: by name, the nodes whose values `train` returns besides; then it returns a dict.

    Raises:
        Error: an option is out of range.
    """

    name: ClassVar[str] = "derive-training"

    momentum: float | None = None
    train_batch_norm: Trained = "as-source"
    rules: tuple[TrainingRule, ...] = ()
    outputs: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self._options()

    def _options(self) -> TrainingOptions:
        return TrainingOptions(self.momentum, self.train_batch_norm, self.rules)

    def edits(self, model: Model) -> Iterable[Edit]:
        """Nothing where there is no batch norm to train, or where the model has its training function already.

        Raises:
            Error: no function serves, or one that serves cannot be trained; the message says why.
        """
        count = step(model)
        if count.key in model.variables or not any(s.status == "float" for s in model.analysis(sites)):
            return
        self._options().refuse_unmatched(model)
        yield AddVariable(count)
        if not model.object_based:
            yield from MainGraphTraining(model, self._options(), self.outputs or {}).edits()
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
        likes = {TRAIN: serving} | ({TRAIN_SIGNATURE: signed} if signed is not None else {})
        outputs = _inner_outputs(model, likes, trace, self.outputs or {})
        if trace is not None:
            yield from self._from_trace(model, trace, likes, outputs)
        else:
            yield from self._derived(model, likes, outputs)
        bound = {name: trace or like for name, like in likes.items()}
        yield from _expose(model, likes, bound, outputs)

    def _from_trace(
        self, model: Model, trace: Entry, likes: Mapping[str, Entry], outputs: InnerOutputs
    ) -> Iterator[Edit]:
        """The source's training function, with its inputs and outputs in the order of serving's."""
        options, serving = self._options(), likes[TRAIN]
        found = switched_sites(model, trace.function, options)
        own = "serving function, which chooses its mode itself" if trace is serving else "training trace"
        yield Note(f"train is the source's {own}, {trace.function}")
        if trace is serving and found.trained:
            raise Error(
                f"{found.trained[0].node} cannot be trained: {trace.function} chooses its mode by an argument, and "
                "runs it in inference mode in both; leave --train-batch-norm away"
            )
        yield from unfrozen(model, found.trained, options)
        left = computed(model, serving.function) - computed(model, trace.function, training=True)
        changed = [_names(model, each) for each in (found.trained, found.frozen)]
        stays = left - changed[0] | changed[1]
        yield from frozen(model, sorted(stays), options)
        tops = {}
        for name, like in likes.items():
            inputs, results = align(model, trace, like) or Alignment((), ())
            tops[name] = Clone(trace.function, name, inputs=inputs, outputs=results)
        yield from FunctionClones(model, tops, options, found, outputs).edits()
        yield from (_count(model, name, stays) for name in likes)

    def _derived(self, model: Model, likes: Mapping[str, Entry], outputs: InnerOutputs) -> Iterator[Edit]:
        """Serving, with batch norms in training mode."""
        options = self._options()
        found = derived_sites(model, [like.function for like in likes.values()], options)
        tops = {name: Clone(like.function, name) for name, like in likes.items()}
        clones = FunctionClones(model, tops, options, Switched(found, []), outputs)
        yield from clones.edits()
        yield from derived(model, clones.trained, clones.left, options)
        left = computed(model, likes[TRAIN].function) - _names(model, found)
        yield from frozen(model, sorted(left), options)
        yield from (_count(model, top, left) for top in tops if top == TRAIN or TRAIN not in clones.names.values())


def _names(model: Model, found: Iterable[Site]) -> frozenset[str]:
    """The batch norms of sites, by name."""
    layer_of = model.analysis(layers_of_sites)
    return frozenset(bn.name for s in found for bn in layer_of[s.graph, s.node].batch_norms)


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


def _inner_outputs(
    model: Model, likes: Mapping[str, Entry], trace: Entry | None, wanted: Mapping[str, str]
) -> InnerOutputs:
    """Further results of the training functions.

    Raises:
        Error: a node is not known, is not the only one of its name, or cannot be returned; or a name is taken.
    """
    signature = serving_signature(model)
    tensors = {
        top: [inner_tensor(model, (trace or like).function, *pair) for pair in sorted(wanted.items())]
        for top, like in likes.items()
        if wanted
    }
    names = {top: output_names(model, likes[top], signature) for top in tensors}
    for top, taken in names.items():
        refuse_taken(tensors[top], taken)
    return InnerOutputs(model, tensors, names)


def _count(model: Model, graph: str, left: Collection[str]) -> Run:
    """One more step, after all that the graph does; it says which batch norms are left frozen."""
    return Run(graph, counted(model, left), "quantization/step", last=True)


def _expose(
    model: Model, likes: Mapping[str, Entry], bound: Mapping[str, Entry], outputs: InnerOutputs
) -> Iterator[Edit]:
    endpoints = {
        name: Endpoint(name, like.function, bound[name].function, returns=outputs.all_of(name, like))
        for name, like in likes.items()
    }
    if "train" in model.root_names:
        yield Note(
            "the source has an attribute 'train' of its own, which is kept and counts no steps; use quantization.train"
        )
    else:
        yield Expose("train", endpoints[TRAIN])
    yield Expose("quantization.train", endpoints[TRAIN])
    yield Expose("quantization.variables", VariablesOf(TRAIN))
    yield Expose("quantization.trainable_variables", VariablesOf(TRAIN, trainable_only=True))
    if TRAIN_SIGNATURE in endpoints:
        yield AddSignature("train", endpoints[TRAIN_SIGNATURE])
