"""Random hand-written batch norms, rewritten and compared with the source's own run.

    python -m tools.handwritten [--forms 1000] [--seed N]
    python -m tools.handwritten --only "Form(chooser='where')"

Prints every failure with its form, and counts of forms by outcome; ends with exit code 1 if a form failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from random import Random

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # the same kernels on every machine

from tests.handwritten.check import check
from tests.models.handwritten.form import Form, random_form

REPORT = 60.0
"""Seconds between two lines that say how far it is."""


def main() -> None:
    """Check forms, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", type=int, default=1000, help="the number of random forms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the one form to check, as a failure prints it")
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
            print("\n    ".join([repr(form), *outcome.failures]), flush=True)
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
