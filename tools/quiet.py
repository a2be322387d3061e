"""Run a Python program without the lines that TensorFlow's C++ libraries log to stderr.

    python -m tools.quiet -m tools.demo

Their levels are set once they are loaded, too late for what they say while they load, and LiteRT has no level at all.
All other lines of the program's stderr pass, errors included; so does its exit code.
"""

from __future__ import annotations

import re
import subprocess
import sys

NOISE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog"
    rb"|[IW]\d{4} \d\d:\d\d:[\d.]+ +\d+ \S+\.cc:\d+\]"  # absl
    rb"|E\d{4} .*Unable to register cu\w+ factory"
    rb"|\d{4}-\d\d-\d\d [\d:.]+: [IW] \S+\.cc:\d+\]"  # TensorFlow
    rb"|INFO: Created TensorFlow Lite \w+ delegate"
    rb"|fully_quantize: \d, inference_type: \d"
)


def main() -> int:
    """Run Python with the arguments, and return its exit code."""
    program = subprocess.Popen([sys.executable, *sys.argv[1:]], stderr=subprocess.PIPE)
    assert program.stderr is not None  # noqa: S101  for the type
    while True:
        try:
            for line in program.stderr:
                if not NOISE.match(line):
                    sys.stderr.buffer.write(line)
                    sys.stderr.buffer.flush()
            return program.wait()
        except KeyboardInterrupt:  # the program gets the signal too, and what it says is still shown
            continue


if __name__ == "__main__":
    sys.exit(main())
