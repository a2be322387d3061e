"""A training function for every model, whether or not its source held one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from passes.batch_norm.layers import layers_of_sites
from passes.batch_norm.site import Site
from passes.batch_norm.sites import sites
from passes.entries.alignment import Alignment, align, capturable
from passes.entries.serving import has_batch_norms, no_signature, serving_entry, serving_signature
from passes.entries.training import computed, draws, training_trace
from passes.quantization.controls import step
from passes.quantization.training_functions import SERVE, TRAIN, TRAIN_SIGNATURE
from passes.training.frozen_layers import step_counter
from passes.training.functions import FunctionClones, Switched, derived_sites, switched_sites
from passes.training.layer_options import TrainingOptions, TrainingRule
from passes.training.main_graph import MainGraphTraining
from passes.training.notes import derived_notes, frozen_notes, unfrozen_notes, unused_notes
from passes.training.options import DeriveOptions
from passes.training.outputs import InnerOutputs, inner_tensor, output_names, refuse_used_names
from rewriter.edit import AddSignature, AddVariable, Clone, Edit, Expose, Note, Run
from rewriter.ir import Endpoint, Entry, Error, Model, VariablesOf


@dataclass(frozen=True)
class DeriveTraining(DeriveOptions):
    """Expose `serve` and `train` at the root, `quantization.train`, and the signature `train`.

    `train` is the source's own training trace where it holds one that takes and returns what serving does,
    with its dropout. Else it is derived from serving: batch norms normalise with the batch's statistics and
    keep the moving averages; dropout and regularisers cannot be recovered. Every call counts one step.

    Attributes:
        rules: other options for some layers.
        beyond_batch_norm: true if other values than those of batch norms are quantised. Then a model without batch
            norms gets a training function too, and what training calls is its own, so that rounding can be stochastic.

    Raises:
        Error: an option is out of range.
    """

    name: ClassVar[str] = "derive-training"

    rules: tuple[TrainingRule, ...] = ()
    beyond_batch_norm: bool = False

    def _options(self) -> TrainingOptions:
        return TrainingOptions(self.momentum, self.train_batch_norm, self.rules)

    def edits(self, model: Model) -> Iterable[Edit]:
        """Derive and expose training, unless there is nothing to train or the model has its training already.

        Raises:
            Error: no function serves, or one that serves cannot be trained; the message says why.
        """
        count = step(model)
        trainable = self.beyond_batch_norm or any(s.status == "float" for s in model.analysis(sites))
        if count.key in model.variables or not trainable:
            return
        self._options().refuse_unmatched(model)
        yield from unused_notes(model, self._options())
        yield AddVariable(count)
        if not model.object_based:
            yield from MainGraphTraining(model, self._options(), self.train_outputs or {}).edits()
            return
        if "quantization" in model.root_names:
            raise Error("the model has an attribute 'quantization' of its own, which is where bnqat puts its controls")
        serving = serving_entry(model)
        if "serve" not in model.root_names:
            # An endpoint needs a function of its own: the source's may be a signature's, or exposed under another name.
            yield Clone(serving.function, SERVE)
            yield Expose("serve", Endpoint(SERVE, serving.function, serving.function))
        trace = training_trace(model, serving)
        signed, why_not = _signed(model, trace)
        if why_not:
            yield Note(why_not)
        likes = {TRAIN: serving} | ({TRAIN_SIGNATURE: signed} if signed is not None else {})
        outputs = _inner_outputs(model, likes, trace, self.train_outputs or {})
        if trace is not None:
            yield from self._from_trace(model, trace, likes, outputs)
        else:
            yield from self._derived(model, likes, outputs)
        bound = {name: trace or like for name, like in likes.items()}
        yield from _expose(model, likes, bound, outputs)

    def _from_trace(
        self, model: Model, trace: Entry, likes: Mapping[str, Entry], outputs: InnerOutputs
    ) -> Iterator[Edit]:
        """Clone the source's training function, with its inputs and outputs in the order of serving's."""
        options, serving = self._options(), likes[TRAIN]
        switched = switched_sites(model, trace.function, options)
        source_kind = "serving function, which chooses its mode itself" if trace is serving else "training trace"
        yield Note(f"train is the source's {source_kind}, {trace.function}", "train")
        if trace is serving and switched.trained:
            raise Error(
                f"{switched.trained[0].node} cannot be trained: {trace.function} chooses its mode by an argument, and "
                "runs it in inference mode in both; leave --train-batch-norm away"
            )
        if model.analysis(has_batch_norms):
            yield from unfrozen_notes(model, switched.trained, options)
        untrained = computed(model, serving.function) - computed(model, trace.function, training=True)
        changed_names = [_names(model, changed_sites) for changed_sites in (switched.trained, switched.frozen)]
        frozen_names = untrained - changed_names[0] | changed_names[1]
        yield from frozen_notes(model, sorted(frozen_names), options)
        tops = {}
        for name, like in likes.items():
            inputs, results = align(model, trace, like) or Alignment((), ())
            tops[name] = Clone(trace.function, name, inputs=inputs, outputs=results)
        yield from FunctionClones(model, tops, options, switched, outputs, whole=self.beyond_batch_norm).edits()
        yield from (_count(model, name, frozen_names) for name in likes)

    def _derived(self, model: Model, likes: Mapping[str, Entry], outputs: InnerOutputs) -> Iterator[Edit]:
        """Clone serving, with batch norms in training mode."""
        options = self._options()
        functions = [like.function for like in likes.values()]
        trained_sites = derived_sites(model, functions, options) if model.analysis(has_batch_norms) else []
        tops = {name: Clone(like.function, name) for name, like in likes.items()}
        switched = Switched(trained_sites, [])
        clones = FunctionClones(model, tops, options, switched, outputs, whole=self.beyond_batch_norm)
        yield from clones.edits()
        random = bool(draws(model, likes[TRAIN].function))
        yield from derived_notes(model, clones.trained, clones.untrainable, options, random=random)
        untrained = computed(model, likes[TRAIN].function) - _names(model, trained_sites)
        yield from frozen_notes(model, sorted(untrained), options)
        # If the signature's function calls the serving one, its clone calls `train`, which counts the step already.
        yield from (_count(model, top, untrained) for top in tops if top == TRAIN or TRAIN not in clones.names.values())


def _names(model: Model, named_sites: Iterable[Site]) -> frozenset[str]:
    """Return the names of the batch norms of sites."""
    layer_of = model.analysis(layers_of_sites)
    return frozenset(bn.name for s in named_sites for bn in layer_of[s.graph, s.node].batch_norms)


def _signed(model: Model, trace: Entry | None) -> tuple[Entry | None, str]:
    """Return the entry whose inputs and outputs the signature `train` has; or None, and the reason."""
    signature = serving_signature(model)
    if "train" in model.signatures:
        return None, "the source has a signature 'train' of its own, which is kept; use the function quantization.train"
    if signature is None:
        return None, f"{no_signature(model)}; use the function train"
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
    model: Model, likes: Mapping[str, Entry], trace: Entry | None, node_of: Mapping[str, str]
) -> InnerOutputs:
    """Return the further results of the training functions.

    Raises:
        Error: a node is not known, is not the only one of its name, or cannot be returned; or a name is used already.
    """
    signature = serving_signature(model)
    tensors = {
        top: [inner_tensor(model, (trace or like).function, *pair) for pair in sorted(node_of.items())]
        for top, like in likes.items()
        if node_of
    }
    names = {top: output_names(model, likes[top], signature) for top in tensors}
    for top, used_names in names.items():
        refuse_used_names(tensors[top], used_names)
    return InnerOutputs(model, tensors, names)


def _count(model: Model, graph: str, frozen_names: Collection[str]) -> Run:
    """Return the edit that counts one step after all that the graph does, and records the frozen batch norms."""
    return Run(graph, step_counter(model, frozen_names), "quantization/step", last=True)


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
