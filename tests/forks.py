"""Python programs in forks of one process that has imported torch: started by conftest.py.

Every line of the input is a JSON list: code, arguments, environment, folder, and the files that
take the output and the errors; the answer is a line with the exit status. Only torch and pytest are
imported before, so that a program still imports the package, and with it reads its environment, by
itself. What the libraries read when they are loaded, as OMP_NUM_THREADS, it does not see changed.
"""

import json
import os
import sys

import pytest  # noqa: F401 (some programs import test files)
import torch  # noqa: F401


def become(code, words, environment, folder, out, err):
    """Make this process look as if it had just been started."""
    for number, path in enumerate((os.devnull, out, err)):
        file = os.open(path, os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.path[0] = ["-c", *words], ""


def main():
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return line
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


if (given := main()) is not None:
    call = json.loads(given)
    become(*call)
    exec(compile(call[0], "<string>", "exec"), {"__name__": "__main__"})
