"""Models by Hugging Face id: huggingface_hub itself, and a server that is one of its here."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save, save_file

import neulig_fast as nf
from neulig_fast.demo import llamas

Files = Mapping[str, bytes]
# A merge as a program: it reads the environment, and prints nothing but the error.
PROGRAM = """
import json, sys, warnings
import neulig_fast as nf
warnings.simplefilter("ignore")  # of the backend without the extension
try:
    nf.merge(json.loads(sys.argv[1]), sys.argv[2])
except ValueError as error:
    sys.exit(f"refused: {error}")
"""
DEAD = "http://127.0.0.1:9"  # no answer there
SMALL = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}',
    "tokenizer.json": b'{"model": {"vocab": {"a": 0}}}',
}


class Hub:
    """A few repositories; it remembers which files were given."""

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], Files] = {}  # of a repository
        self.refs: dict[tuple[str, str], str] = {}
        self.closed: dict[str, str] = {}  # repositories whose files are not given: the error's code
        self.broken: set[str] = set()  # files that end too early
        self.given: list[str] = []
        self.then: dict[str, Callable[[], Any]] = {}  # what happens when a file was asked for
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def push(self, name: str, files: Files, *refs: str) -> str:
        """A commit, at branches or tags."""
        held = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items())
        commit = hashlib.sha1(json.dumps([name, held]).encode()).hexdigest()
        self.commits[name, commit] = files
        self.refs |= {(name, ref): commit for ref in refs or ("main",)}
        return commit

    def find(self, name: str, revision: str) -> tuple[str, Files] | str:
        """A commit and its files, or the code of an error."""
        commit = self.refs.get((name, revision), revision)
        if name in self.closed:
            return self.closed[name]
        if not any(known == name for known, _ in self.commits):
            return "RepoNotFound"
        files = self.commits.get((name, commit))
        return "RevisionNotFound" if files is None else (commit, files)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            info = re.fullmatch(r"/api/models/(.+)/(revision|tree)/([^/]+)", path)
            file = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path)
            match = info or file
            name, revision = ("", "") if match is None else (match[1], match[3 if info else 2])
            found = hub.find(name, revision)
            if isinstance(found, str):
                status = 403 if found == "GatedRepo" else 404
                return self.answer(status, b"", {"X-Error-Code": found})
            commit, files = found
            if info:
                return self.answer(200, json.dumps(_told(info[2], name, commit, files)).encode())
            assert file is not None
            return self.give(file[3], commit, files)

        def give(self, path: str, commit: str, files: Files) -> None:
            if path not in files:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            data, headers = files[path], {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
            start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if self.command == "GET":
                hub.given.append(path)
                hub.then.get(path, int)()
            if start is not None:
                first = int(start[1])
                headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
                return self.answer(206, data[first:], headers)
            return self.answer(200, data, headers, cut=path in hub.broken)

        def answer(
            self, status: int, data: bytes, headers: Files | Any = None, cut: bool = False
        ) -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = cut

    return Handler


def _told(what: str, name: str, commit: str, files: Files) -> Any:
    if what == "revision":
        return {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
    return [
        {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for path, data in files.items()
    ]


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    thread = threading.Thread(target=found.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()


def config(models: tuple[str, ...]) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": model} for model in models]}


@pytest.fixture
def merge(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``merge(model)`` merges it into ``out``; what it complains of."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home/token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def run(*models: str, offline: bool = False, endpoint: str = hub.url) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        try:
            nf.merge(config(models), tmp_path / "out")
        except ValueError as error:
            assert not (tmp_path / "out").exists()
            return f"refused: {error}"
        return ""

    return run


@pytest.fixture
def program(tmp_path: Path, hub: Hub, python: Callable[..., Any]) -> Callable[..., str]:
    """As ``merge``, in a process of its own, by environment variables alone."""

    def run(*models: str, offline: str | None = None) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        words = (json.dumps(config(models)), tmp_path / "out")
        done = python(PROGRAM, *words, HF_HUB_OFFLINE=offline, HF_TOKEN=None, **environment)
        assert done.stdout == ""
        assert (done.returncode == 0) == (tmp_path / "out").exists()
        return done.stderr.strip()

    return run


def state(seed: int) -> dict[str, torch.Tensor]:
    return llamas.tensors(seed, layers=1, width=8, words=9)


def as_safetensors(seed: int) -> Files:
    return {**SMALL, "model.safetensors": save(state(seed), {"format": "pt"})}


def as_pickle(tmp_path: Path, seed: int) -> Files:
    torch.save(state(seed), tmp_path / "state.bin")
    return {**SMALL, "pytorch_model.bin": (tmp_path / "state.bin").read_bytes()}


def as_shards(tmp_path: Path, seed: int, kind: str) -> Files:
    """Two shards and their index."""
    held, suffix = list(state(seed).items()), {"pytorch_model": "bin", "model": "safetensors"}[kind]
    found, weight_map = dict(SMALL), {}
    for k, part in enumerate((dict(held[::2]), dict(held[1::2])), 1):
        file = f"{kind}-{k:05d}-of-00002.{suffix}"
        torch.save(part, tmp_path / file) if suffix == "bin" else save_file(part, tmp_path / file)
        found[file] = (tmp_path / file).read_bytes()
        weight_map |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    found[f"{kind}.{suffix}.index.json"] = json.dumps(content).encode()
    return found


def assert_merged(tmp_path: Path, seed: int) -> None:
    got, wanted = llamas.load(tmp_path / "out"), state(seed)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


# Large files that a merge reads nothing of, as repositories have them.
OTHERS = dict.fromkeys(
    (
        *("pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors", "tf_model.h5"),
        *("flax_model.msgpack", "model.gguf", "training_args.bin", "original/consolidated.00.pth"),
        *("original/params.json", "onnx/model.onnx", "checkpoint-9/model.safetensors", "note.py"),
        *("checkpoint-9/pytorch_model.bin", "checkpoint-9/tokenizer.json", "rust_model.ot"),
    ),
    b"x" * 1000,
)


def repository(tmp_path: Path, kind: str) -> Files:
    """What it holds, weights in files of one kind."""
    if kind in ("one", "pickle"):
        return as_safetensors(1) if kind == "one" else as_pickle(tmp_path, 1)
    return as_shards(tmp_path, 1, "model" if kind == "shards" else "pytorch_model")


@pytest.mark.parametrize("kind", ["one", "shards", "pickle", "pickles"])
def test_a_repository_and_what_of_it_is_fetched(
    tmp_path: Path, hub: Hub, merge: Callable[..., str], kind: str
) -> None:
    """Once: another merge asks whether there is something new, and has all."""
    files = repository(tmp_path, kind)
    weights = ("pytorch_model", "consolidated", "model.fp16") if "pickle" in kind else ()
    others = {n: d for n, d in OTHERS.items() if not n.startswith(weights or "-")}
    hub.push("org/one", {**others, **files})
    assert merge("org/one") == ""
    assert_merged(tmp_path, 1)
    assert sorted(hub.given) == sorted(files)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == SMALL["tokenizer.json"]
    hub.given.clear()
    assert merge("org/one") == ""
    assert_merged(tmp_path, 1)
    assert hub.given == []


def test_weights_by_another_name(tmp_path: Path, hub: Hub, merge: Callable[..., str]) -> None:
    """Of a repository with one file of weights."""
    files = as_safetensors(1)
    renamed = {"weights.safetensors": files["model.safetensors"], **SMALL}
    hub.push("org/one", {**renamed, "pytorch_model.bin": b"x"})
    assert merge("org/one") == ""
    assert_merged(tmp_path, 1)
    assert sorted(hub.given) == sorted(renamed)


def test_revisions(tmp_path: Path, hub: Hub, merge: Callable[..., str]) -> None:
    first = hub.push("org/one", as_safetensors(1), "main", "v1")
    second = hub.push("org/one", as_safetensors(2), "main")
    for model, seed in (("@v1", 1), ("", 2), (f"@{first}", 1), (f"@{second}", 2), ("@main", 2)):
        assert merge(f"org/one{model}") == ""
        assert_merged(tmp_path, seed)
    hub.push("org/one", as_safetensors(3), "main")  # which has moved
    assert merge("org/one") == ""
    assert_merged(tmp_path, 3)
    assert hub.given.count("model.safetensors") == 3


def test_a_push_meanwhile(tmp_path: Path, hub: Hub, merge: Callable[..., str]) -> None:
    """Weights are those of the configuration that was fetched first."""
    hub.push("org/one", as_safetensors(1))
    hub.then["config.json"] = lambda: hub.push("org/one", as_shards(tmp_path, 2, "model"))
    assert merge("org/one") == ""
    assert_merged(tmp_path, 1)
    assert merge("org/one") == ""
    assert_merged(tmp_path, 2)


def test_an_adapter_beside_a_model(tmp_path: Path, hub: Hub, merge: Callable[..., str]) -> None:
    """peft's repositories may hold the whole model too."""
    name = "model.layers.0.self_attn.q_proj"
    factors = {"A": torch.ones(1, 8), "B": torch.ones(8, 1)}
    lora = {f"base_model.model.{name}.lora_{k}.weight": factors[k] for k in "AB"}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    files = {"adapter_config.json": json.dumps(config).encode(), "optimizer.bin": b"x"}
    torch.save(lora, tmp_path / "lora.bin")
    hub.push("org/model", as_safetensors(1))
    hub.push("org/st", {**files, "adapter_model.safetensors": save(lora), "adapter_model.bin": b""})
    hub.push("org/bin", {**files, "adapter_model.bin": (tmp_path / "lora.bin").read_bytes()})
    hub.push("org/both", {**as_safetensors(2), **files, "adapter_model.safetensors": save(lora)})
    for adapter in ("org/st", "org/bin", "org/both"):
        assert merge(f"org/model+{adapter}") == ""
        wanted = state(1)
        wanted[f"{name}.weight"] += 1
        torch.testing.assert_close(llamas.load(tmp_path / "out"), wanted)
    assert "optimizer.bin" not in hub.given and hub.given.count("adapter_model.bin") == 1


# -- without a network ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one", "shards", "pickle", "pickles"])
def test_offline_with_a_filled_cache(
    tmp_path: Path, hub: Hub, merge: Callable[..., str], kind: str
) -> None:
    commit = hub.push(
        "org/one", {**repository(tmp_path, kind), "onnx/model.onnx": b"x"}, "main", "v1"
    )
    assert merge("org/one") == merge("org/one@v1") == ""
    hub.closed["org/one"] = "RepoNotFound"
    for model in ("org/one", "org/one@v1", f"org/one@{commit}"):
        assert merge(model, offline=True) == ""
        assert_merged(tmp_path, 1)
    assert merge("org/one", endpoint=DEAD) == ""
    assert_merged(tmp_path, 1)


def test_offline_by_the_environment(
    tmp_path: Path, hub: Hub, merge: Callable[..., str], program: Callable[..., str]
) -> None:
    hub.push("org/one", as_safetensors(1))
    said = (
        "refused: merge: org/one@main: no folder here, and Hugging Face's cache lacks it, or a "
        "part of it (HF_HUB_OFFLINE is set, nothing is fetched)"
    )
    assert program("org/one@main", offline="1") == said
    assert merge("org/one@main", offline=True) == said
    assert program("org/one@main", offline="0") == ""
    hub.closed["org/one"] = "RepoNotFound"
    assert program("org/one@main", offline="yes") == ""
    assert_merged(tmp_path, 1)


@pytest.mark.parametrize("lost", ["model-00002-of-00002.safetensors", "model.safetensors"])
def test_offline_with_a_part_of_it_in_the_cache(
    tmp_path: Path, hub: Hub, merge: Callable[..., str], lost: str
) -> None:
    files = as_shards(tmp_path, 1, "model") if "-" in lost else as_safetensors(1)
    hub.push("org/one", files)
    assert merge("org/one") == ""
    for path in (tmp_path / "home").rglob(lost):
        path.unlink()
    said = merge("org/one", offline=True)
    assert said.startswith("refused: merge: org/one: ") and "\n" not in said
    assert "HF_HUB_OFFLINE is set" in said
    assert merge("org/one") == ""
    assert_merged(tmp_path, 1)


# -- what cannot be had ---------------------------------------------------------------------------


def test_what_there_is_not(tmp_path: Path, hub: Hub, merge: Callable[..., str]) -> None:
    hub.push("org/one", as_safetensors(1))
    hub.closed["org/gated"] = "GatedRepo"
    hub.push("org/empty", {"README.md": b"nothing", "config.json": b"{}"})
    for model, said in {
        "org/none": "no folder here, and no repository of Hugging Face's, or a private one, "
        "which asks for HF_TOKEN",
        "org/one@v9": "Hugging Face has org/one, but no revision 'v9' of it",
        "org/gated": "Hugging Face gives it to some alone; ask for access at "
        f"{hub.url}/org/gated, and set HF_TOKEN",
    }.items():
        assert merge(model) == f"refused: merge: {model}: {said}"
    text = merge("org/empty")
    assert "needs model.safetensors" in text and "found none" in text
    both = merge("org/none", "org/one@v9")
    assert both.startswith("refused: merge: 2 problems\n  - org/none: ")
    text = merge("org/one", endpoint=DEAD)
    assert text.startswith("refused: merge: org/one: no folder here, and Hugging Face did not give")
    assert "\n" not in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["*"], ["../one", "/etc/passwd"], [7, None, "[!x]*"], "*"])
def test_an_index_of_strangers_fetches_nothing_else(
    hub: Hub, merge: Callable[..., str], names: Any
) -> None:
    weight_map = {f"w{k}": n for k, n in enumerate(names)} if isinstance(names, list) else names
    index = json.dumps({"weight_map": weight_map}).encode()
    repository = {"model.safetensors.index.json": index, **SMALL, "large.gguf": b"x"}
    hub.push("org/one", repository)
    assert merge("org/one").startswith("refused: merge: ")
    assert "large.gguf" not in hub.given


def test_a_file_whose_name_no_system_could_have(hub: Hub, merge: Callable[..., str]) -> None:
    hub.push("org/one", {**as_safetensors(1), "a\0b.json": b"{}"})
    said = "refused: merge: org/one: no folder here, and Hugging Face did not give it: embedded nul"
    assert merge("org/one").startswith(said)


def test_a_file_that_ends_too_early_is_not_taken_for_one(
    tmp_path: Path, hub: Hub, merge: Callable[..., str]
) -> None:
    """The next run fetches it."""
    hub.push("org/one", as_safetensors(1))
    hub.broken.add("model.safetensors")
    said = merge("org/one")
    assert said.startswith("refused: merge: org/one: no folder here, and Hugging Face did not give")
    hub.broken.clear()
    assert merge("org/one") == ""
    assert_merged(tmp_path, 1)
