"""The optional native build, neulig_fast._C. Everything static is in pyproject.toml.

NEULIG_FAST_BUILD says what to build: `auto` (default: CUDA and C++ kernels if they can be built,
else C++ alone, else nothing; never fails), `cuda`, `cpp` (these or an error) or `none`. What was
built, and why not more, goes to neulig_fast/_build_info.json: pip hides what a build prints.
Respected: CUDA_HOME, TORCH_CUDA_ARCH_LIST, CC, CXX, CFLAGS, PYTORCH_NVCC, MAX_JOBS.
"""

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parent
CHOICES = {"auto": ["cuda", "cpp"], "cuda": ["cuda"], "cpp": ["cpp"], "none": []}
CHOICE = os.environ.get("NEULIG_FAST_BUILD") or "auto"
if CHOICE not in CHOICES:
    raise SystemExit(f"NEULIG_FAST_BUILD must be one of {', '.join(CHOICES)}, got {CHOICE!r}")
ARCHS = ("8.0", "9.0", "10.0")
CXX = (os.environ.get("CXX") or "c++").split()
# All that torch and setuptools raise over a broken toolchain.
FAILURES = (
    BaseError, CCompilerError, subprocess.SubprocessError,
    OSError, RuntimeError, ValueError, LookupError, AssertionError,
)  # fmt: skip


def find_cuda() -> Path | None:
    """The toolkit to use: CUDA_HOME, or the first usual place that has both nvcc and headers."""
    places = [os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")]
    if not places[0]:
        nvcc = shutil.which("nvcc")
        # nvcc on the PATH may be a wrapper script or a link far from the toolkit.
        places = [Path(path).parent.parent for path in (nvcc, os.path.realpath(nvcc or "")) if nvcc]
        places.append("/usr/local/cuda")
    roots = (Path(place) for place in places)
    return next((r for r in roots if (r / "bin/nvcc").exists() and cuda_include(r)), None)


def cuda_dir(root: Path, names: list[str], wanted: str) -> Path | None:
    """The toolkit's folder that holds the file `wanted`; conda keeps them under targets/."""
    parents = (root, root / f"targets/{platform.machine()}-linux")
    folders = (parent / name for parent in parents for name in names)
    return next((folder for folder in folders if (folder / wanted).exists()), None)


def cuda_include(root: Path) -> Path | None:
    return cuda_dir(root, ["include"], "cuda_runtime.h")


CUDA = find_cuda()

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension

    # torch's own guess is misled by wrapper scripts, and a torch without CUDA makes none.
    cpp_extension.CUDA_HOME = str(CUDA) if CUDA else None
    TORCH_MISSING = None
except (ImportError, OSError) as error:
    from setuptools.command.build_ext import build_ext as BuildExtension

    TORCH_MISSING = (
        f"torch could not be imported while building ({error}); "
        "install torch first, then `pip install --no-build-isolation`"
    )


def why_not(kind: str) -> str | None:
    """Why this kind cannot even be tried here, or None."""
    if TORCH_MISSING:
        return TORCH_MISSING
    # A launcher such as ccache comes first, its compiler second; flags may follow.
    for program in [word for word in CXX[:2] if not word.startswith("-")]:
        if not shutil.which(program):
            return f"no C++ compiler: `{program}` not found"
    if kind == "cuda" and CUDA is None:
        return "no CUDA toolkit: no folder with bin/nvcc and include/cuda_runtime.h (set CUDA_HOME)"
    if kind == "cuda" and CHOICE == "auto" and torch.version.cuda is None:
        return "this torch has no CUDA (NEULIG_FAST_BUILD=cuda builds CUDA kernels all the same)"
    return None


def sources(*patterns: str) -> list[str]:
    return [p.relative_to(ROOT).as_posix() for name in patterns for p in sorted(ROOT.glob(name))]


def configure(ext: Extension, kind: str) -> None:
    """Sets what `kind` needs on the extension, from scratch: an attempt may have gone before."""
    # 2.11's stable ABI: one binary for this and later torch versions, with and without CUDA.
    macros = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-ffile-prefix-map={ROOT}/="]
    # Multiply, then add, on every machine: contraction would make the bits depend on the CPU.
    cxx = ["-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *macros]
    if not re.search(r"(^|\s)-O", os.environ.get("CFLAGS", "")):
        cxx.insert(0, "-O3")
    ext.sources = sources("csrc/module.cpp", "csrc/cpu/*.cpp")
    ext.include_dirs = [str(ROOT / "csrc"), *cpp_extension.include_paths()]
    ext.library_dirs = cpp_extension.library_paths()
    # --no-as-needed: torch stays a dependency even if every symbol needed of it were weak.
    ext.extra_link_args = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    ext.extra_compile_args = {"cxx": cxx, "nvcc": []}
    if kind == "cuda":
        ext.sources += sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu")
        ext.include_dirs.append(str(cuda_include(CUDA)))
        ext.library_dirs.append(str(cuda_dir(CUDA, ["lib64", "lib"], "libcudart_static.a")))
        # The static runtime: the binary must load where there is no libcudart.
        ext.extra_link_args += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        nvcc = ["-O3", "-fmad=false", "--compiler-options=-fvisibility=hidden"]
        # An eighth of the size, from nvcc 12.8 on; line numbers for profilers (-lineinfo), which
        # NVCC_APPEND_FLAGS can ask for, would triple it.
        if "--compress-mode" in output_of(f"{CUDA}/bin/nvcc", "--help"):
            nvcc.append("--compress-mode=size")
        ext.extra_compile_args = {"cxx": [*cxx, "-DNF_WITH_CUDA", "-DUSE_CUDA"], "nvcc": nvcc}
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs()


def cuda_archs() -> str:
    """TORCH_CUDA_ARCH_LIST, else those of ARCHS that nvcc knows, with PTX of the last."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    known = output_of(f"{CUDA}/bin/nvcc", "--list-gpu-arch").split()
    return ";".join(a for a in ARCHS if f"compute_{a.replace('.', '')}" in known) + "+PTX"


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class BuildNative(BuildExtension):
    """Tries each kind in turn and writes down what came of it."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "neulig_fast" if in_place else Path(self.build_lib) / "neulig_fast"
        built, reasons = "none", {}
        before = self.compiler, self.inplace  # a failed attempt leaves these changed
        for kind in CHOICES[CHOICE]:
            self.compiler, self.inplace = before
            reason = why_not(kind) or self.attempt(kind)
            if reason is None:
                built = kind
                break
            reasons.setdefault(reason, []).append(kind)
        if CHOICE in ("cuda", "cpp") and built == "none":
            raise BaseError(f"NEULIG_FAST_BUILD={CHOICE}: {next(iter(reasons))}")
        text = (f"{' and '.join(kinds)}: {reason}" for reason, kinds in reasons.items())
        write_info(package, built, "; ".join(text))

    def attempt(self, kind: str) -> str | None:
        try:
            configure(self.extensions[0], kind)
            super().run()
        except FAILURES as error:
            if CHOICE != "auto":
                raise
            return f"{error}; see the compiler's message with NEULIG_FAST_BUILD={kind}"
        return None


def write_info(package: Path, built: str, reason: str) -> None:
    if CHOICE in ("cpp", "none"):
        reason = f"NEULIG_FAST_BUILD={CHOICE} when neulig_fast was installed"
    package.mkdir(parents=True, exist_ok=True)
    if built == "none":
        for stale in package.glob("_C*.so"):
            stale.unlink()
    info = {"built": built, "reason": reason or None, "date": f"{datetime.date.today()}"}
    if built != "none":
        info["torch"] = torch.__version__
        info["cxx"] = output_of(*CXX, "--version").splitlines()[0]
    if built == "cuda":
        info["nvcc"] = re.findall(r"\bV([\d.]+)|$", output_of(f"{CUDA}/bin/nvcc", "--version"))[0]
        info["archs"] = re.split(r"[ ;]+", os.environ["TORCH_CUDA_ARCH_LIST"])
    (package / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
    print(f"neulig_fast: native part: {built}" + (f" ({reason})" if reason else ""))


class BuildAlways(build):
    """Runs build_ext even when there is nothing to compile, to write down why."""

    # A list: plugins of setuptools append to it.
    sub_commands = [  # noqa: RUF012
        (name, None if name == "build_ext" else test) for name, test in build.sub_commands
    ]


# Not optional=True, which would hide a failed link from BuildNative.
NATIVE = Extension("neulig_fast._C", ["csrc/module.cpp"], py_limited_api=True)
HOPELESS = CHOICE in ("auto", "none") and all(why_not(kind) for kind in CHOICES[CHOICE])

setup(
    ext_modules=[] if HOPELESS else [NATIVE],
    cmdclass={"build": BuildAlways, "build_ext": BuildNative},
    options={} if HOPELESS else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
