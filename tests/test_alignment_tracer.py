"""Networks that no rule knows: traced and verified, or refused with what is not understood."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet as vision

from neulig_fast import alignment
from neulig_fast.alignment import rules


def partition(spec):
    """Axes by node, whatever the nodes are called."""
    return {
        frozenset((u.tensor, u.axis, u.start, u.role, u.repeat) for u in spec.uses_of(name))
        for name in spec.nodes
    }


class Functional(nn.Module):
    """Calls, methods, operators and parameters."""

    def __init__(self):
        super().__init__()
        self.conv, self.again = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.scale, self.shift = nn.Parameter(torch.randn(6, 1, 1)), nn.Parameter(torch.zeros(1))
        self.mix = nn.Parameter(torch.randn(6 * 16, 5))
        self.table, self.bias = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(7))
        self.slope = nn.Parameter(torch.randn(7))

    def forward(self, x):
        x = self.conv(x)
        x = x + F.gelu(self.again(F.relu(x))) * self.scale.exp() + self.shift
        x = F.max_pool2d(x, 2)
        x = x.view(x.size(0), -1) @ self.mix
        return F.linear(torch.tanh(x), self.table, self.bias) * self.slope


class Tokens(nn.Module):
    """A vision transformer's frame around torch.nn's attention."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.positions = nn.Parameter(torch.randn(1, 4, 8))
        self.attend, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.positions
        y = self.norm(x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        return self.head(x.mean(dim=1)), self.head(x[:, 0])


@pytest.mark.parametrize(
    "build, nodes",
    [(Functional, {"conv": 6, "mix": 5}), (Tokens, {"patch": 8, "attend.qk": 8, "attend.vo": 8})],
)
def test_a_trace_finds_all_nodes(build, nodes):
    module = build()
    spec = alignment.spec_for(module, torch.randn(2, 3, 8, 8))
    assert {name: node.size for name, node in spec.nodes.items()} == nodes
    missing = module.state_dict().keys() - {use.tensor for use in spec.uses}
    assert all(re.match("head.bias|table|bias|slope|shift", name) for name in missing)
    alone = nn.Sequential(module) if build is Functional else module
    inside = alignment.spec_for(alone, torch.randn(2, 3, 8, 8))
    assert len(inside.nodes) == len(nodes)


@pytest.mark.parametrize("block", [vision.BasicBlock, vision.Bottleneck])
def test_a_trace_agrees_with_the_rules(block, monkeypatch):
    with torch.device("meta"):
        module = vision.ResNet(block, [1, 2, 1, 1], 5)
    expected = alignment.spec_for(module)
    layers = {k: v for k, v in rules.RULES.items() if str(k).startswith("torch.nn.")}
    monkeypatch.setattr(rules, "RULES", layers)
    proposed = alignment.propose(module)
    assert partition(proposed) == partition(expected)
    assert proposed.nodes.keys() <= {use.tensor.rpartition(".")[0] for use in proposed.uses}


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(8, 8), nn.Linear(8, 3), function
        self.gain = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.last(self.function(self, self.first(x)))


@pytest.mark.parametrize(
    "function, named",
    [
        (lambda m, x: x.reshape(-1, 2, 4).transpose(1, 2).reshape(-1, 8), r"reshape.*\(B, -1\)"),
        (lambda m, x: torch.cat([x, x], 1), r"cat is not in the tables"),
        (lambda m, x: x.flip(1), r"%flip.*flip is not in the tables"),
        (lambda m, x: x * (m.gain * m.last.weight[0]), r"an index that is no token"),
        (lambda m, x: x * (m.gain * m.gain), "parameters meet one another"),
        (lambda m, x: F.avg_pool1d(x, 1), "pooling of units that lie 'last'"),
        (lambda m, x: x.mean(2), r"over dimensions 2 of units that lie 'last'"),
        (lambda m, x: x.chunk(2, -1)[0], "chunk is not in the tables"),
        (lambda m, x: x + x.mT, "attribute mT of an activation"),
        (lambda m, x: x if x.sum() > 0 else -x, r"torch\.fx cannot trace it"),
    ],
    ids=range(10),
)
def test_what_a_trace_does_not_understand_is_named(function, named):
    with pytest.raises(ValueError, match=named) as caught:
        alignment.spec_for(Calls(function))
    message = str(caught.value)
    assert message.startswith("spec_for: the model is a ") and "Calls" in message
    assert "alignment.register" in message


def test_a_member_without_a_rule_is_named():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 2))

        def forward(self, x):
            return self.inner[1](self.inner[0](x), x)

    with pytest.raises(ValueError, match=r"inner\.1 is a torch.*Bilinear, which has no rule"):
        alignment.spec_for(nn.Sequential(nn.Linear(4, 4), Around()))


def test_a_wrong_proposal_is_not_returned():
    class OverTokens(nn.Module):
        """A norm over dimension 1, which the trace takes for the units."""

        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.norm(self.first(x)))

    spec = alignment.spec_for(OverTokens(), torch.randn(5, 6))
    assert spec.nodes["first"].size == 4
    with pytest.raises(ValueError, match=r"OverTokens.*was not confirmed.*node first changes"):
        alignment.spec_for(OverTokens(), torch.randn(5, 4, 6))


def test_sums_of_unlike_sizes_are_refused():
    class Broadcasts(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.one, self.last = nn.Linear(4, 6), nn.Linear(4, 1), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.wide(x) * self.one(x))

    with pytest.raises(ValueError, match="one makes 1 units that are joined to the 6 of wide"):
        alignment.spec_for(Broadcasts())


def test_shared_layers_join_what_they_read_and_make():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.loop, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.tied = nn.Linear(6, 6)
            self.tied.weight = self.loop.weight

        def forward(self, x):
            return self.last(self.tied(self.loop(self.loop(self.first(x)).relu())).relu())

    spec = alignment.spec_for(Twice())
    assert list(spec.nodes) == ["first"]
    assert {use.tensor for use in spec.uses_of("first")} >= {"loop.weight", "tied.weight"}


def test_what_is_joined_to_inputs_or_outputs_stays():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.hidden = nn.Linear(5, 5), nn.Linear(5, 7)
            self.last, self.beside = nn.Linear(7, 5), nn.Linear(7, 3)

        def forward(self, x):
            hidden = self.hidden(x + self.first(x)).tanh()
            return {"a": [self.last(hidden)], "b": self.beside(hidden)}

    assert list(alignment.spec_for(Skips()).nodes) == ["hidden"]
