"""Runs of the training function of a rewritten model, and of its source's own training function."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from passes.batch_norm.batch_norms import BatchNorm, batch_norms
from passes.batch_norm.roles import BETA, GAMMA, MEAN, ROLES, VARIANCE
from passes.entries.alignment import Alignment
from passes.entries.serving import has_batch_norms, serving_signature
from passes.quantization.training_functions import TRAIN
from passes.training.frozen_layers import frozen_means
from rewriter.app.arrays import Arrays, fitted, unfit
from rewriter.app.verification.functions import Trainer, gradients, keyworded, loss, trainer, variable_at
from rewriter.app.verification.gradients import Reached, other_variables, reached, reaches
from rewriter.app.verification.kernels import Kernels, Placed, placed, placed_by, with_kernels
from rewriter.app.verification.running import OFF, attempt, loaded, loaded_source, on_random, rows, session_of
from rewriter.app.verification.serving import FREEZE, RAMP, START, STEP, Pair
from rewriter.app.verification.source_training import (
    Differences,
    LoadedTrainer,
    Steps,
    common_variables,
    compared,
    loaded_trainer,
    own_training,
    serving_function,
)
from rewriter.dataflow import call_graph
from rewriter.ir import Entry, Error, Model

TRIES = 3
"""Number of times that training is differentiated again if a gradient is zero."""


@dataclass(frozen=True)
class Trained:
    """Observations of one call of the result's training function, with quantisers on.

    Attributes:
        absent: the reason why there was nothing to call; then the other fields mean nothing.
        loads: true if plain loading takes the result.
        failure: the error in loading or in the call.
        steps: the number of steps that the call counted.
        batch_norms: true if the source has batch norms that could train.
        statistics: the number of moving statistics of the batch norms that it trains.
        frozen: the number of batch norms that the result leaves frozen in training, as an option or the source says.
        still: the names of the moving statistics that the call did not change.
        differentiated: the error in differentiating the call.
        alike: true if the source's own signatures cannot be differentiated either, in the same way.
        gradients: the gradients of every gamma and beta, by name; None for one that none reaches. No list if no output
            is a float.
        others: the other trainable variables, if other values than batch norms' are quantised.
        kernels: the executed kernels, with those of gradients if the call can be differentiated.
        source_kernels: the kernels that the source's own training function executes; None if it has none.
        source_failure: the error in running that function.
        raised: the number of kernels that replaced single ops of the source's own training function.
        both_modes: the number of sites of the source's function that compute both modes and use one.
        sites: the number of sites that function runs, or serving, each of which a derived function trains once.
        phases: true if a branch chooses between two training functions, the second with frozen statistics.
        reached: with phases, the number of kernels that a call reaches, gradients not counted; None if unknown.
        rows: the number of examples that it was run on.
        source_distances: its differences from the source's own training function, with quantisers off; None if there
            is none.
    """

    absent: str = ""
    loads: bool = True
    failure: str = ""
    steps: int = 0
    batch_norms: bool = True
    statistics: int = 0
    frozen: int = 0
    still: tuple[str, ...] = ()
    differentiated: str = ""
    alike: bool = False
    gradients: list[tuple[str, Any]] | None = None
    others: Reached = field(default_factory=Reached)
    kernels: Kernels | None = None
    source_kernels: Kernels | None = None
    source_failure: str = ""
    raised: int = 0
    both_modes: int = 0
    sites: int = 0
    phases: bool = False
    reached: int | None = None
    rows: int = 0
    source_distances: Differences | None = None


def train(pair: Pair, inputs: Arrays | None = None, seed: int = 0) -> Trained:
    """Load the result plainly, call its training function once, and differentiate it if that is possible."""
    root, why = attempt(lambda: loaded(pair.after))
    if why:
        return Trained(loads=False, failure=f"plain loading fails: {why}")
    function = trainer(root)
    if function is None or (not pair.result.object_based and "train" in pair.source.signatures):
        return Trained(absent="the result has no training function of a rewrite")
    try:
        if inputs is not None and fitted(inputs, function.specs) is None:
            return Trained(absent=f"the training function {unfit(inputs, function.specs)}")
        trained_variables(pair, root)
    except Error as e:
        return Trained(absent=str(e))
    # TensorFlow reports a function's graphs only when it runs for the first time, so each try loads anew.
    ran, differentiated = attempt(lambda: _run(pair, root, inputs, seed, differentiate=True))
    if ran is None:
        ran, failure = attempt(lambda: _run(pair, loaded(pair.after), inputs, seed, differentiate=False))
        if ran is None:
            return Trained(failure=failure)
        alike = _fails_alike(pair, differentiated)
        ran = ran._replace(done=replace(ran.done, differentiated=differentiated, alike=alike))
    graph = training_graph(pair.result)
    if pair.result.object_based and not graph:
        # A model that was saved again without signatures: nothing tells which of its functions trains.
        return replace(ran.done, kernels=None)
    after = placed_by(pair.result, graph) if graph else placed(pair.result, "train")
    source_training = own_training(pair)
    if source_training is None:
        serving = _served(pair.source, frozen_means(pair.result))
        done = replace(ran.done, sites=serving.trained(serving.raised(after)))
    else:
        done = _with_source_training(pair, ran, source_training, after)
    phases = any(v.name.startswith(FREEZE) for v in pair.result.variables.values())
    return replace(done, phases=True, reached=_reached(pair, ran.given)) if phases else done


class _Run(NamedTuple):
    """Observations of a run of a loaded result, and its training function's inputs, in their order."""

    done: Trained
    given: dict[str, np.ndarray]
    root: Any


def _run(pair: Pair, root: Any, inputs: Arrays | None, seed: int, differentiate: bool) -> _Run:
    """Call the training function of a loaded result, with quantisers on."""
    function = trainer(root)
    if function is None:
        raise AssertionError
    # Quantisers act and statistics move, whatever the step to which the result was trained.
    for v in function.variables:
        if v.name.startswith((START, RAMP)):
            v.assign(0)
        elif v.name.startswith(FREEZE):
            v.assign(OFF)
    parameters, statistics = trained_variables(pair, root)
    others = other_variables(pair, function, parameters)
    steps = [v for v in function.variables if v.name.startswith(STEP)]

    def call(fed: dict[str, np.ndarray]) -> tuple[list[Any] | None, list[np.ndarray], int]:
        before, count = [v.numpy() for v in statistics], sum(int(v) for v in steps)
        grads = gradients(function, [*parameters, *others], fed) if differentiate else None
        if not differentiate:
            function.call(**fed)
        return grads, before, sum(int(v) for v in steps) - count

    def search() -> tuple[tuple[list[Any] | None, list[np.ndarray], int], dict[str, np.ndarray]]:
        arrays = None if inputs is None else fitted(inputs, function.specs)
        return on_random(call, function.specs, seed, flags=True) if arrays is None else (call(arrays), arrays)

    ((grads, before, steps_counted), fed), kernels = with_kernels(search)
    still = tuple(v.name for v, old in zip(statistics, before, strict=True) if np.array_equal(old, v.numpy()))
    for _ in range(TRIES):
        # Stochastic depth may have left out a block for the whole batch.
        if grads is not None and not all(reaches(gradient) for gradient in grads):
            grads_again = gradients(function, [*parameters, *others], fed) or grads
            grads = [g if reaches(g) else again for g, again in zip(grads, grads_again, strict=True)]
    named_gradients = None if grads is None else [(v.name, g) for v, g in zip(parameters, grads, strict=False)]
    done = Trained(
        steps=steps_counted,
        batch_norms=pair.source.analysis(has_batch_norms),
        others=Reached() if grads is None else reached(pair, function, others, grads[len(parameters) :], fed),
        statistics=len(statistics),
        frozen=len(frozen_means(pair.result)),
        still=still,
        gradients=named_gradients,
        kernels=kernels,
        rows=rows(fed),
    )
    return _Run(done, {name: fed[name] for name in function.specs}, root)


def _reached(pair: Pair, given: Arrays) -> int | None:
    """Return the number of kernels that one call of the signature `train` reaches before the freeze step, or None.

    Only a V1 session tells which nodes ran.
    """
    with session_of(pair.after) as session:
        fed = fitted(given, session.inputs("train")) if "train" in session.signatures else None
        freeze = session.node(FREEZE)
        if fed is None or freeze is None:
            return None
        session.assign({freeze: np.array(OFF)})
        return session.run("train", fed).kernels.ran


def _with_source_training(pair: Pair, ran: _Run, source_training: tuple[Entry, Alignment], after: Placed) -> Trained:
    """Return observations with those of the source's own training function: gradients in both, or in neither."""
    entry, alignment = source_training
    before = placed_by(pair.source, entry.function)
    raised = before.raised(after)
    done = replace(
        ran.done,
        raised=before.kernels_for(raised),
        both_modes=before.both_modes,
        sites=before.trained(raised),
    )
    with loaded_trainer(pair.before, entry) as source:
        function = source.function
        names = list(function.specs)
        fed = {names[position]: value for position, value in zip(alignment.inputs, ran.given.values(), strict=True)}
        differentiate = partial(gradients, function, function.variables, fed)
        source_kernels = None if done.differentiated else attempt(lambda: with_kernels(differentiate)[1])[0]
    if source_kernels is not None:
        return replace(
            done, source_kernels=source_kernels, source_distances=_compared(pair, ran, source, alignment, fed)
        )
    # TensorFlow reports a function's graphs only when it runs for the first time, so the source is loaded anew.
    with loaded_trainer(pair.before, entry) as source:
        source_kernels, why = attempt(lambda: with_kernels(partial(source.function.call, **fed))[1])
    if not done.differentiated:
        ran = _run(pair, loaded(pair.after), ran.given, 0, differentiate=False)
        done = replace(done, kernels=ran.done.kernels)
    differences = None if source_kernels is None else _compared(pair, ran, source, alignment, fed)
    return replace(done, source_kernels=source_kernels, source_failure=why, source_distances=differences)


def _compared(pair: Pair, ran: _Run, source: LoadedTrainer, alignment: Alignment, fed: Arrays) -> Differences | None:
    """Compare a step of the source with one of the result, quantisers off; None if their variables do not load."""
    result_trainer = trainer(ran.root)
    if result_trainer is None:
        raise AssertionError
    for v in result_trainer.variables:
        if v.name.startswith(START):
            v.assign(OFF)
    try:
        before, after = common_variables(pair, source.root, ran.root)
    except Error:
        return None
    result_steps = Steps(result_trainer, after, tuple(range(len(alignment.outputs))))
    return compared(Steps(source.function, before, alignment.outputs), result_steps, fed, ran.given)


def _served(source: Model, frozen: frozenset[str]) -> Placed:
    """Return the batch norms of the function or signature from which training is derived, without frozen ones."""
    entry = serving_function(source)
    if entry is not None:
        return placed_by(source, entry.function, frozen)
    signature = serving_signature(source)
    names = sorted(source.signatures, key=lambda name: (name != "serving_default", name)) or [""]
    return placed(source, names[0] if signature is None else signature.name, frozen)


def _fails_alike(pair: Pair, failure: str) -> bool:
    """Return true if differentiating the source's own signatures fails in the same way."""
    error_class = failure.partition(":")[0]

    def differentiate(function: Trainer, fed: dict[str, np.ndarray]) -> Any:
        with tf.GradientTape() as tape:
            inputs = {k: tf.constant(v) for k, v in fed.items()}
            tape.watch([t for t in inputs.values() if t.dtype.is_floating])
            value = loss(function.call(**inputs))
        return tape.gradient(value, [*inputs.values(), *function.variables])

    def failures() -> list[str]:
        with loaded_source(pair.before) as root:
            functions = [keyworded(signature) for signature in root.signatures.values()]
            return [attempt(lambda f=f: on_random(partial(differentiate, f), f.specs))[1] for f in functions]  # type: ignore[misc]

    messages, why = attempt(failures)
    return error_class in why if messages is None else bool(messages) and all(error_class in m for m in messages)


def training_graph(model: Model) -> str:
    """Return the training function's graph, as the rewrite or saving again named it; "" in TensorFlow 1's format."""
    signed = model.signatures["train"].entry if "train" in model.signatures else ""
    return TRAIN if TRAIN in model.graphs else signed


def trained_variables(pair: Pair, root: Any) -> tuple[list[Any], list[Any]]:
    """Return the trainable gammas and betas, and the moving statistics, of the batch norms that a loaded result trains.

    The variables of a batch norm are also taken from the source and from the result's serving functions: the function
    under test cannot tell alone what it should train.

    Raises:
        Error: plain loading leaves variables out, as they are references.
    """
    result = pair.result
    top = training_graph(result)
    trained_functions = result.analysis(call_graph).reached(top) if top else set(result.graphs)
    result_norms = result.analysis(batch_norms)
    trained_norms = {
        _identity(bn) for bn in result_norms if any(s.training and s.graph in trained_functions for s in bn.sites)
    }
    variables: dict[str, dict[str, Any]] = {role: {} for role in ROLES}
    variable_by_node = {v.name.partition(":")[0]: v for v in getattr(root, "variables", ())}
    for bn in (*result_norms, *pair.source.analysis(batch_norms)):
        for role, key in bn.variables.items() if _identity(bn) in trained_norms else ():
            if key not in result.variables:
                continue
            if not result.object_based and result.variables[key].node not in variable_by_node:
                raise Error(f"plain loading does not list {key}, a reference, which is trained in V1 sessions only")
            variables[role][key] = (
                variable_at(root, key) if result.object_based else variable_by_node[result.variables[key].node]
            )
    parameters = [v for role in (GAMMA, BETA) for v in variables[role].values() if v.trainable]
    return parameters, [*variables[MEAN].values(), *variables[VARIANCE].values()]


def _identity(bn: BatchNorm) -> tuple[str, ...]:
    """Return the identity of a batch norm, also if an op stands before its gamma in one function."""
    mean = bn.variables.get(MEAN)
    return tuple(bn.variables.values()) if mean is None else (mean,)
