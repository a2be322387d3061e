"""Error that each quantiser alone makes in a model's outputs, at each width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from passes import roles
from passes.batch_norm.batch_norms import batch_norms
from passes.batch_norm.roles import ROLES
from passes.deploy.quantized_values import tagged
from passes.quantization.quantizer_marks import tag_of
from passes.quantization.roles import MAX_BITS, MIN_BITS
from rewriter.app.arrays import fitted, unfit
from rewriter.app.blocks import Block, Report
from rewriter.app.show_runs import sensitivity_blocks, sensitivity_headline
from rewriter.app.verification.running import attempt, loaded
from rewriter.ir import Error, Model
from rewriter.reach import refuse_reaching
from rewriter.savedmodel.read import load

WIDTHS = (8, 6, 4, 3, 2)


@dataclass(frozen=True)
class SensitivityRow:
    """Errors of one quantiser while the others are off.

    Attributes:
        layer: its index in the control variables that hold a value for each layer.
        name: the layer's name.
        error: the norm of the difference to the float outputs, relative to the norm of these, by width.
    """

    layer: int
    name: str
    role: str
    error: dict[int, float]


@dataclass(frozen=True, repr=False)
class Sensitivity(Report):
    """Errors of all quantisers of a model, and the number of inputs."""

    rows: list[SensitivityRow]
    inputs: int

    @property
    def headline(self) -> str:
        """The result in a few words."""
        return sensitivity_headline(self)

    def blocks(self) -> Iterable[Block]:
        """Return what the command prints."""
        return sensitivity_blocks(self)


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
        inputs: the inputs of its default signature, by name; one array may have any name.
        bits: the widths, each from 2 to 16.
        trust: run a model that holds ops for files, the network or Python.
        progress: a function that wraps the runs to show their progress.

    Raises:
        Error: the model has no quantisers, or is not trusted and holds such ops; or an input is missing or of another
            shape; or a width is out of range.
    """
    import tensorflow as tf

    if not bits:
        raise Error("no width is given to try")
    if not isinstance(inputs, Mapping):
        raise Error("inputs are arrays by name, a dict")
    for width in bits:
        if not MIN_BITS <= width <= MAX_BITS:
            raise Error(f"{width} bits: a width is from {MIN_BITS} to {MAX_BITS}")
    saved_model = load(model)
    quantizers = _quantizers(model, saved_model)
    refuse_reaching(model, saved_model, trust=trust)
    root, why = attempt(lambda: loaded(Path(model)))
    if root is None:
        raise Error(f"TensorFlow does not load {model}: {why}")
    run, count = _runner(root, inputs)
    widths = _widths(root)
    errors: dict[tuple[int, str], dict[int, float]] = {key: {} for key in quantizers}
    for variable in widths.values():
        variable.assign(tf.zeros_like(variable))
    expected = run()
    for layer, role in progress(list(quantizers)):
        for width in bits:
            layer_bits = np.zeros(widths[role].shape, np.int32)
            layer_bits[layer] = width
            widths[role].assign(layer_bits)
            errors[layer, role][width] = _difference(run(), expected)
        widths[role].assign(tf.zeros_like(widths[role]))
    return Sensitivity(
        [SensitivityRow(layer, name, role, errors[layer, role]) for (layer, role), name in quantizers.items()], count
    )


def plot(measured: Sensitivity, file: Path) -> None:
    """Draw the errors as a heat map: a row for each layer and role, a column for each width.

    Raises:
        Error: matplotlib is not installed, or cannot write a file of this kind.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as e:
        raise Error("a plot needs matplotlib, which comes with the extra `plot` of bnqat") from e
    widths = list(measured.rows[0].error)
    errors = np.array([[max(row.error[n], 1e-9) for n in widths] for row in measured.rows])
    figure = Figure(figsize=(1.5 + len(widths), 1.5 + 0.22 * len(measured.rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(errors, aspect="auto", norm=LogNorm(max(errors.min(), 1e-5), max(errors.max(), 2e-5)))
    axes.set_xticks(range(len(widths)), [str(n) for n in widths])
    axes.set_yticks(range(len(measured.rows)), [f"{row.name} {row.role}" for row in measured.rows], fontsize=7)
    axes.set_xlabel("bits")
    figure.colorbar(image, label="relative error of the outputs")
    try:
        figure.savefig(file)
    except ValueError as e:
        raise Error(f"the plot {file} cannot be written: {e}") from e


def _quantizers(model: str | Path, saved_model: Model) -> dict[tuple[int, str], str]:
    """Return the layer's name of each quantiser that serving uses, by (layer, role), in order."""
    names: dict[tuple[int, str], str] = {}
    for bn in saved_model.analysis(batch_norms):
        tags = [tag for site in bn.sites if site.mode != "training" for tag in site.binding.quantized]
        names |= {(tag["layer"], tag["role"]): tag["layer_name"] for tag in tags if "layer" in tag}
    tags = [tag_of(saved_model.graphs[graph].nodes[node]) for graph, node in tagged(saved_model)]
    names |= {(tag["layer"], tag["role"]): tag["layer_name"] for tag in tags if tag["role"] not in ROLES}
    if not names:
        raise Error(f"{model} has no quantisers of known widths; rewrite it with bnqat rewrite")
    # A role that the registry does not know is one of a provider that is not here; it comes last.
    order = [*roles(), *sorted({role for _, role in names} - roles().keys())]
    # Each provider numbers its layers from 0, so batch norms come first, and then the layers of each other role.
    return dict(sorted(names.items(), key=lambda item: _place(item[0], order)))


def _place(key: tuple[int, str], order: Sequence[str]) -> tuple[int, int, int]:
    """Return the sort key of a quantiser."""
    layer, role = key
    return 0 if role in ROLES else 1 + order.index(role), layer, order.index(role)


def _widths(root: Any) -> dict[str, Any]:
    """Return the variables with the layers' widths, by role, after letting quantisers act from step 0 on."""
    quantization = getattr(root, "quantization", None)
    candidates = getattr(root if quantization is None else quantization, "variables", ())
    variables = {v.name: v for v in candidates}
    missing = [n for n in ("start_step", "ramp_steps") if f"quantization/{n}:0" not in variables]
    if missing:
        raise Error(f"the model's root holds no quantization.{missing[0]}; give the model that bnqat rewrote itself")
    for name in ("start_step", "ramp_steps"):
        variables[f"quantization/{name}:0"].assign(0)
    prefix, suffix = "quantization/layer_bits/", ":0"
    return {n.removeprefix(prefix).removesuffix(suffix): v for n, v in variables.items() if n.startswith(prefix)}


def _runner(root: Any, inputs: Mapping[str, np.ndarray]) -> tuple[Callable[[], list[np.ndarray]], int]:
    """Return a function that computes the default signature's float outputs, and the number of examples.

    Raises:
        Error: the model has no signature, or it does not take the inputs.
    """
    import tensorflow as tf

    names = sorted(set(root.signatures) - {"train"}, key=lambda name: (name != "serving_default", name))
    if not names:
        raise Error("the model has no signature to run")
    signature = root.signatures[names[0]]
    specs = signature.structured_input_signature[1]
    feeds = fitted(inputs, specs)
    if feeds is None:
        raise Error(f"the signature {names[0]} {unfit(inputs, specs)}")
    tensors = {name: tf.constant(feeds[name], spec.dtype) for name, spec in specs.items()}

    def run() -> list[np.ndarray]:
        result, why = attempt(lambda: signature(**tensors))
        if result is None:
            raise Error(f"the signature {names[0]} does not run on these inputs: {why}")
        outputs = [value for _, value in sorted(result.items())]
        return [value.numpy().astype(np.float64) for value in outputs if value.dtype.is_floating]

    if not run():
        raise Error(f"the signature {names[0]} gives no numbers whose error could be measured")
    return run, max((len(value) for value in feeds.values() if np.ndim(value)), default=1)


def _difference(outputs: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the norm of all differences, relative to the norm of the expected outputs."""
    squared_error = sum(float(np.sum((a - b) ** 2)) for a, b in zip(outputs, expected, strict=True))
    squared_norm = sum(float(np.sum(b**2)) for b in expected)
    return float(np.sqrt(squared_error / squared_norm)) if squared_norm else float(np.sqrt(squared_error))
