"""Every block of a guide runs, page by page, in an empty directory, as a reader would run it.

The blocks of Python are one session. One that begins with ``# file: name`` is a file. Of the console's blocks the
lines that begin with ``$ `` run in bash, where they stand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ("docs/keras.md", "docs/loops.md", "docs/distributed.md", "docs/deployment.md", "docs/migrating.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SESSION = """
import pathlib, re, subprocess, sys
namespace = {"__name__": "__main__"}
for index, (kind, text) in enumerate(eval(sys.stdin.read())):
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
def test_every_block_runs(page: str, tmp_path: Path) -> None:
    matches = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    blocks = [(kind, text) for kind, text in matches if kind in ("python", "console")]
    assert len(blocks) > 1
    commands = str(Path(sys.executable).parent)  # where `bnqat` and `python` are
    environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        input=repr(blocks),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
        timeout=600,
    )
    assert done.stdout.endswith("every block ran\n"), f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
