"""Write all models below a directory."""

import sys
from pathlib import Path

from tests.models.all import ALL

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.models DIRECTORY")
    for name, make in ALL.items():
        print(make(Path(sys.argv[1]) / name))  # noqa: T201  this is what it is for
