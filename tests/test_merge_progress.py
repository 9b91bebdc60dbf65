"""What a merge says while it runs and of what it would do, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import neulig_fast as nf
from neulig_fast.checkpoints import merging, sizes
from neulig_fast.checkpoints.forecast import Forecast
from neulig_fast.checkpoints.report import Progress, progress_text
from neulig_fast.demo import llamas

GIB = 1 << 30


def foreseen(**changes: Any) -> Forecast:
    """3 GiB read at 3 GiB/s and 1 GiB written at 0.5 GiB/s: 4 GiB in 3 s."""
    plain = Forecast(3 * GIB, GIB, 0, 1, GIB, 3 * GIB, GIB / 2, 9 * GIB, 3.0, "the disk")
    return plain._replace(**changes)


def test_the_disks_speed_is_of_what_is_read_and_written_together() -> None:
    assert foreseen().disk == pytest.approx(4 / 3 * GIB)
    assert foreseen(bytes_out=0).disk == pytest.approx(3 * GIB)
    assert foreseen(bytes_in=0, bytes_out=0).disk == 0


def test_progress_in_words() -> None:
    text = progress_text(2 * GIB, 4 * GIB, 2.0, foreseen())
    assert text == (
        "50 % of 4 GiB; 1 GiB/s, 75 % of the disk's speed, bound by the disk; 2 GiB and 2 s left"
    )
    text = progress_text(GIB // 2, 100 * GIB, 1.0, None)
    assert text == "0 % of 100 GiB; 512 MiB/s; 99.5 GiB and 3 min 19 s left"
    text = progress_text(GIB, 8000 * GIB, 1.0, foreseen(bound="ties on 2 threads"))
    assert "75 % of the disk's speed, bound by ties on 2 threads" in text
    assert text.endswith("7.81 TiB and 2 h 13 min left")
    assert progress_text(0, 4 * GIB, 5.0, foreseen()) == "0 % of 4 GiB"
    assert progress_text(0, 0, 0.0, None) == "0 % of 0 bytes"
    assert progress_text(7, 7, 0.0, None) == "100 % of 7 bytes"


def test_the_clock_starts_when_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    shown: list[str] = []
    progress = Progress(lambda done, total, text: shown.append(text))
    now[0] = 10.0
    progress.foreseen(foreseen())
    now[0] = 12.0
    progress.advance(2 * GIB, 4 * GIB)
    assert "1 GiB/s, 75 %" in shown[0]


def test_tensors_beyond_memory_are_told_in_bytes() -> None:
    assert "again" not in str(foreseen())
    assert f"{foreseen().seconds:.2g} s besides start-up and checks, bound by" in str(foreseen())
    text = str(foreseen(bytes_again=2 * GIB))
    assert "reads 3 GiB and up to 2 GiB again, of tensors that do not fit into memory" in text


def test_a_merge_foresees_what_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"large": torch.ones(1 << 23), "small": torch.ones(100)}
    for name in ("m0", "m1"):
        llamas.write(tmp_path / name, state, torch.float32, shards=1)
    models = [{"model": str(tmp_path / name)} for name in ("m0", "m1")]
    config = {"merge_method": "karcher", "models": models}
    told: list[Forecast] = []
    nf.merge(config, tmp_path / "out", foreseen=told.append)
    assert not told
    monkeypatch.setattr(merging, "_LONG", 0)
    options: dict[str, Any] = {"max_ram": "128M", "threads": 1, "resume": False}
    nf.merge(config, tmp_path / "out", foreseen=told.append, **options)
    # Karcher's inner products read what does not fit once more: 64 MiB hold 5 M elements of it.
    assert [found.bytes_again for found in told] == [2 * 4 << 23]
    assert told[0].bytes_in == 2 * 4 * ((1 << 23) + 100)


def test_slips_of_the_pen_are_warned_of(tmp_path: Path) -> None:
    llamas.family(tmp_path, 2)
    own = {"weight": [{"filter": "mpl", "value": 0.5}, {"filter": "mlp", "value": 1}, {"value": 2}]}
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / name), "parameters": own} for name in ("m0", "m1")],
        "parameters": {"lambda": [{"filter": "*", "value": 1.0}]},
        "neulig_fast": {"outputs": {"a": {"parameters": {"lambda": {"filter": "x_", "value": 1}}}}},
    }
    report = nf.merge(config, tmp_path / "out", max_ram="900G", threads=1, shard_size=1000)
    memory, *others = report.warnings
    assert memory.startswith("max_ram is 900 GiB, this machine has ")
    assert others == [
        "lambda: the filter 'x_' is part of no tensor's name",
        "weight: the filter 'mpl' is part of no tensor's name",
        "shard_size is 1000 bytes: the result has 18 files of weights",
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [(1023, "1023 bytes"), (1 << 20, "1 MiB"), (1023 << 20, "1023 MiB"), (1000 << 20, "1000 MiB")],
)
def test_sizes_have_no_exponents(size: int, text: str) -> None:
    assert sizes.text(size) == text
