"""blend_lists_weight_grad beyond test_house.py and the gradients in test_blend_lists.py."""

import pytest
import torch

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS

OP = OPS["blend_lists_weight_grad"]
BACKENDS = testing.backends_of(OP)
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
SIZES = [1, 0, 17, 4096, 16384, 40001]


def run(backend, weights, grads, lists):
    with neulig_fast.use_backend(blend_lists_weight_grad=backend):
        return torch.ops.neulig_fast.blend_lists_weight_grad(
            weights, grads, [x for xs in lists for x in xs]
        )


def integers(size, device, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (size + 1,), generator=generator).to(device, dtype)[size % 2 :][
        :size
    ]


@in_every_dtype
@pytest.mark.parametrize("n, grad_dtype", [(1, None), (5, torch.bfloat16), (9, torch.float64)])
@on_every_backend
def test_it_is_exact_where_sums_are(device, backend, n, grad_dtype, dtype):
    lists = [
        [integers(s, device, dtype, 10 * i + t) for t, s in enumerate(SIZES)] for i in range(n)
    ]
    grads = [integers(s, device, grad_dtype or dtype, 99 + t) for t, s in enumerate(SIZES)]
    expected = torch.tensor(
        [[float(g.double() @ xs[t].double()) for xs in lists] for t, g in enumerate(grads)],
        device=device, dtype=torch.promote_types(dtype, torch.float32),
    )  # fmt: skip
    weights = torch.empty(len(SIZES), n, device=device)
    assert torch.equal(run(backend, weights, grads, lists), expected)
    assert torch.equal(run(backend, weights[0], grads, lists), expected.sum(0))


@on_every_backend
def test_it_is_blend_weight_grads_within_the_rule(device, backend):
    sizes, generator = [1000, 33, 3000], torch.Generator().manual_seed(0)
    arena, grad = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((4, sum(sizes)), (sum(sizes),))
    )
    lists = [list(row.split(sizes)) for row in arena]
    bounds = torch.tensor([0, 1000, 1033, 4033], device=device)
    got = run(backend, arena.new_empty(3, 4), list(grad.split(sizes)), lists)
    working = neulig_fast.blend_weight_grad(grad, arena, bounds)
    oracle = neulig_fast.blend_weight_grad(grad.double(), arena.double(), bounds)
    testing.assert_within_rule(got, working, oracle, max(sizes))


@on_every_backend
def test_gradients_of_several_types_and_none(device, backend):
    lists = [[torch.full((40,), float(i + 1), device=device) for _ in range(3)] for i in range(2)]
    grads = [torch.ones(40, device=device, dtype=d) for d in (torch.float16, torch.float64)]
    got = run(backend, torch.empty(3, 2, device=device), [grads[0], None, grads[1]], lists)
    assert got.tolist() == [[40.0, 80.0], [0.0, 0.0], [40.0, 80.0]]
    nothing = run(backend, torch.empty(2, device=device), [None] * 3, lists)
    assert nothing.tolist() == [0.0, 0.0]


@on_every_backend
def test_non_finite_terms_reach_their_tensor_only(device, backend):
    lists = [[torch.ones(5, device=device), torch.ones(6, device=device)] for _ in range(2)]
    lists[1][0][3] = float("inf")
    grads = [torch.ones(5, device=device), torch.ones(6, device=device)]
    got = run(backend, torch.empty(2, 2, device=device), grads, lists)
    assert got[0, 1].isinf() and got[got.isfinite()].tolist() == [5.0, 6.0, 6.0]


@on_every_backend
def test_lists_of_nothing(device, backend):
    weights = torch.ones(2, device=device)
    assert run(backend, weights, [], [[], []]).tolist() == [0.0, 0.0]
    assert run(backend, weights.new_ones(0, 2), [], [[], []]).shape == (0, 2)
    empty = torch.ones(0, device=device)
    assert run(backend, weights, [empty], [[empty], [empty]]).tolist() == [0.0, 0.0]


X = torch.ones(3)
WRONG = [
    ([], r"grads must be T = 1 tensors like each expert's, got 0"),
    ([torch.ones(4)], r"grads, position 0: must be \(3,\) on cpu like the experts, got \(4,\)"),
    ([X.int()], "grads, position 0: must be fp32, bf16, fp16 or fp64, got torch.int32"),
    ([torch.ones(6)[::2]], r"grads, position 0: not contiguous \(strides \(2,\)\)"),
]


@pytest.mark.parametrize("grads, message", WRONG, ids=[m for _, m in WRONG])
def test_wrong_gradients_are_named(grads, message):
    with pytest.raises(ValueError, match=f"blend_lists_weight_grad: {message}"):
        torch.ops.neulig_fast.blend_lists_weight_grad(torch.ones(2), grads, [X, X])
