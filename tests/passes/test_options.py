"""Tests of options: one check serves a pass's constructor and the configuration file."""

from __future__ import annotations

from typing import Any

import pytest

from passes.batch_norm.options import AverageOptions
from passes.frontend.options import ReferenceOptions
from passes.options import PassOptions, options_of
from passes.quantization.options import ScheduleOptions
from passes.training.layer_options import TrainingOptions, TrainingRule
from passes.training.options import DeriveOptions, FreezeOptions
from rewriter.app.settings import settings
from rewriter.ir import Error


@pytest.mark.parametrize(
    ("options", "name", "value", "expected"),
    [
        (ScheduleOptions, "start_step", -1, " = -1: it is to be greater than or equal to 0"),
        (ScheduleOptions, "ramp_steps", None, " = None: it is to be a valid integer"),
        (ScheduleOptions, "start_step", True, " = True: it is to be a valid integer"),
        (FreezeOptions, "freeze_step", 2**63, " = 9223372036854775808: it is to be less than 9223372036854775808"),
        (FreezeOptions, "freeze_step", 1.0, " = 1.0: it is to be a valid integer"),
        (DeriveOptions, "momentum", 1, " = 1: it is to be less than 1"),
        (DeriveOptions, "momentum", float("nan"), " = nan: it is to be less than 1"),
        (DeriveOptions, "train_batch_norm", "some", " = 'some': it is to be 'as-source', 'all' or 'none'"),
        (DeriveOptions, "train_outputs", {"a": 3}, ".a = 3: it is to be a valid string"),
        (AverageOptions, "quantize_average", "all", " = 'all': it is to be 'statistic', 'none' or 'stored'"),
        (ReferenceOptions, "keep_ref", "yes", " = 'yes': it is to be a valid boolean"),
    ],
)
def test_a_wrong_value_is_refused_in_the_same_words_everywhere(
    options: type[PassOptions], name: str, value: Any, expected: str
) -> None:
    sentence = f"{name}{expected}"
    with pytest.raises(Error) as raised:
        options(**{name: value})
    assert str(raised.value) == sentence
    with pytest.raises(Error) as raised:
        settings({name: value}, {})
    assert str(raised.value) == sentence


def test_a_value_has_the_type_of_the_option() -> None:
    option = next(option for option in options_of(DeriveOptions) if option.name == "momentum")
    assert (option.type, option.bounds, option.default) == (float, (0, 1), None)
    momentum = DeriveOptions(momentum="0.5").momentum  # type: ignore[arg-type]  # text is converted
    assert momentum == settings({"momentum": "0.5"}, {}).momentum == 0.5


def test_options_of_layers_have_the_checks_of_all_layers() -> None:
    assert TrainingRule("a") == TrainingRule("a", None, None)
    for wrong in ({"momentum": 1.5}, {"train_batch_norm": "some"}):
        with pytest.raises(Error, match=f"{next(iter(wrong))} = "):
            TrainingRule("a", **wrong)
        with pytest.raises(Error, match=f"{next(iter(wrong))} = "):
            TrainingOptions(**wrong)
