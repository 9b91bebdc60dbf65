"""``nf_ties``, ``nf_dare_ties``: mergekit's methods in ``accurate`` parity, whatever the patch's.

So a recipe says itself which sums it means: with ``nf.patch("mergekit", parity="exact")`` only
models that ask for it are summed in fp32.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from torch import Tensor

from .._seam import Unsupported
from ._task_vectors import merge_group


def method(name: str) -> Any:
    """One of mergekit's methods of task vectors by our name, as its registry holds it."""
    theirs = importlib.import_module("mergekit.merge_methods.registry").get(name)
    kind = type(theirs)

    def merge(self: Any, group: Any, /, **parameters: Any) -> Tensor:
        try:
            return merge_group(self, group, **parameters)
        except Unsupported:
            pass  # counted where mergekit's own is replaced
        merged: Tensor = kind.merge_group(self, group, **parameters)
        return merged

    # A class that no module has by name: who unpickles one in another process makes it anew.
    own = {"merge_group": merge, "__module__": __name__, "__reduce__": lambda _: (method, (name,))}
    ours = type(f"Fused{kind.__name__}", (kind,), own)
    fields = {field.name: getattr(theirs, field.name) for field in dataclasses.fields(theirs)}
    title = f"{theirs.method_pretty_name} (neulig_fast)"
    return ours(**{**fields, "method_name": f"nf_{name}", "method_pretty_name": title})
