"""Options of training functions. Importing this module does not import TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from passes.options import Help, PassOptions, Step

MomentumValue = Annotated[float, Ge(0), Lt(1)]
Trained = Literal["as-source", "all", "none"]
"""The batch norms that train: those that the source trains, all, or none."""


@dataclass(frozen=True)
class LayerOptions(PassOptions):
    """Options of derived training that rules may change for some layers.

    A momentum that is not given is that of the other batch norms where they agree, or else 0.99.
    """

    momentum: Annotated[
        MomentumValue | None,
        Help("Momentum of derived training, where the model does not state it"),
    ] = None
    train_batch_norm: Annotated[
        Trained,
        Help("Batch norms that train: all except those that are frozen in the source, all, or none"),
    ] = "as-source"


@dataclass(frozen=True)
class DeriveOptions(LayerOptions):
    """All options of derived training; with further outputs, `train` returns a dict."""

    train_outputs: Annotated[
        Mapping[str, str] | None,
        Help("Let train also return the output of a node, as NAME"),
    ] = None


@dataclass(frozen=True)
class FreezeOptions(PassOptions):
    """The beginning of training's second phase: the initial value of the variable; None for no such phase."""

    freeze_step: Annotated[
        Step | None,
        Help("First step at which training uses the moving statistics, and no longer updates them"),
    ] = None
