"""Rewrite a float TensorFlow SavedModel into a fine-tunable one with quantised batch norms.

``bnqat.inspect(model)`` and ``bnqat.rewrite(source, target)``; the passes are objects from `passes`.
Importing this module is fast: TensorFlow is imported when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewriter.app.api import NothingToRewriteError, inspect, rewrite
    from rewriter.ir import Error

__all__ = ["Error", "NothingToRewriteError", "inspect", "rewrite"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bnqat' has no attribute {name!r}")
    if name == "Error":
        from rewriter.ir import Error

        return Error
    from rewriter.app import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
