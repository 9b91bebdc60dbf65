"""The table of rules: how a module of a known type runs for many models at once.

A rule is a function ``rule(run, module, path, x)``: ``module`` is the template's submodule at
``path``, and says what to compute; the numbers come from ``run`` (:mod:`.runs`), which holds those
of all models. ``x`` is a plain batch, so whatever has no parameters is computed as usual.

Rules are found by a module's exact type, not by what it inherits from: a subclass may compute
something else. Built-in rules name types as strings, so that no library is imported for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from .runs import Run

Apply = Callable[["Run", Any, str, Tensor], Tensor]
AnyApply = TypeVar("AnyApply", bound=Callable[..., Tensor])
WhyNot = Callable[[Any], "str | None"]

# Without a forward of their own: the rule of the module that holds one runs its members.
_CONTAINERS = ("torch.nn.modules.container.ModuleList", "torch.nn.modules.container.ModuleDict")


class Rule(NamedTuple):
    """``apply`` computes the module's output; ``why_not`` says which settings it does not cover."""

    apply: Apply
    why_not: WhyNot


RULES: dict[type[nn.Module] | str, Rule] = {}


def register(
    *kinds: type[nn.Module] | str, why_not: WhyNot = lambda module: None
) -> Callable[[AnyApply], AnyApply]:
    """A decorator that makes a function the rule of modules of exactly these types.

    ::

        class Gated(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.gate, self.value = nn.Linear(width, width), nn.Linear(width, width)
            def forward(self, x):
                return self.gate(x).sigmoid() * self.value(x)

        @neulig_fast.encoders.register(Gated)
        def gated(run, module, path, x):
            gate = run.child(module, path, "gate", x)
            return gate.sigmoid() * run.child(module, path, "value", x)

    Args:
        kinds: classes, or their qualified names (``"open_clip.transformer.QuickGELU"``).
        why_not: given a module, says in words which of its settings the rule does not cover; None
            when it covers all.

    The rule must keep the rows of ``x``, its first dimension, apart and in order. It computes what
    the module does in eval mode, reads parameters through ``run`` alone and changes nothing.

    Raises:
        ValueError: a type that has a rule already.
    """

    def decorate(apply: AnyApply) -> AnyApply:
        for kind in kinds:
            if kind in RULES:
                raise ValueError(f"register: {kind} has a rule already")
            RULES[kind] = Rule(apply, why_not)
        return apply

    return decorate


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of the module's exact type, if there is one."""
    return RULES.get(type(module)) or RULES.get(kind(module))


def faults(template: nn.Module) -> list[str]:
    """What in ``template`` no rule covers, module by module; empty when it can run."""
    found: list[str] = []
    passed_over: list[str] = []  # modules that no rule knows: their children are their own business
    for path, module in template.named_modules(remove_duplicate=False):
        if not any(path.startswith(above) for above in passed_over):
            reasons = [f"{where(path)} {why}" for why in _faults(module)]
            if reasons and rule_of(module) is None:
                passed_over.append(f"{path}." if path else "")
            found += reasons
    return found


def _faults(module: nn.Module) -> Iterator[str]:
    rule, name = rule_of(module), kind(module)
    if rule is None and name not in _CONTAINERS:
        yield f"is a {name}, which has no rule"
    elif rule is not None and (reason := rule.why_not(module)) is not None:
        yield f"is a {name} that the rule does not cover: {reason}"
    if module._forward_hooks or module._forward_pre_hooks:
        yield "has forward hooks, which no rule would call"
    if module._backward_hooks or module._backward_pre_hooks:
        yield "has backward hooks, which no rule would call"
    if "forward" in vars(module):
        yield "has a forward of its own, which no rule would call"


def kind(module: nn.Module) -> str:
    """The qualified name of the module's type."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def join(path: str, name: str) -> str:
    """The path of a submodule or tensor called ``name`` of the module at ``path``."""
    return f"{path}.{name}" if path else name


def where(path: str) -> str:
    """What messages call the module at ``path``."""
    return path or "the template"
