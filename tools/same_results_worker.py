"""Worker of `tools.same_results`: rewrites models with the bnqat of one checkout, and hashes the results.

    python -P tools/same_results_worker.py TREE FOLDER

It imports bnqat from TREE, which PYTHONPATH has to name, and nothing from the checkout that this file lies in.
Each line on stdin is a JSON list of a model's name and its folder; each line on stdout has that model's outcomes. Each
``saved_model.pb`` stays below FOLDER/graphs, and everything else is deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import click
from click.testing import CliRunner

DEFAULT = "default"
CONFIGURATION = "ranges.toml"
"""The name of the file with `RANGES`."""
RANGES = """
unfreeze_constants = true

[defaults.gamma]
range = "learned"

[defaults.beta]
range = "learned"

[defaults.moving_mean]
range = "ema"

[defaults.moving_variance]
range = "ema"
"""
"""Frozen models have a result with this configuration, and with no other."""
REWRITES: Mapping[str, Sequence[str]] = {
    DEFAULT: (),
    "4 bits": ("--bits", "4"),
    "no fuse": ("--no-fuse",),
    "ranges": ("--config", CONFIGURATION),
}
FINALISATIONS: Mapping[str, Sequence[str]] = {"final": (), "folded": ("--fold",)}
"""Options of `bnqat finalize`, whose source is the result of `DEFAULT`."""
CONFIGURATIONS = (*REWRITES, *FINALISATIONS)

PACKAGES = ("bnqat", "passes", "rewriter", "tests")
GRAPH = "saved_model.pb"
TEXT_GRAPH = "saved_model.pbtxt"
"""The file with the graph, of which a model has one or the other."""
GRAPHS = "graphs"
EXTRA = "assets.extra"
"""Folder with the report and the record, of which only the names count."""

PROGRESS = re.compile(r"^\S+: \d+ edits in .*\n?", re.MULTILINE)
"""Lines that tell of a pass."""


@dataclass(frozen=True)
class Outcome:
    """Printed text and written files of one command.

    Attributes:
        refused: true if the command failed.
        text: its printed text, without times and temporary paths.
        files: hashes of the files that it wrote, by path.
        extra: paths of the files in `EXTRA`.
        crash: the exception, if the command ended with one that bnqat did not foresee.
    """

    refused: bool
    text: str
    files: Mapping[str, str] = field(default_factory=dict)
    extra: Sequence[str] = ()
    crash: str = ""


@dataclass(frozen=True)
class Worker:
    """Runs the commands of one checkout.

    Attributes:
        commands: the subcommands of bnqat's command line.
        folder: an absolute path; the current directory.
        masked: paths that differ between two checkouts, and what stands for them in texts.
    """

    commands: Mapping[str, click.Command]
    folder: Path
    masked: Mapping[str, str]

    def outcomes(self, name: str, source: str) -> dict[str, Outcome]:
        """Rewrite a model with every configuration, and finalise the default's result.

        Targets are relative paths, so that messages and the widths of tables are the same for every checkout.
        """
        graphs = self.folder / GRAPHS / name
        graphs.mkdir(parents=True)
        by_configuration = {}
        for configuration, options in REWRITES.items():
            by_configuration[configuration] = self._run("rewrite", [source, configuration, *options], graphs)
        if not by_configuration[DEFAULT].refused:
            for configuration, options in FINALISATIONS.items():
                by_configuration[configuration] = self._run("finalize", [DEFAULT, configuration, *options], graphs)
        for configuration in by_configuration:
            shutil.rmtree(configuration, ignore_errors=True)
        return by_configuration

    def _run(self, command: str, arguments: Sequence[str], graphs: Path) -> Outcome:
        """Run a command that writes to its second argument, and keep the graph under that name."""
        # The subcommand, as the group would take over the process's signals.
        result = CliRunner().invoke(self.commands[command], arguments)
        if result.exit_code:
            crash = "" if isinstance(result.exception, SystemExit) else repr(result.exception)
            return Outcome(True, self.mask(result.output), crash=self.mask(crash))
        target = Path(arguments[1])
        paths = sorted(p for p in target.rglob("*") if p.is_file())
        names = {p: p.relative_to(target) for p in paths}
        files = {str(names[p]): sha256(p) for p in paths if names[p].parts[0] != EXTRA}
        if GRAPH in files:
            (graphs / f"{target.name}.pb").hardlink_to(target / GRAPH)
        if TEXT_GRAPH in files:
            from google.protobuf import text_format
            from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

            message = text_format.Parse((target / TEXT_GRAPH).read_text(encoding="utf-8"), SavedModel())
            (graphs / f"{target.name}.pb").write_bytes(message.SerializeToString())
        if target.name != DEFAULT:  # which is finalised afterwards
            shutil.rmtree(target)
        return Outcome(False, self.mask(result.output), files, [str(n) for n in names.values() if n.parts[0] == EXTRA])

    def mask(self, text: str) -> str:
        """A text without progress, times and paths, which may differ where results do not."""
        text = PROGRESS.sub("", text)
        for path, name in sorted(self.masked.items(), key=lambda item: -len(item[0])):  # one may lie in the other
            text = text.replace(path, name)
        return re.sub(r" in \d+\.\d+ s\b", " in SECONDS s", text)


def sha256(file: Path) -> str:
    """The hash of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def require_imports_from(tree: Path) -> None:
    """End the process if bnqat would be imported from somewhere else."""
    for name in PACKAGES:
        file = import_module(name).__file__
        if file is None or Path(file).resolve() not in (tree / f"{name}.py", tree / name / "__init__.py"):
            sys.exit(f"{name} is imported from {file}, not from {tree}")


def commands(tree: Path) -> Mapping[str, click.Command]:
    """The subcommands of bnqat, wherever the checkout has them."""
    project = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["bnqat"].partition(":")
    group: click.Group = getattr(import_module(module), name)
    return group.commands


def answer_requests(tree: Path, folder: Path, answer: Callable[[str], object]) -> None:
    """Take models from stdin until it ends."""
    os.chdir(folder)
    Path(CONFIGURATION).write_text(RANGES, encoding="utf-8")
    # The folders of both workers lie in one temporary folder, with the models.
    worker = Worker(commands(tree), folder, {str(folder.parent): "TEMPORARY", str(tree): "TREE"})
    for line in sys.stdin:
        name, source = json.loads(line)
        answer(json.dumps({c: asdict(o) for c, o in worker.outcomes(name, source).items()}) + "\n")


def main() -> None:
    """Run the command line."""
    tree, folder = (Path(argument).resolve() for argument in sys.argv[1:])
    require_imports_from(tree)
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as answers:
        os.dup2(2, 1)  # whatever libraries print must not come between the answers
        answer_requests(tree, folder, answers.write)


if __name__ == "__main__":
    main()
