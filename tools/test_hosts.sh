#!/usr/bin/env bash
# Another project's own tests, without nf.patch and with it: what passed must still pass.
#
#   tools/test_hosts.sh HOST [exact|accurate] [PYTEST_ARGUMENT ...]
#
# Tests come from the released source archive, and run against the released package, in an
# environment of their own under build/hosts that sees the packages of $PYTHON (default: python3).
# Needs the network on the first run. Exit status 1: a test has another outcome under the patch.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
host=${1:?HOST: peft or mergekit}
parity=${2:-exact}
shift $(($# < 2 ? $# : 2))

# What is installed, the tests in its archive, and what those need beside it.
case $host in
    peft)
        release=peft==0.21.2 needs="parameterized datasets diffusers"
        chosen=(tests/test_custom_models.py -k "weighted_adapter or merging_adapters")
        ;;
    mergekit)
        # Its pins would bring other releases of what is here already; the archive lacks
        # tests/common.py, which the other tests of merges need.
        release=mergekit==0.1.5 needs="immutables" alone=--no-deps
        chosen=(tests/test_{batched_merges,merge_method_interface}.py
            tests/test_{merge_method_regressions,sparsify}.py)
        ;;
    *)
        echo "$host: its release has no tests, or none that are known here" >&2
        exit 2
        ;;
esac

base=$PWD/build/hosts/$host
if [ ! -f "$base/ready-$release" ]; then
    rm -rf "$base"
    "$python" -m venv "$base/env"
    site=$("$base/env/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    "$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" >"$site/below.pth"
    "$base/env/bin/python" -m pip install --quiet ${alone:-} "$release" pytest $needs
    "$base/env/bin/python" -m pip download --quiet --no-deps --no-binary :all: -d "$base" "$release"
    mkdir "$base/archive"
    tar -xzf "$base"/*.tar.gz -C "$base/archive" --strip-components 1
    mv "$base/archive/tests" "$base/tests" # the archive's package must not be imported
    touch "$base/tests/__init__.py"
    rm -rf "$base/archive"
    touch "$base/ready-$release"
fi

# The root itself on the path would make its folder kernels a package of that name.
mkdir -p "$base/path"
ln -sfn "$PWD/neulig_fast" "$base/path/neulig_fast"
export PYTHONPATH=$base/path
export HF_HUB_OFFLINE=1 # what needs models of the hub fails, and fails alike
cd "$base"
echo "[pytest]" >pytest.ini # else our own settings are found
tests() { env/bin/python -m pytest -q -p no:cacheprovider -c pytest.ini "$@" || [ $? = 1 ]; }
tests "${chosen[@]}" "$@" --junit-xml without.xml
NEULIG_FAST_PATCH=$host:$parity \
    tests "${chosen[@]}" "$@" -p neulig_fast.compat.pytest_plugin --junit-xml with.xml
env/bin/python - <<'END'
import sys
import xml.etree.ElementTree as tree

def outcomes(path):
    return {
        (case.get("classname"), case.get("name")): next(
            (kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed"
        )
        for case in tree.parse(path).iter("testcase")
    }

before, after = outcomes("without.xml"), outcomes("with.xml")
changed = [key for key in before if before[key] != after.get(key)]  # a method may be added
for key in sorted(changed):
    print("::".join(key), before[key], "->", after.get(key))
passed = sum(outcome == "passed" for outcome in after.values())
print(f"{len(after)} tests, {passed} passed under the patch, {len(before)} without it")
sys.exit(bool(changed) or not passed)
END
