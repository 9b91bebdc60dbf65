"""Pages of docs/: examples run as printed, and docs/api.md lists the public names."""

import inspect
import operator
import re
from pathlib import Path

import pytest

import neulig_fast
from neulig_fast.methods import METHODS

DOCS = Path(__file__).resolve().parents[1] / "docs"
# One runs in a test of its own, one is what a command prints about a file that it wrote.
ELSEWHERE = {DOCS / "encoders.md", DOCS / "train.md"}


def examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page not in ELSEWHERE and examples(page)]


@pytest.fixture
def own_methods():
    """Methods that an example adds end with it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.usefixtures("own_methods")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run_as_printed(page):
    for example in examples(page):
        exec(compile(example, page.name, "exec"), {})


def test_the_list_of_public_names_is_complete():
    page = (DOCS / "api.md").read_text()
    names = re.findall(r"^\| `([\w.]+)` \|", page, flags=re.M)
    public = [n for n in neulig_fast.__all__ if not inspect.ismodule(getattr(neulig_fast, n))]
    assert sorted(n for n in names if "." not in n) == sorted(public)
    for name in names:
        assert operator.attrgetter(name)(neulig_fast).__doc__
