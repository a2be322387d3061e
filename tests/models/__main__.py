"""Write all models, or those named, below a directory."""

import sys
from pathlib import Path

from tests.models.all import ALL

if __name__ == "__main__":
    _, *arguments = sys.argv
    unknown = [name for name in arguments[1:] if name not in ALL]
    if not arguments or unknown:
        sys.exit(f"no model {', '.join(unknown)}" if unknown else "usage: python -m tests.models DIRECTORY [NAME ...]")
    for name in arguments[1:] or ALL:
        print(ALL[name](Path(arguments[0]) / name))  # noqa: T201  this is what it is for
