"""exp, log and sqrt of vectors against wider arithmetic, and with the same bits at every level."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
EXP, LOG, SQRT = range(3)
TYPES = {np.float32: (ctypes.c_float, np.float64), np.float64: (ctypes.c_double, np.longdouble)}
in_both_types = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.__name__)


@pytest.fixture(scope="module")
def library(once):
    """The shared library of tests/vector_math.cpp."""
    compiler = shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wno-psabi"]
    source = str(ROOT / "tests/vector_math.cpp")

    def build(folder):
        command = [compiler, *flags, f"-I{ROOT / 'csrc'}", source, "-o", str(folder / "vectors.so")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return ctypes.CDLL(str(once("vector_math", build) / "vectors.so"))


def evaluate(library, function, x, level=None):
    """The function of x, whose length is a multiple of 16, at a level (the best one)."""
    level = library.best_level() if level is None else level
    kind = TYPES[x.dtype.type][0]
    run = library.evaluate_float if kind is ctypes.c_float else library.evaluate_double
    y, pointer = np.empty_like(x), ctypes.POINTER(kind)
    x = np.ascontiguousarray(x)
    run(level, function, x.ctypes.data_as(pointer), y.ctypes.data_as(pointer),
        ctypes.c_int64(len(x)))  # fmt: skip
    return y


def ulps(got, exact, dtype):
    """The largest error in units of the last place of the exact value."""
    return float((np.abs(got - exact) / np.spacing(np.abs(exact).astype(dtype))).max())


def arguments(function, dtype):
    """Many of all sizes at which the function is defined, with their neighbours at its joints."""
    random = np.random.default_rng(0)
    info = np.finfo(dtype)
    if function == EXP:
        low = float(np.log(info.tiny))
        small, joints = -np.exp2(random.uniform(-60, 0, 40000)), np.arange(0, -100, -1) * np.log(2)
        x = np.concatenate((random.uniform(low, 0, 40000), small, joints, [-0.0, low * 0.999999]))
    else:
        powers = np.exp2(random.uniform(info.minexp, info.maxexp - 1, 40000))
        x = np.concatenate((powers, random.uniform(0.4, 2.1, 40000), [1.0, 2.0, 0.5**0.5, 2**0.5]))
    x = x.astype(dtype)
    x = np.concatenate((x, np.nextafter(x, dtype(0)))) if function == EXP else x
    return np.resize(x, len(x) // 16 * 16 + 16)


@in_both_types
@pytest.mark.parametrize("function", [EXP, LOG, SQRT], ids=["exp", "log", "sqrt"])
def test_at_most_two_units_in_the_last_place(library, function, dtype):
    """fp64 is compared in the platform's long double, where that is wider."""
    wide = TYPES[dtype][1]
    if np.finfo(wide).eps >= np.finfo(dtype).eps:
        pytest.skip("long double is no wider than double")
    x = arguments(function, dtype)
    exact = (np.exp, np.log, np.sqrt)[function](x.astype(wide))
    y = evaluate(library, function, x)
    known = exact != 0  # log 1
    assert (y[~known] == 0).all()
    assert ulps(y[known], exact[known], dtype) <= (2, 2, 0.5)[function]


@in_both_types
def test_exp_beyond_its_range(library, dtype):
    tiny = np.log(np.finfo(dtype).tiny)
    x = np.array([0, -0.0, -np.inf, tiny - 1, 2 * tiny, -1e30, np.nan, *[0] * 9], dtype)
    y = evaluate(library, EXP, x)
    assert y[:6].tolist() == [1, 1, 0, 0, 0, 0] and np.isnan(y[6])


@in_both_types
def test_log_of_nan_is_nan(library, dtype):
    assert np.isnan(evaluate(library, LOG, np.full(16, np.nan, dtype))).all()


@in_both_types
@pytest.mark.parametrize("function", [EXP, LOG, SQRT], ids=["exp", "log", "sqrt"])
def test_every_level_gives_the_same_bits(library, function, dtype):
    x = arguments(function, dtype)
    best = library.best_level()
    results = [evaluate(library, function, x, level) for level in (0, 3, 4) if level <= best]
    assert all(y.tobytes() == results[0].tobytes() for y in results)
