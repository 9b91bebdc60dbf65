"""The fixtures of conftest.py do what tests rely on."""

import os


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
