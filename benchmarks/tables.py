"""Tables and figures of README and docs, written anew from the committed rows.

``python -m neulig_fast.benchmarks.tables`` (or ``make tables``) replaces what stands between

    <!-- rows: NAME -->
    <!-- end of rows -->

by what the function of that name in ``BLOCKS`` makes of benchmarks/results, and draws a roofline
per device that has rows of ``machine``. tests/test_readme.py holds the pages to it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from . import machine
from .rows import Row, read

ROOT = machine.ROOT
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
FIGURES = ROOT / "docs" / "figures"
_BLOCK = re.compile(r"(<!-- rows: ([\w-]+) -->\n).*?(<!-- end of rows -->)", flags=re.S)
_CASE = ("op", "shape", "N", "K", "S", "dtype", "threads")
_LEVEL = 0.03  # less of a difference is no lead: medians move from run to run
_OTHERS = ("torch.compile", "torch._foreach", "flat matmul", "python loop")


@functools.cache
def rows_of(folder: Path) -> list[Row]:
    """All rows of one device."""
    return [row for file in sorted(folder.glob("*.csv")) for row in read(file)]


def devices() -> list[Path]:
    """The folders with rows; CPUs first."""
    found = [path for path in sorted(RESULTS.iterdir()) if path.is_dir() and rows_of(path)]
    return sorted(found, key=_is_gpu)


def _is_gpu(folder: Path) -> bool:
    return not rows_of(folder)[0]["threads"]


def cases_of(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each case, in the order of the files."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        mode = row["mode"].partition(",")[0]
        found.setdefault((mode, *(row[column] for column in _CASE)), []).append(row)
    return list(found.values())


def _is_ours(row: Row) -> bool:
    return row["provider"].startswith("neulig_fast")


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row of the least time among those that are right."""
    right = [r for r in rows if r["ms_q50"] and not r["check"].startswith(("wrong", "failed"))]
    return min(right, key=lambda row: float(row["ms_q50"]), default=None)


def _sides(rows: Iterable[Row]) -> tuple[Row | None, Row | None]:
    """Our fastest row of a case, and everybody else's."""
    rows = [row for row in rows if not row["provider"].startswith("ceiling/")]
    ours = fastest(row for row in rows if _is_ours(row))
    return ours, fastest(row for row in rows if not _is_ours(row))


def _table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    header = list(header)
    text = [header, ["---"] * len(header), *([cell or "–" for cell in line] for line in lines)]
    return "".join("| " + " | ".join(line) + " |\n" for line in text)


def _per_device(section: Callable[[Path], str]) -> str:
    """The sections of all devices that have one, and what is missing, in words."""
    parts = []
    for folder in devices():
        text = section(folder)
        if text:
            newest = max(rows_of(folder), key=lambda row: row["date"])
            title = f"{newest['device']} (torch {newest['torch']}, {newest['date']})"
            parts.append(f"**{title}**\n\n{text}")
    gpu = any(_is_gpu(folder) and section(folder) for folder in devices())
    if not parts:
        return "No rows are committed yet.\n"
    return "\n".join(parts if gpu else [*parts, "No rows of a GPU are committed yet.\n"])


# -- the blocks -----------------------------------------------------------------------------------


def readme() -> str:
    """The blend of N experts of ViT-B/32's size, per device."""
    return _per_device(_readme_table)


def _readme_table(folder: Path) -> str:
    wanted = {"op": "blend", "mode": "fwd", "shape": "ViT-B-32", "K": "1", "S": "1"}
    chosen = [row for row in rows_of(folder) if wanted.items() <= row.items()]
    most = max((row["threads"] for row in chosen), key=lambda count: int(count or 0), default="")
    lines, leads, published = [], [], ""
    for case in cases_of(row for row in chosen if row["threads"] == most):
        ours, other = _sides(case)
        if ours is None:
            continue
        by_name = {row["provider"]: row["ms_q50"] for row in case}
        cells = [ours["ms_q50"], ours["pct_copy"], *(by_name.get(p, "") for p in _OTHERS)]
        lines.append([ours["N"], ours["dtype"], *cells])
        if other is not None:
            leads.append(float(other["ms_q50"]) / float(ours["ms_q50"]))
        if (ours["N"], ours["dtype"]) == ("5", "float32"):
            published = by_name.get("published: flatten and loop", "")
    if not lines:
        return ""
    header = ["experts", "dtype", "`blend` ms", "% of copy bandwidth", "torch.compile ms"]
    header += ["`torch._foreach` ms", "flat matmul ms", "Python loop ms"]
    lines.sort(key=lambda line: (line[1] != "float32", int(line[0])))
    ahead = sum(lead > 1 + _LEVEL for lead in leads)
    level = sum(abs(lead - 1) <= _LEVEL for lead in leads)
    text = (
        f"Of {len(leads)} rows, ahead of every other way in {ahead}, and level with the best of "
        f"them, within {_LEVEL:.0%}, in {level}.\n"
    )
    if published:
        text += f"The published flatten-and-loop takes {published} ms for five experts in fp32.\n"
    return f"{_table(header, lines)}\n{text}"


def training() -> str:
    """A step of Portland training, the demo's experts."""
    for folder in devices():
        found = {
            row["provider"]: row["ms_q50"]
            for row in rows_of(folder)
            if (row["op"], row["shape"]) == ("neulig_fit", "demo ViT")
        }
        if found:
            ours, published = found["neulig_fast"], found["published: experts in every step"]
            filled = found["neulig_fast, cache filled in the run"]
            return (
                f"Portland training on cached features takes {ours} ms a step for the demo's five "
                f"experts, against\n{published} ms when every step runs the experts as published. "
                f"The one pass that fills the cache, spread over\n20 epochs of one step, makes it "
                f"{filled} ms.\n"
            )
    return ""


def merging() -> str:
    """A batch through merged models of its own, beside its ensemble."""
    wanted = {"shape": "ViT-B-32", "N": "5", "dtype": "float32", "mode": "batch 8"}
    for folder in devices():
        found = {
            (row["op"], row["provider"]): row["ms_q50"]
            for row in rows_of(folder)
            if wanted.items() <= row.items()
        }
        if found:
            merged = [
                found["mixture_forward", name]
                for name in ("neulig_fast", "blend per image", "Python sum per image, as published")
            ]
            return (
                f"Eight images through a merged model each, five ViT-B/32 experts in fp32, take "
                f"{merged[0]} ms an image; blending\nthe models one by one with our own operator "
                f"{merged[1]} ms, with the published loop {merged[2]} ms; the ensemble's\nfive "
                f"forwards {found['expert_forward', 'loop']} ms.\n"
            )
    return ""


def ceilings() -> str:
    """What each machine can do."""
    return _per_device(_ceilings)


def _ceilings(folder: Path) -> str:
    limits = [row for row in rows_of(folder) if row["op"] == "machine"]
    columns = ("shape", "dtype", "ms_q50", "gb_s", "tflop_s")
    lines = [
        [row["provider"].removeprefix("ceiling/"), *(row[column] for column in columns)]
        for row in limits
    ]
    return _table(["limit", "size", "dtype", "ms", "GB/s", "TFLOP/s"], lines) if lines else ""


def op(name: str) -> str:
    """Every case of one op: our fastest backend beside the fastest other way."""
    return _per_device(functools.partial(_op, name))


_COLUMNS = {
    **{
        name: name for name in ("mode", "shape", "N", "K", "weights", "dtype", "threads", "backend")
    },
    "ms_q50": "ms",
    "gb_s": "GB/s",
    "pct_copy": "% of copy",
    "peak_mb": "peak MB",
    "host_us": "host µs",
    "one": "one model, ms",
    "ratio": "ratio",
    "rival": "to the best other",
}


def _op(name: str, folder: Path) -> str:
    found = []
    for case in cases_of(row for row in rows_of(folder) if row["op"] == name):
        ours, other = _sides(case)
        if ours is not None:
            more = {
                "backend": ours["provider"].removeprefix("neulig_fast").lstrip("/, "),
                "weights": "per tensor" if ours["S"] not in ("", "1") else "",
                "one": next(
                    (r["ms_q50"] for r in case if r["provider"] == "ceiling/one model"), ""
                ),
                "rival": other["provider"] if other else "",
            }
            found.append(ours | more)
    kept = [column for column in _COLUMNS if any(row[column] for row in found)]
    lines = ([row[column] for column in kept] for row in found)
    return _table([_COLUMNS[column] for column in kept], lines) if found else ""


def rooflines() -> str:
    """The figures, one per device whose limits were measured."""
    names = [figure_of(folder).name for folder in devices() if _has_limits(folder)]
    if not names:
        return "Figures appear here with the first rows of `machine`.\n"
    return "\n".join(f"![Roofline of {Path(name).stem}](figures/{name})\n" for name in names)


def _has_limits(folder: Path) -> bool:
    return any(row["op"] == "machine" for row in rows_of(folder))


def figure_of(folder: Path) -> Path:
    """Where the roofline of a device is drawn."""
    return FIGURES / f"roofline-{folder.name}.svg"


_OPS = (
    "blend",
    "blend_weight_grad",
    "blend_lists",
    "blend_lists_weight_grad",
    "offset_gram",
    "blend_telemetry",
    "mixture_linear",
    "expert_linear",
    "mixture_layer_norm",
    "expert_layer_norm",
    "mixture_forward",
    "expert_forward",
    "cross_moments",
    "align",
    "merge",
    "merge_task_vectors",
    "magnitude_select",
    "magnitude_histogram",
    "magnitude_sums",
    "gram",
    "lerp_lists",
    "dropin",
    "neulig_loss",
    "neulig_fit",
)
BLOCKS: dict[str, Callable[[], str]] = {
    "readme": readme,
    "training": training,
    "merging": merging,
    "ceilings": ceilings,
    "rooflines": rooflines,
    **{name.replace("_", "-"): functools.partial(op, name) for name in _OPS},
}


def rendered(page: str) -> str:
    """The page with its blocks as the rows say now."""
    return _BLOCK.sub(lambda m: m[1] + BLOCKS[m[2]]() + m[3], page)


def main() -> None:
    """Rewrite the pages and draw the figures."""
    from .plot import roofline

    for folder in filter(_has_limits, devices()):
        roofline(rows_of(folder), figure_of(folder))
        print(figure_of(folder).relative_to(ROOT))
    for page in PAGES:
        old = page.read_text()
        new = rendered(old)
        page.write_text(new)
        print(f"{page.relative_to(ROOT)}: {'rewritten' if new != old else 'was right'}")


if __name__ == "__main__":
    main()
