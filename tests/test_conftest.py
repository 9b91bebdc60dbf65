"""The fixtures of conftest.py do what tests rely on."""

import importlib.util
import os

import pytest
import torch

import neulig_fast as nf
from neulig_fast import testing
from neulig_fast._registry import OPS


def test_forked_programs_are_like_started_ones(python):
    done = python(
        "import os, sys; print(__name__, *sys.argv, os.environ.get('NEULIG_FAST_BACKEND'))\n"
        "print('neulig_fast' in sys.modules, os.environ.get('HOME'), sys.stdin.read())\n"
        "print('an error', file=sys.stderr); sys.exit(3)",
        "a word",
        7,
        NEULIG_FAST_BACKEND="blend=torch",
        HOME=None,
    )
    assert done.stdout == "__main__ -c a word 7 blend=torch\nFalse None \n"
    assert (done.stderr, done.returncode) == ("an error\n", 3)
    assert python("import os; print(os.environ.get('HOME'))").stdout == f"{os.environ['HOME']}\n"


def test_a_forked_program_that_fails_says_where(python):
    failed = python("def fail():\n    raise KeyError('key')\nfail()")
    assert failed.returncode == 1 and "line 2, in fail\nKeyError: 'key'" in failed.stderr
    killed = python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == -9
    code = "import torch; torch.set_num_threads(2); print(torch.ones(99_999).sum().item())"
    threads = python(code)
    assert threads.stdout == "99999.0\n", threads.stderr


@pytest.mark.skipif(importlib.util.find_spec("neulig_fast._C") is None, reason="not built")
def test_a_forked_program_chooses_its_instruction_set(python):
    code = "from neulig_fast import _C; print(_C.cpu_level())"
    assert python(code, NEULIG_FAST_CPU="0").stdout == "0\n"
    failed = python(code, NEULIG_FAST_CPU="2")
    assert failed.returncode == 1 and "NEULIG_FAST_CPU must be 0" in failed.stderr


def test_what_is_made_once(once):
    calls = []

    def make(folder):
        calls.append(folder)
        if len(calls) == 1:
            raise ValueError("not this time")
        (folder / "file").write_text("made")

    name = f"once-{os.getpid()}"
    with pytest.raises(ValueError, match="not this time"):
        once(name, make)
    folders = {once(name, make) for _ in range(3)}
    assert len(calls) == 2 and len(folders) == 1
    assert (folders.pop() / "file").read_text() == "made"


def test_a_launch_leaves_tritons_language_as_it_was():
    if os.environ.get("TRITON_INTERPRET") != "1" or ("cpu", "triton") not in testing.backends_of(
        OPS["blend"]
    ):
        pytest.skip("Triton does not interpret here")
    from triton.runtime.interpreter import tl

    before, weights, params = dict(vars(tl)), torch.ones(2), torch.ones(2, 300)
    with nf.use_backend(blend="triton"):
        for _ in range(2):
            assert nf.blend(weights, params).eq(2).all()
            assert tl.core.is_builtin(tl.load) and dict(vars(tl)) == before
