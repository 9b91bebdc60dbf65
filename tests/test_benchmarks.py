"""Every benchmark at toy size, and the harness's promises. No time is asserted."""

import dataclasses
import functools
import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import parallel_num_threads
from typer.testing import CliRunner

from neulig_fast import benchmarks, testing
from neulig_fast.benchmarks import (
    bench_blend,
    bench_machine,
    ceilings,
    harness,
    machine,
    plot,
    rows,
    selection,
    session,
    shapes,
    tables,
    timing,
)
from neulig_fast.benchmarks.harness import Case, Provider
from neulig_fast.benchmarks.selection import Selection
from neulig_fast.cli import app

ROOT = Path(__file__).resolve().parents[1]
OPS = [name for name in benchmarks.names() if name != "machine"]


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 1)
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1 << 20)
    # The graph is what is checked here; making C++ of it takes longer than everything else.
    compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(harness, "compiled", compiled)


def case(*providers, **changes):
    def check(result):
        one = torch.ones(3)
        testing.assert_within_rule(result, one, one.double())

    settings = {"op": "op", "mode": "fwd", "shape": "toy", "dtype": torch.float32, "device": "cpu"}
    settings |= {"threads": 1, "traffic": 12, "check": check, "providers": list(providers)}
    return Case(**settings | changes)


# -- every benchmark ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_runs_at_toy_size_and_every_result_is_checked(name):
    module = importlib.import_module(f"neulig_fast.benchmarks.bench_{name}")
    for one in module.cases("cpu", True):
        measured = harness.measure(one, quick=True)
        sides = {provider.name: provider.side for provider in one.providers}
        assert [row["provider"] for row in measured] == list(sides)
        for row in measured:
            side = sides[row["provider"]]
            assert set(row) == set(rows.COLUMNS)
            assert row["op"] == name
            assert float(row["ms_q20"]) <= float(row["ms_q50"]) <= float(row["ms_q80"])
            assert row["check"].split(":")[0] in {"ceiling": [""], "ours": ["ok"]}.get(
                side, ["ok"] if name == "blend" else ["ok", "wrong"]
            ), row["check"]
            assert bool(row["peak_mb"]) == (side != "ceiling")
            assert bool(row["ratio"]) == (row["check"] == "ok")
        assert any(row["check"] == "ok" and sides[row["provider"]] == "theirs" for row in measured)


def test_a_blend_of_one_wrong_column_is_wrong():
    one = next(bench_blend.cases("cpu", True))
    result = one.providers[0].run().clone()
    result[-30] += 1e-3 * result.abs().max()
    with pytest.raises(AssertionError, match="over the allowed"):
        one.check(result)


@pytest.mark.parametrize("shape, count", [(shapes.VIT_B_32, 302), (shapes.VIT_L_14, 446)])
def test_the_clip_models_are_open_clips(shape, count):
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        model = open_clip.model.CLIP(**open_clip.get_model_config(shape.name))
    expected = [(name, tuple(t.shape)) for name, t in model.state_dict().items()]
    assert list(shape.tensors()) == expected
    assert len(expected) == count


def test_the_decoder_has_as_many_parameters_as_published():
    sizes = dict(shapes.QWEN_1_5B.tensors())
    assert sum(map(math.prod, sizes.values())) == 1_543_714_304
    assert len(sizes) == 338


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_grid_holds_what_was_promised(device):
    grid = set()
    for one in bench_blend.settings(False, device):
        grid.add((one.shape.name, one.dtype, one.N, one.K or 1))
    for dtype in (torch.float32, torch.bfloat16):
        assert {("ViT-B-32", dtype, N, 1) for N in (2, 3, 5, 8, 16)} <= grid
        assert ("ViT-B-32", dtype, 5, 8) in grid
        assert {(s, dtype, N, 1) for s in ("ViT-L-14", "Qwen2.5-1.5B") for N in (2, 5)} <= grid


def test_a_case_whose_inputs_do_not_fit_is_skipped_in_words(capsys, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda device: 10**9)
    wanted = Selection(full=False, shapes=frozenset({"ViT-L-14"}))
    with selection.selecting(wanted):
        assert list(bench_blend.cases("cpu", False)) == []
    assert "blend ViT-L-14 N=5 K=1 float32 skipped: " in capsys.readouterr().out


def test_experts_are_one_memory_seen_twice():
    segments = shapes.layout(shapes.TOY, torch.bfloat16)
    experts = shapes.make_experts(2, segments, torch.bfloat16, "cpu")
    states = experts.state_dicts
    used = sum(tensor.numel() for tensor in states[0].values())
    assert int((experts.params[0] != 0).sum()) <= used < segments.width
    states[1]["logit_scale"].fill_(7)
    start = segments[segments.index("logit_scale")].start
    assert experts.params[1, start] == 7
    assert all(
        tensor.data_ptr() % 128 == experts.params.data_ptr() % 128 for tensor in states[1].values()
    )


# -- the harness ----------------------------------------------------------------------------------


def test_wrong_and_failed_results_get_no_ratio():
    def fails():
        raise RuntimeError("no memory\nat all")

    measured = harness.measure(
        case(
            Provider("neulig_fast/a", lambda: torch.ones(3), "ours"),
            Provider("wrong", lambda: torch.full((3,), 1.1)),
            Provider("shape", lambda: torch.ones(4)),
            Provider("fails", fails),
            Provider("right", lambda: torch.ones(3)),
        ),
        quick=True,
    )
    by_name = {row["provider"]: row for row in measured}
    assert by_name["wrong"]["check"].startswith("wrong: error 1.000e-01 is over")
    assert by_name["shape"]["check"].startswith("wrong: expected (3,)")
    assert by_name["fails"]["check"] == "failed: no memory"
    assert not by_name["fails"]["ms_q50"]
    assert all(not by_name[name]["ratio"] for name in ("wrong", "shape", "fails"))
    refused = rows.refusals(measured)
    assert [text.split(":")[0].rsplit(" ", 1)[1] for text in refused] == ["wrong", "shape", "fails"]
    assert refused[0].startswith("no speed-up is given against wrong: wrong: error 1.000e-01")
    right, ours = by_name["right"], by_name["neulig_fast/a"]
    expected = float(right["ms_q50"]) / float(ours["ms_q50"])
    assert float(ours["ratio"]) == pytest.approx(expected, rel=0.01)


def test_providers_run_interleaved_and_slow_ones_in_the_first_rounds_only():
    calls = []

    def provider(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds)
            return torch.ones(3)

        return Provider(name, run)

    harness.measure(case(provider("A", 0.001), provider("B", 0.001), provider("C", 0.1)))
    assert "".join(calls).startswith("AABBCC" + "ABC" * harness.SLOW_ROUNDS + "ABAB")
    assert calls.count("C") == 2 + harness.SLOW_ROUNDS


def test_a_provider_that_does_not_fit_into_memory_is_skipped_aloud(capsys):
    provider = Provider("huge", lambda: torch.ones(3), needs=1 << 60)
    measured = harness.measure(case(provider, Provider("small", lambda: torch.ones(3))), quick=True)
    assert [row["provider"] for row in measured] == ["small"]
    assert "huge skipped" in capsys.readouterr().out


def test_the_number_of_threads_is_the_cases_and_restored():
    seen = []
    before = torch.get_num_threads()
    provider = Provider("p", lambda: (seen.append(torch.get_num_threads()), torch.ones(3))[1])
    harness.measure(case(provider, threads=2), quick=True)
    assert set(seen) == {2}
    assert torch.get_num_threads() == before


def test_steps_divide_the_time():
    def run():
        time.sleep(0.02)
        return torch.ones(3)

    whole, tenth = harness.measure(
        case(Provider("a", run), Provider("b", run, steps=10)), quick=True
    )
    assert float(whole["ms_q50"]) > 3 * float(tenth["ms_q50"])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("write", [True, False])
def test_ceilings_move_all_they_claim(threads, write):
    data = torch.randint(-(2**31), 2**31 - 1, (4, 32 * 21), dtype=torch.int32)
    mixed = functools.reduce(torch.bitwise_xor, data)
    names = []
    for ceiling in ceilings.ceilings(data, threads, write=write):
        got = ceiling.run()
        names.append(ceiling.name)
        if "copy" in ceiling.name:
            assert ceiling.traffic == 2 * data[0].nbytes
            assert torch.equal(got, data[0])
        elif write:
            assert ceiling.traffic == data.nbytes + data[0].nbytes
            assert torch.equal(got, mixed)
            got.zero_()
        else:
            assert ceiling.traffic == data.nbytes
            lines = got.view(torch.int32).view(threads, 16)
            expected = functools.reduce(torch.bitwise_xor, mixed.view(-1, 16))
            assert torch.equal(functools.reduce(torch.bitwise_xor, lines), expected)
    assert len(names) == (2 if ceilings.library() is None else 4 if write else 3)


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_quantiles(count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(count)).double()
    for q in (0.2, 0.5, 0.8):
        assert rows.quantile(values.tolist(), q) == pytest.approx(float(values.quantile(q)))


def test_a_second_run_replaces_the_file(tmp_path):
    path = tmp_path / "machine" / "op.csv"
    measured = harness.measure(case(Provider("p", lambda: torch.ones(3))), quick=True)
    rows.write(path, [*measured, *measured])
    rows.write(path, measured)
    assert rows.read(path) == [{key: str(value) for key, value in measured[0].items()}]
    assert set(measured[0]) >= {"device", "driver", "torch", "triton", "commit", "date", "malloc"}


def test_folder_names_are_plain(monkeypatch):
    monkeypatch.setattr(machine, "name", lambda device: "AMD EPYC (TM) 9B14, 2 cores, AVX2")
    assert machine.slug("cpu") == "amd-epyc-tm-9b14-2-cores-avx2"


def test_scripts_start_over_with_warm_malloc(tmp_path):
    script = tmp_path / "bench.py"
    script.write_text(
        "from neulig_fast.benchmarks import harness, machine\n"
        "harness.main('empty', lambda device, quick: print(machine.identity(device)) or iter(()))\n"
    )
    command = [sys.executable, script, "--quick", "--device", "cpu", "--out", tmp_path / "out.csv"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert "'malloc': 'warm'" in done.stdout, done.stderr
    assert rows.read(tmp_path / "out.csv") == []


def test_figures_come_from_rows(tmp_path):
    measured = []
    for N in (2, 3, 5):
        ours = Provider("neulig_fast/cpu", lambda: torch.ones(3), "ours")
        ceiling = Provider("ceiling/copy torch", lambda: None, "ceiling", traffic=24)
        wrong = Provider("wrong", lambda: torch.zeros(3))
        measured += harness.measure(case(ours, wrong, ceiling, numbers={"N": N}), quick=True)
    rows.write(tmp_path / "results" / "op.csv", measured)
    drawn = plot.plot(tmp_path / "results", tmp_path / "figures")
    assert len(drawn) == 2
    assert "(wrong)" in drawn[1].read_text() or drawn[1].stat().st_size > 1000


def test_a_roofline_of_any_rows(tmp_path):
    ours = Provider("neulig_fast/cpu", lambda: torch.ones(3), "ours")
    limits = [row for c in bench_machine.cases("cpu", True) for row in harness.measure(c, True)]
    measured = harness.measure(case(ours, flops=6, numbers={"N": 2}), quick=True)
    old = [{**row, "tflop_s": ""} for row in measured]
    for number, found in enumerate(([], limits, measured, [*limits, *measured], [*limits, *old])):
        path = tmp_path / f"{number}.svg"
        plot.roofline(found, path)
        assert path.stat().st_size > 1000


def test_tables_show_every_device_that_has_rows(tmp_path, monkeypatch):
    ours = Provider("neulig_fast/cuda", lambda: torch.ones(3), "ours")
    both = case(ours, Provider("other", lambda: torch.ones(3)), op="blend", shape="ViT-B-32")
    numbers = {"N": 5, "K": 1, "S": 1}
    measured = harness.measure(dataclasses.replace(both, numbers=numbers), quick=True)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows.write(tmp_path / "cpu" / "blend.csv", measured)
    assert "No rows of a GPU" in tables.readme()
    assert "host µs" not in tables.op("blend")
    assert tables.op("offset_gram") == "No rows are committed yet.\n"
    on_gpu = [{**row, "threads": "", "host_us": "7.5", "device": "A GPU"} for row in measured]
    rows.write(tmp_path / "a-gpu" / "blend.csv", on_gpu)
    assert [path.name for path in tables.devices()] == ["cpu", "a-gpu"]
    text = tables.rendered("<!-- rows: blend -->\nold\n<!-- end of rows -->\n")
    assert "No rows of a GPU" not in tables.readme() + text
    assert "**A GPU (torch" in text
    assert re.search(r"\| fwd \| ViT-B-32 \| 5 \| 1 \|.*\| cuda \|.*\| 7.5 \|.*\| other \|", text)
    assert "old" not in text


def test_a_gpu_waits_until_a_call_is_queued(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            log.append("event")

        def elapsed_time(self, other):
            return 10.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"busy {cycles > 1e5}"))
    timing._cycles_per_second.cache_clear()
    clock = timing.Clock("cpu")
    clock.device = "cuda"
    clock(lambda: None)
    log.clear()
    taken = clock(lambda: log.append("call"))
    timing._cycles_per_second.cache_clear()
    assert log == ["wait", "call", "wait", "busy True", "event", "call", "event", "wait"]
    assert taken.ms == 10.0
    assert taken.per(2) == (5.0, taken.host_us / 2)


def test_memory_is_given_back_before_it_runs_out_and_warmed_again(monkeypatch):
    log, room = [], iter([True, True, True, True, True, False, *[True] * 20])
    monkeypatch.setattr(machine, "has_room", lambda needs: next(room))
    monkeypatch.setattr(timing, "return_freed_memory", lambda: log.append("-"))

    def provider(name):
        return Provider(name, lambda: (log.append(name), torch.ones(3))[1])

    harness.measure(case(provider("A"), provider("B"), provider("C")), quick=True)
    # Checked and called; then three rounds. Memory is given back before C is timed in the first.
    assert "".join(log) == "AABBCC" + "AB-CC" + "AABBC" + "ABC"


# -- what a call costs beside its time ------------------------------------------------------------


def test_peak_is_what_torch_had_allocated_at_once():
    def run():
        parts = [torch.empty(250_000) for _ in range(4)]  # 4 MB
        del parts[1:]
        return torch.empty(500_000)  # 2 MB

    result, peak = timing.with_peak(run, "cpu")
    assert result.shape == (500_000,)
    assert peak == pytest.approx(4, rel=0.01)


def test_rates_are_those_of_the_formula():
    ours = Provider("neulig_fast/cpu", lambda: torch.ones(3), "ours")
    roof = Provider("ceiling/matmul", lambda: None, "ceiling", traffic=30, flops=600)
    for row in harness.measure(case(ours, roof, flops=6), quick=True):
        expected = 20 if row["provider"] == "ceiling/matmul" else 0.5
        assert 1e3 * float(row["tflop_s"]) / float(row["gb_s"]) == pytest.approx(expected, rel=1e-2)
        assert row["host_us"] == ""


def test_compiled_code_has_the_cases_threads(monkeypatch):
    seen = []
    provider = Provider("p", lambda: (seen.append(parallel_num_threads()), torch.ones(3))[1])
    for threads in (1, 2):
        harness.measure(case(provider, threads=threads), quick=True)
    assert set(seen[: len(seen) // 2]) == {1}
    assert set(seen[len(seen) // 2 :]) == {2}


# -- choosing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen, numbers, wanted",
    [
        (Selection(), {"N": 16, "K": 8}, True),
        (Selection(full=False), {"N": 5, "K": 1, "S": 1}, True),
        (Selection(full=False), {"N": 5, "K": 8}, False),
        (Selection(full=False), {"N": 2}, False),
        (Selection(full=False, shapes=frozenset({"ViT-B-32"})), {"N": 2}, True),
        (Selection(full=False, shapes=frozenset({"ViT-L-14"})), {"N": 5}, False),
        (Selection(dtypes=frozenset({torch.bfloat16})), {"N": 5}, False),
    ],
)
def test_what_is_wanted(chosen, numbers, wanted):
    with selection.selecting(chosen):
        assert selection.wanted("ViT-B-32", torch.float32, **numbers) is wanted
    assert selection.wanted("ViT-B-32", torch.float32, **numbers)


def test_only_chosen_providers_run_and_ceilings_stay():
    names = ("ours/a", "theirs", "more")
    found = [Provider(name, lambda: torch.ones(3)) for name in names]
    found.append(Provider("ceiling/copy", lambda: None, "ceiling", traffic=1))
    chosen = Selection(quick=True, providers=frozenset({"OURS", "mor"}))
    measured = harness.run(iter([case(*found), case(found[1])]), chosen)
    assert [row["provider"] for row in measured] == ["ours/a", "more", "ceiling/copy"]


def test_an_interrupted_session_keeps_the_finished_rows(monkeypatch):
    def cases(op, device, quick):
        yield case(Provider("p", lambda: torch.ones(3)), op=op)
        if op == "blend":
            raise KeyboardInterrupt

    monkeypatch.setattr(session, "_cases", cases)
    found, interrupted = session.measure(["blend", "offset_gram"], "cpu", Selection(quick=True))
    assert interrupted
    assert [row["op"] for row in found] == ["machine", "blend"]


def test_rows_as_json_have_the_committed_columns(tmp_path):
    measured = harness.measure(case(Provider("p", lambda: torch.ones(3))), quick=True)
    session.write(measured, tmp_path / "rows.json", None)
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert tuple(row) == rows.COLUMNS


def test_old_files_are_still_read(tmp_path):
    (tmp_path / "old.csv").write_text("op,provider,ms_q50\nblend,p,1.5\n")
    (row,) = rows.read(tmp_path / "old.csv")
    assert set(row) == set(rows.COLUMNS)
    assert (row["ms_q50"], row["host_us"]) == ("1.5", "")


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["blnd"], "unknown op 'blnd'; known: align, blend, "),
        (["--shapes", "ViT-B-32,vit"], "unknown shape 'vit'; known: toy, ViT-B-32, "),
        (["--dtype", "int8"], "unknown dtype 'int8'; known: float32, "),
        (["offset_gram", "--providers", "copmile"], "unknown provider 'copmile'; known: flat "),
        (["--quick", "--full"], "--quick has its own toy sizes"),
        (["--plot", "roof.txt"], "--plot must end in .svg"),
        (["--json", "no/such/folder/rows.json"], "is no file in an existing folder"),
    ],
)
def test_the_command_refuses_what_means_nothing(arguments, message):
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_command_writes_rows_and_a_roofline(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", machine.WARM_MALLOC)  # it does not start over
    files = tmp_path / "rows.json", tmp_path / "roof.svg"
    arguments = ["bench", "neulig_loss_backward", "--quick", "--device", "cpu", "--dtype", "fp32"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(files[0]), "--plot", str(files[1])])
    assert result.exit_code == 0, result.output
    assert {row["op"] for row in json.loads(files[0].read_text())} == {
        "machine",
        "neulig_loss_backward",
    }
    assert files[1].stat().st_size > 1000


@pytest.mark.parametrize("size", [300 << 20, 1 << 30, 4 << 30, 16 << 30])
def test_models_to_merge_have_the_size_that_is_asked_for(size):
    from neulig_fast.benchmarks import bench_merge
    from neulig_fast.demo import llamas

    shapes = llamas.shapes(**bench_merge.shaped(size)).values()
    assert 2 * sum(math.prod(shape) for shape in shapes) == pytest.approx(size, rel=0.1)
