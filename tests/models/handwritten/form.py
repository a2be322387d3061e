"""The ways in which people write a batch norm by hand, as a product of choices."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from random import Random
from typing import Any

from tests.covering import Exclusion, covering, drawn


@dataclass(frozen=True)
class Form:
    """One way to write two batch norms; `OPTIONS` has the values of each choice.

    Attributes:
        arithmetic: "folded" (``x * inv - mean * inv + beta``), "centred" (``(x - mean) * inv * gamma + beta``),
            "library" (``tf.nn.batch_normalization``), or "kernels" (a fused kernel for each mode: both are computed
            before the choice, or where the branches compute "inside", one of them).
        scale: gamma is a variable; otherwise it is absent.
        center: beta is a variable; otherwise it is absent.
        chooser: construct that chooses between the modes: ``tf.cond``, ``tf.where``, Python's ``if``, ``smart_cond`` or
            ``tf.case``.
        chosen: value that it chooses: "both" statistics at once, "each" by itself, or the "output".
        branches: the alternatives pass through ``tf.identity``, are passed "direct", or are computed "inside" the
            branches.
        averaged: the moving averages take the statistics of the "batch", or the "chosen" ones, which in inference
            leave the averages as they are.
        updates: update of a moving average: "assign", "assign_sub", "helper" (``assign_moving_average``),
            "debiased" (the same with ``zero_debias``) or "ema" (``ExponentialMovingAverage``).
        placement: place that runs the updates: a "collection" (in a ``tf.function``, the order of the program), control
            dependencies of the "output" or of the "input", or the "branch" for training.
        packing: the updates are "apart", one "group", or in a "cond" of their own.
        momentum: a "python" number, a constant "tensor", a "placeholder", or a placeholder with a "default".
        mode: a "placeholder", a placeholder with a "default", a "variable", or constant: "true" or "false".
        storage: "reference" or "resource" variables.
        control_flow: 1 (Switch and Merge) or 2 (``If``).
        rank: that of x, whose last axis is the channels'.
        dtype: that of x; variables are float32, or float64 where x is.
        shared: both batch norms use the same variables.
        api: a TensorFlow 1 "graph", or a ``tf.function`` of a ``tf.Module``.
    """

    arithmetic: str = "folded"
    scale: bool = True
    center: bool = True
    chooser: str = "cond"
    chosen: str = "both"
    branches: str = "identities"
    averaged: str = "batch"
    updates: str = "assign"
    placement: str = "collection"
    packing: str = "apart"
    momentum: str = "python"
    mode: str = "placeholder"
    storage: str = "resource"
    control_flow: int = 1
    rank: int = 4
    dtype: str = "float32"
    shared: bool = False
    api: str = "graph"

    def __repr__(self) -> str:
        """Return an expression that makes the form; it names only values that differ from the defaults."""
        choices = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return f"Form({', '.join(f'{name}={value!r}' for name, value, default in choices if value != default)})"

    @classmethod
    def parsed(cls, text: str) -> Form:
        """Return the form that an expression makes."""
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        return cls(**{str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords})

    @property
    def dynamic(self) -> bool:
        """Return true if the mode is only known while the model runs."""
        return self.mode not in CONSTANT

    @property
    def unguarded(self) -> bool:
        """Return true if running the model in inference runs the updates."""
        waits = self.placement in ("output", "input") or (self.placement == "collection" and self.api == "function")
        return waits and self.packing != "cond" and self.chooser != "python"


CONSTANT = ("true", "false")

OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "mode": ("placeholder", "default", "variable", *CONSTANT),
    "chooser": ("cond", "where", "python", "smart_cond", "case"),
    "arithmetic": ("folded", "library", "centred", "kernels"),
    "scale": (True, False),
    "placement": ("collection", "output", "input", "branch"),
    "dtype": ("float32", "half", "bfloat16", "float64"),
    "updates": ("assign", "assign_sub", "helper", "debiased", "ema"),
    "momentum": ("python", "tensor", "placeholder", "default"),
    "rank": (2, 3, 4, 5),
    "branches": ("identities", "direct", "inside"),
    "api": ("graph", "function"),
    "averaged": ("batch", "chosen"),
    "packing": ("apart", "group", "cond"),
    "chosen": ("both", "each", "output"),
    "storage": ("reference", "resource"),
    "center": (True, False),
    "control_flow": (1, 2),
    "shared": (False, True),
}
"""The values of every choice, in an order for which few forms cover all pairs; it was found by trying many."""

_UNGUARDED = {"placement": ("output", "input"), "packing": ("apart", "group"), "api": ("graph",)}
_CONDITIONALS = ("cond", "where", "smart_cond", "case")

EXCLUSIONS = (
    Exclusion("a kernel for each mode leaves only the output to choose", {
        "arithmetic": ("kernels",), "chosen": ("both", "each"),
    }),
    Exclusion("the kernel does not compute in float64", {
        "arithmetic": ("kernels",), "dtype": ("float64",),
    }),
    Exclusion("Python's if needs a mode that is known when the graph is made", {
        "chooser": ("python",), "mode": ("placeholder", "default", "variable"),
    }),
    Exclusion("tf.where and Python's if have no branches to compute in", {
        "chooser": ("where", "python"), "branches": ("inside",),
    }),
    Exclusion("tf.where and Python's if have no branch for updates", {
        "chooser": ("where", "python"), "placement": ("branch",),
    }),
    Exclusion("tf.where chooses each tensor by itself, and Python's if chooses no tensors", {
        "chooser": ("where", "python"), "chosen": ("each",),
    }),
    Exclusion("where Python chooses, the chosen statistics are the batch's", {
        "chooser": ("python",), "averaged": ("chosen",),
    }),
    Exclusion("where Python chooses, there is no condition for a cond", {
        "chooser": ("python",), "packing": ("cond",),
    }),
    Exclusion("in the branch for training, the chosen statistics are the batch's", {
        "placement": ("branch",), "averaged": ("chosen",),
    }),
    Exclusion("in the branch for training, a second cond of the same condition means nothing", {
        "placement": ("branch",), "packing": ("cond",),
    }),
    Exclusion("in a graph, tensors from outside the branch do not wait for updates in it", {
        "placement": ("branch",), "branches": ("direct",), "api": ("graph",),
    }),
    Exclusion("statistics computed inside a branch are known outside as the chosen ones only", {
        "branches": ("inside",), "averaged": ("batch",), "placement": ("collection", "output", "input"),
    }),
    Exclusion("where outputs are chosen, the input is used before there are chosen statistics", {
        "chosen": ("output",), "averaged": ("chosen",), "placement": ("input",),
    }),
    Exclusion("the kernel that gives the statistics uses the input before there are updates", {
        "arithmetic": ("kernels",), "placement": ("input",),
    }),
    Exclusion("ExponentialMovingAverage makes its averages from the batch's statistics, before there is a choice", {
        "updates": ("ema",), "averaged": ("chosen",),
    }),
    Exclusion("ExponentialMovingAverage makes its averages inside the branch, after inference was computed", {
        "updates": ("ema",), "placement": ("branch",), "chosen": ("output",), "branches": ("identities", "direct"),
    }),
    Exclusion("ExponentialMovingAverage makes its averages in the branch for training, which Python does not build", {
        "updates": ("ema",), "placement": ("branch",), "chooser": ("python", "smart_cond"), "mode": ("false",),
    }),
    Exclusion("ExponentialMovingAverage keeps averages for tensors, not for variables that layers share", {
        "updates": ("ema",), "shared": (True,),
    }),
    Exclusion("ExponentialMovingAverage averages no tensors of a tf.function", {
        "updates": ("ema",), "api": ("function",),
    }),
    Exclusion("a branch of If is given a reference's value, which cannot be assigned", {
        "storage": ("reference",), "control_flow": (2,), "placement": ("branch",),
    }),
    Exclusion("a branch of If is given a reference's value, which cannot be assigned", {
        "storage": ("reference",), "control_flow": (2,), "packing": ("cond",),
    }),
    Exclusion("a tf.function has resource variables", {"api": ("function",), "storage": ("reference",)}),
    Exclusion("a tf.function has TensorFlow 2's control flow", {"api": ("function",), "control_flow": (1,)}),
    Exclusion("a tensor argument of a tf.function has no default", {"api": ("function",), "mode": ("default",)}),
    Exclusion("a tensor argument of a tf.function has no default", {"api": ("function",), "momentum": ("default",)}),
    Exclusion("nothing orders the updates of averages that two layers share, within one run of a graph", {
        "shared": (True,), "api": ("graph",), "placement": ("output", "input", "branch"),
    }),
    Exclusion("a net that a constant lets serve alone, and that still averages every batch, means nothing", {
        **_UNGUARDED, "mode": ("false",), "averaged": ("batch",), "chooser": _CONDITIONALS,
        "api": ("graph", "function"),
    }),
    Exclusion("a net that a constant lets serve alone, and that still averages every batch, means nothing", {
        **_UNGUARDED, "mode": ("false",), "averaged": ("batch",), "chooser": _CONDITIONALS,
        "api": ("function",), "placement": ("collection",),
    }),
    Exclusion("in inference, references would be read while the batch's statistics are written to them", {
        **_UNGUARDED, "storage": ("reference",), "averaged": ("batch",), "chooser": _CONDITIONALS,
        "mode": ("placeholder", "default", "variable"),
    }),
    Exclusion("in inference, ExponentialMovingAverage's averages would be read while they are written", {
        **_UNGUARDED, "updates": ("ema",), "chooser": _CONDITIONALS,
        "mode": ("placeholder", "default", "variable"),
    }),
)  # fmt: skip
"""Combinations that cannot be built, that mean nothing, or whose result the source does not define."""


def pairwise() -> Iterator[Form]:
    """Forms that hold every possible pair of two choices."""
    return (Form(**case) for case in covering(OPTIONS, EXCLUSIONS))


def random_form(random: Random) -> Form:
    """A form at random; all that are possible are equally likely."""
    return Form(**drawn(OPTIONS, EXCLUSIONS, random))
