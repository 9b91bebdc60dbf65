#!/usr/bin/env bash
# All that a machine with a GPU is asked, in one go: build, test, sanitize, measure, print.
#
#   tools/gpu.sh [RESULTS_FOLDER]
#
# Uses the interpreter `python3` (or $PYTHON), which must have torch; needs no network. Steps that
# fail do not stop the later ones; the exit status is the number of failed steps. Rows go to
# benchmarks/results/<device>/ and, when a folder is named, are copied there.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=0

step() {
    echo
    echo "== $1"
    shift
    "$@" || { echo "FAILED: $*"; failed=$((failed + 1)); }
}

export NEULIG_FAST_BUILD=cuda
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 1
step "build" "$python" setup.py -q build_ext --inplace
step "backends" "$python" -c "import neulig_fast; neulig_fast.show_backends()"
step "tests" make --no-print-directory test-gpu PYTHON="$python"
if command -v compute-sanitizer >/dev/null; then
    step "compute-sanitizer" compute-sanitizer --error-exitcode 9 --tool memcheck \
        "$python" -m pytest -q tests/test_house.py -k "tolerance_rule and cuda-cuda"
fi
for path in benchmarks/bench_*.py; do
    name=$(basename "$path" .py)
    step "$name" "$python" -m "neulig_fast.benchmarks.$name" --device cuda
done
if [ $# -gt 0 ]; then
    mkdir -p "$1" && cp benchmarks/results/*/*.csv "$1"
fi
echo
echo "$failed steps failed"
exit "$failed"
