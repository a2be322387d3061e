"""Running the signatures of a model and of what it was rewritten to, each on the same inputs."""

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
from rewriter.app.arrays import Arrays, fitted
from rewriter.app.verification.running import OFF, Ran, Session, attempt, last_bits, on_random, rows, session_of
from rewriter.dataflow import Captured, Constant
from rewriter.ir import Error, Model

CONTROLS = "quantization/"
START, RAMP, STEP, FREEZE = (f"{CONTROLS}{name}" for name in ("start_step", "ramp_steps", "step", "freeze_step"))

PERTURBATIONS = 4
"""In how many ways last bits are changed."""


@dataclass(frozen=True)
class Pair:
    """A source and what it was rewritten to: directories, and what is in them."""

    before: Path
    after: Path
    source: Model
    result: Model

    @property
    def unfrozen(self) -> bool:
        """Whether batch norms' parameters are variables that the source holds as constants."""
        origins = [o for s in self.source.analysis(sites) if s.inference for b in s.origins for o in b[2:4]]
        known = {v.name for v in self.source.variables.values()}
        used = [
            self.result.variables[k].name for bn in self.result.analysis(batch_norms) for k in bn.variables.values()
        ]
        return any(isinstance(o, Constant | Captured) for o in origins) and any(name not in known for name in used)


@dataclass(frozen=True)
class Served:
    """Both models' runs of a signature on the same inputs, or what went wrong in the result's.

    Attributes:
        off: the run with quantisers off.
        on: the run with quantisers on; None where there are none.
        changed: the nodes of the variables that the result's runs change, and the source's does not.
        rows: how many examples the inputs hold.
        rerun: by output, how far the source is from itself when it runs again; looked at where the result differs.
        perturbed: the same with other last bits in its inputs and variables.
        inert: whether quantisers change no output, with other values in the variables either.
        fixed: whether, in addition, these other values themselves change no output.
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
    """What was seen of the signatures.

    Attributes:
        names: the source's signatures.
        promised: how the result's signatures are not the source's; nothing where they are.
        ran: by name, the signatures that both models have and the source ran.
        skipped: by name, why others were not run.
        trained: how many variables the source was given the result's values of, as the result was trained since.
        lost: why outputs cannot be compared, as the source cannot be given the result's values.
    """

    names: list[str]
    promised: list[str]
    ran: dict[str, Served]
    skipped: dict[str, str]
    trained: int
    lost: str


def serve(pair: Pair, inputs: Arrays | None = None, seed: int = 0) -> Serving:
    """Run every signature that both models have, in V1 sessions, each on the same inputs.

    Grappler folds constants into convolutions, which it cannot do with variables: it folds none where the source's
    were unfrozen.

    Raises:
        Error: the source runs on no inputs, or the given ones do not fit.
    """
    fold = not pair.unfrozen
    with session_of(pair.before, fold) as source, session_of(pair.after, fold) as result:
        trained, lost = _same_values(pair, source, result)
        ran: dict[str, Served] = {}
        skipped: dict[str, str] = {}
        for name in source.signatures:
            if name not in result.signatures:
                continue
            taken, why = _source_run(source, name, inputs, seed)
            if taken is None:
                skipped[name] = why
            else:
                ran[name] = _both(source, result, name, taken)
        if skipped and not ran:
            hint = "the inputs given" if inputs is not None else "random inputs, give it some with --inputs"
            raise Error(f"the source runs on none of {hint}: {next(iter(skipped.values()))}")
        return Serving(list(source.signatures), list(_broken(source, result)), ran, skipped, trained, lost)


def _source_run(
    source: Session, name: str, inputs: Arrays | None, seed: int
) -> tuple[tuple[Ran, dict[str, np.ndarray]] | None, str]:
    """The source's run of a signature and its inputs, or why there is none."""
    specs, run = source.inputs(name), partial(source.run, name)
    if inputs is None:
        return attempt(lambda: on_random(run, specs, seed))
    try:
        given = fitted(inputs, specs)
    except Error as e:
        return None, f"the signature {name}: {e}"
    if given is None:
        return None, f"the signature {name} takes {', '.join(specs) or 'nothing'}, not {', '.join(inputs) or 'nothing'}"
    return attempt(lambda: (run(given), given))


def _both(source: Session, result: Session, name: str, taken: tuple[Ran, dict[str, np.ndarray]]) -> Served:
    """The result's runs on what the source took."""
    wanted, fed = taken
    takes = set(result.inputs(name))
    if takes != set(fed):
        why = f"the result takes {', '.join(sorted(takes)) or 'nothing'}, not {', '.join(sorted(fed)) or 'nothing'}"
        return Served(wanted, why, None, frozenset(), rows(fed), {}, {})
    on = _quantized(result, name, fed)
    off, why = attempt(lambda: result.run(name, fed))
    rerun, perturbed = {}, {}
    if off is not None and any(differences(wanted.outputs, off.outputs).values()):
        rerun = differences(wanted.outputs, source.run(name, fed).outputs)
        perturbed = _perturbed(source, name, wanted, fed)
    inert, fixed = _inert(result, name, fed, off, on) if off is not None and isinstance(on, Ran) else (False, False)
    nodes = _matching(source, result) if wanted.changed else {}
    changed = [ran.changed - {nodes.get(n, n) for n in wanted.changed} for ran in (off, on) if isinstance(ran, Ran)]
    return Served(wanted, off or why, on, frozenset().union(*changed), rows(fed), rerun, perturbed, inert, fixed)


def _quantized(result: Session, name: str, fed: Arrays) -> Ran | str | None:
    """The result's run with quantisers on, or what went wrong in it; they are off afterwards. None if it has none."""
    start, ramp = result.node(START), result.node(RAMP)
    if start is None:
        return None
    result.assign({node: np.array(0) for node in (start, ramp) if node is not None})
    ran, why = attempt(lambda: result.run(name, fed))
    result.assign({start: np.array(OFF)})
    return ran or why


def _perturbed(source: Session, name: str, wanted: Ran, fed: Arrays) -> dict[str, float]:
    """The largest distance of each output from the wanted one, where inputs and variables have other last bits."""
    values = source.values()
    found = dict.fromkeys(wanted.outputs, 0.0)
    for seed in range(PERTURBATIONS):
        source.assign(last_bits(values, seed))
        ran = source.run(name, {**fed, **last_bits(fed, seed)})
        found = {key: max(found[key], share) for key, share in differences(wanted.outputs, ran.outputs).items()}
    source.assign({node: values[node] for node in last_bits(values, 0)})
    return found


def _inert(result: Session, name: str, fed: Arrays, off: Ran, on: Ran) -> tuple[bool, bool]:
    """Return whether quantisers change no output, also with other values in the variables; and whether these do.

    A net that was never trained holds zeros and ones, which quantisers keep as they are. A saturated softmax gives
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


def _same_values(pair: Pair, source: Session, result: Session) -> tuple[int, str]:
    """Give the source the values that the result was trained to."""
    step = result.node(STEP)
    values, wanted = source.values(), result.values()
    if step is None or not wanted[step]:
        return 0, ""
    if pair.unfrozen:
        return 0, f"the result was trained for {wanted[step]} steps, and the source holds its parameters as constants"
    nodes = _matching(source, result)
    new = {a: wanted[b] for a, b in nodes.items() if values[a].tobytes() != wanted[b].tobytes()}
    source.assign(new)
    return len(new), ""


def _matching(source: Session, result: Session) -> dict[str, str]:
    """The node of the result's variable for each node of the source's: names need not be unique, captures' order is."""
    found = {a: a for a in source.values() if a in result.values()}
    for name in set(source.signatures) & set(result.signatures):
        pairs = zip(source.captured(name), result.captured(name), strict=False)
        found |= {a: b for a, b in pairs if _plain(source.name(a)) == _plain(result.name(b))}
    return found


def _plain(name: str) -> str:
    """A name without the number that made it unique."""
    return re.sub(r"_\d+$", "", name)


def _broken(source: Session, result: Session) -> Iterator[str]:
    """How signatures are not the source's."""
    for name, signature in source.signatures.items():
        if name not in result.signatures:
            yield f"the signature {name} is missing"
            continue
        for kind in ("inputs", "outputs"):
            both = (getattr(s, kind) for s in (signature, result.signatures[name]))
            wanted, found = ({k: _spec(v) for k, v in infos.items()} for infos in both)
            if set(wanted) != set(found):
                yield f"the signature {name} has the {kind} {', '.join(sorted(found))}, not {', '.join(sorted(wanted))}"
            for key in sorted(set(wanted) & set(found)):
                if wanted[key] != found[key]:
                    yield f"{key} of the signature {name} is {found[key]}, not {wanted[key]}"


def _spec(info: Any) -> str:
    return f"{tf.as_dtype(info.dtype).name}{tf.TensorShape(info.tensor_shape)}"


def floats(values: Arrays) -> dict[str, np.ndarray]:
    """The floats among some arrays, in double precision."""
    return {k: v.astype(np.float64) for k, v in values.items() if tf.as_dtype(v.dtype).is_floating}


def differences(wanted: Arrays, found: Arrays) -> dict[str, float]:
    """The distance of each array from the wanted one, relative to its largest element; infinite if not comparable."""
    numbers, others = floats(wanted), floats(found)
    missed = {}
    for key, value in wanted.items():
        if key not in found or value.shape != found[key].shape:
            missed[key] = np.inf
        elif key not in numbers or key not in others:
            missed[key] = 0.0 if np.array_equal(value, found[key]) else np.inf
        else:
            missed[key] = _difference(numbers[key], others[key])
    return missed


def _difference(wanted: np.ndarray, found: np.ndarray) -> float:
    same = (wanted == found) | (np.isnan(wanted) & np.isnan(found))
    if same.all():
        return 0.0
    if not np.isfinite(wanted[~same]).all() or not np.isfinite(found[~same]).all():
        return np.inf
    largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)
    return float(np.abs(found - wanted)[~same].max() / largest) if largest else np.inf
