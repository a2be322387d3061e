"""Running the training function of a rewritten model, and what its source has in its place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from passes.batch_norm.batch_norms import BatchNorm, batch_norms
from passes.batch_norm.entries import TRAIN, Alignment, serving_signature
from passes.roles import BETA, GAMMA, MEAN, ROLES, VARIANCE
from passes.training.frozen_layers import frozen_means
from rewriter.app.arrays import Arrays, fitted
from rewriter.app.verification.functions import Trainer, gradients, held, keyworded, loss, trainer
from rewriter.app.verification.kernels import Kernels, Placed, placed, placed_by, with_kernels
from rewriter.app.verification.running import OFF, attempt, loaded, loaded_source, on_random, rows, session_of
from rewriter.app.verification.serving import FREEZE, START, STEP, Pair
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
"""How often training is differentiated again where a gradient is zero."""


@dataclass(frozen=True)
class Trained:
    """What one call of the result's training function did, with quantisers on.

    Attributes:
        absent: why there was nothing to call; then the rest says nothing.
        loads: whether plain loading takes it.
        failure: what went wrong in that, or in the call.
        steps: how many it counted.
        statistics: how many moving statistics the batch norms have that it trains.
        frozen: how many batch norms the result leaves frozen in training, as an option or the source says.
        still: the names of those that it did not change.
        differentiated: what went wrong in differentiating it.
        alike: whether the source's own signatures cannot be differentiated either, in the same way.
        gradients: of every gamma and beta, by name; None where none reaches it. No list where no output is a float.
        kernels: what was executed, with gradients where it can be differentiated.
        wanted: what the source's own training function executes in the same way; None where it has none.
        unwanted: what went wrong in running that.
        raised: of single ops that the source's function trains by, or that serve, how many became a kernel.
        twice: how many sites of the source's function compute both modes, of which one is used.
        sites: how many sites that function runs, or serving, each of which a derived function trains once.
        phases: whether a branch chooses between two training functions, the second with frozen statistics.
        reached: with phases, how many kernels a call runs through, gradients not counted; None where that is not known.
        rows: how many examples it was run on.
        own: how far it is from the source's own training function with quantisers off; None where it has none.
    """

    absent: str = ""
    loads: bool = True
    failure: str = ""
    steps: int = 0
    statistics: int = 0
    frozen: int = 0
    still: tuple[str, ...] = ()
    differentiated: str = ""
    alike: bool = False
    gradients: list[tuple[str, Any]] | None = None
    kernels: Kernels | None = None
    wanted: Kernels | None = None
    unwanted: str = ""
    raised: int = 0
    twice: int = 0
    sites: int = 0
    phases: bool = False
    reached: int | None = None
    rows: int = 0
    own: Differences | None = None


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
            takes = ", ".join(function.specs)
            return Trained(absent=f"the training function takes {takes}, not {', '.join(inputs)}")
        layers(pair, root)
    except Error as e:
        return Trained(absent=str(e))
    # TensorFlow tells of a function's graphs only when it runs for the first time, so each try loads anew.
    ran, differentiated = attempt(lambda: _run(pair, root, inputs, seed, differentiate=True))
    if ran is None:
        ran, failure = attempt(lambda: _run(pair, loaded(pair.after), inputs, seed, differentiate=False))
        if ran is None:
            return Trained(failure=failure)
        alike = _fails_alike(pair, differentiated)
        ran = ran._replace(done=replace(ran.done, differentiated=differentiated, alike=alike))
    graph = training_graph(pair.result)
    if pair.result.object_based and not graph:
        return replace(ran.done, kernels=None)
    after = placed_by(pair.result, graph) if graph else placed(pair.result, "train")
    own = own_training(pair)
    if own is None:
        serving = _served(pair.source, frozen_means(pair.result))
        done = replace(ran.done, sites=serving.trained(serving.raised(after)))
    else:
        done = _beside(pair, ran, own, after)
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
    for v in function.variables:
        if v.name.startswith(START):
            v.assign(0)
        elif v.name.startswith(FREEZE):
            v.assign(OFF)
    parameters, statistics = layers(pair, root)
    steps = [v for v in function.variables if v.name.startswith(STEP)]

    def call(fed: dict[str, np.ndarray]) -> tuple[list[Any] | None, list[np.ndarray], int]:
        before, count = [v.numpy() for v in statistics], sum(int(v) for v in steps)
        found = gradients(function, parameters, fed) if differentiate else None
        if not differentiate:
            function.call(**fed)
        return found, before, sum(int(v) for v in steps) - count

    def search() -> tuple[tuple[list[Any] | None, list[np.ndarray], int], dict[str, np.ndarray]]:
        given = None if inputs is None else fitted(inputs, function.specs)
        return on_random(call, function.specs, seed, flags=True) if given is None else (call(given), given)

    ((found, before, counted), fed), kernels = with_kernels(search)
    still = tuple(v.name for v, old in zip(statistics, before, strict=True) if np.array_equal(old, v.numpy()))
    for _ in range(TRIES):
        # Stochastic depth may have left out a block for the whole batch.
        if found is not None and not all(_reaches(gradient) for gradient in found):
            again = gradients(function, parameters, fed) or found
            found = [g if _reaches(g) else other for g, other in zip(found, again, strict=True)]
    named = None if found is None else [(v.name, g) for v, g in zip(parameters, found, strict=True)]
    done = Trained(
        steps=counted,
        statistics=len(statistics),
        frozen=len(frozen_means(pair.result)),
        still=still,
        gradients=named,
        kernels=kernels,
        rows=rows(fed),
    )
    return _Run(done, {name: fed[name] for name in function.specs}, root)


def _reaches(gradient: Any) -> bool:
    """Return whether a gradient is there and not zero everywhere."""
    return gradient is not None and bool(tf.convert_to_tensor(gradient).numpy().any())


def _reached(pair: Pair, given: Arrays) -> int | None:
    """The number of kernels that one call of the signature `train` reaches before the freeze step; None if it has none.

    Only a V1 session tells which nodes ran.
    """
    with session_of(pair.after) as session:
        fed = fitted(given, session.inputs("train")) if "train" in session.signatures else None
        freeze = session.node(FREEZE)
        if fed is None or freeze is None:
            return None
        session.assign({freeze: np.array(OFF)})
        return session.run("train", fed).kernels.ran


def _beside(pair: Pair, ran: _Run, own: tuple[Entry, Alignment], after: Placed) -> Trained:
    """What was seen, and the kernels of the source's own training function: with gradients in both, or in neither."""
    entry, order = own
    before = placed_by(pair.source, entry.function)
    raised = before.raised(after)
    done = replace(
        ran.done,
        raised=before.kernels_for(raised),
        twice=before.twice,
        sites=before.trained(raised),
    )
    with loaded_trainer(pair.before, entry) as theirs:
        function = theirs.function
        names = list(function.specs)
        fed = {names[position]: value for position, value in zip(order.inputs, ran.given.values(), strict=True)}
        step = partial(gradients, function, function.variables, fed)
        wanted = None if done.differentiated else attempt(lambda: with_kernels(step)[1])[0]
    if wanted is not None:
        return replace(done, wanted=wanted, own=_compared(pair, ran, theirs, order, fed))
    # TensorFlow tells of a function's graphs only when it runs for the first time.
    with loaded_trainer(pair.before, entry) as theirs:
        wanted, why = attempt(lambda: with_kernels(partial(theirs.function.call, **fed))[1])
    if not done.differentiated:
        ran = _run(pair, loaded(pair.after), ran.given, 0, differentiate=False)
        done = replace(done, kernels=ran.done.kernels)
    differences = None if wanted is None else _compared(pair, ran, theirs, order, fed)
    return replace(done, wanted=wanted, unwanted=why, own=differences)


def _compared(pair: Pair, ran: _Run, theirs: LoadedTrainer, order: Alignment, fed: Arrays) -> Differences | None:
    """One step of the source beside one of the result with quantisers off; None where their variables do not load."""
    ours = trainer(ran.root)
    if ours is None:
        raise AssertionError
    for v in ours.variables:
        if v.name.startswith(START):
            v.assign(OFF)
    try:
        before, after = common_variables(pair, theirs.root, ran.root)
    except Error:
        return None
    result = Steps(ours, after, tuple(range(len(order.outputs))))
    return compared(Steps(theirs.function, before, order.outputs), result, fed, ran.given)


def _served(source: Model, frozen: frozenset[str]) -> Placed:
    """The batch norms of the function, or signature, from which training is derived, but for the frozen ones."""
    entry = serving_function(source)
    if entry is not None:
        return placed_by(source, entry.function, frozen)
    signature = serving_signature(source)
    names = sorted(source.signatures, key=lambda name: (name != "serving_default", name)) or [""]
    return placed(source, names[0] if signature is None else signature.name, frozen)


def _fails_alike(pair: Pair, failure: str) -> bool:
    """Whether differentiating the source's own signatures fails in the same way."""
    kind = failure.partition(":")[0]

    def differentiate(function: Trainer, fed: dict[str, np.ndarray]) -> Any:
        with tf.GradientTape() as tape:
            inputs = {k: tf.constant(v) for k, v in fed.items()}
            tape.watch([t for t in inputs.values() if t.dtype.is_floating])
            value = loss(function.call(**inputs))
        return tape.gradient(value, list(inputs.values()))

    def failures() -> list[str]:
        with loaded_source(pair.before) as root:
            functions = [keyworded(signature) for signature in root.signatures.values()]
            return [attempt(lambda f=f: on_random(partial(differentiate, f), f.specs))[1] for f in functions]  # type: ignore[misc]

    found, why = attempt(failures)
    return kind in why if found is None else bool(found) and all(kind in other for other in found)


def training_graph(model: Model) -> str:
    """The graph of the training function as the rewrite, or saving again, named it; "" in TensorFlow 1's format."""
    signed = model.signatures["train"].entry if "train" in model.signatures else ""
    return TRAIN if TRAIN in model.graphs else signed


def layers(pair: Pair, root: Any) -> tuple[list[Any], list[Any]]:
    """Trainable gammas and betas, and moving statistics, of the batch norms that a loaded result trains.

    What a batch norm normalises with is also known from the source, and from where the result serves: a function that
    is to be checked cannot say alone what it should train.

    Raises:
        Error: plain loading does not give them, as they are references.
    """
    result = pair.result
    top = training_graph(result)
    trained = result.analysis(call_graph).reached(top) if top else set(result.graphs)
    known = result.analysis(batch_norms)
    wanted = {_identity(bn) for bn in known if any(s.training and s.graph in trained for s in bn.sites)}
    found: dict[str, dict[str, Any]] = {role: {} for role in ROLES}
    named = {v.name.partition(":")[0]: v for v in getattr(root, "variables", ())}
    for bn in (*known, *pair.source.analysis(batch_norms)):
        for role, key in bn.variables.items() if _identity(bn) in wanted else ():
            if key not in result.variables:
                continue
            if not result.object_based and result.variables[key].node not in named:
                raise Error(f"plain loading does not list {key}, a reference, which is trained in V1 sessions only")
            found[role][key] = held(root, key) if result.object_based else named[result.variables[key].node]
    parameters = [v for role in (GAMMA, BETA) for v in found[role].values() if v.trainable]
    return parameters, [*found[MEAN].values(), *found[VARIANCE].values()]


def _identity(bn: BatchNorm) -> tuple[str, ...]:
    """What tells a batch norm from others, even if something stands before its gamma in one function."""
    mean = bn.variables.get(MEAN)
    return tuple(bn.variables.values()) if mean is None else (mean,)
