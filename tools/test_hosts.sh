#!/usr/bin/env bash
# Another project's own tests, without nf.patch and under it, with either parity: what passed must
# still pass.
#
#   tools/test_hosts.sh HOST [PYTEST_ARGUMENT ...]
#
# Tests come from the released source archive, and run against the released package, in an
# environment of their own under build/hosts that sees the packages of $PYTHON (default: python3).
# Needs the network on the first run. Exit status 1: a test has another outcome under the patch.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
host=${1:?HOST: peft, mergekit, fusion_bench or sd_mecha}
shift

# What is installed, what its tests need beside it, and which of those in its archive are run.
case $host in
    peft)
        release=peft==0.21.2 needs="parameterized datasets diffusers"
        chosen=(tests/test_custom_models.py -k "weighted_adapter or merging_adapters")
        ;;
    mergekit)
        # The archive lacks their tests/common.py: ours makes the models and runs the merges.
        release=mergekit==0.1.5 common=tools/mergekit_tests_common.py
        chosen=(tests)
        ;;
    fusion_bench)
        release=fusion_bench==0.2.33
        chosen=(tests -k "not solar") # it makes a model of 7 billion parameters
        ;;
    sd_mecha)
        # One of them needs a file that the archive lacks, and fails either way.
        release=sd_mecha==1.1.8
        chosen=(tests)
        ;;
    *)
        echo "$host: its release has no tests, or none that are known here" >&2
        exit 2
        ;;
esac

base=$PWD/build/hosts/$host
# An environment that another version of this script made may lack what is needed now.
ready=$base/ready-$release-$(cksum <tools/test_hosts.sh | cut -d' ' -f1)
if [ ! -f "$ready" ]; then
    rm -rf "$base"
    "$python" -m venv "$base/env"
    site=$("$base/env/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    "$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" >"$site/below.pth"
    "$base/env/bin/python" -m pip install --quiet "$release" pytest ${needs:-}
    "$base/env/bin/python" -m pip download --quiet --no-deps --no-binary "${release%==*}" -d "$base" "$release"
    mkdir "$base/archive"
    tar -xzf "$base"/*.tar.gz -C "$base/archive" --strip-components 1
    mv "$base/archive/tests" "$base/tests" # the archive's package must not be imported
    touch "$base/tests/__init__.py"
    rm -rf "$base/archive"
    touch "$ready"
fi

[ -z "${common:-}" ] || cp "$common" "$base/tests/common.py"

# The root itself on the path would make its folder kernels a package of that name.
mkdir -p "$base/path"
ln -sfn "$PWD/neulig_fast" "$base/path/neulig_fast"
export PYTHONPATH=$base/path
export HF_HUB_OFFLINE=1 # what needs models of the hub fails, and fails alike
cd "$base"
echo "[pytest]" >pytest.ini # else our own settings are found
tests() { env/bin/python -m pytest -q -p no:cacheprovider -c pytest.ini "$@" || [ $? = 1 ]; }
tests "${chosen[@]}" "$@" --junit-xml without.xml
for parity in exact accurate; do
    NEULIG_FAST_PATCH=$host:$parity \
        tests "${chosen[@]}" "$@" -p neulig_fast.compat.pytest_plugin --junit-xml $parity.xml
done
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

before, wrong = outcomes("without.xml"), False
for parity in ("exact", "accurate"):
    after = outcomes(f"{parity}.xml")
    changed = [key for key in before if before[key] != after.get(key)]  # a method may be added
    for key in sorted(changed):
        print(parity, "::".join(key), before[key], "->", after.get(key))
    passed = sum(outcome == "passed" for outcome in after.values())
    print(f"{parity}: {len(after)} tests, {passed} passed under the patch, {len(before)} without it")
    wrong |= bool(changed) or not passed
sys.exit(wrong)
END
