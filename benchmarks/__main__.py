"""``python benchmarks [--quick] [--device cpu|cuda]``: every benchmark, one process each."""

import os
import subprocess
import sys

from neulig_fast import benchmarks

load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
if load > 0.7:
    print(f"load average {load:.1f}: other work is running here; do not keep these rows")
failed = []
for name in benchmarks.names():
    print(f"\n{name}", flush=True)
    module = f"neulig_fast.benchmarks.bench_{name}"
    if subprocess.run([sys.executable, "-m", module, *sys.argv[1:]]).returncode:
        failed.append(name)
if failed:
    sys.exit(f"failed: {', '.join(failed)}")
