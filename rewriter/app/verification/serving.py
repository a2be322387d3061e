"""Runs of the signatures of a model and of its rewritten version, each on the same inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from passes.batch_norm.batch_norms import batch_norms
from passes.batch_norm.sites import sites
from rewriter.app.arrays import Arrays, fitted, unfit
from rewriter.app.verification.running import OFF, Ran, Session, attempt, last_bits, on_random, rows, session_of
from rewriter.dataflow import Captured, Constant
from rewriter.ir import Error, Model

CONTROLS = "quantization/"
START, RAMP, STEP, FREEZE = (f"{CONTROLS}{name}" for name in ("start_step", "ramp_steps", "step", "freeze_step"))

PERTURBATIONS = 4
"""Number of random changes of last bits that are tried."""


@dataclass(frozen=True)
class Pair:
    """A source and its rewritten version: their directories, and the models in them."""

    before: Path
    after: Path
    source: Model
    result: Model

    @property
    def unfrozen(self) -> bool:
        """True if parameters of batch norms are variables that the source holds as constants."""
        # Moving mean and variance (positions 2 and 3): a constant gamma or beta alone does not make a frozen model.
        origins = [o for s in self.source.analysis(sites) if s.inference for b in s.binding.origins for o in b[2:4]]
        source_names = {v.name for v in self.source.variables.values()}
        result_names = [
            self.result.variables[k].name for bn in self.result.analysis(batch_norms) for k in bn.variables.values()
        ]
        return any(isinstance(o, Constant | Captured) for o in origins) and any(
            name not in source_names for name in result_names
        )


@dataclass(frozen=True)
class Served:
    """Runs of a signature by both models on the same inputs; a text if the result's run failed.

    Attributes:
        source: the source's run.
        off: the result's run with quantisers off.
        on: the result's run with quantisers on; None if there are none.
        changed: the nodes of the variables that the result's runs change, and the source's does not.
        rows: the number of examples in the inputs.
        rerun: the difference of the source from itself when it runs again, by output; empty unless the result differs.
        perturbed: the difference of the source from itself with other last bits in inputs and variables, likewise.
        inert: true if quantisers change no output, even with other values in the variables.
        fixed: true if, in addition, these other values themselves change no output.
    """

    source: Ran
    off: Ran | str
    on: Ran | str | None
    changed: frozenset[str]
    rows: int
    rerun: Mapping[str, float]
    perturbed: Mapping[str, float]
    inert: bool = False
    fixed: bool = False


@dataclass(frozen=True)
class Serving:
    """Observations of the signatures of both models.

    Attributes:
        names: the source's signatures.
        promised: sentences on signatures of the result that are not the source's.
        ran: the runs of signatures that both models have and the source ran, by name.
        skipped: the reasons for which other signatures were not run, by name.
        trained: the number of variables whose values the source got from the result, which was trained since.
        lost: the reason for which the source cannot get the result's values, so outputs cannot be compared; or "".
    """

    names: list[str]
    promised: list[str]
    ran: dict[str, Served]
    skipped: dict[str, str]
    trained: int
    lost: str


def serve(pair: Pair, inputs: Arrays | None = None, seed: int = 0) -> Serving:
    """Run every signature that both models have, in V1 sessions, each on the same inputs.

    Grappler folds constants into convolutions, but not variables. If the source's constants were unfrozen, constant
    folding is off in both models.

    Raises:
        Error: the source runs on no inputs, or the given inputs do not fit.
    """
    fold = not pair.unfrozen
    with session_of(pair.before, fold) as source, session_of(pair.after, fold) as result:
        trained, lost = _give_trained_values(pair, source, result)
        ran: dict[str, Served] = {}
        skipped: dict[str, str] = {}
        for name in source.signatures:
            if name not in result.signatures:
                continue
            source_run, why = _source_run(source, name, inputs, seed)
            if source_run is None:
                skipped[name] = why
            else:
                ran[name] = _served(source, result, name, source_run)
        if skipped and not ran:
            hint = "the inputs given" if inputs is not None else "random inputs, give it some with --inputs"
            raise Error(f"the source runs on none of {hint}: {next(iter(skipped.values()))}")
        return Serving(list(source.signatures), list(_signature_changes(source, result)), ran, skipped, trained, lost)


def _source_run(
    source: Session, name: str, inputs: Arrays | None, seed: int
) -> tuple[tuple[Ran, dict[str, np.ndarray]] | None, str]:
    """Return the source's run of a signature and its inputs, or None and the reason."""
    specs, run = source.inputs(name), partial(source.run, name)
    if inputs is None:
        return attempt(lambda: on_random(run, specs, seed))
    try:
        fed = fitted(inputs, specs)
    except Error as e:
        return None, f"the signature {name}: {e}"
    if fed is None:
        return None, f"the signature {name} {unfit(inputs, specs)}"
    return attempt(lambda: (run(fed), fed))


def _served(source: Session, result: Session, name: str, source_run: tuple[Ran, dict[str, np.ndarray]]) -> Served:
    """Return both models' runs of a signature, the result's on the inputs of the source's."""
    source_ran, fed = source_run
    names = set(result.inputs(name))
    if names != set(fed):
        why = f"the result takes {', '.join(sorted(names)) or 'nothing'}, not {', '.join(sorted(fed)) or 'nothing'}"
        return Served(source_ran, why, None, frozenset(), rows(fed), {}, {})
    # Before the run with quantisers off, as this leaves them off.
    on = _quantized(result, name, fed)
    off, why = attempt(lambda: result.run(name, fed))
    rerun, perturbed = {}, {}
    if off is not None and any(differences(source_ran.outputs, off.outputs).values()):
        rerun = differences(source_ran.outputs, source.run(name, fed).outputs)
        perturbed = _perturbed(source, name, source_ran, fed)
    inert, fixed = _inert(result, name, fed, off, on) if off is not None and isinstance(on, Ran) else (False, False)
    nodes = _matching(source, result) if source_ran.changed else {}
    changed = [ran.changed - {nodes.get(n, n) for n in source_ran.changed} for ran in (off, on) if isinstance(ran, Ran)]
    return Served(source_ran, off or why, on, frozenset().union(*changed), rows(fed), rerun, perturbed, inert, fixed)


def _quantized(result: Session, name: str, fed: Arrays) -> Ran | str | None:
    """Return the result's run with quantisers on, its error, or None without quantisers; they are off afterwards."""
    start, ramp = result.node(START), result.node(RAMP)
    if start is None:
        return None
    no_ramp = {} if ramp is None else {ramp: np.array(0)}
    result.assign({start: np.array(0), **no_ramp})
    ran, why = attempt(lambda: result.run(name, fed))
    # The same variables as above, as TensorFlow optimises a graph for each set of fetches.
    result.assign({start: np.array(OFF), **no_ramp})
    return ran or why


def _perturbed(source: Session, name: str, source_ran: Ran, fed: Arrays) -> dict[str, float]:
    """Return the largest difference of each output of the source with other last bits in inputs and variables."""
    values = source.values()
    largest = dict.fromkeys(source_ran.outputs, 0.0)
    for seed in range(PERTURBATIONS):
        source.assign(last_bits(values, seed))
        ran = source.run(name, {**fed, **last_bits(fed, seed)})
        largest = {key: max(largest[key], share) for key, share in differences(source_ran.outputs, ran.outputs).items()}
    # `last_bits` moves floats only, so its keys are the variables to restore.
    source.assign({node: values[node] for node in last_bits(values, 0)})
    return largest


def _inert(result: Session, name: str, fed: Arrays, off: Ran, on: Ran) -> tuple[bool, bool]:
    """Return the fields `inert` and `fixed` of `Served`.

    A net that was never trained holds zeros and ones, which quantisers keep as they are. A saturated softmax returns
    the same, whatever the variables hold.
    """
    if any(differences(off.outputs, on.outputs).values()):
        return False, False
    values = result.values()
    rng = np.random.default_rng(0)
    floating = {n: v for n, v in values.items() if tf.as_dtype(v.dtype).is_floating and not n.startswith(CONTROLS)}
    result.assign({n: (v * rng.uniform(0.9, 1.1, v.shape)).astype(v.dtype) for n, v in floating.items()})
    other_on = _quantized(result, name, fed)
    other_off, _ = attempt(lambda: result.run(name, fed))
    result.assign(floating)
    if other_off is None or not isinstance(other_on, Ran):
        return True, False
    fixed = not any(differences(off.outputs, other_off.outputs).values())
    return not any(differences(other_off.outputs, other_on.outputs).values()), fixed


def _give_trained_values(pair: Pair, source: Session, result: Session) -> tuple[int, str]:
    """Assign the result's trained values to the source, and return their number; or 0 and why it is impossible."""
    step = result.node(STEP)
    source_values, result_values = source.values(), result.values()
    # Values that no step trained have to be the source's; a difference is not excused.
    if step is None or not result_values[step]:
        return 0, ""
    if pair.unfrozen:
        return (
            0,
            f"the result was trained for {result_values[step]} steps, and the source holds its parameters as constants",
        )
    nodes = _matching(source, result)
    trained_values = {
        a: result_values[b] for a, b in nodes.items() if source_values[a].tobytes() != result_values[b].tobytes()
    }
    source.assign(trained_values)
    return len(trained_values), ""


def _matching(source: Session, result: Session) -> dict[str, str]:
    """Return the node of the result's variable for the node of each of the source's variables."""
    # Names need not be unique, but both signatures capture variables in the same order.
    result_node = {a: a for a in source.values() if a in result.values()}
    for name in set(source.signatures) & set(result.signatures):
        pairs = zip(source.captured(name), result.captured(name), strict=False)
        result_node |= {a: b for a, b in pairs if _without_number(source.name(a)) == _without_number(result.name(b))}
    return result_node


def _without_number(name: str) -> str:
    """Return a name without the number that made it unique."""
    return re.sub(r"_\d+$", "", name)


def _signature_changes(source: Session, result: Session) -> Iterator[str]:
    """Return sentences on signatures of the result that are not the source's."""
    for name, signature in source.signatures.items():
        if name not in result.signatures:
            yield f"the signature {name} is missing"
            continue
        for kind in ("inputs", "outputs"):
            protos = (getattr(s, kind) for s in (signature, result.signatures[name]))
            before, after = ({k: _spec(v) for k, v in infos.items()} for infos in protos)
            if set(before) != set(after):
                yield f"the signature {name} has the {kind} {', '.join(sorted(after))}, not {', '.join(sorted(before))}"
            for key in sorted(set(before) & set(after)):
                if before[key] != after[key]:
                    yield f"{key} of the signature {name} is {after[key]}, not {before[key]}"


def _spec(info: Any) -> str:
    return f"{tf.as_dtype(info.dtype).name}{tf.TensorShape(info.tensor_shape)}"


def floats(values: Arrays) -> dict[str, np.ndarray]:
    """Return the arrays of floats, in double precision."""
    return {k: v.astype(np.float64) for k, v in values.items() if tf.as_dtype(v.dtype).is_floating}


def differences(expected: Arrays, actual: Arrays) -> dict[str, float]:
    """Return each array's difference, relative to the largest expected element; infinite if not comparable."""
    expected_floats, actual_floats = floats(expected), floats(actual)
    shares = {}
    for key, value in expected.items():
        if key not in actual or value.shape != actual[key].shape:
            shares[key] = np.inf
        elif key not in expected_floats or key not in actual_floats:
            shares[key] = 0.0 if np.array_equal(value, actual[key]) else np.inf
        else:
            shares[key] = _difference(expected_floats[key], actual_floats[key])
    return shares


def _difference(expected: np.ndarray, actual: np.ndarray) -> float:
    same = (expected == actual) | (np.isnan(expected) & np.isnan(actual))
    if same.all():
        return 0.0
    if not np.isfinite(expected[~same]).all() or not np.isfinite(actual[~same]).all():
        return np.inf
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    return float(np.abs(actual - expected)[~same].max() / largest) if largest else np.inf
