"""The tables of merge methods in docs/, from the table of methods itself.

    python tools/method_tables.py        # writes them anew; tests/test_docs.py compares

A page of docs/methods says which methods it is about, ``<!-- methods: slerp nuslerp -->``; what
stands from there to ``<!-- end of methods -->`` is written here. docs/merge.md has all methods,
each with a link to its page: ``<!-- methods: all -->``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import isinf
from pathlib import Path

from neulig_fast.methods import METHODS, Method, Parameter

DOCS = Path(__file__).resolve().parents[1] / "docs"
OVERVIEW = DOCS / "merge.md"
_BLOCK = re.compile(r"(<!-- methods: ([\w ]+) -->\n).*?(<!-- end of methods -->)", re.S)


def pages() -> dict[str, Path]:
    """The page of every method that has one, by its name."""
    found = {}
    for page in sorted((DOCS / "methods").glob("*.md")):
        for block in _BLOCK.finditer(page.read_text()):
            found |= dict.fromkeys(block[2].split(), page)
    return found


def rendered(text: str) -> str:
    """A page with its tables as they have to be."""

    def block(match: re.Match[str]) -> str:
        names = match[2].split()
        lines = _overview() if names == ["all"] else _tables([METHODS[name] for name in names])
        return match[1] + "\n".join(lines) + "\n" + match[3]

    return _BLOCK.sub(block, text)


def _overview() -> Iterator[str]:
    where, rows = pages(), [("`merge_method`", "", "source", "page")]
    for method in METHODS.values():
        page = where[method.name]
        link = f"[{page.stem.replace('-', ' ')}]({page.relative_to(DOCS).as_posix()})"
        rows.append((f"`{method.name}`", method.title, method.source, link))
    yield from _table(rows)


def _tables(methods: Sequence[Method]) -> Iterator[str]:
    base = {"needed": "needed", "subtracted": "if given", "one more": "–"}
    rows = [("method", "source", "base model", "experts", "parity")]
    for m in methods:
        parities = ", ".join(f"`{parity}`" for parity in m.parities)
        rows.append((f"`{m.name}`", m.source, base[m.base], _count(m), parities))
    yield from _table(rows if any(len(m.parities) > 1 for m in methods) else [r[:-1] for r in rows])
    places: dict[tuple[str, Parameter], list[str]] = {}
    for m in methods:
        for place in m.parameters.items():
            places.setdefault(place, []).append(f"`{m.name}`")
    rows = [("parameter", "of", "default", "values", "methods")]
    for (name, p), users in sorted(places.items(), key=lambda place: not place[0][1].each):
        whose = "each expert" if p.each else "the merge"
        default = "must be given" if p.default is None else f"`{_text(p.default)}`"
        where = "all" if len(users) == len(methods) else ", ".join(users)
        rows.append((f"`{name}`", whose, default, _values(p), where))
    if len(rows) > 1:
        yield ""
        yield from _table(rows if len(methods) > 1 else [row[:-1] for row in rows])


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    head, *others = (f"| {' | '.join(row)} |" for row in rows)
    yield from (head, "|---" * len(rows[0]) + "|", *others)


def _count(method: Method) -> str:
    if method.most is None:
        return f"{method.fewest} or more"
    return " or ".join(str(n) for n in dict.fromkeys((method.fewest, method.most)))


def _text(value: float | bool | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:g}"


def _values(p: Parameter) -> str:
    if p.words:
        return ", ".join(f"`{word}`" for word in p.words)
    if p.kind not in (int, float):
        return "true or false" if p.kind is bool else "a model"
    kind = "a number" if p.kind is float else "a whole number"
    if isinf(p.low):
        return kind
    return f"{kind}, {p.low:g} or more" if isinf(p.high) else f"{kind}, {p.low:g} to {p.high:g}"


def main() -> None:
    for page in (*sorted((DOCS / "methods").glob("*.md")), OVERVIEW):
        text = page.read_text()
        if text != rendered(text):
            page.write_text(rendered(text))
            print(page)


if __name__ == "__main__":
    main()
