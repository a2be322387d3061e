"""Options of every pass that quantises. Importing this module does not import TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from passes.options import Help, PassOptions, Step


@dataclass(frozen=True)
class ScheduleOptions(PassOptions):
    """The steps at which quantisers begin to act: initial values of the variables of these names."""

    start_step: Annotated[Step, Help("First step that quantises")] = 0
    ramp_steps: Annotated[Step, Help("Steps from there on that blend float and quantised values")] = 0
