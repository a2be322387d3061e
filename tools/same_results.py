"""Prove that a refactoring changed nothing: rewrite models with two versions of bnqat, and compare the results.

    python -m tools.same_results BASE [--only NAME ...] [--json FILE]

BASE is a commit; its results are compared with those of the current checkout, uncommitted changes included. The models
are those of `tests.models.all` and, where BNQAT_CORPUS points to them, public ones. Each is rewritten by default, with
``--bits 4``, with ``--no-fuse``, and with learned and moving ranges; the default's result is finalised, without and
with ``--fold``. Compared are the bytes of all files but those in ``assets.extra``, of which only the names count, and
what the commands print, without times and paths. The table says

- same: nothing differs. Where a command refuses a model, its message is the same;
- marks differ: only attributes of nodes whose names begin with ``_bnqat`` differ. A refactoring may rename these;
- error differs: both versions refuse the model, with different messages;
- differs: anything else. The first differing place is listed below the table;
- -: there was nothing to finalise.

Exit code 1 if anything differs but marks, 2 if the comparison cannot be made. The two versions run in processes with
different hash seeds, as results must not depend on them; set PYTHONHASHSEED to find out whether a difference comes from
there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from tools import same_results_worker as worker_program
from tools.same_results_worker import CONFIGURATIONS, GRAPH, GRAPHS, TEXT_GRAPH, Outcome

ROOT = Path(__file__).resolve().parent.parent
CORPUS = os.environ.get("BNQAT_CORPUS", "")
FILL = "fill_weights.py"
"""Program in the corpus that copies it, and gives random weights to models without any."""

SAME, MARKS_DIFFER, ERROR_DIFFERS, DIFFERS, NOT_APPLICABLE = "same", "marks differ", "error differs", "differs", "-"
MARK = "_bnqat"
EXIT_FAILED = 2
LONGEST = 200
"""Characters of a value that are shown."""


@dataclass(frozen=True)
class Verdict:
    """The comparison of two outcomes, and the first place where they differ."""

    status: str
    detail: str = ""


@dataclass
class Row:
    """Verdicts of one model, by configuration.

    Attributes:
        refused: by configuration, the message with which both versions refuse the model.
        crashes: by configuration, the exception that ended both versions.
        seconds: duration of both versions together.
    """

    model: str
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    crashes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """True if anything differs but marks."""
        return any(v.status in (DIFFERS, ERROR_DIFFERS) for v in self.verdicts.values())


def compare(base: Outcome, here: Outcome, base_graph: Path, here_graph: Path) -> Verdict:
    """Compare two outcomes. The graphs' files are read only if their hashes differ."""
    if base.refused != here.refused:
        refusing = base if base.refused else here
        side = "BASE" if base.refused else "this checkout"
        return Verdict(DIFFERS, f"only {side} refuses: {refusing.crash or refusing.text.strip()}")
    text = first_difference_of_lines(base.text, here.text)
    if base.refused:
        detail = text or (f"{base.crash} became {here.crash}" if base.crash != here.crash else "")
        return Verdict(ERROR_DIFFERS, detail) if detail else Verdict(SAME)
    names = {*base.files, *base.extra} ^ {*here.files, *here.extra}
    if names:
        return Verdict(DIFFERS, f"only one of them has {', '.join(sorted(names))}")
    graphs = Verdict(SAME)
    graph_files = [name for name in (GRAPH, TEXT_GRAPH) if name in base.files]
    if any(base.files[name] != here.files[name] for name in graph_files):
        graphs = compare_graphs(base_graph.read_bytes(), here_graph.read_bytes())
        if graphs.status == DIFFERS:
            return graphs
    for name in sorted(base.files):
        if name not in graph_files and base.files[name] != here.files[name]:
            return Verdict(DIFFERS, f"bytes of {name}")
    return Verdict(DIFFERS, text) if text else graphs


def first_difference_of_lines(base: str, here: str) -> str:
    """The first pair of lines that differ; empty if none do."""
    for old, new in zip_longest(base.splitlines(), here.splitlines(), fillvalue="nothing"):
        if old != new:
            return f"printed: {old} became {new}"
    return ""


def compare_graphs(base: bytes, here: bytes) -> Verdict:
    """Compare two graphs, as files ``saved_model.pb``, of results whose files differ."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    models = old, new = SavedModel.FromString(base), SavedModel.FromString(here)
    if serialised(old) == serialised(new):
        return Verdict(DIFFERS, f"{GRAPH}: the same message in other bytes")
    for model in models:
        drop_marks(model)
    if serialised(old) == serialised(new):
        return Verdict(MARKS_DIFFER)
    return Verdict(DIFFERS, first_difference(old, new))


def serialised(message: Any) -> bytes:
    """Bytes of a message with sorted maps. Unlike messages, they equal themselves even if there is a NaN."""
    content: bytes = message.SerializeToString(deterministic=True)
    return content


def drop_marks(model: Any) -> None:
    """Remove bnqat's own attributes from all nodes of a SavedModel message."""
    for meta in model.meta_graphs:
        for nodes in graphs_of(meta).values():
            for node in nodes:
                for name in [a for a in node.attr if a.startswith(MARK)]:
                    del node.attr[name]


def graphs_of(meta: Any) -> dict[str, Any]:
    """The nodes of a meta graph's main graph and of its functions."""
    functions = {f"function {f.signature.name}": f.node_def for f in meta.graph_def.library.function}
    return {"main graph": meta.graph_def.node, **functions}


def first_difference(base: Any, here: Any) -> str:
    """The first place where two SavedModel messages differ: meta graph, function, node and attribute."""
    for number, (old, new) in enumerate(zip(base.meta_graphs, here.meta_graphs, strict=False)):
        if serialised(old) != serialised(new):
            return f"meta graph {number}, {_of_meta_graphs(old, new)}"
    return "number of meta graphs, or the schema's version"


def _of_meta_graphs(base: Any, here: Any) -> str:
    olds, news = graphs_of(base), graphs_of(here)
    if olds.keys() != news.keys():
        return _lonely(olds, news)
    for place, nodes in olds.items():
        difference = _of_nodes(nodes, news[place])
        if difference:
            return f"{place}, {difference}"
    for old, new in zip(base.graph_def.library.function, here.graph_def.library.function, strict=True):
        if old.signature.name != new.signature.name:
            return "order of functions"
        if serialised(old) != serialised(new):
            return f"function {old.signature.name}, {_of_fields(old, new)}"
    return _of_fields(base, here)


def _of_nodes(base: Any, here: Any) -> str:
    """The first difference of two graphs' nodes; empty if there is none."""
    olds, news = {n.name: n for n in base}, {n.name: n for n in here}
    if olds.keys() != news.keys():
        return f"nodes: {_lonely(olds, news)}"
    for name, old in olds.items():
        new = news[name]
        if serialised(old) == serialised(new):
            continue
        for attribute in sorted({*old.attr, *new.attr}):
            values = [_shown(n.attr[attribute]) if attribute in n.attr else "absent" for n in (old, new)]
            if values[0] != values[1]:
                return f"node {name}, attribute {attribute}: {_short(*values)}"
        return f"node {name}, {_of_fields(old, new)}"
    return "order of nodes" if list(olds) != list(news) else ""


def _of_fields(base: Any, here: Any) -> str:
    """The first field in which two messages differ, with its values."""
    for name in base.DESCRIPTOR.fields_by_name:
        old, new = _only(base, name), _only(here, name)
        if serialised(old) != serialised(new):
            inner = getattr(old, name)
            if hasattr(inner, "DESCRIPTOR"):  # a single message
                return f"{name}.{_of_fields(inner, getattr(new, name))}"
            return f"{name}: {_short(_shown(old), _shown(new))}"
    return "unknown fields"


def _only(message: Any, name: str) -> Any:
    """A copy of a message with one field."""
    copied = type(message)()
    copied.CopyFrom(message)
    for other in message.DESCRIPTOR.fields_by_name:
        if other != name:
            copied.ClearField(other)
    return copied


def _lonely(base: Mapping[str, object], here: Mapping[str, object]) -> str:
    """Names that only one side has."""
    sides = (("BASE", [n for n in base if n not in here]), ("this checkout", [n for n in here if n not in base]))
    return "; ".join(f"only {side} has {', '.join(names[:3])}" for side, names in sides if names)


def _shown(message: Any) -> str:
    from google.protobuf import text_format

    text: str = text_format.MessageToString(message, as_one_line=True)
    return text or "nothing"


def _short(base: str, here: str) -> str:
    """Two values from shortly before the place where they begin to differ."""
    pairs = enumerate(zip(base, here, strict=False))
    first = next((i for i, (old, new) in pairs if old != new), min(len(base), len(here)))
    start = max(first - LONGEST // 4, 0)
    before = "..." if start else ""
    old, new = (before + t[start : start + LONGEST] + "..." * (len(t) > start + LONGEST) for t in (base, here))
    return f"{old} became {new}"


def stop(message: str) -> NoReturn:
    """End the comparison."""
    print(message, file=sys.stderr)
    sys.exit(EXIT_FAILED)


def run(command: Sequence[str]) -> None:
    """Run a program that imports from the current checkout; end the comparison if it fails."""
    # What it prints goes to stderr: stdout is for the table.
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment(ROOT), stdout=sys.stderr)
    if done.returncode:
        stop(f"exit code {done.returncode} of {' '.join(command)}")


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """A checkout of a commit, removed at the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    run([*git, "add", "--quiet", "--detach", str(folder), commit])
    try:
        yield folder
    finally:
        run([*git, "remove", "--force", str(folder)])


class Worker:
    """A process that rewrites models with the bnqat of one checkout."""

    def __init__(self, tree: Path, folder: Path) -> None:
        folder.mkdir()
        self.tree, self.folder = tree, folder
        self.process = subprocess.Popen(
            # -P: the program's own folder must not hide modules of the checkout
            [sys.executable, "-P", "-W", "ignore", worker_program.__file__, str(tree), str(folder)],
            cwd=tree,
            env=environment(tree),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def request(self, name: str, source: Path) -> None:
        """Begin with a model."""
        assert self.process.stdin is not None  # noqa: S101  for the type checker
        try:
            print(json.dumps([name, str(source)]), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self._fail(name)

    def outcomes(self, name: str) -> dict[str, Outcome]:
        """Wait for the outcomes, by configuration, of the model that was requested."""
        assert self.process.stdout is not None  # noqa: S101  for the type checker
        line = self.process.stdout.readline()
        if not line:
            self._fail(name)
        return {configuration: Outcome(**fields) for configuration, fields in json.loads(line).items()}

    def graph(self, name: str, configuration: str) -> Path:
        """The file with the result's graph."""
        return self.folder / GRAPHS / name / f"{configuration}.pb"

    def forget(self, name: str) -> None:
        """Delete the graphs of a model."""
        for file in (self.folder / GRAPHS / name).iterdir():
            file.unlink()

    def _fail(self, name: str) -> NoReturn:
        stop(f"the process of {self.tree} ended at {name} with exit code {self.process.wait()}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def environment(tree: Path) -> dict[str, str]:
    """The environment of a process that imports from a checkout."""
    quiet = {"TF_ENABLE_ONEDNN_OPTS": "0", "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    # With BNQAT_TRACEBACK a crash is an exception, in place of a message with the number of a source line.
    return {**quiet, **os.environ, "PYTHONPATH": str(tree), "BNQAT_TRACEBACK": "1"}


def sources(folder: Path, only: Sequence[str]) -> dict[str, Path]:
    """Make the source models, all or some, by name; both versions read the same files."""
    folder.mkdir()
    public = sorted(p.parent for p in Path(CORPUS).glob("*/saved_model.pb")) if CORPUS else []
    public_names = [p.name for p in public if not only or p.name in only]
    names = [n for n in dict.fromkeys(only) if n not in public_names]
    if names or not only:
        # In a process of its own: functions that TensorFlow traces are numbered, and must not count in the workers.
        run([sys.executable, "-m", "tests.models", str(folder), *names])
    written = {path.name: path for path in sorted(folder.iterdir())}
    fill = Path(CORPUS) / FILL
    if not public_names or not fill.exists():
        return {**written, **{p.name: p for p in public if p.name in public_names}}
    filled = folder.with_name("public")
    run([sys.executable, str(fill), str(filled)])
    return {**written, **{name: filled / name for name in public_names}}


def rows(models: Mapping[str, Path], base: Worker, here: Worker) -> Iterator[Row]:
    """Compare both versions' results, model by model."""
    for name, source in models.items():
        begun = time.monotonic()
        for worker in (base, here):
            worker.request(name, source)
        olds, news = base.outcomes(name), here.outcomes(name)
        row = Row(name)
        for configuration in CONFIGURATIONS:
            if configuration not in olds or configuration not in news:
                row.verdicts[configuration] = Verdict(NOT_APPLICABLE)
                continue
            old, new = olds[configuration], news[configuration]
            verdict = compare(old, new, *(w.graph(name, configuration) for w in (base, here)))
            row.verdicts[configuration] = verdict
            if old.refused and new.refused:
                row.refused[configuration] = new.text.strip()
                if new.crash:
                    row.crashes[configuration] = new.crash
        for worker in (base, here):
            worker.forget(name)
        row.seconds = round(time.monotonic() - begun, 1)
        yield row


def show(compared: Sequence[Row]) -> None:
    """Print the table and, below it, what differs and how often."""
    table = Table()
    for column in ("model", *CONFIGURATIONS):
        table.add_column(column, overflow="fold")
    for row in compared:
        table.add_row(row.model, *(row.verdicts[c].status for c in CONFIGURATIONS))
    Console(width=None if sys.stdout.isatty() else 140, markup=False).print(table)
    for row in compared:
        for configuration, verdict in row.verdicts.items():
            if verdict.detail:
                print(f"{row.model}, {configuration}: {verdict.status}: {verdict.detail}")
        for configuration, crash in row.crashes.items():
            print(f"{row.model}, {configuration}: both crash: {crash}")
    counts = Counter(v.status for row in compared for v in row.verdicts.values() if v.status != NOT_APPLICABLE)
    print(", ".join(f"{counts[status]} {status}" for status in (SAME, MARKS_DIFFER, ERROR_DIFFERS, DIFFERS)))
    print(f"{sum(len(row.refused) for row in compared)} refused by both versions")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="the commit to compare with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these models")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: stop("terminated"))  # so that the worktree is removed
    compared = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same_results_"))).resolve()
        tree = stack.enter_context(worktree(arguments.base, scratch / "tree"))
        models = sources(scratch / "models", arguments.only)
        base = stack.enter_context(Worker(tree, scratch / "base"))
        here = stack.enter_context(Worker(ROOT, scratch / "here"))
        for row in rows(models, base, here):
            statuses = Counter(v.status for v in row.verdicts.values())
            said = ", ".join(f"{count} {status}" for status, count in statuses.items())
            print(f"{row.model}: {said} ({row.seconds} s)", file=sys.stderr, flush=True)
            compared.append(row)
    show(compared)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in compared], indent=1) + "\n", encoding="utf-8")
    return 1 if any(r.failed for r in compared) else 0


if __name__ == "__main__":
    sys.exit(main())
