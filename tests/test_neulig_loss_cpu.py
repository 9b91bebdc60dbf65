"""neulig_loss and its backward in C++: shapes against autograd, bits, hostile values, doors."""

import itertools

import pytest
import torch
from torch.nn import functional

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.neulig_loss import OP as LOSS
from neulig_fast.ops.neulig_loss import neulig_loss
from neulig_fast.ops.neulig_loss_backward import OP as BACKWARD

pytestmark = pytest.mark.skipif(
    LOSS.why_not("cpu", "cpu") is not None, reason="the C++ extension is not built"
)
SCALING = 10.0
FLOATS = ("features", "portland_weight", "portland_bias", "head_weight", "head_bias", "alignment")

# B, N, D, C; the last classes of a tile, samples of a block and columns of a step are missing,
# or nothing is.
SHAPES = {
    "one of everything": (1, 1, 1, 1),
    "whole blocks": (32, 2, 16, 32),
    "one sample": (1, 5, 48, 33),
    "one expert": (18, 1, 20, 7),
    "one class": (17, 3, 16, 1),
    "one column": (20, 4, 1, 5),
    "odd": (37, 7, 33, 50),
    "several pieces": (19, 3, 600, 17),
    "64 experts": (5, 64, 3, 18),
}


def arguments(sizes, dtype=torch.float32, boosting="supervised", head_scale=3.0, seed=6):
    """The tensors by name, for sizes (B, N, D, C)."""
    B, N, D, C = sizes
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "features": draw(B, N, D),
        "portland_weight": draw(N, N * D, dtype=acc) / (N * D) ** 0.5,
        "portland_bias": draw(N, dtype=acc),
        "head_weight": head_scale * functional.normalize(draw(C, D, dtype=acc), dim=1),
        "head_bias": draw(C, dtype=acc),
        "targets": torch.randint(C, (B,), generator=g) if boosting == "supervised" else None,
        "alignment": draw(N, N, dtype=acc),
    }


def plain(z, W, c, H, h, t, A, boosting, normalize, centered):
    """The loss as one would write it, for autograd in fp64."""
    w = functional.softmax(functional.linear(z.flatten(1), W, c), 1)
    e = torch.einsum("bn,bnd->bd", w, z)
    y = functional.linear(functional.normalize(e, dim=1) if normalize else e, H, h)
    if boosting == "supervised":
        L_b = functional.cross_entropy(y, t)
    else:
        p = functional.softmax(y, 1)
        L_b = -(p * torch.log(p + 1e-6)).sum(1).mean()
    v = w - w.mean(0) if centered else w
    L_a = torch.einsum("bi,ij,bj->b", v, A, v).mean() / SCALING
    return L_b + L_a, L_b, L_a, w


def outcome(backend, tensors, boosting="supervised", normalize=True, centered=False, wrt=FLOATS):
    """The four outputs, then the gradients of a mix of them; with backend None the plain formula
    in fp64."""
    change = torch.float64 if backend is None else None
    inputs = {
        name: x if x is None or name == "targets" else x.detach().to(change or x.dtype)
        for name, x in tensors.items()
    }
    tracked = [inputs[name].requires_grad_() for name in wrt if inputs[name] is not None]
    if backend is None:
        out = plain(*inputs.values(), boosting, normalize, centered)
    else:
        with neulig_fast.use_backend(neulig_loss=backend):
            out = neulig_loss(
                **inputs, boosting=boosting, scaling=SCALING, normalize=normalize, centered=centered
            )
    mix = 0.7 * out[0] + 1.3 * out[1] - 2 * out[2]
    mix = mix + (out[3] * torch.linspace(-1, 1, out[3].numel()).view_as(out[3]).to(out[3])).sum()
    with neulig_fast.use_backend(neulig_loss_backward=backend or "torch"):
        gradients = torch.autograd.grad(mix, tracked)
    return [x.detach() for x in (*out, *gradients)]


def check(tensors, boosting="supervised", normalize=True, centered=False):
    settings = (boosting, normalize, centered)
    got, working, exact = (outcome(b, tensors, *settings) for b in ("cpu", "torch", None))
    terms = tensors["features"].numel()
    for x, y, oracle in zip(got, working, exact, strict=True):
        testing.assert_within_rule(x, y, oracle, terms)


# -- values and gradients --------------------------------------------------------------------------

COMBINATIONS = list(itertools.product(("supervised", "entropy"), (True, False), (True, False)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_outputs_and_gradients_are_autograds(shape, dtype):
    for boosting, normalize, centered in COMBINATIONS:
        check(arguments(SHAPES[shape], dtype, boosting), boosting, normalize, centered)


@pytest.mark.parametrize("boosting", ["supervised", "entropy"])
def test_many_classes(boosting):
    check(arguments((17, 2, 24, 21000), boosting=boosting), boosting)


@pytest.mark.parametrize("boosting", ["supervised", "entropy"])
def test_without_a_bias(boosting):
    check({**arguments(SHAPES["odd"], boosting=boosting), "head_bias": None}, boosting)


@pytest.mark.parametrize("boosting", ["supervised", "entropy"])
def test_logits_that_rise_with_every_tile(boosting):
    """The running maximum moves all the time, by more than an exponential can hold."""
    tensors = arguments((20, 3, 16, 90), boosting=boosting)
    tensors["head_bias"] = torch.linspace(-500, 500, 90)
    check(tensors, boosting)
    tensors["head_bias"] = torch.linspace(0, 30, 90)
    check(tensors, boosting)


@pytest.mark.parametrize("dtypes", list(itertools.product(testing.DTYPES, repeat=2)), ids=str)
def test_each_tensor_may_have_a_dtype_of_its_own(dtypes):
    tensors = arguments(SHAPES["odd"], dtypes[0])
    for name in FLOATS[1:]:
        tensors[name] = tensors[name].to(dtypes[1])
    out = outcome("cpu", tensors)
    widened = {k: v if v is None or k == "targets" else v.double() for k, v in tensors.items()}
    working, exact = outcome("torch", tensors), outcome(None, widened)
    least = torch.finfo(out[0].dtype).eps  # of the arithmetic, whatever a gradient's dtype
    for x, y, oracle in zip(out, working, exact, strict=True):
        eps = max(least, torch.finfo(x.dtype).eps)
        testing.assert_within_rule(x, y, oracle, tensors["features"].numel(), eps)


def test_the_gradient_is_exact_where_the_softmax_is_sure():
    """What is left of p - onehot there is far below p's last place."""
    tensors = arguments((16, 3, 32, 40))
    tensors["head_bias"] = torch.zeros(40).index_fill(0, torch.tensor(3), 25.0)
    tensors["targets"] = torch.full((16,), 3)
    tensors["alignment"] = torch.zeros(3, 3)
    inputs = {k: v.clone() for k, v in tensors.items()}
    found = []
    for change in (torch.float32, torch.float64):
        wide = {k: v if k == "targets" else v.to(change) for k, v in inputs.items()}
        weight = wide["head_weight"].requires_grad_()
        bias = wide["portland_bias"].requires_grad_()
        with neulig_fast.use_backend(neulig_loss="cpu", neulig_loss_backward="cpu"):
            out = neulig_loss(**wide)
        found.append(torch.autograd.grad(out.loss, (weight, bias)))
    for single, double in zip(*found, strict=True):
        assert 0 < double.abs().max() < torch.finfo(torch.float32).eps
        testing.assert_within_rule(single, double.float(), double, 16 * 3 * 32)


# -- what is not needed, bits ----------------------------------------------------------------------


@pytest.mark.parametrize("boosting", ["supervised", "entropy"])
def test_every_subset_of_gradients_has_the_bits_of_all(boosting):
    *args, _ = backward_arguments("odd", boosting)
    everything = torch.ops.neulig_fast_C.neulig_loss_backward(*args, [True] * 6)
    for needs in itertools.product((False, True), repeat=6):
        some = torch.ops.neulig_fast_C.neulig_loss_backward(*args, list(needs))
        for need, x, y in zip(needs, some, everything, strict=True):
            assert torch.equal(x, y) if need else x.shape == (0,)


def backward_arguments(shape, boosting="supervised"):
    tensors = arguments(SHAPES[shape], boosting=boosting)
    w = torch.softmax(torch.randn(SHAPES[shape][:2]), 1)
    z, W, _, *rest = tensors.values()
    grads = [torch.randn(()), torch.randn(()), None, torch.randn_like(w)]
    return (*grads, w, z, W, *rest, boosting, SCALING, True, True, [True] * 6)


@pytest.mark.parametrize("boosting", ["supervised", "entropy"])
def test_the_bits_do_not_depend_on_the_number_of_threads(boosting):
    tensors = arguments((150, 5, 130, 70), boosting=boosting)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results += [outcome("cpu", tensors, boosting, centered=True) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


DIGEST = """
import sys, hashlib
sys.path.insert(0, "tests")
import test_neulig_loss_cpu as tests
digest = hashlib.sha256()
for shape, sizes in tests.SHAPES.items():
    for dtype in tests.testing.DTYPES:
        for boosting in ("supervised", "entropy"):
            for tensor in tests.outcome("cpu", tests.arguments(sizes, dtype, boosting), boosting):
                digest.update(tensor.view(-1).view(tests.torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_bits_do_not_depend_on_the_instruction_set(python):
    from neulig_fast import _C

    digests = set()
    for level in [level for level in (0, 3, 4) if level <= _C.cpu_level()]:
        done = python(DIGEST, NEULIG_FAST_CPU=str(level))
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


def test_rows_may_be_apart():
    """Every other sample, every third class: the bits of copies, and nothing is written to."""
    wide = arguments((40, 3, 33, 60))
    wide["targets"] = wide["targets"] % 20
    strided = {
        **wide,
        "features": wide["features"][::2],
        "targets": wide["targets"][::2],
        "head_weight": wide["head_weight"][::3],
        "head_bias": wide["head_bias"][::3],
        "portland_weight": wide["portland_weight"].T.contiguous().T,
    }
    before = {name: x.clone() for name, x in wide.items()}
    tight = {name: x.contiguous() for name, x in strided.items()}
    for x, y in zip(outcome("cpu", strided), outcome("cpu", tight), strict=True):
        assert torch.equal(x, y)
    assert all(torch.equal(wide[name], x) for name, x in before.items())


# -- hostile values --------------------------------------------------------------------------------


@pytest.mark.parametrize("boosting", ["supervised", "entropy"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_sample_that_is_not_finite_spoils_the_sums_and_no_other_sample(boosting, value):
    good = arguments((20, 3, 33, 18), boosting=boosting)
    bad = {**good, "features": good["features"].clone()}
    bad["features"][4, 1, 32] = value
    clean, spoilt = outcome("cpu", good, boosting), outcome("cpu", bad, boosting)
    others = torch.arange(20) != 4
    loss, term, alignment, coopvec, features, *rest = spoilt
    assert all(x.isnan() for x in (loss, term, alignment))
    for x, y in ((coopvec, clean[3]), (features, clean[4])):
        assert x[4].isnan().all() and torch.equal(x[others], y[others])
    assert all(x.isnan().any() for x in rest)


@pytest.mark.parametrize("boosting", ["supervised", "entropy"])
def test_classes_of_no_probability_are_as_if_they_were_not_there(boosting):
    """A bias of -inf: a whole tile of them before all others, and one among others."""
    some = arguments((20, 3, 33, 24), boosting=boosting)
    kept = torch.cat((torch.arange(16, 20), torch.arange(21, 24)))
    fewer = {**some, "head_weight": some["head_weight"][kept], "head_bias": some["head_bias"][kept]}
    masked = {**some, "head_bias": torch.full((24,), -torch.inf)}
    masked["head_bias"][kept] = some["head_bias"][kept]
    if boosting == "supervised":
        fewer["targets"] = some["targets"] % 7
        masked["targets"] = kept[fewer["targets"]]
    got, exact = outcome("cpu", masked, boosting), outcome(None, fewer, boosting)
    for k in (*range(7), 9):
        testing.assert_within_rule(got[k], exact[k].float(), exact[k], 20 * 3 * 33)
    assert not got[7][:16].any() and not got[8][20]


def test_one_class_has_neither_loss_nor_gradient():
    loss, boosting, alignment, _, *gradients = outcome("cpu", arguments(SHAPES["one class"]))
    assert boosting == 0 and loss == alignment
    assert not gradients[3].any() and not gradients[4].any()


def test_huge_features_are_normalised_like_the_references():
    tensors = arguments((20, 3, 16, 10))
    tensors["features"] *= 1e15
    tensors["portland_weight"] *= 1e-15
    check(tensors)


# -- doors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("features", lambda z: torch.zeros(37, 33, 7).mT, "must be contiguous"),
        ("features", lambda z: torch.zeros(37, 7, 66)[..., ::2], "must be contiguous"),
        ("head_weight", lambda H: torch.zeros(33, 50).T, "head_weight must have stride 1 .* 50"),
    ],
)
def test_what_the_kernels_cannot_take_is_said_in_a_sentence(name, change, reason):
    tensors = arguments(SHAPES["odd"])
    tensors[name] = change(tensors[name])
    with neulig_fast.use_backend(neulig_loss="cpu"), pytest.raises(RuntimeError, match=reason):
        neulig_loss(**tensors)


def test_more_experts_than_the_kernels_know_run_on_the_reference():
    args = (*arguments((2, 65, 2, 3)).values(), "supervised", SCALING, True, False)
    assert LOSS.why_not("cpu", "cpu", args) == "N=65 > 64 experts"


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("features", torch.zeros(37, 7), r"features must be \(B, N, D\) with N <= 64, got"),
        ("features", torch.zeros(37, 33, 7).mT, "features must be contiguous"),
        ("portland_weight", torch.zeros(7, 230), r"portland_weight must be .* \(7, 231\), got"),
        ("head_weight", torch.zeros(50, 33).double(), "head_weight must be Float .* got .*Double"),
        ("head_bias", torch.zeros(49), r"head_bias must be contiguous Float \(50\), got \(49,\)"),
        ("targets", None, "targets are needed"),
        ("targets", torch.full((37,), 50), r"targets must be in \[0, 50\), got 50"),
        ("targets", torch.full((37,), -1), r"targets must be in \[0, 50\), got -1"),
        ("alignment", torch.zeros(7, 14)[:, ::2], "alignment must be contiguous"),
    ],
)
@pytest.mark.parametrize("op", [LOSS, BACKWARD], ids=lambda op: op.name)
def test_the_native_twins_have_a_door_of_their_own(op, name, value, message):
    if op is LOSS:
        args = [*arguments(SHAPES["odd"]).values(), "supervised", SCALING, True, False]
    else:
        args = list(backward_arguments("odd"))
    args[op.arguments.index(name)] = value
    with pytest.raises(RuntimeError, match=f"{op.name}: .*{message}"):
        getattr(torch.ops.neulig_fast_C, op.name).default(*args)
