"""Every benchmark at toy size, and the harness's promises. No time is asserted."""

import functools
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

# As python does for a script in that folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_blend
import ceilings
import harness
import machine
import plot
import rows
import shapes
from harness import Case, Provider

from neulig_fast import testing

FOLDER = Path(harness.__file__).parent
BENCHMARKS = sorted(path.stem for path in FOLDER.glob("bench_*.py"))


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 1)
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


@pytest.mark.parametrize("name", BENCHMARKS)
def test_runs_at_toy_size_and_every_result_is_checked(name):
    module = importlib.import_module(name)
    for one in module.cases("cpu", True):
        measured = harness.measure(one, quick=True)
        sides = {provider.name: provider.side for provider in one.providers}
        assert [row["provider"] for row in measured] == list(sides)
        for row in measured:
            side = sides[row["provider"]]
            assert set(row) == set(rows.COLUMNS)
            assert row["op"] == name.removeprefix("bench_")
            assert float(row["ms_q20"]) <= float(row["ms_q50"]) <= float(row["ms_q80"])
            assert row["check"].split(":")[0] in {"ceiling": [""], "ours": ["ok"]}.get(
                side, ["ok"] if name == "bench_blend" else ["ok", "wrong"]
            ), row["check"]
            assert bool(row["ratio"]) == (row["check"] == "ok")
        assert any(row["check"] == "ok" and sides[row["provider"]] == "theirs" for row in measured)


def test_a_blend_of_one_wrong_column_is_wrong():
    one = next(bench_blend.cases("cpu", True))
    result = one.providers[0].run().clone()
    result[-30] += 1e-3 * result.abs().max()
    with pytest.raises(AssertionError, match="over the allowed"):
        one.check(result)


def test_vit_b_32_is_open_clips():
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        model = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-32"))
    expected = [(name, tuple(t.shape)) for name, t in model.state_dict().items()]
    assert list(shapes.clip_tensors(**shapes.VIT_B_32)) == expected
    assert len(expected) == 302


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
    monkeypatch.setattr(machine, "name", lambda device: "AMD EPYC (TM) 9B14, 2 cores")
    assert machine.slug("cpu") == "amd-epyc-tm-9b14-2-cores"


def test_scripts_start_over_with_warm_malloc(tmp_path):
    script = tmp_path / "bench.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "import harness, machine\n"
        "harness.main('empty', lambda device, quick: print(machine.identity(device)) or iter(()))\n"
    )
    command = [sys.executable, script, "--quick", "--device", "cpu", "--out", tmp_path / "out.csv"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
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
