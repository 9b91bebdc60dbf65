"""Ops and their backends: define, offer, choose.

An :class:`Op` is defined once, in Python, from a schema in words; a backend is *offered* to it and
says by itself, in a sentence, when it cannot take a call. The first able backend in the op's
documented order runs. Nothing falls back silently: the first time an op runs on anything but its
first choice, one :class:`NeuligFastWarning` gives the reason and the remedy.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _autograd, _checks, _native

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


def _always(*_args: Any, **_kwargs: Any) -> None:
    return None


class Op:
    """An operator of the ``neulig_fast`` namespace and the backends that can run it.

    Args:
        name: its one name, in every folder.
        schema: ``"(Tensor a, ...) -> Tensor"``; also defined as ``neulig_fast_C::<name>``.
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
        native: the schema of the native twin where it is not ``schema``. Such a twin, and the
            Triton launcher, write into their first argument, which ``prepare`` supplies; or ``run``
            of :meth:`add_native` and :meth:`add_triton` calls them as it pleases.
        room: the op whose files, native twin and Triton launcher this variant of it shares.
        guard: looks at the memory and the state of the arguments before anything is written.

    An op that writes into its first argument (``Tensor(a!)`` in the schema) returns nothing, has no
    gradient, and refuses arguments that ask for one.
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
        check: Callable[..., None] = _always,
        autograd: _autograd.Formula | None = None,
        differentiable: Sequence[str] = (),
        terms: Callable[..., int] = lambda *args: 1,
        elementwise: bool = False,
        not_offered: Mapping[str, str] | None = None,
        native: str | None = None,
        room: str | None = None,
        guard: Callable[..., None] = _always,
    ) -> None:
        self.name, self.schema, self.room, self.guard = name, schema, room or name, guard
        self.reference, self.fake, self.faults, self.check = reference, fake, faults, check
        self.order = {device: tuple(order[device]) for device in DEVICES}
        self.samples, self.terms, self.elementwise = samples, terms, elementwise
        self.differentiable, self.not_offered = tuple(differentiable), dict(not_offered or {})
        self.impls: dict[str, Impl] = {"torch": Impl(reference, _always, _always)}
        self.kernels_write: bool = native is not None if room is None else OPS[room].kernels_write
        self._able: set[tuple[str, str]] = set()  # (backend, device) known to run here
        if room is None:
            _NATIVE_LIB.define(name + (native or schema))
        self._define(autograd)
        OPS[name] = self

    def _define(self, formula: _autograd.Formula | None) -> None:
        _LIB.define(self.name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.overload = getattr(torch.ops.neulig_fast, self.name).default
        arguments = self.overload._schema.arguments
        self.arguments = [argument.name for argument in arguments]
        self.writes = self.overload._schema.is_mutable
        # The first tensor that is never None says the device.
        self._witness = [str(argument.type) for argument in arguments].index("Tensor")
        _LIB.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"neulig_fast::{self.name}", self._run_fake, lib=_LIB)
        _autograd.register(self, _LIB, formula)

    def __call__(self, *args: Any) -> Any:
        """Call the operator.

        Raises:
            ValueError: arguments that do not fit, every fault named.
            NotImplementedError: an argument with a forward-mode tangent.
        """
        # torch.library has no forward-mode formula and would drop the tangent without a word.
        if forward_ad._current_level >= 0 and any(map(_autograd.has_tangent, args)):
            raise NotImplementedError(f"{self.name}: no forward-mode derivative")
        return self.overload(*args)

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
        overload = getattr(torch.ops.neulig_fast_C, self.room).default

        def missing(device: str) -> str | None:
            if device != backend:
                return f"for {backend} tensors"
            return _native.why_missing(self.room, key) or no_device(device)

        kernel = self._adapted(lambda: overload, prepare)
        self.impls[backend] = Impl(run or kernel, missing, why_not)

    def add_triton(
        self,
        *,
        prepare: Callable[..., tuple[Any, ...]] | None = None,
        run: Callable[..., Any] | None = None,
        why_not: Callable[..., str | None] = lambda module, *args: module.why_not(*args),
    ) -> None:
        """Offer ``kernels/<op>.py``, which says itself what it cannot take; imported when asked.

        ``prepare`` and ``run`` as in :meth:`add_native`.
        """

        @functools.cache
        def module() -> Any:
            return importlib.import_module(f"neulig_fast.kernels.{self.room}")

        def missing(device: str) -> str | None:
            kernels = importlib.import_module("neulig_fast.kernels._launch")
            return kernels.missing(device) or no_device(device)

        self.impls["triton"] = Impl(
            run or self._adapted(lambda: getattr(module(), self.room), prepare),
            missing,
            lambda *args: why_not(module(), *args),
        )

    def _adapted(
        self,
        kernel: Callable[[], Callable[..., Any]],
        prepare: Callable[..., tuple[Any, ...]] | None,
    ) -> Callable[..., Any]:
        """The op, from a kernel that takes what ``prepare`` makes of the op's arguments."""

        def call(*args: Any) -> Any:
            return kernel()(*(prepare(*args) if prepare else args))

        def write(*args: Any) -> Any:
            prepared = prepare(*args) if prepare else args
            kernel()(*prepared)
            return prepared[0]

        return write if self.kernels_write else call

    # -- choosing ------------------------------------------------------------------------------

    def forced(self) -> str | None:
        """The backend this op is bound to by ``use_backend`` or the environment, if any."""
        for choices in reversed(forcing):
            for name in (self.name, self.room):
                if name in choices:
                    return choices[name]
            if choices.get(None) in self.impls:
                return choices[None]
        return None

    def why_not(self, backend: str, device: str, args: Sequence[Any] | None = None) -> str | None:
        """Why ``backend`` cannot run on ``device`` (with these arguments); None when it can."""
        if backend not in self.impls:
            return self.not_offered.get(backend, "not offered")
        impl = self.impls[backend]
        if args is None:
            return impl.missing(device)
        if (backend, device) not in self._able:
            if (reason := impl.missing(device)) is not None:
                return reason
            self._able.add((backend, device))
        return impl.why_not(*args)

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
        if found := list(self.faults(*args)):
            _checks.raise_all(self.name, found)
        device = args[self._witness].device.type
        if device == "cpu":
            self.check(*args)
        self.guard(*args)
        backend = self.choose(device, args)
        log.debug("%s: %s on %s", self.name, backend, device)
        run = self.impls[backend].run
        if torch.is_autocast_enabled(device):  # the op states its own types
            with torch.autocast(device, enabled=False):
                result = run(*args)
        else:
            result = run(*args)
        return None if self.writes else result

    def _run_fake(self, *args: Any) -> Any:
        _checks.raise_all(self.name, self.faults(*args))
        return self.fake(*args)


def no_device(device: str) -> str | None:
    """Why there is nothing to run on: no CUDA device where one is asked for."""
    return "no CUDA device" if device == "cuda" and not torch.cuda.is_available() else None
