"""The specification of a model: by the rules of its modules, or by a trace that is verified."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import builders  # noqa: F401  (its files fill the table of rules)
from .draft import Draft
from .rules import ADVICE
from .spec import Spec, check_tensors
from .tracer import traced
from .verifier import verify


def spec_for(model: nn.Module, inputs: Any = None) -> Spec:
    """Which axes of which tensors of ``model`` move together.

    A module's rule is found by its exact type (docs/align.md lists them); a module that has none is
    traced. What the model is given and returns is in no node. A node bears the name of the first
    layer that makes its units.

    Args:
        model: read, not changed.
        inputs: for :func:`verify`, which judges whatever was traced; None makes them up.

    Raises:
        TypeError: not a module.
        ValueError: a module that no rule covers and that cannot be traced, or whose trace is not
            right; named, as :func:`verify` does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"spec_for: model must be a torch.nn.Module, got {type(model).__name__}")
    draft = Draft(traced)
    draft.fix(draft.apply(model, "", draft.given()))
    spec = draft.spec()
    check_tensors(spec, model.state_dict(), "spec_for")
    if draft.guessed:
        try:
            verify(model, spec, inputs)
        except ValueError as error:
            raise ValueError(
                f"spec_for: no rule for {'; '.join(draft.guessed)}, and what its trace proposes "
                f"was not confirmed. {ADVICE}. {error}"
            ) from error
    spec.confirmed = True
    return spec
