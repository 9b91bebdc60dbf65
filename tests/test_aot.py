"""tools/aot.py: what it compiles is clean, and what it looks for it would find.

Compiling needs a process in which Triton does not interpret, so most of this runs in subprocesses.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # scripts, not a package

import aot_nvcc  # noqa: E402
import aot_sass  # noqa: E402

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@needs_triton
@pytest.mark.slow
def test_triton_kernels_compile_without_spills_and_with_wide_accesses():
    done = run("tools/aot.py", "--few", "--only", "triton", "--arch", "90", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped: nvcc kernels" in done.stdout and ", 0 with faults" in done.stdout
    assert "blend bfloat16 N8 K4 S302" in done.stdout
    assert "mixture_linear bfloat16 1600x1024x3072" in done.stdout


def built_without_cuda():
    """Whether there is an extension, and by choice without CUDA's part."""
    info = ROOT / "neulig_fast/_build_info.json"
    return info.exists() and json.loads(info.read_text())["built"] == "cpp"


@pytest.mark.slow
@pytest.mark.skipif(
    built_without_cuda(), reason="built for the CPU; `make aot` compiles for minutes"
)
@pytest.mark.skipif(aot_nvcc.missing() is not None, reason=str(aot_nvcc.missing()))
def test_cuda_kernels_compile_without_spills_and_with_wide_accesses():
    done = run("tools/aot.py", "--few", "--only", "nvcc", "--arch", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "blend_few_kernel<float, 8>" in done.stdout and ", 0 with faults" in done.stdout


@needs_triton
def test_a_jitted_function_without_a_kernel_is_found():
    code = (
        "import sys; sys.path.insert(0, 'tools')\n"
        "import aot_triton\n"
        "module = aot_triton.kernel_modules()['blend']\n"
        "aot_triton.compiled_kernels.append(module.blend_kernel)\n"
        "print(*aot_triton.complaints(), sep='\\n')\n"
    )
    lines = run("-c", code).stdout.splitlines()
    assert all("reached by no kernel" in line for line in lines), lines
    # blend's own helpers are reached, the other ops' are not
    assert not any(".blend." in line or "_segments" in line for line in lines), lines
    assert sum(".blend_weight_grad." in line for line in lines) == 4, lines


def test_missing_tools_are_said(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tools'); sys.argv = ['aot.py']\n"
        "import aot, aot_nvcc, aot_triton\n"
        "aot_nvcc.find_nvcc = lambda: None\n"
        "aot_triton.missing = lambda: 'triton is not installed'\n"
        "sys.exit(aot.main())\n"
    )
    done = run("-c", code)
    assert done.returncode == 1, done.stderr  # nothing was compiled, so nothing is proved
    assert "skipped: triton kernels (triton is not installed)" in done.stdout
    assert "skipped: nvcc kernels (no nvcc: set CUDA_HOME)" in done.stdout


def kernel(**changes):
    clean = {
        "name": "blend", "arch": 90, "registers": 40, "stack": 0, "shared": 0, "spills": 0,
        "fused": 0, "loads": {128: 5, 32: 5}, "stores": {128: 1},
    }  # fmt: skip
    return aot_sass.CompiledKernel(**{**clean, **changes})


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({}, None),
        ({"spills": 2}, "2 spills"),
        ({"stack": 8}, "a stack frame of 8 bytes"),
        ({"fused": 1}, "1 fused multiply-adds"),
        ({"loads": {128: 4, 32: 9}}, "narrow accesses on the main path of 5 experts"),
        ({"stores": {64: 2}}, "narrow accesses on the main path of 5 experts"),
    ],
)
def test_faults_are_found(changes, fault):
    found = kernel(**changes)
    found.check_blend(5)
    assert found.faults == ([fault] if fault else [])


def test_stores_of_another_type_may_be_narrow_and_loads_may_not():
    found = kernel(stores={64: 2})
    found.check_blend(5, narrow_stores=True)
    assert not found.faults
    found = kernel(loads={64: 10})
    found.check_blend(5, narrow_stores=True)
    assert found.faults == ["narrow accesses on the main path of 5 experts"]


@pytest.mark.parametrize(
    "arch, rows, products, fault",
    [
        (80, 128, {"HMMA": 8}, None),
        (90, 128, {"HGMMA": 8}, None),
        (100, 64, {"UTCHMMA": 8}, None),
        (90, 16, {"HMMA": 8}, None),
        (90, 64, {"HMMA": 8}, "no HGMMA in tiles of 64 rows"),
        (80, 16, {}, "no HMMA in tiles of 16 rows"),
    ],
)
def test_products_without_tensor_cores_are_found(arch, rows, products, fault):
    found = kernel(arch=arch, products=products)
    found.check_tensor_cores(rows)
    assert found.faults == ([fault] if fault else [])


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"registers": 255, "shared": 232448}, None),
        ({"registers": 257}, "67584 registers in 8 warps, of 65536"),
        ({"shared": 232449}, "232449 bytes of shared memory, of 232448"),
    ],
)
def test_kernels_that_no_multiprocessor_holds_are_found(changes, fault):
    found = kernel(**changes)
    found.check_fits(num_warps=8)
    assert found.faults == ([fault] if fault else [])


SASS = """
 LDG.E.128 R4, desc[UR4][R2.64] ;  LDG.E.U16 R6, [R2] ;  @P0 LDG.E R7, [R2] ;  STG.E.64 [R2], R4 ;
 LDG.E.64.CONSTANT R8, [R2] ;  LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;  LDS.128 R4, [R5] ;
"""


def test_accesses_are_counted_by_width():
    assert aot_sass.accesses(SASS, "LDG") == {128: 1, 64: 1, 32: 1, 16: 1}
    assert aot_sass.accesses(SASS, "LDG(?:STS)?") == {128: 2, 64: 1, 32: 1, 16: 1}
    assert aot_sass.accesses(SASS, "STG") == {64: 1}


PLANTED = """
__global__ void spilling(float* x, int n) {
  float local[64];
  for (int i = 0; i < 64; ++i) local[i] = x[i * n];
  for (int i = 0; i < 64; ++i) x[i] = local[(i * n) & 63];
}
"""


@pytest.mark.skipif(aot_nvcc.missing() is not None, reason=str(aot_nvcc.missing()))
def test_a_planted_stack_frame_is_found(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED)
    (found,) = aot_nvcc.compile_file(source, 90)
    assert found.name == "spilling" and any("stack frame" in fault for fault in found.faults)
