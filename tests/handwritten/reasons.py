"""Claims that do not hold for some forms, for reasons that lie in the forms."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tests.models.handwritten.form import Form


@dataclass(frozen=True)
class Reason:
    """A claim that need not hold for some forms.

    Attributes:
        claim: the claim, as `check` names it.
        where: values of a form's choices; the reason holds for a form that has one of them for each choice.
        why: the reason, as a sentence.
        said: a regular expression that the rewrite's report has to match.
        no_fuse_only: the reason holds only for ``--no-fuse``.
    """

    claim: str
    where: Mapping[str, Collection[Any]]
    why: str
    said: str
    no_fuse_only: bool = False

    def excuses(self, claim: str, form: Form, report: str, *, fused: bool) -> bool:
        """Return true if a claim need not hold for a form, and the report says so."""
        if self.no_fuse_only and fused:
            return False
        holds = all(getattr(form, name) in values for name, values in self.where.items())
        return claim == self.claim and holds and re.search(self.said, report) is not None


NO_BOOLEAN = "there is no signature 'train': what chooses between training and inference is not a single boolean"

REASONS = (
    Reason(
        "kernels",
        {"dtype": ("float64",)},
        "the fused kernel does not compute in float64",
        "it computes in float64, which the fused kernel does not have",
    ),
    Reason(
        "kernels",
        {"mode": ("false",), "arithmetic": ("kernels",)},
        "a choice on a constant may compute the kernels of both modes; without fusing it stays",
        "train is derived from serving",
        no_fuse_only=True,
    ),
    Reason(
        "kernels",
        {"api": ("function",), "chosen": ("output",)},
        "a function whose averages are updated before its output is chosen computes the batch's statistics first",
        "its averages are updated before",
    ),
    Reason(
        "kernels",
        {"control_flow": (2,), "averaged": ("chosen",), "placement": ("input",)},
        "gamma or beta is read after what takes the statistics that an If chooses, so that no kernel fits into the If",
        "what it normalises, or its gamma or beta, waits for",
    ),
    Reason(
        "train",
        {"mode": ("variable",), "api": ("graph",)},
        "a mode that is a variable is no input of a graph, so a signature cannot set it",
        NO_BOOLEAN,
    ),
    Reason(
        "train",
        {"mode": ("false",), "chooser": ("cond", "where", "case"), "api": ("graph",)},
        "a conditional on a constant that chooses inference, and is not fused, cannot choose training",
        NO_BOOLEAN,
    ),
    Reason(
        "train",
        {"mode": ("false",), "chooser": ("cond", "where", "case"), "api": ("function",)},
        "a conditional on a constant that chooses inference, and is not fused, cannot choose training",
        "no training function can be derived: .* a constant chooses inference; without --no-fuse",
    ),
    Reason(
        "train",
        {"mode": ("false",), "branches": ("inside",), "api": ("graph",), "control_flow": (2,)},
        "without fusing, batch norms stay in functions of conditionals, which a V1 graph cannot differentiate",
        "computed in functions that the main graph calls",
        no_fuse_only=True,
    ),
    Reason(
        "train",
        {"mode": ("true",), "chooser": ("cond", "where", "smart_cond", "case"), "api": ("function",)},
        "a module whose only function trains has none that serves",
        "no signature and no function of the root object computes a batch norm in inference",
    ),
    Reason(
        "averages of train",
        {"mode": ("false",), "updates": ("debiased",)},
        "a net that only serves does not say that its averages are zero-debiased",
        "train is derived from serving",
    ),
    Reason(
        "averages of train",
        {"shared": (True,), "api": ("graph",)},
        "nothing orders the updates of averages that two layers share, within one run of a graph",
        "",
    ),
)
"""The reasons for which a form does not keep all claims."""
