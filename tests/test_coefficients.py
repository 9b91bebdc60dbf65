"""CoefficientModule: gradients against oracles, what it keeps in memory, constraints, errors."""

import copy
import re

import pytest
import torch
from torch import nn

from neulig_fast import CoefficientModule, ExpertPool

GRANULARITIES = ("model", "layer", "tensor")
CONSTRAINTS = ("none", "clamp", "softmax")


class Encoder(nn.Module):
    """A layer with BatchNorm, one without, a buffer that is not saved, and a keyword."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU())
        self.out = nn.Linear(6, 3)
        self.register_buffer("shift", torch.tensor(0.25), persistent=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return self.out(self.dropout(self.blocks(x + self.shift))) * scale


def experts(count=3, make=Encoder):
    models = [make() for _ in range(count)]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return models


def pool_of(count=3, make=Encoder, **options):
    return ExpertPool(experts(count, make), **options)


def inputs(pool):
    return torch.randn(5, 4, dtype=pool.params.dtype)


def by_hand(module, x):
    """The same model from a graph of N additions per tensor, buffers not differentiated."""
    pool, weights = module.pool, module.weights()
    state = {}
    for s, segment in enumerate(pool.segments):
        w = weights if weights.ndim == 1 else weights[s]
        tensors = [pool.state_dict(i)[segment.name].detach() for i in range(pool.num_experts)]
        total = w[0] * tensors[0]
        for i in range(1, len(tensors)):
            total = total + w[i] * tensors[i]
        state[segment.name] = total if segment.kind == "parameter" else total.detach()
    model = copy.deepcopy(pool.template).to(pool.params.dtype).eval()
    return torch.func.functional_call(model, state, (x,))


@pytest.mark.parametrize("base", [None, 1])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_outputs_and_gradients_are_those_of_a_plain_graph(granularity, constraint, base):
    if base is not None and constraint == "softmax":
        pytest.skip("refused, see below")
    pool = pool_of(dtype=torch.float64)
    module = CoefficientModule(pool, granularity, constraint=constraint, base=base)
    with torch.no_grad():
        module.coefficients.add_(0.2 * torch.randn_like(module.coefficients))
    x = inputs(pool)
    got, expected = module(x), by_hand(module, x)
    torch.testing.assert_close(got, expected)
    (grad,) = torch.autograd.grad(got.square().sum(), module.coefficients)
    (exact,) = torch.autograd.grad(expected.square().sum(), module.coefficients)
    torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradcheck_through_an_encoder(granularity):
    def tower():
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

    pool = pool_of(make=tower, dtype=torch.float64)
    module, x = CoefficientModule(pool, granularity, base=0), inputs(pool)

    def loss(coefficients):
        return torch.func.functional_call(module, {"coefficients": coefficients}, (x,)).sum()

    torch.autograd.gradcheck(loss, [module.coefficients.detach().requires_grad_()])


def test_the_gradient_reaches_the_coefficients_alone():
    pool = pool_of()
    module = CoefficientModule(pool, "tensor")
    assert [name for name, _ in module.named_parameters()] == ["coefficients"]
    assert list(module.state_dict()) == ["coefficients"]
    module(inputs(pool)).sum().backward()
    assert module.coefficients.grad.abs().max() > 0
    assert all(p.grad is None for p in pool.template.parameters()) and pool.params.grad is None


def held_for_backward(count):
    """Bytes of the storages kept between forward and backward, apart from the arena itself."""
    pool = pool_of(count, lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))))
    module, x = CoefficientModule(pool, "layer"), torch.randn(2, 64)
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    held.pop(pool.params.untyped_storage().data_ptr())
    rows = [size for size in held.values() if size >= pool.segments.width * 4]
    return len(rows), sum(held.values()) / (pool.segments.width * 4)


def test_one_row_is_held_between_forward_and_backward_whatever_the_number_of_experts():
    for count in (2, 16):
        rows, in_rows = held_for_backward(count)
        assert rows == 1 and in_rows < 1.2


def test_rows_are_layers_or_tensors_of_parameters():
    pool = pool_of()
    layer, tensor = CoefficientModule(pool, "layer"), CoefficientModule(pool, "tensor")
    assert layer.rows == ("blocks.0", "blocks.1", "out")
    assert tensor.rows == pool.segments.parameters().names
    assert CoefficientModule(pool).rows == ("model",)
    with torch.no_grad():
        layer.coefficients.copy_(torch.arange(9.0).view(3, 3))
    for name, weights in zip(pool.segments.names, layer.weights(), strict=True):
        row = layer.rows.index(name.rpartition(".")[0])
        assert torch.equal(weights, layer.coefficients[row])  # BatchNorm's statistics too


def test_statistics_take_the_mean_weights_of_their_layer():
    pool = pool_of()
    module = CoefficientModule(pool, "tensor")
    with torch.no_grad():
        module.coefficients.copy_(torch.randn(len(module.rows), 3))
    weights = dict(zip(pool.segments.names, module.weights(), strict=True))
    expected = (weights["blocks.1.weight"] + weights["blocks.1.bias"]) / 2
    torch.testing.assert_close(weights["blocks.1.running_mean"], expected)
    assert torch.equal(weights["blocks.1.running_var"], weights["blocks.1.running_mean"])


def test_statistics_of_a_layer_without_parameters_take_the_mean_of_all_rows():
    def tower():
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2))

    module = CoefficientModule(pool_of(make=tower), "layer")
    with torch.no_grad():
        module.coefficients.copy_(torch.tensor([[1.0, 2, 3], [5, 6, 7]]))
    assert module.weights()[-2:].tolist() == [[3, 4, 5], [3, 4, 5]]


def test_the_base_makes_task_arithmetic():
    pool = pool_of(4, dtype=torch.float64)
    merged = CoefficientModule(pool, "layer", init=0.3, base=3).merged_state_dict()
    for name in pool.segments.names:
        origin, *others = (pool.state_dict(i)[name] for i in (3, 0, 1, 2))
        expected = origin + 0.3 * sum(other - origin for other in others)
        torch.testing.assert_close(merged[name], expected)


def test_starting_points():
    pool = pool_of(4)
    uniform = torch.full((4,), 0.25)
    assert torch.equal(CoefficientModule(pool).weights(), uniform)
    assert torch.equal(CoefficientModule(pool, constraint="softmax").weights(), uniform)
    with_base = CoefficientModule(pool, "layer", constraint="clamp", base=0)
    assert with_base.coefficients.shape == (3, 3) and (with_base.coefficients == 0.3).all()
    one_row = CoefficientModule(pool, "layer", init=torch.tensor([1.0, 2, 3, 4]))
    assert one_row.coefficients.tolist() == [[1, 2, 3, 4]] * 3
    given = torch.randn(3, 4)
    assert torch.equal(CoefficientModule(pool, "layer", init=given).coefficients, given)
    for large in (10**30, torch.tensor(0.5).to(torch.float8_e5m2)):
        assert CoefficientModule(pool, init=large).coefficients.eq(float(large)).all()


def test_clamped_coefficients_can_come_back():
    module = CoefficientModule(pool_of(4), constraint="clamp")
    with torch.no_grad():
        module.coefficients.copy_(torch.tensor([-0.5, -0.5, 1.5, 1.5]))
    assert module.weights().tolist() == [0, 0, 1, 1]
    module.weights().backward(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    # Descent subtracts the gradient: what would lead further out is dropped.
    assert module.coefficients.grad.tolist() == [0, -1, 1, 0]


def test_clamped_weights_can_be_differentiated_as_a_function():
    module = CoefficientModule(pool_of(), constraint="clamp", init=0.5)

    def total(coefficients):
        return torch.func.functional_call(module, {"coefficients": coefficients}, ())

    module.forward = lambda: module.weights().square().sum()
    assert torch.func.grad(total)(torch.tensor([0.5, 2.0, -1.0])).tolist() == [1, 2, 0]


def test_an_optimiser_lowers_a_loss():
    pool = pool_of()
    module = CoefficientModule(pool, constraint="softmax")
    x = inputs(pool)
    with torch.no_grad():
        target = CoefficientModule(pool, init=torch.tensor([0.0, 1.0, 0.0]))(x)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.3)
    losses = []
    for _ in range(50):
        loss = (module(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert module.weights().argmax() == 1


def test_the_merged_state_dict_is_the_model_that_forward_runs():
    pool = pool_of()
    module, x = CoefficientModule(pool, "tensor", init=0.5), inputs(pool)
    state = module.merged_state_dict()
    assert not any(tensor.requires_grad for tensor in state.values())
    assert (
        len({t.untyped_storage().data_ptr() for t in state.values() if t.is_floating_point()}) == 1
    )
    model = Encoder().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(module(x), model(x))
        assert torch.equal(module(x, scale=2.0), model(x, scale=2.0))
    flowing = pool.blend(module.weights())
    assert all(t.requires_grad for t in flowing.values() if t.is_floating_point())


def test_the_template_runs_in_eval_mode_and_keeps_its_own():
    pool = pool_of()
    pool.template.train()
    module, x = CoefficientModule(pool).train(), inputs(pool)
    before = {name: t.clone() for name, t in pool.template.state_dict().items()}
    assert torch.equal(module(x), module(x))  # no dropout, no batch statistics
    assert pool.template.training
    module.eval()
    assert pool.template.training
    assert all(torch.equal(t, before[name]) for name, t in pool.template.state_dict().items())


def test_a_bf16_pool_has_fp32_coefficients():
    pool = pool_of(dtype=torch.bfloat16)
    module = CoefficientModule(pool, "layer")
    assert module.coefficients.dtype == torch.float32
    y = module(inputs(pool))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and module.coefficients.grad.dtype == torch.float32


def test_one_expert_and_a_saved_module():
    pool = pool_of(1)
    x = inputs(pool)
    assert torch.equal(CoefficientModule(pool)(x), pool.template.eval()(x))
    trained, fresh = CoefficientModule(pool, "layer", init=2.0), CoefficientModule(pool, "layer")
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x), trained(x))


def test_compiles_to_one_graph():
    pool = pool_of()
    module, x = CoefficientModule(pool, "layer", constraint="clamp", base=0), inputs(pool)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x).sum(), module.coefficients)
    (exact,) = torch.autograd.grad(module(x).sum(), module.coefficients)
    torch.testing.assert_close(grad, exact)


def test_every_fault_is_listed():
    with pytest.raises(TypeError, match="pool must be an ExpertPool, got list"):
        CoefficientModule([Encoder()])
    nameless = ExpertPool([Encoder().state_dict()])
    with pytest.raises(ValueError, match="5 problems") as caught:
        CoefficientModule(nameless, "layers", constraint="clam", base=1)
    for words in (
        "no template module",
        "granularity must be one of model, layer, tensor; got 'layers'; did you mean 'layer'?",
        "constraint must be one of none, clamp, softmax; got 'clam'; did you mean 'clamp'?",
        "base must be None or an expert 0 .. 0, got 1",
        "base needs at least one other expert",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"base": True}, "base must be"),
        ({"base": 0, "constraint": "softmax"}, "leaves base no weight"),
        ({"base": -1}, "base must be None or an expert 0 .. 2, got -1"),
        ({"init": "uniform"}, "init must be a number or a dense tensor of real numbers, got 'uni"),
        ({"init": torch.zeros(3).to_sparse()}, "a dense tensor of real numbers"),
        ({"init": torch.zeros(3, device="meta")}, "a dense tensor of real numbers"),
        ({"init": torch.zeros(3, dtype=torch.complex64)}, "a dense tensor of real numbers"),
        ({"init": float("nan")}, "init must be finite in torch.float32"),
        ({"init": torch.tensor(1e300, dtype=torch.float64)}, "init must be finite in torch.float3"),
        ({"init": 10**400}, "init must be finite in torch.float32"),
        ({"init": 1.5, "constraint": "clamp"}, "init must lie in [0, 1]"),
        ({"init": torch.zeros(4)}, "of shape (3, 3) or (3,), got (4,)"),
        ({"init": torch.zeros(4), "granularity": "model"}, "of shape (3,), got (4,)"),
    ],
)
def test_one_fault(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        CoefficientModule(pool_of(), **{"granularity": "layer", **options})


def test_a_pool_of_buffers_alone_is_refused():
    with pytest.raises(ValueError, match="no parameters, only buffers"):
        CoefficientModule(pool_of(make=lambda: nn.BatchNorm1d(4, affine=False)))
