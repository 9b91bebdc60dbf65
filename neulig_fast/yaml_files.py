"""YAML files, by the safe loader: nothing in them is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_MOST = 1_000_000  # values of a file: a few lines of aliases of aliases have billions


def read(path: str | Path) -> Any:
    """The content of a YAML file.

    Raises:
        OSError: no such file, or not readable.
        ValueError: broken YAML, with line and column; a key that appears twice; aliases that make
            more of the file than anybody can read.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        count = _count(content, {})
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {_why_broken(error)}") from error
    except (ValueError, RecursionError) as error:  # no number, no date; too deep
        raise ValueError(f"{path}: {error}") from error
    if count > _MOST:
        raise ValueError(f"{path}: has more than {_MOST} values, as its aliases are written out")
    return content


def _count(content: Any, known: dict[int, int]) -> int:
    """Values of YAML, with its aliases written out; what holds itself has more than any."""
    if not isinstance(content, (dict, list, tuple, set)):
        return 1
    if id(content) not in known:
        known[id(content)] = _MOST + 1
        below = content.values() if isinstance(content, dict) else content
        known[id(content)] = 1 + sum(_count(value, known) for value in below)
    return known[id(content)]


class _Loader(yaml.SafeLoader):
    """The safe loader, and a key that appears twice is an error instead of overwriting."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} appears twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _why_broken(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    if "could not determine a constructor" in problem:
        problem += "; tags such as !!python are not allowed"
    return f"{where}{problem}"
