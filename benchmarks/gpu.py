"""The GPU tests, and what a step costs on a GPU, in one command.

    python benchmarks/gpu.py --out docs/step_time_gpu.json

It takes under eight minutes and exits with the tests' status. `benchmarks/step_time.py --device cuda` has the options.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "step_time_gpu.json")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each row of the benchmark")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    print(torch.cuda.get_device_name(), flush=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", str(ROOT / "tests")]
    status = subprocess.run(tests, cwd=ROOT, check=False).returncode
    step_time = [sys.executable, str(ROOT / "benchmarks" / "step_time.py"), "--device", "cuda"]
    subprocess.run([*step_time, "--seconds", str(args.seconds), "--out", str(args.out)], cwd=ROOT, check=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
