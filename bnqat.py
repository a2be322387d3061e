"""Rewrite a float TensorFlow SavedModel into a fine-tunable one with quantised batch norms.

``bnqat.inspect(model)``, ``bnqat.rewrite(source, target)`` and ``bnqat.diff(before, after)``;
``bnqat.verify(before, after)``, ``bnqat.reestimate_statistics(model, dataset, steps)`` and ``bnqat.sensitivity(model,
inputs)``, which run the models; ``bnqat.KerasLayer(path)``, ``bnqat.QuantizationLog(layer, log_dir)`` and
``bnqat.ReestimateStatistics(dataset, steps)``, which train them with Keras 3; the passes are objects from `passes`.
Importing this module is fast: TensorFlow is imported when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewriter.app.api import NothingToRewriteError, inspect, rewrite
    from rewriter.app.diff import diff
    from rewriter.app.finalize import finalize
    from rewriter.app.reestimate import reestimate_statistics
    from rewriter.app.sensitivity import sensitivity
    from rewriter.app.training.layer import KerasLayer
    from rewriter.app.training.log import QuantizationLog
    from rewriter.app.training.statistics import ReestimateStatistics
    from rewriter.app.verification.claims import verify
    from rewriter.ir import Error

__all__ = [
    "Error",
    "KerasLayer",
    "NothingToRewriteError",
    "QuantizationLog",
    "ReestimateStatistics",
    "diff",
    "finalize",
    "inspect",
    "reestimate_statistics",
    "rewrite",
    "sensitivity",
    "verify",
]

ELSEWHERE = {
    "KerasLayer": "training.layer",
    "QuantizationLog": "training.log",
    "ReestimateStatistics": "training.statistics",
    "diff": "diff",
    "finalize": "finalize",
    "reestimate_statistics": "reestimate",
    "sensitivity": "sensitivity",
    "verify": "verification.claims",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bnqat' has no attribute {name!r}")
    if name == "Error":
        from rewriter.ir import Error

        return Error
    if name in ELSEWHERE:
        return getattr(import_module(f"rewriter.app.{ELSEWHERE[name]}"), name)
    from rewriter.app import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
