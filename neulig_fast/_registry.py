"""Ops and their backends: define, offer, choose.

An :class:`Op` is defined once, in Python, from a schema in words; a backend is *offered* to it and
says by itself, in a sentence, when it cannot take a call. The first able backend in the op's
documented order runs. Nothing falls back silently: the first time an op runs on anything but its
first choice, one :class:`NeuligFastWarning` gives the reason and the remedy.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from . import _native

BACKENDS = ("cuda", "triton", "cpu", "torch")
DEVICES = ("cpu", "cuda")

log = logging.getLogger("neulig_fast.dispatch")
_LIB = torch.library.Library("neulig_fast", "DEF")
# C++ and CUDA implement a private twin of every op. It keeps them from fighting Python over the
# dispatch keys and lets a test call them alone.
_NATIVE_LIB = torch.library.Library("neulig_fast_C", "DEF")

OPS: dict[str, Op] = {}
# What use_backend and the environment bind: op name (None: every op that offers it) -> backend.
forced_backends: dict[str | None, str] = {}
_warned: set[tuple[str, str]] = set()


class NeuligFastWarning(UserWarning):
    """Something works, but not the way it was meant to; the text says why and what would help."""


@dataclasses.dataclass(frozen=True)
class Impl:
    """One backend of one op.

    ``missing`` answers, per device type, why it cannot run here at all (None: it can);
    ``why_not`` answers the same for one call. Both speak of ability, never of preference.
    """

    run: Callable[..., Any]
    missing: Callable[[str], str | None]
    why_not: Callable[..., str | None]


@dataclasses.dataclass(frozen=True)
class BackendStatus:
    """What runs for one op on one device type, and why the other backends do not."""

    op: str
    device: str
    runs: str | None
    reasons: Mapping[str, str | None]
    forced: str | None


def _always(*_args: Any, **_kwargs: Any) -> None:
    return None


def _not_differentiable(name: str) -> tuple[Callable[..., None], Callable[..., Any]]:
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: not differentiable; detach its inputs")

    return setup_context, backward


class Op:
    """An operator of the ``neulig_fast`` namespace and the backends that can run it.

    Args:
        name: its one name, in every folder.
        schema: ``"(Tensor a, ...) -> Tensor"``; also defined as ``neulig_fast_C::<name>``.
        reference: plain PyTorch; the documentation, the ``torch`` backend and the oracle.
        fake: shapes, strides and dtypes only.
        order: device type -> backends, best first; ``torch`` is always last.
        samples: ``samples(device, dtype)`` yields argument tuples that cover the op.
        check: looks at the *values* of index arguments before any backend runs on the CPU.
        autograd: ``(setup_context, backward)``, or None: an explicit error in the backward pass.
        differentiable: names of the arguments that have a gradient.
        terms: the number of terms per output element, for the tolerance of reductions.
        elementwise: promises the same bits on every backend.
        not_offered: backend -> why this op does not have it.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        order: Mapping[str, Sequence[str]],
        samples: Callable[[torch.device | str, torch.dtype], Iterator[tuple[Any, ...]]],
        check: Callable[..., None] = _always,
        autograd: tuple[Callable[..., None], Callable[..., Any]] | None = None,
        differentiable: Sequence[str] = (),
        terms: Callable[..., int] = lambda *args: 1,
        elementwise: bool = False,
        not_offered: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.schema = name, schema
        self.reference, self.fake, self.check = reference, fake, check
        self.order = {device: tuple(order[device]) for device in DEVICES}
        self.samples, self.terms, self.elementwise = samples, terms, elementwise
        self.differentiable = tuple(differentiable)
        self.not_offered = dict(not_offered or {})
        self.impls: dict[str, Impl] = {"torch": Impl(reference, _always, _always)}

        qualified = f"neulig_fast::{name}"
        _LIB.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _NATIVE_LIB.define(name + schema)
        _LIB.impl(name, reference, "CompositeExplicitAutograd")
        for key in ("CPU", "CUDA"):
            _LIB.impl(name, self._run, key)
        torch.library.register_fake(qualified, fake, lib=_LIB)
        setup_context, backward = autograd or _not_differentiable(name)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIB)
        OPS[name] = self

    @property
    def arguments(self) -> list[str]:
        """The names of the schema's arguments, in order."""
        overload = getattr(torch.ops.neulig_fast, self.name).default
        return [argument.name for argument in overload._schema.arguments]

    # -- offering backends ---------------------------------------------------------------------

    def add_native(
        self,
        backend: str,
        *,
        prepare: Callable[..., tuple[Any, ...]],
        why_not: Callable[..., str | None] = _always,
    ) -> None:
        """Offer the C++ (``cpu``) or CUDA C++ (``cuda``) room; ``prepare`` makes its arguments."""
        key = backend.upper()

        def missing(device: str) -> str | None:
            if device != backend:
                return f"for {backend} tensors"
            return _native.why_missing(self.name, key) or _no_device(device)

        def run(*args: Any) -> Any:
            overload = getattr(torch.ops.neulig_fast_C, self.name).default
            return overload(*prepare(*args))

        self.impls[backend] = Impl(run, missing, why_not)

    def add_triton(
        self,
        *,
        prepare: Callable[..., tuple[Any, ...]],
        why_not: Callable[..., str | None] = _always,
    ) -> None:
        """Offer ``kernels/<op>.py``; imported at its first call, never before."""

        def run(*args: Any) -> Any:
            module = importlib.import_module(f"neulig_fast.kernels.{self.name}")
            return getattr(module, self.name)(*prepare(*args))

        self.impls["triton"] = Impl(run, _triton_missing, why_not)

    # -- choosing ------------------------------------------------------------------------------

    def forced(self) -> str | None:
        """The backend this op is bound to by ``use_backend`` or the environment, if any."""
        if self.name in forced_backends:
            return forced_backends[self.name]
        unnamed = forced_backends.get(None)
        return unnamed if unnamed in self.impls else None

    def why_not(self, backend: str, device: str, args: Sequence[Any] | None = None) -> str | None:
        """Why ``backend`` cannot run on ``device`` (with these arguments); None when it can."""
        if backend not in self.impls:
            return self.not_offered.get(backend, "not offered")
        impl = self.impls[backend]
        return impl.missing(device) or (impl.why_not(*args) if args is not None else None)

    def choose(self, device: str, args: Sequence[Any]) -> str:
        """The backend that runs this call. RuntimeError when a forced one is unable."""
        forced = self.forced()
        if forced is not None:
            reason = self.why_not(forced, device, args)
            if reason is not None:
                raise RuntimeError(
                    f"{self.name}: backend {forced!r} was asked for but cannot run on {device} "
                    f"here: {reason}"
                )
            return forced
        order = self.order.get(device, ("torch",))
        skipped = []
        for backend in order:
            reason = self.why_not(backend, device, args)
            if reason is None:
                break
            skipped.append(f"{backend}: {reason}")
        if skipped and (self.name, device) not in _warned:
            _warned.add((self.name, device))
            warnings.warn(
                f"{self.name} runs on the {backend!r} backend for {device} tensors, because "
                f"{'; '.join(skipped)}. neulig_fast.show_backends() explains; "
                f"use_backend({backend!r}) accepts it silently.",
                NeuligFastWarning,
                stacklevel=3,
            )
        return backend

    def _run(self, *args: Any) -> Any:
        device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
        if device == "cpu":
            self.check(*args)
        backend = self.choose(device, args)
        log.debug("%s: %s on %s", self.name, backend, device)
        return self.impls[backend].run(*args)

    def status(self, device: str) -> BackendStatus:
        """What would run on ``device``, and why the other backends would not."""
        reasons = {backend: self.why_not(backend, device) for backend in BACKENDS}
        if device == "cuda" and _no_device("cuda"):
            return BackendStatus(self.name, device, None, reasons, self.forced())
        forced = self.forced()
        candidates = self.order[device] if forced is None else (forced,)
        runs = next((b for b in candidates if reasons[b] is None), None)
        return BackendStatus(self.name, device, runs, reasons, forced)


def _no_device(device: str) -> str | None:
    return "no CUDA device" if device == "cuda" and not torch.cuda.is_available() else None


def triton_interprets() -> bool:
    """Whether Triton kernels run in its interpreter, hence also on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _triton_missing(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu":
        return None if triton_interprets() else "for cuda tensors (or TRITON_INTERPRET=1)"
    return _no_device(device)
