"""The first sentence about a comparison: what became of the batch norms, and from when on outputs differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from passes.quantization.controls import control_values
from rewriter.app.blocks import counted, quantized_text, widths_text
from rewriter.app.report_schema import QuantizerReport
from rewriter.diff.report import LayerDiff, Verdict
from rewriter.ir import Model


def headline(
    after: Model,
    layers: list[LayerDiff],
    verdict: Verdict,
    changes: int,
    *,
    others: Sequence[QuantizerReport] = (),
    baked: Mapping[str, Collection[int]] | None = None,
) -> str:
    """Return one or two sentences that say what differs between two models.

    Args:
        after: the second model.
        layers: the batch norms of both.
        verdict: the comparison in numbers.
        changes: the number of changes.
        others: the quantisers of other values than batch norms' that only the second model has.
        baked: name of a layer whose variables hold quantised values for good in the second model -> their widths.
    """
    if not changes:
        return "The two models are the same."
    if not layers:
        return _without_batch_norms(after, changes, others, baked or {})
    finalized = [layer for layer in layers if layer.status == "finalised"]
    if finalized:
        widths = f"{'- and '.join(map(str, _widths(finalized)))}-bit"
        are = "holds its" if len(finalized) == 1 else "hold their"
        return f"{_of(len(finalized), verdict)} {are} {widths} values for good: the model is finalised."
    released = [layer for layer in layers if layer.status == "no longer quantised"]
    if released:
        return f"{_of(len(released), verdict)} {'is' if len(released) == 1 else 'are'} no longer quantised."
    quantized = [layer for layer in layers if layer.status in ("quantised", "partly")]
    fused = [layer for layer in layers if layer.fused]
    if not quantized and not fused:
        return f"The models differ in {counted(changes, 'place')}; no batch norm became quantised or the fused kernel."
    if {layer.name for layer in fused} == {layer.name for layer in quantized}:
        text = f"{_quantized(quantized, verdict)}, and each became one fused kernel"
    else:
        parts = [_quantized(quantized, verdict)] if quantized else []
        parts += (
            [f"{len(fused) if quantized else _of(len(fused), verdict)} became one fused kernel each"] if fused else []
        )
        text = ", ".join(parts)
    return f"{text}; {_outputs(after, fused=bool(fused))}." if quantized else f"{text}."


def _without_batch_norms(
    after: Model, changes: int, others: Sequence[QuantizerReport], baked: Mapping[str, Collection[int]]
) -> str:
    """Return what differs between two models without batch norms."""
    if others:
        return f"Quantised: {quantized_text(others)}; {_outputs(after, fused=False)}."
    if baked:
        widths = f"{'- and '.join(map(str, sorted(set().union(*map(set, baked.values())))))}-bit"
        hold = "holds its" if len(baked) == 1 else "hold their"
        return f"{counted(len(baked), 'layer')} {hold} {widths} values for good: the model is finalised."
    return f"The models differ in {counted(changes, 'place')}."


def _quantized(layers: list[LayerDiff], verdict: Verdict) -> str:
    """Return how many batch norms were quantised, and to which widths: "2 batch norms were quantised to 4 bits"."""
    partly = sum(layer.status == "partly" for layer in layers)
    part = f" ({partly} of them only in some places)" if partly else ""
    return f"{_of(len(layers), verdict)} {_were(len(layers))} quantised to {widths_text(_widths(layers))}{part}"


def _widths(layers: list[LayerDiff]) -> list[int]:
    return sorted({bits for layer in layers for bits in layer.bits})


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _of(number: int, verdict: Verdict) -> str:
    """Return a number of batch norms, of all those of the first model if these are more."""
    if number == verdict.batch_norms:
        return counted(number, "batch norm")
    return f"{number} of {counted(verdict.batch_norms, 'batch norm')}"


def _outputs(after: Model, *, fused: bool) -> str:
    """Return from which step of training on the second model's outputs are those of a quantised model."""
    controls = control_values(after, "step", "start_step")
    step, start = controls.get("step", 0), controls.get("start_step", 0)
    if start <= step:
        return "the quantisers are on, so outputs differ"
    return f"outputs are unchanged{', up to float rounding,' if fused else ''} until step {start:,} of training"
