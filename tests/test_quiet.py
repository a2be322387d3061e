"""Lines that the libraries log do not come through, and all others do."""

from __future__ import annotations

import subprocess
import sys

LOGGED = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1796078639.025967   13351 port.cc:153] oneDNN custom operations are on.
W0000 00:00:1796078639.1    7 computation_placer.cc:177] computation placer already registered.
E0000 00:00:1796078639.1    7 cuda_fft.cc:477] Unable to register cuFFT factory: it is already registered
2026-11-30 22:46:14.123456: I tensorflow/core/platform/cpu_feature_guard.cc:210] This binary is optimized
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
fully_quantize: 0, inference_type: 6, input_inference_type: FLOAT32, output_inference_type: FLOAT32
"""
OTHER = """\
E0000 00:00:1796078639.1    7 loader.cc:9] Bad model
2026-11-30 22:46:14.123456: E tensorflow/core/loader.cc:210] Bad model
WARNING: something is deprecated
INFO: started
"""


def test_only_what_libraries_log_is_left_out() -> None:
    program = "import sys; print('result'); sys.stderr.write(sys.argv[1]); raise ValueError('wrong')"
    command = [sys.executable, "-m", "tools.quiet", "-c", program, LOGGED + OTHER]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == "result\n"
    assert done.stderr.startswith(OTHER + "Traceback")
    assert done.stderr.endswith("ValueError: wrong\n")


def test_exit_code_is_the_programs() -> None:
    done = subprocess.run([sys.executable, "-m", "tools.quiet", "-c", "raise SystemExit(3)"], check=False)
    assert done.returncode == 3
