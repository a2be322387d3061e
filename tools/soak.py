"""Faults, damaged models and hand-written batch norms for an hour: tests with other random numbers.

    python -m tools.soak [--minutes 60] [--seed N] [--workers 2]
    python -m tools.soak --only NUMBER

Every trial has a number, from which all that is random in it follows; `--only` repeats one. Where BNQAT_CORPUS points
to public models, these are damaged, too. Prints counts by kind and outcome, and ends with exit code 1 if a promise was
broken.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # the same kernels on every machine, told by name

import bnqat
from tests.models.all import ALL
from tests.models.handwritten.form import random_form
from tests.mutate import mutated
from tests.reliability.damage import damage_configuration, damage_graph, damaged
from tests.reliability.faults import Writing, writings
from tests.reliability.forks import Call, Server, server
from tests.reliability.trials import LIMIT, MIB, BrokenPromiseError, fresh, judged, loads, trial

DAMAGED = (
    "keras_export",
    "keras_save",
    "module_train",
    "module_silu",
    "if",
    "nested",
    "v1_two_fused",
    "v1_by_hand",
    "v1_loop",
    "as_text",
)
FAULTED = "keras_export"
PUBLIC = os.environ.get("BNQAT_CORPUS", "")
PUBLIC_LIMIT = 60.0
"""Seconds that a command may take for a public model, some of which have hundreds of functions."""

REWRITTEN = ("rewritten", "saved_again", "silu_rewritten")

FORM_LIMIT = 120.0
"""Seconds that the runs of a hand-written batch norm may take; without other load it is about two."""

REPORT = 60.0
"""Seconds between two lines that say how far a worker is."""


class Soak:
    """Trials in one server, one after the other.

    Attributes:
        damage: description of the last trial's damage, or the form that it wrote.
    """

    def __init__(self, forks: Server, models: Path, folder: Path) -> None:
        self.forks = forks
        self.models = models
        self.folder = folder
        self.damage = ""
        self.writings = dict(writings(forks, models / FAULTED, models / "rewritten", folder / "writings"))
        self.events = {name: writing.events() for name, writing in self.writings.items()}
        configuration = forks.cli("rewrite", "--bits", "gamma=4,beta=8", "--print-config").out
        self.configuration = configuration.encode()

    def run(self, number: int) -> Iterator[str]:
        """Run a trial, and yield its outcomes with its kind.

        Raises:
            BrokenPromiseError: a promise was broken.
        """
        self.damage = ""
        random = Random(number)  # noqa: S311  no secret
        kind: Callable[[Random], Iterator[str]] = random.choices(
            [
                self.killed,
                self.killed_at,
                self.interrupted,
                self.damaged,
                self.damaged_rewritten,
                self.damaged_settings,
                self.damaged_public,
                self.handwritten,
            ],
            [3, 2, 2, 6, 2, 1, 3 if PUBLIC else 0, 2],
        )[0]
        for outcome in kind(random):
            yield f"{kind.__name__.replace('_', ' ')}: {outcome}"

    def _writing(self, random: Random) -> tuple[str, Writing]:
        return random.choice(sorted(self.writings.items(), key=lambda item: item[0]))

    def killed(self, random: Random) -> Iterator[str]:
        """Kill a command at a random moment."""
        name, writing = self._writing(random)
        yield f"{name}, {writing.killed(random.uniform(0, 1.1))}"

    def killed_at(self, random: Random) -> Iterator[str]:
        """Kill a command at a random event about files."""
        name, writing = self._writing(random)
        yield f"{name}, {writing.killed_at(random.randrange(self.events[name]))}"

    def interrupted(self, random: Random) -> Iterator[str]:
        """Interrupt a command at a random moment."""
        name, writing = self._writing(random)
        yield f"{name}, {writing.interrupted(random.uniform(0, 1.1))}"

    def damaged(self, random: Random) -> Iterator[str]:
        """Try a damaged float model."""
        source = fresh(self.folder / "damaged") / "source"
        self.damage = damaged(self.models / random.choice(DAMAGED), source, random)
        yield from trial(self.forks, source, fresh(self.folder / "out"))

    def damaged_public(self, random: Random) -> Iterator[str]:
        """Try a public model with damaged graphs or objects."""
        model = random.choice(sorted((self.models / "public").glob("*/saved_model.pb"))).parent

        def edit(meta: Any) -> None:
            self.damage = f"{model.name}: {damage_graph(meta, random)}"

        source = mutated(model, fresh(self.folder / "damaged") / "source", edit)
        yield from trial(self.forks, source, fresh(self.folder / "out"), PUBLIC_LIMIT)

    def damaged_rewritten(self, random: Random) -> Iterator[str]:
        """Try a damaged rewritten model, perhaps saved again by TensorFlow."""
        source = fresh(self.folder / "damaged") / "source"
        self.damage = damaged(self.models / random.choice(REWRITTEN), source, random)
        final = fresh(self.folder / "out") / "final"
        for command, *arguments in (
            ("inspect", source),
            ("diff", self.models / FAULTED, source),
            ("finalize", source, final),
        ):
            outcome = judged(self.forks.cli(str(command), *arguments, limit=LIMIT, mib=MIB), str(command))
            yield f"{command} {outcome}"
        if outcome == "done":
            yield loads(self.forks, source, final, "finalize")

    def damaged_settings(self, random: Random) -> Iterator[str]:
        """Try a damaged configuration."""
        file = fresh(self.folder / "settings") / "bnqat.toml"
        file.write_bytes(damage_configuration(self.configuration, random))
        outcome = self.forks.cli("rewrite", "--config", file, "--print-config", limit=LIMIT, mib=MIB)
        yield judged(outcome, "settings")

    def handwritten(self, random: Random) -> Iterator[str]:
        """Compare a hand-written batch norm of a random form with the source's own run."""
        self.damage = repr(random_form(random))
        outcome = self.forks.run(Call("tests.handwritten.check:print_failures", [self.damage]), limit=FORM_LIMIT)
        if outcome.code or outcome.out:
            raise BrokenPromiseError(f"{outcome.out}{outcome.err[-2000:] if outcome.code else ''}{outcome.stopped}")
        yield "as the source"


class Tally:
    """Counts of all workers, and broken promises."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.broken: list[tuple[int, str]] = []
        self._lock = threading.Lock()

    def add(self, soak: Soak, number: int) -> None:
        """Make a trial and count what came of it."""
        outcomes: list[str] = []
        try:
            outcomes += soak.run(number)
        except BrokenPromiseError as e:
            with self._lock:
                self.broken.append((number, str(e)))
                print(f"\ntrial {number}: {soak.damage}\n{e}\n", flush=True)
        with self._lock:
            self.counts["trials"] += 1
            self.counts.update(outcomes)


def _models(folder: Path) -> Path:
    for name in sorted({*DAMAGED, FAULTED}):  # functions are numbered as they are traced
        ALL[name](folder / name)
    bnqat.rewrite(folder / FAULTED, folder / "rewritten")
    bnqat.rewrite(folder / "module_silu", folder / "silu_rewritten")
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder / "rewritten"))
    tf.saved_model.save(loaded, str(folder / "saved_again"), signatures=loaded.signatures)
    if PUBLIC:
        fill = [sys.executable, str(Path(PUBLIC) / "fill_weights.py"), str(folder / "public")]
        subprocess.run(fill, check=True, capture_output=True)
    return folder


def main() -> None:
    """Run trials in all workers, and print their outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="the number of the first trial")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="the number of the one trial to make")
    options = parser.parse_args()
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        models = _models(Path(folder) / "models")
        end = time.monotonic() + 60 * options.minutes
        numbers = iter([options.only]) if options.only is not None else count(options.seed)

        def work(worker: int) -> None:
            with server() as forks:
                soak = Soak(forks, models, Path(folder) / f"worker{worker}")
                said = time.monotonic()
                while time.monotonic() < end:
                    number = next(numbers, None)
                    if number is None:
                        return
                    tally.add(soak, number)
                    if time.monotonic() - said > REPORT:
                        said = time.monotonic()
                        print(f"{tally.counts['trials']} trials, {len(tally.broken)} broken promises", flush=True)

        with ThreadPoolExecutor(options.workers) as threads:
            list(threads.map(work, range(1 if options.only is not None else options.workers)))
    print("\n| what | count |\n|---|---|")
    for name, number in sorted(tally.counts.items()):
        print(f"| {name} | {number} |")
    print(f"| broken promises | {len(tally.broken)} |")
    sys.exit(bool(tally.broken))


if __name__ == "__main__":
    main()
