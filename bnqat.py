"""Rewrite a float TensorFlow SavedModel into a fine-tunable one with quantised batch norms.

``bnqat.inspect(model)``, ``bnqat.rewrite(source, target)``, ``bnqat.diff(before, after)`` and
``bnqat.finalize(source, target)`` read and write models. ``bnqat.verify(before, after)``,
``bnqat.reestimate_statistics(model, dataset, steps)`` and ``bnqat.sensitivity(model, inputs)`` run them.
``bnqat.find_ranges(model)`` searches ranges of weights again while a program trains them.
``bnqat.KerasLayer(path)``, ``bnqat.QuantizationLog(layer, log_dir)`` and ``bnqat.ReestimateStatistics(dataset, steps)``
train them with Keras 3. The passes are objects from `passes`.

Importing this module is fast: TensorFlow is imported when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewriter.app.api import NothingToRewriteError, inspect, rewrite
    from rewriter.app.diff import diff
    from rewriter.app.finalize import finalize
    from rewriter.app.find_ranges import find_ranges
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
    "find_ranges",
    "inspect",
    "reestimate_statistics",
    "rewrite",
    "sensitivity",
    "verify",
]

MODULES = {
    "KerasLayer": "training.layer",
    "QuantizationLog": "training.log",
    "ReestimateStatistics": "training.statistics",
    "diff": "diff",
    "find_ranges": "find_ranges",
    "finalize": "finalize",
    "reestimate_statistics": "reestimate",
    "sensitivity": "sensitivity",
    "verify": "verification.claims",
}
"""The modules, below `rewriter.app`, of the names that `rewriter.app.api` does not define."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bnqat' has no attribute {name!r}")
    if name == "Error":
        from rewriter.ir import Error

        return Error
    if name in MODULES:
        return getattr(import_module(f"rewriter.app.{MODULES[name]}"), name)
    from rewriter.app import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
