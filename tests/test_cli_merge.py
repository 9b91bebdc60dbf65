"""``neulig-fast merge`` and ``verify`` as a user calls them."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from neulig_fast.cli import app
from neulig_fast.demo import llamas

ROOT = Path(__file__).resolve().parents[1]
RUN = CliRunner()


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What examples/small_models.py makes, in the working directory."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("models", ROOT / "examples/small_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(Path("models"), width=32, layers=2)
    return tmp_path


def test_models_to_try_it_on(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/small_models.py"), "models", "--width", "32"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [
        "base",
        "m0",
        "m1",
        "m2",
    ]


def test_the_readmes_commands(models: Path) -> None:
    config = str(ROOT / "examples/ties.yml")
    planned = RUN.invoke(app, ["merge", config, "merged", "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "rates measured just now" in planned.output
    assert not (models / "merged").exists()
    done = RUN.invoke(app, ["merge", config, "merged"])
    assert done.exit_code == 0, done.output
    assert "merged: 21 tensors" in done.output
    checked = RUN.invoke(app, ["verify", "merged"])
    assert checked.exit_code == 0, checked.output
    assert "ties of models/base, models/m0, models/m1, models/m2" in checked.output
    name = "model.layers.0.mlp.up_proj.weight"
    base, got = (llamas.load(models / folder)[name] for folder in ("models/base", "merged"))
    changed = (base != got).float().mean()
    assert 0.3 < changed < 0.9  # 30 % of each model's elements, of three models


def test_what_is_wrong_is_told_without_a_traceback(models: Path) -> None:
    Path("bad.yml").write_text("merge_method: tis\nmodels: [{model: models/m0}]\n")
    result = RUN.invoke(app, ["merge", "bad.yml", "merged"])
    assert result.exit_code == 2
    assert "there is no 'tis'; did you mean 'ties'?" in result.output
    assert RUN.invoke(app, ["merge", "none.yml", "merged"]).exit_code == 2
    result = RUN.invoke(app, ["verify", "models/m0"])
    assert result.exit_code == 2
    assert "not a merge" in result.output


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from neulig_fast.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "verify" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


# In a process of its own: what torch itself takes, then the most that a merge took beside it.
# Not getrusage's number, which begins at that of the process that started this one.
_MEASURED = """
import re, sys, torch
def most():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = most()
import neulig_fast as nf
nf.merge(sys.argv[1], sys.argv[2], max_ram=sys.argv[3])
print(most() - before)
"""


def peak(folder: Path, text: str, max_ram: str) -> int:
    """MiB that a merge takes at most."""
    (folder / "c.yml").write_text(text)
    files = [str(folder / "c.yml"), str(folder / "out")]
    command = [sys.executable, "-c", _MEASURED, *files, max_ram]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) >> 10


@pytest.mark.parametrize(
    ("method", "count", "million"), [("sce", 3, 8), ("arcee_fusion", 1, 8), ("model_stock", 3, 8)]
)
def test_what_is_computed_of_elements_or_blocks_takes_no_memory(
    tmp_path: Path, method: str, count: int, million: int
) -> None:
    """A variance or an importance of every element would take 64 MiB and more, and sums of blocks
    that lie between what they are made from hold all of that."""
    for name in ("base", *(f"m{i}" for i in range(count))):
        part = torch.randn(1 << 20, generator=torch.Generator().manual_seed(ord(name[-1])))
        llamas.write(tmp_path / name, {"w": part.repeat(million).view(-1, 64)}, shards=1)
    models = "".join(f"  - {{model: {tmp_path}/m{i}}}\n" for i in range(count))
    text = f"merge_method: {method}\nbase_model: {tmp_path}/base\nmodels:\n{models}"
    text += "parameters: {select_topk: 0.5}\n" if method == "sce" else ""
    least = million * (2 * (count + 1) + 2)  # MiB of its rows and the result
    # Beside it what a merge takes for itself, and pages of 2 MiB at the end of every row.
    assert least * 3 // 4 <= peak(tmp_path, text, "512M") <= least + 64 + 2 * (count + 2)


def test_the_cards_command_gives_the_same_bytes(tmp_path: Path) -> None:
    llamas.family(tmp_path, 1)
    text = f"merge_method: dare_linear\nbase_model: {tmp_path}/base\n"
    text += f"models: [{{model: {tmp_path}/m0, parameters: {{weight: 1, density: 0.5}}}}]\n"
    (tmp_path / "c.yml").write_text(text)
    out = tmp_path / "out"
    assert RUN.invoke(app, ["merge", f"{tmp_path}/c.yml", str(out), "--seed", "7"]).exit_code == 0
    card = (out / "README.md").read_text()
    (command,) = re.findall(r"^`neulig-fast (merge .*)` makes it", card, re.MULTILINE)
    words = command.replace("mergekit_config.yml", f"{out}/mergekit_config.yml").split()
    again = [str(tmp_path / "again") if word == "FOLDER" else word for word in words]
    assert RUN.invoke(app, again).exit_code == 0
    assert llamas.contents(tmp_path / "again") == llamas.contents(out)
    assert "seed 7" in RUN.invoke(app, ["verify", str(out)]).output


def test_a_full_disk_and_ctrl_c_say_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from neulig_fast import cli
    from neulig_fast.checkpoints import merging

    def run(error: BaseException) -> None:
        def fails(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(merging, "merge", fails)
        monkeypatch.setattr(sys, "argv", ["neulig-fast", "merge", "a.yml", str(tmp_path)])
        cli.main()

    with pytest.raises(SystemExit) as ended:
        run(OSError(errno.ENOSPC, "No space left on device", "out/x"))
    assert ended.value.code == 2
    told = "error: out/x: No space left on device; what is done is kept: repeat the command"
    assert told in capsys.readouterr().err
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    run(KeyboardInterrupt())
    assert codes == [130]


@pytest.mark.parametrize("command", [["merge", "a.yml", "out"], ["demo", "--toy"]])
def test_seeds_are_not_negative(command: list[str]) -> None:
    result = RUN.invoke(app, [*command, "--seed", "-1"])
    assert result.exit_code == 2 and "'--seed'" in result.output


def test_a_dry_run_warns_as_the_merge_does(models: Path) -> None:
    config = models / "typo.yml"
    # A file of mergekit's may have keys that are not known here.
    config.write_text((ROOT / "examples/ties.yml").read_text().replace("density", "densty", 1))
    planned = RUN.invoke(app, ["merge", str(config), "merged", "--dry-run"])
    warning = "densty: unknown key, not read; did you mean 'density'?"
    assert planned.exit_code == 0 and warning in planned.output
    assert warning in RUN.invoke(app, ["merge", str(config), "merged", "--quiet"]).output
    config.write_text(config.read_text() + "neulig_fast: {parity: mergekit}\n")
    refused = RUN.invoke(app, ["merge", str(config), "merged", "--dry-run"])
    assert (
        refused.exit_code == 2
        and f"error: {config}: models.0.parameters.densty: unknown key; did" in (refused.output)
    )
