"""The rules that make it one system: rooms, backends, numerics, manners. Walks the registry."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import BACKENDS, OPS

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"cpu": "csrc/cpu/{}.cpp", "cuda": "csrc/cuda/{}.cu", "triton": "kernels/{}.py"}
ALWAYS = ("neulig_fast/ops/{}.py", "tests/test_{}.py", "docs/ops/{}.md", "benchmarks/bench_{}.py")
DEVICES = testing.devices()

on_every_device = pytest.mark.parametrize("device", DEVICES)
on_every_op = pytest.mark.parametrize("name", sorted(OPS))
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)


def runnable():
    """(device, op name, backend) for everything that can run on this machine."""
    return [
        pytest.param(device, op.name, backend, id=f"{op.name}-{backend}-{device}")
        for device in DEVICES
        for op, backend in testing.backends_here(device)
    ]


on_every_backend = pytest.mark.parametrize("device, name, backend", runnable())


def forced(name, backend, args):
    with neulig_fast.use_backend(**{name: backend}):
        return testing.result(OPS[name], OPS[name].overload, args)


def interpreted(device, backend):
    """Whether kernels run in Triton's interpreter, which takes milliseconds per program."""
    return backend == "triton" and device == "cpu"


def small(op, device, dtype):
    """The samples whose tensors are small enough for numerical differentiation."""
    for args in op.samples(device, dtype):
        sizes: list[int] = []
        testing.map_tensors(args, lambda a, sizes=sizes: sizes.append(a.numel()))
        if all(size <= 600 for size in sizes):
            yield args


# -- rooms ----------------------------------------------------------------------------------------


@on_every_op
def test_every_room_is_there_or_declared_missing(name):
    op = OPS[name]
    if op.room != name:  # a variant: its own definition, and the same backends in the same room
        assert (ROOT / ALWAYS[0].format(name)).is_file()
        assert set(op.impls) == set(OPS[op.room].impls) and op.room == OPS[op.room].room
        return
    needed = [room.format(name) for room in ALWAYS]
    for backend, room in ROOMS.items():
        declared = backend in op.not_offered
        assert declared != (backend in op.impls), f"{name}: {backend} is neither or both"
        if not declared:
            needed.append(room.format(name))
        else:
            assert not (ROOT / room.format(name)).exists(), f"{room.format(name)} is undeclared"
    missing = [room for room in needed if not (ROOT / room).is_file()]
    assert not missing, f"{name}: no {', '.join(missing)}"


@pytest.mark.parametrize("room", [*ALWAYS[:1], *ROOMS.values()])
def test_no_room_without_an_op(room):
    stems = {path.stem for path in ROOT.glob(room.format("*")) if path.stem[0] != "_"}
    assert stems <= set(OPS)


@on_every_op
def test_schema_names_the_arguments_of_the_python_function(name):
    op = OPS[name]
    names = op.arguments
    assert list(inspect.signature(op.reference).parameters) == names
    assert list(inspect.signature(op.fake).parameters) == names
    if hasattr(neulig_fast, name):
        public = inspect.signature(getattr(neulig_fast, name)).parameters.values()
        # Keyword-only arguments may also become part of others before the op is called.
        assert [p.name for p in public if p.kind != p.KEYWORD_ONLY or p.name in names] == names


# -- every backend, every sample ------------------------------------------------------------------


@in_every_dtype
@on_every_backend
def test_backend_obeys_the_tolerance_rule(device, name, backend, dtype):
    for args in OPS[name].samples(device, dtype):
        if OPS[name].why_not(backend, device, args) is None:
            testing.assert_op_close(OPS[name], forced(name, backend, args), args)


@in_every_dtype
@on_every_backend
def test_backend_gives_the_same_bits_twice(device, name, backend, dtype):
    if interpreted(device, backend):
        pytest.skip("Triton's interpreter runs one program after the other")
    for args in OPS[name].samples(device, dtype):
        if OPS[name].why_not(backend, device, args) is None:
            first, second = (testing.outputs(forced(name, backend, args)) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@in_every_dtype
@on_every_backend
def test_elementwise_ops_give_the_references_bits(device, name, backend, dtype):
    op = OPS[name]
    if not op.elementwise:
        return
    if interpreted(device, backend) and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates fp32 to bf16; the tolerance rule covers it")
    for args in op.samples(device, dtype):
        if interpreted(device, backend) and torch.bfloat16 in args:
            continue  # the same, of an output dtype
        if op.why_not(backend, device, args) is None:
            expected = testing.outputs(testing.result(op, op.reference, args))
            got = testing.outputs(forced(name, backend, args))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@in_every_dtype
@on_every_backend
def test_a_variant_gives_the_bits_of_its_op(device, name, backend, dtype):
    op = OPS[name]
    if op.room == name:
        return
    for out, *args in op.samples(device, dtype):
        if op.why_not(backend, device, (out, *args)) is None:
            named = dict(zip(op.arguments[1:], args, strict=True))
            with neulig_fast.use_backend(**{op.room: backend}):
                expected = OPS[op.room].overload(**named, out_dtype=out.dtype)
                assert torch.equal(testing.result(op, op.overload, (out, *args)), expected)


@on_every_backend
def test_gradients_match_the_references(device, name, backend):
    op = OPS[name]
    if not op.differentiable:
        return
    for args in small(op, device, torch.float64):
        if op.why_not(backend, device, args) is not None:
            continue
        call, inputs = testing.differentiable_call(op, args)
        reference = testing.outputs(op.reference(*with_inputs(op, args, inputs)))
        used = [k for k, output in enumerate(reference) if output.requires_grad]
        seeds = [torch.randn_like(reference[k]) for k in used]
        with neulig_fast.use_backend(backend):
            outputs = testing.outputs(call(*inputs))
            got = torch.autograd.grad([outputs[k] for k in used], inputs, seeds)
        expected = torch.autograd.grad([reference[k] for k in used], inputs, seeds)
        # A gradient may sum over anything the op reads, whatever the op itself sums over.
        terms = max(t.numel() for t in (*inputs, *seeds))
        for a, b in zip(got, expected, strict=True):
            testing.assert_within_rule(a, b, b, terms)


def with_inputs(op, args, inputs):
    replaced = iter(inputs)
    return [
        next(replaced) if name in op.differentiable and arg is not None else arg
        for name, arg in zip(op.arguments, args, strict=True)
    ]


@on_every_op
def test_gradcheck(name):
    op = OPS[name]
    for args in small(op, "cpu", torch.float64) if op.differentiable else ():
        call, inputs = testing.differentiable_call(op, args)
        if all(t.numel() for t in inputs):
            assert torch.autograd.gradcheck(call, inputs)


@on_every_op
def test_what_is_not_differentiable_says_so(name):
    op = OPS[name]
    if op.differentiable:
        return
    args = next(iter(op.samples("cpu", torch.float64)))
    results = testing.outputs(testing.result(op, op.reference, args))
    if not any(r.is_floating_point() for r in results):
        return  # counts have no gradient that could be lost
    tracked = [
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args
    ]
    with pytest.raises(RuntimeError, match=f"{name}: not differentiable"):
        result = testing.outputs(op.overload(*tracked))
        sum(r.sum() for r in result if r.requires_grad).backward()


@on_every_backend
def test_opcheck(device, name, backend):
    op = OPS[name]
    checks = ["test_schema", "test_faketensor"]
    if backend == "torch":  # graphs are the same on every backend, and this one takes all samples
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    for args in op.samples(device, torch.float32):
        if op.why_not(backend, device, args) is not None:
            continue
        tracked = args
        if op.differentiable:
            _, inputs = testing.differentiable_call(op, args)
            tracked = tuple(with_inputs(op, args, inputs))
        with neulig_fast.use_backend(backend):
            torch.library.opcheck(op.overload, tracked, test_utils=checks)


@on_every_op
def test_autocast_changes_nothing(name):
    op = OPS[name]
    for args in op.samples("cpu", torch.float32):
        expected = testing.outputs(testing.result(op, op.overload, args))
        with torch.autocast("cpu", torch.bfloat16):
            got = testing.outputs(testing.result(op, op.overload, args))
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@on_every_op
def test_forward_mode_is_an_error_not_a_lost_tangent(name):
    op = OPS[name]
    args = list(next(iter(op.samples("cpu", torch.float64))))
    slot = next(
        i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()
    )
    with forward_ad.dual_level():
        args[slot] = forward_ad.make_dual(args[slot], torch.ones_like(args[slot]))
        with pytest.raises(NotImplementedError, match=f"{name}: no forward-mode derivative"):
            op(*args)


@on_every_op
def test_every_way_to_the_op_has_the_same_door(name):
    op = OPS[name]
    args = list(next(iter(op.samples("cpu", torch.float32))))
    slot = next(
        i
        for i, argument in enumerate(op.arguments)
        if argument in ("params", "features", "state", "x", "weight")
        or (argument == "weights" and "experts" in op.arguments)
    )
    args[slot] = args[slot][..., None]
    on_meta = testing.map_tensors(args, lambda a: a.to("meta"))
    for call in (args, on_meta):
        with pytest.raises(ValueError, match=f"(?s)^{name}: .*{op.arguments[slot]}"):
            op.overload(*call)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@on_every_op
def test_compiles_to_one_graph(name, dynamic):
    op = OPS[name]
    overload = getattr(torch.ops.neulig_fast, name).default
    torch._dynamo.reset()
    compiled = torch.compile(overload, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for args in op.samples("cpu", torch.float32):
        got, expected = (testing.result(op, run, args) for run in (compiled, overload))
        for a, b in zip(testing.outputs(got), testing.outputs(expected), strict=True):
            assert torch.equal(a, b)


@on_every_op
def test_meta_tensors_have_the_right_shape(name):
    op = OPS[name]
    for args in op.samples("cpu", torch.float32):
        meta = testing.map_tensors(args, lambda a: a.to("meta"))
        got = testing.outputs(testing.result(op, op.overload, meta))
        expected = testing.outputs(testing.result(op, op.reference, args))
        for shape, real in zip(got, expected, strict=True):
            assert (shape.shape, shape.dtype) == (real.shape, real.dtype)


# -- choosing and forcing -------------------------------------------------------------------------


def test_forced_and_unable_is_an_error_with_the_reason():
    if torch.cuda.is_available():
        pytest.skip("the reason looked for is the absence of a GPU")
    with neulig_fast.use_backend(blend="cuda"), pytest.raises(RuntimeError, match="for cuda tens"):
        neulig_fast.blend(torch.ones(2), torch.ones(2, 3))


def test_unknown_names_are_all_listed():
    with pytest.raises(ValueError, match=r"unknown op 'blond'.*unknown backend 'gpu'"):
        neulig_fast.use_backend("gpu", blond="torch")


def test_the_innermost_choice_wins_and_ends():
    op = OPS["blend"]
    before = op.forced()
    with neulig_fast.use_backend("torch"):
        assert op.forced() == "torch"
        with neulig_fast.use_backend(blend="cpu"):
            assert (op.forced(), OPS["blend_weight_grad"].forced()) == ("cpu", "torch")
            with neulig_fast.use_backend("torch"):
                assert op.forced() == "torch"
        assert op.forced() == "torch"
    assert op.forced() == before


def test_overlapping_choices_end_in_any_order():
    op = OPS["blend"]
    before = op.forced()
    first, second = neulig_fast.use_backend("torch"), neulig_fast.use_backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert op.forced() == "cpu"
    second.__exit__()
    assert op.forced() == before


def test_a_forced_and_unable_backend_keeps_its_reason(capsys):
    with neulig_fast.use_backend(blend="cuda"):
        neulig_fast.show_backends()
    if not torch.cuda.is_available():
        assert "cuda: for cuda tensors" in capsys.readouterr().out


def test_unnamed_form_leaves_ops_that_do_not_offer_the_backend():
    with neulig_fast.use_backend("cuda"):
        assert OPS["neulig_loss"].forced() is None


def test_environment_forces_and_unknown_names_fail_at_import(python):
    code = "from neulig_fast import _registry, ops; print(_registry.OPS['blend'].forced())"
    assert python(code, NEULIG_FAST_BACKEND="blend=torch").stdout.strip() == "torch"
    twice = python(code, NEULIG_FAST_BACKEND="blend=torch,blend=cpu")
    assert twice.returncode and "blend is given twice" in twice.stderr
    failed = python(code, NEULIG_FAST_BACKEND="blend=tritom")
    assert failed.returncode and "NEULIG_FAST_BACKEND: unknown backend 'tritom'" in failed.stderr


def test_a_missing_native_backend_is_said_once(python):
    code = (
        "import warnings, torch, neulig_fast as nf\n"
        "from neulig_fast import _native\n"
        "_native.why_missing = lambda op, key: 'not built: no compiler'\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3): nf.blend(torch.ones(2), torch.ones(2, 3))\n"
        "    with nf.use_backend('torch'): nf.blend_weight_grad(torch.ones(3), torch.ones(2, 3))\n"
        "print(len(seen), seen[0].category.__name__, seen[0].message)"
    )
    result = python(code)
    assert result.stdout.startswith("1 NeuligFastWarning"), result.stdout + result.stderr
    assert "not built: no compiler" in result.stdout


def test_show_backends_tells_what_would_run(capsys):
    rows = neulig_fast.show_backends()
    printed = capsys.readouterr().out
    assert {(row.op, row.device) for row in rows} == {(o, d) for o in OPS for d in ("cpu", "cuda")}
    for row in rows:
        assert set(row.reasons) == set(BACKENDS)
        assert row.op in printed
        if row.device == "cpu" and row.op == "blend":
            args = next(iter(OPS["blend"].samples("cpu", torch.float32)))
            assert OPS["blend"].choose("cpu", args) == row.runs


def test_show_backends_is_a_table_that_begins_with_versions(capsys):
    rows = neulig_fast.show_backends()
    first, _, *lines, _ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"neulig_fast {neulig_fast.__version__}, torch {torch.__version__}, ")
    start = lines[0].index("device")
    for row, line in zip(rows, lines[1:], strict=True):
        assert line[:start].rstrip() == row.op and line[start:].startswith(row.device)


def test_without_a_gpu_nothing_is_said_to_run_on_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for row in neulig_fast.show_backends():
        if row.device == "cuda":
            assert row.runs is None and row.reasons["torch"] == "no CUDA device"
            assert None not in row.reasons.values()


# -- manners --------------------------------------------------------------------------------------

SOURCES = sorted([*(ROOT / "neulig_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def test_import_is_lean(python):
    code = (
        "import sys, torch, neulig_fast\n"
        "heavy = {'triton', 'open_clip', 'timm', 'torchvision', 'matplotlib', 'sklearn', 'typer',"
        " 'pydantic', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())"
    )
    result = python(code, TRITON_INTERPRET="0")
    assert result.stdout.strip() == "[] False", result.stdout + result.stderr


def test_kernels_refuse_a_second_name(python):
    result = python("import kernels")
    assert result.returncode and "neulig_fast.kernels" in result.stderr


def body_lines(function):
    """Lines of a function without its docstring."""
    first = function.body[0]
    docstring = ast.get_docstring(function, clean=False)
    skipped = first.end_lineno - first.lineno + 1 if docstring is not None else 0
    return function.end_lineno - function.lineno + 1 - skipped


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_manners(path):
    text = path.read_text()
    faults = [] if text.count("\n") <= 300 else [f"{text.count(chr(10))} lines, over 300"]
    kernel = path.parent.name == "kernels"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assert):
            faults.append(f"line {node.lineno}: assert")
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            if caught in ("everything", "Exception", "BaseException"):
                faults.append(f"line {node.lineno}: catches {caught}")
        if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
            faults.append(f"line {node.lineno}: star import")
        if isinstance(node, ast.FunctionDef):
            limit = 80 if kernel else 40
            if body_lines(node) > limit:
                faults.append(f"{node.name}: {body_lines(node)} lines, over {limit}")
    assert not faults, faults
