"""Options of the passes that bring a model into form. Importing this module does not import TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from passes.options import Flag, Help, PassOptions


@dataclass(frozen=True)
class ReferenceOptions(PassOptions):
    """The treatment of TensorFlow 1's reference variables."""

    keep_ref: Annotated[
        Flag,
        Help("Leave TensorFlow 1's reference variables; the result trains in V1 sessions only"),
    ] = False
