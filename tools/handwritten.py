"""Random hand-written batch norms, rewritten and compared with the source's own run.

    python -m tools.handwritten [--forms 1000] [--seed N] [--shrink]
    python -m tools.handwritten --only "Form(chooser='where')"

Prints every failure with its form (with `--shrink`, after the simplest form that fails likewise), and counts of forms
by outcome; ends with exit code 1 if a form failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from random import Random

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # the same kernels on every machine

from tests.covering import excluded
from tests.handwritten.check import Outcome, check
from tests.models.handwritten.form import EXCLUSIONS, OPTIONS, Form, random_form

REPORT = 60.0
"""Seconds between two lines that say how far it is."""


def claims(outcome: Outcome) -> set[tuple[str, str]]:
    """Return the failing claims as (rewrite, claim), without details."""
    split = (failure.split(": ", 2) for failure in outcome.failures)
    return {(run, claim) for run, claim, _ in split}


def simplest(outcome: Outcome) -> Form:
    """Return the simplest form that still breaks one of the same claims."""
    broken = claims(outcome)
    form, usual = outcome.form, Form()
    for name in OPTIONS:
        simpler = replace(form, **{name: getattr(usual, name)})
        if simpler != form and not excluded(asdict(simpler), EXCLUSIONS) and claims(check(simpler)) & broken:
            form = simpler
    return form


def main() -> None:
    """Check forms and print the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", type=int, default=1000, help="the number of random forms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the one form to check, as a failure prints it")
    parser.add_argument("--shrink", action="store_true", help="look for the simplest form that fails likewise")
    options = parser.parse_args()
    random = Random(options.seed)  # noqa: S311  no secret
    forms = [random_form(random) for _ in range(options.forms)]
    if options.only is not None:
        forms = [Form.parsed(options.only)]
    counts: Counter[str] = Counter()
    said = time.monotonic()
    for number, form in enumerate(forms, 1):
        outcome = check(form)
        if outcome.failures:
            lines = [f"simplest: {simplest(outcome)!r}"] if options.shrink else []
            print("\n    ".join([*lines, repr(form), *outcome.failures]), flush=True)
        for reason in outcome.reasons:
            counts[f"reason: {reason}"] += 1
        counts["failed" if outcome.failures else "passed, with a reason" if outcome.reasons else "passed"] += 1
        if time.monotonic() - said > REPORT:
            said = time.monotonic()
            print(f"{number} of {len(forms)} forms, {counts['failed']} failed", flush=True)
    print("\n| outcome | forms |\n|---|---|")
    for name, count in sorted(counts.items()):
        print(f"| {name} | {count} |")
    sys.exit(bool(counts["failed"]))


if __name__ == "__main__":
    main()
