"""Ops and their backends: define, offer, choose.

An :class:`Op` is defined once, in Python, from a schema in words; a backend is *offered* to it and
says by itself, in a sentence, when it cannot take a call. The first able backend in the op's
documented order runs. Nothing falls back silently: the first time an op runs on anything but its
first choice, one :class:`NeuligFastWarning` gives the reason and the remedy.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _checks, _native

BACKENDS = ("cuda", "triton", "cpu", "torch")
DEVICES = ("cpu", "cuda")

log = logging.getLogger("neulig_fast.dispatch")
_LIB = torch.library.Library("neulig_fast", "DEF")
# C++ and CUDA implement a private twin of every op. It keeps them from fighting Python over the
# dispatch keys and lets a test call them alone.
_NATIVE_LIB = torch.library.Library("neulig_fast_C", "DEF")

OPS: dict[str, Op] = {}
# What the environment and use_backend bind, innermost last: op name (None: every op that offers the
# backend) -> backend. Replaced as a whole, never changed, so that other threads see all or nothing.
forcing: tuple[Mapping[str | None, str], ...] = ()
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
        native_schema: of that twin, where its arguments are not the op's.
        reference: plain PyTorch; the documentation, the ``torch`` backend and the oracle.
        fake: shapes, strides and dtypes of the result; its arguments have no faults.
        order: device type -> backends, best first; ``torch`` is always last.
        samples: ``samples(device, dtype)`` yields argument tuples that cover the op.
        faults: what is wrong with the form of the arguments, in words; asked before every call,
            also of the fake, so that each way to the op has the same door.
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
        faults: Callable[..., Iterable[str]],
        order: Mapping[str, Sequence[str]],
        samples: Callable[[torch.device | str, torch.dtype], Iterator[tuple[Any, ...]]],
        native_schema: str | None = None,
        check: Callable[..., None] = _always,
        autograd: tuple[Callable[..., None], Callable[..., Any]] | None = None,
        differentiable: Sequence[str] = (),
        terms: Callable[..., int] = lambda *args: 1,
        elementwise: bool = False,
        not_offered: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.schema = name, schema
        self.reference, self.fake, self.faults, self.check = reference, fake, faults, check
        self.order = {device: tuple(order[device]) for device in DEVICES}
        self.samples, self.terms, self.elementwise = samples, terms, elementwise
        self.differentiable = tuple(differentiable)
        self.not_offered = dict(not_offered or {})
        self.impls: dict[str, Impl] = {"torch": Impl(reference, _always, _always)}

        qualified = f"neulig_fast::{name}"
        _LIB.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _NATIVE_LIB.define(name + (native_schema or schema))
        _LIB.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, self._run_fake, lib=_LIB)
        setup_context, backward = autograd or _not_differentiable(name)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIB)
        self.overload = getattr(torch.ops.neulig_fast, name).default
        OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        """Call the operator.

        Raises:
            ValueError: arguments that do not fit, every fault named.
            NotImplementedError: an argument with a forward-mode tangent.
        """
        # torch.library has no forward-mode formula and would drop the tangent without a word.
        if any(map(has_tangent, args)):
            raise NotImplementedError(f"{self.name}: no forward-mode derivative")
        return self.overload(*args)

    @property
    def arguments(self) -> list[str]:
        """The names of the schema's arguments, in order."""
        return [argument.name for argument in self.overload._schema.arguments]

    # -- offering backends ---------------------------------------------------------------------

    def add_native(
        self,
        backend: str,
        *,
        prepare: Callable[..., tuple[Any, ...]] | None = None,
        run: Callable[..., Any] | None = None,
        why_not: Callable[..., str | None] = _always,
    ) -> None:
        """Offer the C++ (``cpu``) or CUDA C++ (``cuda``) room.

        ``prepare`` makes the twin's arguments of the op's; or ``run`` does all, where one call of
        the op is not one of the twin.
        """
        key = backend.upper()
        overload = getattr(torch.ops.neulig_fast_C, self.name).default

        def missing(device: str) -> str | None:
            if device != backend:
                return f"for {backend} tensors"
            return _native.why_missing(self.name, key) or _no_device(device)

        def run_twin(*args: Any) -> Any:
            return overload(*(prepare(*args) if prepare else args))

        self.impls[backend] = Impl(run or run_twin, missing, why_not)

    def add_triton(
        self,
        *,
        prepare: Callable[..., tuple[Any, ...]] | None = None,
        run: Callable[..., Any] | None = None,
    ) -> None:
        """Offer ``kernels/<op>.py``, which says itself what it cannot take; imported when asked.

        ``prepare`` and ``run`` as in :meth:`add_native`.
        """

        def module() -> Any:
            return importlib.import_module(f"neulig_fast.kernels.{self.name}")

        def launch(*args: Any) -> Any:
            return getattr(module(), self.name)(*(prepare(*args) if prepare else args))

        def missing(device: str) -> str | None:
            kernels = importlib.import_module("neulig_fast.kernels._launch")
            return kernels.missing(device) or _no_device(device)

        self.impls["triton"] = Impl(run or launch, missing, lambda *args: module().why_not(*args))

    # -- choosing ------------------------------------------------------------------------------

    def forced(self) -> str | None:
        """The backend this op is bound to by ``use_backend`` or the environment, if any."""
        for choices in reversed(forcing):
            if self.name in choices:
                return choices[self.name]
            if choices.get(None) in self.impls:
                return choices[None]
        return None

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
        _checks.raise_all(self.name, self.faults(*args))
        device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
        if device == "cpu":
            self.check(*args)
        backend = self.choose(device, args)
        log.debug("%s: %s on %s", self.name, backend, device)
        run = self.impls[backend].run
        if torch.is_autocast_enabled(device):  # the op states its own types
            with torch.autocast(device, enabled=False):
                return run(*args)
        return run(*args)

    def _run_fake(self, *args: Any) -> Any:
        _checks.raise_all(self.name, self.faults(*args))
        return self.fake(*args)

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


def has_tangent(argument: Any) -> bool:
    """Whether an argument carries a forward-mode derivative."""
    return (
        forward_ad._current_level >= 0
        and isinstance(argument, torch.Tensor)
        and forward_ad.unpack_dual(argument).tangent is not None
    )
