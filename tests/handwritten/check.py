"""One form, rewritten with and without fusing, beside the source's own run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import bnqat
from tests.handwritten.behaviour import Arrays, Behaviour, differs
from tests.handwritten.expected import expected
from tests.handwritten.graphs import loaded_graph, source_graph
from tests.handwritten.modules import loaded_module, source_module
from tests.handwritten.reasons import REASONS
from tests.models.handwritten.form import Form
from tests.models.handwritten.norm import MOMENTUM

OFF = 2**40
"""A step at which quantisers have not begun to act."""

FUSED = {"float32": 1e-5, "half": 4e-2, "bfloat16": 1e-1, "float64": 1e-14}
"""Largest differences where the kernel computes what single ops did, by dtype: it rounds once, they round often."""

ROUNDED = {"float32": 5e-6, "half": 4e-3, "bfloat16": 5e-2, "float64": 1e-6}
"""Largest differences where the same is computed by other ops; a momentum that is given is a float32."""

MEANT = {"float32": 2e-5, "half": 2e-2, "bfloat16": 1e-1, "float64": 1e-6}
"""Largest differences of a source from its form's meaning."""

LAST_BIT = 2.3e-16
"""Tolerance for float64: one of some 1,000 forms served 8.6e-17 apart without fusing; nobody looked into the cause."""

Finding = tuple[str, str]
"""A claim that does not hold, and a sentence about it."""


@dataclass
class Outcome:
    """The result of a check.

    Attributes:
        failures: claims that do not hold, without a reason that the report states, each with its rewrite.
        reasons: the reasons for others that do not hold, each with its rewrite.
    """

    form: Form
    failures: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


class WrongSourceError(AssertionError):
    """A source does not compute what its form says."""


def check(form: Form, runs: Sequence[str] = ("fused", "kept")) -> Outcome:
    """Write a form, rewrite it, and compare.

    Args:
        form: to check.
        runs: "fused" for the default passes, "kept" for ``--no-fuse``.

    Raises:
        WrongSourceError: the source does not do what the form says.
    """
    outcome = Outcome(form)
    with tempfile.TemporaryDirectory() as folder:
        source = _source(form, Path(folder) / "source")
        training = _source(replace(form, mode="true"), Path(folder) / "twin") if form.mode == "false" else source
        _assert_meant(form, source, training)
        for run in runs:
            fuse = run == "fused"
            report = ""
            try:
                report = _rewritten(Path(folder), run)
                findings = list(Comparison(form, fuse, source, training, report).findings(Path(folder) / run))
            except bnqat.Error as e:
                report = str(e)
                findings = [("train", f"refused: {e}")]
            except Exception as e:  # noqa: BLE001  whatever TensorFlow raises, the form is to be known
                findings = [("runs", f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")]
            for claim, sentence in findings:
                reason = next((r for r in REASONS if r.excuses(claim, form, report, fused=fuse)), None)
                if reason is None:
                    outcome.failures.append(f"{run}: {claim}: {sentence}")
                elif f"{run}: {reason.why}" not in outcome.reasons:
                    outcome.reasons.append(f"{run}: {reason.why}")
    return outcome


def print_failures(form: str) -> None:
    """Check the form that an expression makes, and print the failures; for a process of its own."""
    for failure in check(Form.parsed(form)).failures:
        print(failure)  # noqa: T201  this is what it is for


def _source(form: Form, path: Path) -> Behaviour:
    return source_graph(form, path) if form.api == "graph" else source_module(form, path)


def _rewritten(folder: Path, run: str) -> str:
    """Rewrite the source; return the sentences of the report."""
    fuse = run == "fused"
    report = bnqat.rewrite(folder / "source", folder / run, start_step=OFF, fuse=fuse, momentum=MOMENTUM)
    skipped, declined = ([site.reason for site in sites] for sites in (report.skipped, report.declined))
    return "\n".join([*report.notes, *skipped, *declined])


def _assert_meant(form: Form, source: Behaviour, training: Behaviour) -> None:
    meaning, tolerance = expected(form), MEANT[form.dtype]
    pairs = list(zip(training.outputs, meaning.outputs, strict=True))
    pairs += list(zip(training.averages.values(), meaning.averages.values(), strict=True))
    if source.served is not None and meaning.served is not None:
        pairs.append((source.served, meaning.served))
    for actual, meant in pairs:
        for sentence in differs("the source", {"": actual}, {"": meant}, tolerance):
            raise WrongSourceError(f"{form!r}: {sentence}")


@dataclass
class Comparison:
    """A rewritten form beside its source.

    Attributes:
        fused: true if kernels took the place of single ops.
        source: the source's own behaviour.
        training: that of the source in training; if it only serves, of its twin that trains.
        report: the sentences of the rewrite's report.
    """

    form: Form
    fused: bool
    source: Behaviour
    training: Behaviour
    report: str

    def findings(self, path: Path) -> Iterator[Finding]:
        """Compare the rewritten model with its source; yield the claims that do not hold."""
        form = self.form
        if form.api == "graph":
            rewritten, trained = loaded_graph(form, path, self.source)
        else:
            decides = form.dynamic and "which chooses its mode itself" in self.report
            rewritten, trained = loaded_module(form, path, decides)
        raced = form.storage == "reference" and form.unguarded  # a reference is read while its average is written to it
        last_bit = LAST_BIT if form.dtype == "float64" else 0.0
        exact = FUSED[form.dtype] if self.fused else ROUNDED[form.dtype] if raced else last_bit
        if self.source.served is not None and rewritten.served is not None:
            yield from self._differ("serving", {"y": rewritten.served}, {"y": self.source.served}, exact)
            yield from self._differ(
                "averages after serving", rewritten.served_averages, self.source.served_averages, exact
            )
        if form.mode != "false":
            # Functions and If are differentiated in the source alone, which changes what Grappler makes of them.
            rounded = ROUNDED[form.dtype] if form.control_flow == 2 else 0.0
            yield from self._training("its own training", rewritten, max(exact, rounded))
        yield from self._kernels("its own ops", rewritten, self.source)
        if trained is None:
            yield "train", "there is none"
            return
        # Graphs differentiate a copy, and TensorFlow folds a conditional on a constant, or not.
        rounded = ROUNDED[form.dtype] if form.api == "graph" or not form.dynamic else 0.0
        # TensorFlow makes the gradient of a conditional anew in each function, and adds up in another order.
        slopes = ROUNDED[form.dtype] if form.control_flow == 2 else 0.0
        yield from self._training("train", trained, max(exact, rounded), max(exact, rounded, slopes))
        yield from self._kernels("train", trained, self.training)

    def _differ(self, claim: str, actual: Arrays, reference: Arrays, tolerance: float) -> Iterator[Finding]:
        return ((claim, sentence) for sentence in differs("it", actual, reference, tolerance))

    def _training(self, name: str, run: Behaviour, tolerance: float, slopes: float = 0.0) -> Iterator[Finding]:
        """Compare outputs, gradients and averages of training steps; the averages have to move in any case."""
        for step, (y, source_y) in enumerate(zip(run.outputs, self.training.outputs, strict=True)):
            yield from self._differ(f"outputs of {name}", {f"step {step}": y}, {f"step {step}": source_y}, tolerance)
        for gradients, right in zip(run.gradients, self.training.gradients, strict=True):
            if gradients:
                yield from self._differ(f"gradients of {name}", gradients, right, max(tolerance, slopes))
        yield from self._differ(f"averages of {name}", run.averages, self.training.averages, tolerance)
        for average, value in run.averages.items():
            if np.array_equal(value, run.start[average]):
                yield f"moving averages of {name}", f"{average} does not move"

    def _kernels(self, name: str, run: Behaviour, source: Behaviour) -> Iterator[Finding]:
        """Expect one kernel of the mode for each batch norm; without fusing, expect the source's kernels."""
        for mode, ran in run.kernels.items():
            allowed = [[mode] * 2]
            if not self.fused:  # `train` leaves out the source's for inference
                allowed = [source.kernels.get(mode, ran), [k for k in source.kernels.get(mode, ran) if k is mode]]
            elif not mode and self.form.unguarded and self.form.averaged == "batch":
                allowed += [[False, False, True, True]]  # the averages take the batch's statistics in inference, too
            if ran not in allowed:
                when = "training" if mode else "inference"
                yield "kernels", f"{name} in {when} runs {_spelled(ran)}, not {_spelled(allowed[0])}"


def _spelled(kernels: list[bool]) -> str:
    return f"{kernels.count(True)} for training and {kernels.count(False)} for inference"
