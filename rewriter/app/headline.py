"""The first sentence about a comparison: what became of the layers, and from when on outputs differ."""

from __future__ import annotations

from collections.abc import Iterable

from passes.quantization.controls import control_values
from rewriter.app.blocks import counted, members, noun_of, widths_text
from rewriter.diff.report import BATCH_NORM, LayerDiff, LayerStatus, Verdict
from rewriter.ir import Model


def headline(after: Model, layers: list[LayerDiff], verdict: Verdict, changes: int) -> str:
    """Return one or two sentences that say what differs between two models.

    Args:
        after: the second model.
        layers: the batch norms of both, and the other values that are quantised.
        verdict: the comparison in numbers.
        changes: the number of changes.
    """
    if not changes:
        return "The two models are the same."
    finalized = _with(layers, "finalised")
    if finalized:
        widths = [str(bits) for bits in _widths(finalized) if bits]  # 0: the quantiser was off
        number = f"{'- and '.join(widths)}-bit " if widths else ""
        are = "holds its" if _single(finalized) else "hold their"
        return f"{_numbers(finalized, verdict)} {are} {number}values for good: the model is finalised."
    released = _with(layers, "no longer quantised")
    if released:
        return f"{_numbers(released, verdict)} {'is' if _single(released) else 'are'} no longer quantised."
    norms = [layer for layer in layers if layer.kind == BATCH_NORM]
    parts = _batch_norms(norms, verdict)
    quantized = _with(layers, "quantised", "partly")
    by_kind = _by_kind(layer for layer in quantized if layer.kind != BATCH_NORM)
    parts += [_quantized(of_kind, verdict) for of_kind in by_kind.values()]
    if not parts:
        none = "; no batch norm became quantised or the fused kernel" if norms else ""
        return f"The models differ in {counted(changes, 'place')}{none}."
    if quantized:
        parts.append(_outputs(after, fused=any(layer.fused for layer in layers)))
    return f"{'; '.join(parts)}."


def _batch_norms(norms: list[LayerDiff], verdict: Verdict) -> list[str]:
    """Return what became of batch norms, if any became quantised or the fused kernel."""
    quantized = _with(norms, "quantised", "partly")
    fused = [layer for layer in norms if layer.fused]
    if quantized and {layer.name for layer in fused} == {layer.name for layer in quantized}:
        return [f"{_quantized(quantized, verdict)}, and each became one fused kernel"]
    parts = [_quantized(quantized, verdict)] if quantized else []
    if fused:
        parts.append(f"{len(fused) if quantized else _numbers(fused, verdict)} became one fused kernel each")
    return [", ".join(parts)] if parts else []


def _with(layers: Iterable[LayerDiff], *statuses: LayerStatus) -> list[LayerDiff]:
    return [layer for layer in layers if layer.status in statuses]


def _by_kind(layers: Iterable[LayerDiff]) -> dict[str, list[LayerDiff]]:
    kinds: dict[str, list[LayerDiff]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    return kinds


def _quantized(layers: list[LayerDiff], verdict: Verdict) -> str:
    """Return how many layers of one kind were quantised, and to which widths: "2 weights were quantised to 4 bits"."""
    partly = len(_with(layers, "partly"))
    part = f" ({partly} of them only in some places)" if partly else ""
    were = "was" if _single(layers) else "were"
    return f"{_numbers(layers, verdict)} {were} quantised to {widths_text(_widths(layers))}{part}"


def _single(layers: list[LayerDiff]) -> bool:
    return len(layers) == 1 and (layers[0].kind == BATCH_NORM or members(layers[0].name) == 1)


def _widths(layers: list[LayerDiff]) -> list[int]:
    return sorted({bits for layer in layers for bits in layer.bits})


def _numbers(layers: list[LayerDiff], verdict: Verdict) -> str:
    """Return the numbers of layers by kind; of batch norms, of all those of the first model if these are more."""
    texts = []
    for kind, of_kind in _by_kind(layers).items():
        number = sum(members(layer.name) for layer in of_kind) if kind != BATCH_NORM else len(of_kind)
        if kind == BATCH_NORM and number != verdict.batch_norms:
            texts.append(f"{number} of {counted(verdict.batch_norms, BATCH_NORM)}")
        else:
            texts.append(counted(number, noun_of(kind)))
    return " and ".join(texts)


def _outputs(after: Model, *, fused: bool) -> str:
    """Return from which step of training on the second model's outputs are those of a quantised model."""
    controls = control_values(after, "step", "start_step")
    step, start = controls.get("step", 0), controls.get("start_step", 0)
    if start <= step:
        return "the quantisers are on, so outputs differ"
    return f"outputs are unchanged{', up to float rounding,' if fused else ''} until step {start:,} of training"
