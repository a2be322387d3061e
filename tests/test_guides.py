"""Every block of a guide runs, page by page, in an empty directory, as a reader would run it.

The blocks of Python are one session. One that begins with ``# file: name`` is a file. Of the console's blocks the
lines that begin with ``$ `` run in bash, where they stand. There `bnqat` and `python` are forked from processes that
have imported TensorFlow; tests/test_docs.py runs the installed command.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import command
from tests.reliability.forks import Server

ROOT = Path(__file__).resolve().parent.parent
GUIDES = (
    *("docs/keras.md", "docs/loops.md", "docs/tensorflow1.md", "docs/distributed.md"),
    *("docs/deployment.md", "docs/migrating.md"),
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SESSION = """
import os, pathlib, re, subprocess, sys
folders = [*sys.argv[2:], os.environ["PATH"]]  # with `bnqat`, `python`, and all others
os.environ["PATH"] = os.pathsep.join(folders)
namespace = {"__name__": "__main__"}
for index, (kind, text) in enumerate(eval(sys.argv[1])):
    file = re.match(r"# file: (\\S+)\\n", text)
    if kind == "console":
        for line in (each[2:] for each in text.splitlines() if each.startswith("$ ")):
            print("$", line, flush=True)
            subprocess.run(["bash", "-c", line], check=True)
    elif file:
        pathlib.Path(file[1]).write_text(text, encoding="utf-8")
    else:
        exec(compile(text, f"block {index}", "exec"), namespace)
print("every block ran")
"""


@pytest.mark.parametrize("page", GUIDES)
def test_every_block_runs(page: str, forks: Server, plain_forks: Server, python: Path, tmp_path: Path) -> None:
    matches = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    blocks = [(kind, text) for kind, text in matches if kind in ("python", "console")]
    assert len(blocks) > 1
    work, commands = tmp_path / "work", tmp_path / "commands"
    work.mkdir()
    with command(forks, commands):
        done = plain_forks.python(SESSION, repr(blocks), commands, python.parent, cwd=work, limit=600)
    assert done.out.endswith("every block ran\n"), f"{done.out[-2000:]}\n{done.err[-3000:]}"
