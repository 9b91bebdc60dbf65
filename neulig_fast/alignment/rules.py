"""The table of rules: which axes of a module's tensors belong to which units.

A rule is a function ``rule(draft, module, path, x)``: it says which tensors of the module at
``path`` have the units ``x`` that it is given along an axis, and returns the units that it hands on
(:mod:`.draft`). Rules are found by a module's exact type: a subclass may compute something else.
Built-in rules name types as strings, so that no library is imported for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import nn

from ..encoders.rules import kind

if TYPE_CHECKING:
    from .draft import Draft, Units

Follow = Callable[["Draft", Any, str, "Units"], "Units"]
AnyFollow = TypeVar("AnyFollow", bound=Callable[..., Any])
WhyNot = Callable[[Any], "str | None"]


class Rule(NamedTuple):
    """``follow`` the units through a module; ``why_not`` says which settings are not covered."""

    follow: Follow
    why_not: WhyNot


# What to do about a module that nothing is known of.
ADVICE = "Pass a Spec, or say which axes belong together with alignment.register"

RULES: dict[type[nn.Module] | str, Rule] = {}


def register(
    *kinds: type[nn.Module] | str, why_not: WhyNot = lambda module: None
) -> Callable[[AnyFollow], AnyFollow]:
    """A decorator that makes a function the rule of modules of exactly these types.

    ::

        @neulig_fast.alignment.register(Gated)
        def gated(draft, module, path, x):
            gate = draft.child(module, path, "gate", x)
            return draft.join(gate, draft.child(module, path, "value", x))

    Args:
        kinds: classes, or their qualified names (``"torchvision.models.resnet.BasicBlock"``).
        why_not: given a module, says in words which of its settings the rule does not cover; None
            when it covers all.

    ``alignment.verify`` tells whether a rule is right.

    Raises:
        ValueError: a type that has a rule already.
    """

    def decorate(follow: AnyFollow) -> AnyFollow:
        for one in kinds:
            if one in RULES:
                raise ValueError(f"register: {one} has a rule already")
            RULES[one] = Rule(follow, why_not)
        return follow

    return decorate


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of the module's exact type, if there is one."""
    return RULES.get(type(module)) or RULES.get(kind(module))


def refusal(module: nn.Module, rule: Rule) -> str | None:
    """Why the rule of its type says nothing of this very module; None when it does."""
    if "forward" in vars(module):
        return "it has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    return rule.why_not(module)


def where(path: str) -> str:
    """What messages call the module at ``path``."""
    return path or "the model"
