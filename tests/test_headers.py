"""Headers of safetensors files: read like the format's own library, and never believed."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from neulig_fast.checkpoints.checkpoint import open_checkpoint
from neulig_fast.checkpoints.headers import ITEM_BYTES, read_header


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(start: int, stop: int, dtype: str = "U8", shape: list | None = None) -> dict:
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_entries_are_the_formats_own(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(3, 4).bfloat16(),
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "steps": torch.arange(7),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, {"format": "pt"})
    header = read_header(file)
    assert header.metadata == {"format": "pt"}
    raw = file.read_bytes()
    for entry in header.entries:
        expected = tensors[entry.name]
        assert (entry.shape, entry.elements) == (tuple(expected.shape), expected.numel())
        stored = raw[entry.start : entry.stop]
        assert stored == expected.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert [e.start for e in header.entries] == sorted(e.start for e in header.entries)


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (b"[]", b"", "not a JSON object of tensors"),
        (b"{", b"", "is not the JSON of safetensors"),
        (b"[" * 100_000, b"", "is not the JSON of safetensors"),
        (b'{"a":1,"a":2}', b"", "the key 'a' appears twice"),
        ({"a": 3}, b"", "'a' must have dtype, shape and data_offsets, got 3"),
        ({"a": tensor(0, 2, "I4")}, b"ab", "'a' has dtype 'I4', none of F64, F32"),
        ({"a": tensor(0, 2, shape=[-2])}, b"ab", r"'a' must have a shape of counts, got \[-2\]"),
        ({"a": tensor(0, 1, shape=[True])}, b"a", "'a' must have a shape of counts"),
        ({"a": tensor(0, 1, shape=[2**64, 0])}, b"a", "'a' must have a shape of counts"),
        ({"a": tensor(0, 2, "F32")}, b"ab", "'a' has 2 bytes, its shape and dtype need 8"),
        ({"a": tensor(2, 0, shape=[])}, b"ab", "'a' has -2 bytes"),
        ({"a": tensor(0, 2), "b": tensor(1, 3)}, b"abc", "'b' overlaps what is before it"),
        ({"a": tensor(0, 2), "b": tensor(3, 4)}, b"abcd", "'b' leaves a gap to what is before"),
        ({"a": tensor(0, 2)}, b"a", "the tensors end at byte"),
        ({"a": tensor(0, 2)}, b"abc", "the tensors end at byte"),
        ({"__metadata__": {"k": 1}}, b"", "__metadata__ must be an object of texts"),
    ],
)
def test_a_file_that_contradicts_itself(tmp_path, header, data, said) -> None:
    with pytest.raises(ValueError, match=said):
        read_header(write(tmp_path / "x.safetensors", header, data))


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    header = {"a": tensor(0, 2, "F32"), "b": 1, "c": tensor(2, 3, "no")}
    with pytest.raises(ValueError, match=r"3 problems\n.*'a' has.*\n.*'b' must.*\n.*'c' has"):
        read_header(write(tmp_path / "x.safetensors", header, b"abc"))


@pytest.mark.parametrize("length", [2**63, 2**40, 100, 1])
def test_a_header_that_claims_another_length(tmp_path: Path, length: int) -> None:
    with pytest.raises(ValueError, match=r"not a whole safetensors file|not the JSON"):
        read_header(write(tmp_path / "x.safetensors", {"a": tensor(0, 1)}, b"a", length))
    for cut in (b"", b"1234567"):
        (tmp_path / "x.safetensors").write_bytes(cut)
        with pytest.raises(ValueError, match="not a safetensors file"):
            read_header(tmp_path / "x.safetensors")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_means_what_the_library_reads(tmp_path, place, byte) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.ones(4).half()}
    save_file(tensors, file, {"k": "v"})
    raw = bytearray(file.read_bytes())
    raw[place % len(raw)] = byte
    file.write_bytes(raw)
    try:
        ours = {e.name: (e.dtype, e.shape) for e in read_header(file).entries}
    except ValueError:
        return
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            theirs = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except SafetensorError as error:
        raise AssertionError(f"the library refuses it: {error}") from error
    assert ours == theirs


# -- folders --------------------------------------------------------------------------------------


def shards(folder: Path) -> dict[str, str]:
    first, second = ({"a": torch.ones(2), "b": torch.zeros(3)}, {"c": torch.ones(4)})
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors")
    return {n: f"model-0000{1 + (n == 'c')}-of-00002.safetensors" for n in "abc"}


def index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_shards_come_in_file_order_and_leftovers_are_not_read(tmp_path: Path) -> None:
    index(tmp_path, shards(tmp_path))
    save_file({"old": torch.ones(9)}, tmp_path / "model-00003-of-00003.safetensors")
    found = open_checkpoint(tmp_path)
    assert list(found.entries) == ["a", "b", "c"] or list(found.entries) == ["b", "a", "c"]
    assert found.bytes == 4 * 9
    single = tmp_path / "single"
    single.mkdir()
    save_file({"x": torch.ones(2)}, single / "any.safetensors")
    assert list(open_checkpoint(single).entries) == ["x"]
    assert list(open_checkpoint(single / "any.safetensors").entries) == ["x"]


def test_an_index_that_disagrees_with_its_files(tmp_path: Path) -> None:
    good = shards(tmp_path)
    outside = tmp_path.parent / "outside.safetensors"
    save_file({"a": torch.ones(2)}, outside)
    for changed, said in (
        ({**good, "a": "../outside.safetensors"}, "'../outside.safetensors', which is not one of"),
        ({**good, "a": str(outside)}, "which is not one of this folder's"),
        ({**good, "a": "gone.safetensors"}, "'gone.safetensors', which is not one of"),
        ({**good, "a": good["c"]}, "'a' is not in model-00002-of-00002"),
        ({**good, "bb": good["b"]}, "'bb' is not in model-00001-of-00002.*did you mean 'b'"),
        ({k: v for k, v in good.items() if k != "a"}, "'a' is in model-00001-of-00002.* alone"),
        ([1], "no index of shards with a weight_map"),
        ({**good, "a": "x" * 5000}, "names the file 'x{80}', which is not one of"),
        ({**good, "a": "a\0b"}, "which is not one of this folder's"),
    ):
        index(tmp_path, changed)
        with pytest.raises(ValueError, match=said):
            open_checkpoint(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match="found none"):
        open_checkpoint(tmp_path)
    for name in "ab":
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"found a.safetensors, b.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="no index of shards"):
        open_checkpoint(tmp_path)


def test_sizes_of_types_are_torchs() -> None:
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    names |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"}
    names |= {f"I{b}": f"int{b}" for b in (8, 16, 32, 64)}
    names |= {f"U{b}": f"uint{b}" for b in (8, 16, 32, 64)}
    assert {n: getattr(torch, t).itemsize for n, t in names.items()} == ITEM_BYTES


# -- headers of any content -----------------------------------------------------------------------

fuzzed = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LENGTHS = st.sampled_from([0, 1, 2, 8, 100, 2**31, 2**63, 2**64 - 1])
NUMBERS = st.sampled_from([0, 1, 2, 4, 8, -1, 2**31, 2**63 - 1, 2**63, 10**400, 1.0, True, None])
NAMES = st.sampled_from(["a", "b", "", "__metadata__", "../a", "\0", "é"]) | st.text(max_size=3)
DTYPES = st.sampled_from([*ITEM_BYTES, "I4", "f32", "", None, 8])
TENSORS = st.fixed_dictionaries(
    {
        "dtype": DTYPES,
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    }
)
JUNK = st.recursive(
    NUMBERS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
PAIRS = st.lists(st.tuples(NAMES, TENSORS | JUNK), max_size=4)  # keys may appear twice


def whole(path: Path) -> None:
    """It is refused in a sentence, or every tensor lies where its bytes are, none twice."""
    try:
        header = read_header(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")
        return
    size = path.stat().st_size
    taken = [range(entry.start, entry.stop) for entry in header.entries]
    assert sum(map(len, taken)) == size - 8 - struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert all(a.stop == b.start for a, b in pairwise(taken))
    for entry in header.entries:
        assert len(range(entry.start, entry.stop)) == entry.elements * ITEM_BYTES[entry.dtype]
    if taken:
        assert taken[-1].stop == size


@fuzzed
@given(
    pairs=PAIRS,
    data=st.integers(0, 20),
    length=st.none() | LENGTHS,
    cut=st.none() | st.integers(0, 60),
)
def test_any_header_is_refused_in_words_or_right(tmp_path, pairs, data, length, cut) -> None:
    body = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs)
    file = write(tmp_path / "x.safetensors", f"{{{body}}}".encode(), bytes(data), length)
    if cut is not None:
        file.write_bytes(file.read_bytes()[:cut])
    whole(file)


SPANS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=5)


@fuzzed
@given(spans=SPANS, data=st.integers(0, 12))
def test_bytes_belong_to_one_tensor_each(tmp_path, spans, data) -> None:
    """Tensors of any ranges: read only where they cover the data without gap and overlap."""
    header = {f"t{k}": tensor(first, first + length) for k, (first, length) in enumerate(spans)}
    file = write(tmp_path / "x.safetensors", header, bytes(data))
    used = sorted(place for first, length in spans for place in range(first, first + length))
    fits = used == list(range(data))
    try:
        read_header(file)
    except ValueError:
        # An empty tensor has a place too, which may lie where none can be.
        assert not fits or any(length == 0 for _, length in spans)
        return
    assert fits
    whole(file)


SHARDS = st.sampled_from(["one.safetensors", "two.safetensors"])
PATHS = st.sampled_from(
    [
        *("../outside.safetensors", "./one.safetensors", "sub/../one.safetensors", "", ".", ".."),
        *("/etc/passwd", "one.safetensors/", "ONE.safetensors", "a\0b", "link.safetensors"),
    ]
)
MAPS = st.dictionaries(st.sampled_from(["a", "b", "c"]) | NAMES, SHARDS | PATHS | JUNK, max_size=4)


@fuzzed
@given(weight_map=MAPS | JUNK)
def test_any_index_is_refused_in_words_or_names_this_folders_files(tmp_path, weight_map) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        folder.mkdir()
        write(tmp_path / "outside.safetensors", {"a": tensor(0, 1)}, b"x")
        write(folder / "one.safetensors", {"a": tensor(0, 1), "b": tensor(1, 2)}, b"xy")
        write(folder / "two.safetensors", {"c": tensor(0, 1)}, b"z")
    index(folder, weight_map)
    try:
        found = open_checkpoint(folder)
    except ValueError as error:
        assert str(folder) in str(error)
        return
    files = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    assert {name: entry.file.name for name, entry in found.entries.items()} == weight_map
    assert all(entry.file == folder / files[name] for name, entry in found.entries.items())
