"""How much each quantiser alone changes a model's outputs, at each width."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from passes.batch_norm.batch_norms import batch_norms
from passes.roles import MAX_BITS, MIN_BITS, ROLES
from rewriter.app.arrays import fitted
from rewriter.app.verification.running import attempt, loaded
from rewriter.ir import Error, Model
from rewriter.reach import refuse_reaching
from rewriter.savedmodel.read import load

WIDTHS = (8, 6, 4, 3, 2)


@dataclass(frozen=True)
class SensitivityRow:
    """One quantiser, the others off.

    Attributes:
        layer: its number in variables for each layer.
        name: the batch norm's name.
        error: by width, the norm of the difference to the float outputs, relative to the norm of these.
    """

    layer: int
    name: str
    role: str
    error: dict[int, float]


@dataclass(frozen=True)
class Sensitivity:
    """All quantisers of a model, and how many inputs were used."""

    rows: list[SensitivityRow]
    inputs: int

    def to_json(self) -> str:
        """The table as JSON text."""
        return json.dumps(asdict(self), indent=1)


def sensitivity(
    model: str | Path,
    inputs: Mapping[str, np.ndarray],
    *,
    bits: Sequence[int] = WIDTHS,
    trust: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Sensitivity:
    """Run a rewritten model on inputs, each time with one quantiser of one layer acting at one width.

    The model is executed. Widths are assigned, so it is loaded once.

    Args:
        model: a directory with a SavedModel that bnqat rewrote, fine-tuned and saved again or not.
        inputs: what its default signature takes, by name; one array may have any name.
        bits: the widths, each from 2 to 16.
        trust: run a model that holds ops for files, the network or Python.
        progress: wraps the runs, to show how far they are.

    Raises:
        Error: the model has no quantisers, or is not trusted and holds such ops, an input is missing or of another
            shape, or a width is out of range.
    """
    import tensorflow as tf

    if not bits:
        raise Error("no width is given to try")
    if not isinstance(inputs, Mapping):
        raise Error("inputs are arrays by name, a dict")
    for width in bits:
        if not MIN_BITS <= width <= MAX_BITS:
            raise Error(f"{width} bits: a width is from {MIN_BITS} to {MAX_BITS}")
    read = load(model)
    known = _quantizers(model, read)
    refuse_reaching(model, read, trust=trust)
    root, why = attempt(lambda: loaded(Path(model)))
    if root is None:
        raise Error(f"TensorFlow does not load {model}: {why}")
    run, count = _runner(root, inputs)
    widths = _widths(root)
    errors: dict[tuple[int, str], dict[int, float]] = {key: {} for key in known}
    for variable in widths.values():
        variable.assign(tf.zeros_like(variable))
    expected = run()
    for layer, role in progress(list(known)):
        for width in bits:
            own = np.zeros(widths[role].shape, np.int32)
            own[layer] = width
            widths[role].assign(own)
            errors[layer, role][width] = _difference(run(), expected)
        widths[role].assign(tf.zeros_like(widths[role]))
    return Sensitivity(
        [SensitivityRow(layer, name, role, errors[layer, role]) for (layer, role), name in known.items()], count
    )


def plot(found: Sensitivity, file: Path) -> None:
    """Draw the errors as a heat map: a row for each layer and role, a column for each width.

    Raises:
        Error: matplotlib is not installed, or cannot write a file of this kind.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as e:
        raise Error("a plot needs matplotlib, which comes with the extra `plot` of bnqat") from e
    widths = list(found.rows[0].error)
    errors = np.array([[max(row.error[n], 1e-9) for n in widths] for row in found.rows])
    figure = Figure(figsize=(1.5 + len(widths), 1.5 + 0.22 * len(found.rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(errors, aspect="auto", norm=LogNorm(max(errors.min(), 1e-5), max(errors.max(), 2e-5)))
    axes.set_xticks(range(len(widths)), [str(n) for n in widths])
    axes.set_yticks(range(len(found.rows)), [f"{row.name} {row.role}" for row in found.rows], fontsize=7)
    axes.set_xlabel("bits")
    figure.colorbar(image, label="relative error of the outputs")
    try:
        figure.savefig(file)
    except ValueError as e:
        raise Error(f"the plot {file} cannot be written: {e}") from e


def _quantizers(model: str | Path, read: Model) -> dict[tuple[int, str], str]:
    """(layer, role) -> the batch norm's name, of what serving quantises, in order."""
    found: dict[tuple[int, str], str] = {}
    for bn in read.analysis(batch_norms):
        tags = [tag for site in bn.sites if site.mode != "training" for tag in site.quantized]
        found |= {(tag["layer"], tag["role"]): tag["batch_norm"] for tag in tags if "layer" in tag}
    if not found:
        raise Error(f"{model} has no quantisers of known widths; rewrite it with bnqat rewrite")
    return dict(sorted(found.items(), key=lambda item: (item[0][0], ROLES.index(item[0][1]))))


def _widths(root: Any) -> dict[str, Any]:
    """The widths of layers by role; quantisers act from now on."""
    quantization = getattr(root, "quantization", None)
    held = getattr(root, "variables", ()) if quantization is None else quantization.variables
    variables = {v.name: v for v in held}
    missing = [n for n in ("start_step", "ramp_steps") if f"quantization/{n}:0" not in variables]
    if missing:
        raise Error(f"the model's root holds no quantization.{missing[0]}; give the model that bnqat rewrote itself")
    for name in ("start_step", "ramp_steps"):
        variables[f"quantization/{name}:0"].assign(0)
    return {role: variables[f"quantization/layer_bits/{role}:0"] for role in ROLES}


def _runner(root: Any, inputs: Mapping[str, np.ndarray]) -> tuple[Callable[[], list[np.ndarray]], int]:
    """What computes the default signature's outputs, and the number of inputs.

    Raises:
        Error: the model has no signature, or the inputs are not what it takes.
    """
    import tensorflow as tf

    names = sorted(set(root.signatures) - {"train"}, key=lambda name: (name != "serving_default", name))
    if not names:
        raise Error("the model has no signature to run")
    signature = root.signatures[names[0]]
    specs = signature.structured_input_signature[1]
    given = fitted(inputs, specs)
    if given is None:
        raise Error(f"the signature {names[0]} takes {', '.join(specs)}, not {', '.join(inputs) or 'nothing'}")
    fed = {name: tf.constant(given[name], spec.dtype) for name, spec in specs.items()}

    def run() -> list[np.ndarray]:
        found, why = attempt(lambda: signature(**fed))
        if found is None:
            raise Error(f"the signature {names[0]} does not run on these inputs: {why}")
        outputs = [value for _, value in sorted(found.items())]
        return [value.numpy().astype(np.float64) for value in outputs if value.dtype.is_floating]

    if not run():
        raise Error(f"the signature {names[0]} gives no numbers whose error could be measured")
    return run, max((len(value) for value in given.values() if np.ndim(value)), default=1)


def _difference(outputs: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The norm of all differences, relative to that of what is expected."""
    missed = sum(float(np.sum((a - b) ** 2)) for a, b in zip(outputs, expected, strict=True))
    whole = sum(float(np.sum(b**2)) for b in expected)
    return float(np.sqrt(missed / whole)) if whole else float(np.sqrt(missed))
