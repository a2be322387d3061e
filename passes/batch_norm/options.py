"""Options of the quantisers of batch norms. Importing this module does not import TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from passes.options import Help, PassOptions

Average = Literal["statistic", "none", "stored"]


@dataclass(frozen=True)
class AverageOptions(PassOptions):
    """The value that is quantised when a batch's statistics enter the moving averages.

    "statistic": the batch's statistic; the average stays float, and is quantised where it is read. "none": only what is
    read. "stored": the average itself before it is written back, which can make it stand still.
    """

    quantize_average: Annotated[
        Average,
        Help("What is quantised when a moving average is updated: the batch's statistic, none, or the stored average"),
    ] = "statistic"
