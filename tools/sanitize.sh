#!/usr/bin/env bash
# The op tests against the C++ kernels built with AddressSanitizer and UBSan; takes minutes.
#
#   tools/sanitize.sh [PYTEST_ARGUMENT ...]
#
# Uses $PYTHON (default: python3), which must have torch. The build has its own folder and leaves the
# usual one alone. Without arguments: what test_house.py asks of the C++ backend, and the test file
# of every op that has one. Both sanitizers stop at the first fault, with a stack.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
base=$PWD/build/sanitize
flags="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"

rm -rf "$base/lib" "$base"/fault.*  # else the files of an older tree stay
NEULIG_FAST_BUILD=cpp CFLAGS="-O1 $flags -fno-omit-frame-pointer" LDFLAGS="$flags" \
    "$python" setup.py -q build --build-base "$base" --build-lib "$base/lib"

# Python is not instrumented, so the runtimes come first into its process. It frees little of its
# own memory at the end: leaks are not looked for.
cxx=${CXX:-c++}
export LD_PRELOAD="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libubsan.so)"
# pytest keeps what a test prints, and a fault ends pytest: reports go to files.
options=halt_on_error=1:log_path=$base/fault
export ASAN_OPTIONS=detect_leaks=0:$options UBSAN_OPTIONS=print_stacktrace=1:$options
trap 'cat "$base"/fault.* 2>/dev/null || true' EXIT
export PYTHONPATH=$base/lib OMP_WAIT_POLICY=passive PYTHONSAFEPATH=1
tests() { "$python" -m pytest -q -p no:cacheprovider -o pythonpath="$base/lib" "$@"; }

loaded=$("$python" -c "import torch, neulig_fast._C as c; print(c.__file__)")
[[ $loaded == "$base"/* ]] || { echo "the usual build was loaded: $loaded"; exit 1; }
if [ $# -gt 0 ]; then
    tests "$@"
    exit
fi
tests tests/test_house.py -k cpu-cpu
for source in csrc/cpu/*.cpp; do
    test=tests/test_$(basename "$source" .cpp).py
    if [ -f "$test" ]; then tests "$test"; fi
done
