"""One row for each SavedModel of a folder: what `bnqat rewrite` makes of it, seen by running both.

    python -m tools.survey FOLDER [--json FILE] [--unfreeze-constants]

The columns: batch-norm sites found, rewritten, and raised from single ops to the fused kernel; whether
``tf.saved_model.load`` loads the result; whether every signature gives the same bits as the source's while the
quantisers are off, or the same but for rounding where something was raised (both in V1 sessions, which load what
plain loading does not); whether `train` runs with quantisers on; whether every moving statistic of the batch norms
that it trains changes; whether a finite gradient reaches every gamma and beta. Exit code 1 if a column fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.console import Console
from rich.table import Table

import bnqat
from passes.batch_norm.sites import sites
from rewriter.app.verification.claims import FAILS, HOLDS, Claim, gradients_reach, same_off, statistics_move
from rewriter.app.verification.running import OFF
from rewriter.app.verification.serving import Pair, Serving, serve
from rewriter.app.verification.training import train
from rewriter.savedmodel.read import load

YES, NO, NOT_APPLICABLE = "yes", "no", "-"


@dataclass
class Row:
    """Observations of one model; of its sites, `single` are in single ops, and `fused` of these became the kernel.

    A column is "yes", "no" with a reason, or "-" where it does not apply.
    """

    model: str
    found: int = 0
    rewritten: int = 0
    added: int = 0
    single: int = 0
    fused: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    not_fused: dict[str, int] = field(default_factory=dict)
    loads: str = NOT_APPLICABLE
    same: str = NOT_APPLICABLE
    trains: str = NOT_APPLICABLE
    moves: str = NOT_APPLICABLE
    gradients: str = NOT_APPLICABLE
    notes: list[str] = field(default_factory=list)
    declined: str = ""

    @property
    def failed(self) -> bool:
        """True if a column that applies fails."""
        columns = (self.loads, self.same, self.trains, self.moves, self.gradients)
        return any(c not in (YES, NOT_APPLICABLE) for c in columns)


def survey(source: Path, target: Path, **options: Any) -> Row:
    """Rewrite one model to `target` and look at the result."""
    row = Row(source.name)
    try:
        report = bnqat.rewrite(source, target, start_step=OFF, **options)
    except bnqat.Error as e:
        row.declined = str(e)
        return row
    row.found, row.rewritten, row.added = report.sites_found, report.sites_rewritten, report.sites_added
    row.notes = report.notes
    for skipped in report.skipped:
        row.skipped[skipped.reason] = row.skipped.get(skipped.reason, 0) + 1
    row.fused = report.sites_fused
    for declined in report.declined:
        row.not_fused[declined.reason] = row.not_fused.get(declined.reason, 0) + 1
    pair = Pair(source, target, load(source), load(target))
    row.single = sum(site.kind == "decomposed" for site in pair.source.analysis(sites))
    serving, row.same = same(pair)
    trained = train(pair)
    row.loads = YES if trained.loads else f"{NO}: {trained.failure}"
    if trained.absent or not trained.loads:
        return row
    if trained.failure and row.same == NOT_APPLICABLE:
        row.notes.append("neither the source nor the result runs on random inputs")
        return row
    row.trains = f"{NO}: {trained.failure}" if trained.failure else YES
    row.moves = _column(statistics_move(serving, trained))
    row.gradients = _column(gradients_reach(trained))
    if trained.alike:
        row.notes.append(f"neither the source nor the result can be differentiated: {trained.differentiated}")
    return row


def same(pair: Pair) -> tuple[Serving, str]:
    """Run the signatures, and return the runs and the column that compares them.

    The column does not apply if the source does not run on random inputs.
    """
    try:
        serving = serve(pair)
    except bnqat.Error:
        return Serving([], [], {}, {}, 0, ""), NOT_APPLICABLE
    return serving, _column(same_off(pair, serving))


def _column(claim: Claim) -> str:
    return {HOLDS: YES, FAILS: f"{NO}: {claim.detail}"}.get(claim.status, NOT_APPLICABLE)


def models(folder: Path) -> list[Path]:
    """The SavedModels of a folder."""
    return sorted({p.parent for kind in ("pb", "pbtxt") for p in folder.glob(f"*/saved_model.{kind}")})


def show(rows: list[Row]) -> None:
    """Print the table and, below it, the problems."""
    table = Table()
    for column in ("model", "found", "rewritten", "fused", "loads", "same off", "trains", "stats move", "gradients"):
        table.add_column(column, overflow="fold")
    for row in rows:
        columns = (row.loads, row.same, row.trains, row.moves, row.gradients)
        table.add_row(
            row.model, str(row.found), str(row.rewritten), str(row.fused), *(c.partition(":")[0] for c in columns)
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for row in rows:
        for note in row.notes:
            print(f"{row.model}: note: {note}")
        if row.declined:
            print(f"{row.model}: declined: {row.declined}")
        for reason, count in row.skipped.items():
            print(f"{row.model}: {count} skipped: {reason}")
        for reason, count in row.not_fused.items():
            print(f"{row.model}: {count} not fused: {reason}")
        for name in ("loads", "same", "trains", "moves", "gradients"):
            if ":" in getattr(row, name):
                print(f"{row.model}: {name}: {getattr(row, name)}")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--unfreeze-constants", action="store_true", help="as of bnqat rewrite")
    parser.add_argument("--only", default="", metavar="TEXT", help="only models whose name holds this")
    arguments = parser.parse_args()
    folders = [m for m in models(arguments.folder) if arguments.only in m.name]
    if not folders:
        parser.error(f"{arguments.folder} holds no folder with a SavedModel")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in folders:
            target = Path(scratch) / model.name
            rows.append(survey(model, target, unfreeze_constants=arguments.unfreeze_constants))
            print(f"{model.name}: {'declined' if rows[-1].declined else 'done'}", file=sys.stderr)
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    return 1 if any(r.failed for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
