"""``python benchmarks [--quick] [--device cpu|cuda]``: every benchmark, one process each."""

import os
import subprocess
import sys
from pathlib import Path

load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
if load > 0.7:
    print(f"load average {load:.1f}: other work is running here; do not keep these rows")
failed = []
for path in sorted(Path(__file__).parent.glob("bench_*.py")):
    print(f"\n{path.stem}", flush=True)
    if subprocess.run([sys.executable, str(path), *sys.argv[1:]]).returncode:
        failed.append(path.stem)
if failed:
    sys.exit(f"failed: {', '.join(failed)}")
