"""What merge_task_vectors, its variant and magnitude_sums share: arguments, faults, formulas, what
kernels take.

Two kinds of reasons drop an element of a task vector: its magnitude, where its place in the whole
tensor decides ties, and a draw. The random word of an element is a pure function of the seed, the
expert's stream and the element's place o = 64 a + 16 w + 2 l + h (w < 4, l < 8, h < 2).
Philox4x32-7 (Salmon, Moraes, Dror, Shaw, SC 2011) with the seed as key and (8 a + l, stream) as
counter, two words each, lower one first, gives four words; half h of word w, 0 the lower one, is
the upper half of the element's word. The lower half is the same of (8 a + l + 2^63, stream): only
the 1 of 65536 elements that the upper half does not decide needs it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from . import _arena, _rounding

# A word's place in its list is how kernels know it.
ELECTIONS = ("none", "weighted_sum", "sum", "weighted_count", "count")
DIVISORS = ("none", "weights", "count")
COMBINATIONS = ("sum", "max")
_WORDS = {"elect": ELECTIONS, "divide": DIVISORS, "combine": COMBINATIONS}
LOWER, UPPER, DRAWN, SCALED = 1, 2, 4, 8  # what kernels are told of a rule
MOST_EXPERTS = 64  # as csrc/cpu/merge_task_vectors_kernels.h and kernels/_launch.py have it

_INTEGERS = ("lower_cut", "upper_cut", "streams")
_BOUNDS = ("lower", "upper")
_VECTORS = ("weights", "scales", *_BOUNDS, "density", *_INTEGERS)
_NEEDS = {"lower_cut": "lower", "upper_cut": "upper", "streams": "density"}
_WORD, _HALF = 0xFFFFFFFF, 0xFFFF
_ROUNDS = 7  # the fewest that passed all tests of the paper
_ANY = 1 << 32  # of a draw: more than every word


class Call(NamedTuple):
    """The arguments of the op, out_dtype apart, as merge_task_vectors explains them."""

    params: Tensor
    weights: Tensor
    base: Tensor | None = None
    scales: Tensor | None = None
    lower: Tensor | None = None
    lower_cut: Tensor | None = None
    upper: Tensor | None = None
    upper_cut: Tensor | None = None
    density: Tensor | None = None
    seed: int = 0
    streams: Tensor | None = None
    start: int = 0
    lam: float = 1.0
    elect: str = "none"
    zero_sign: int = 1
    divide: str = "none"
    combine: str = "sum"


# -- the door -------------------------------------------------------------------------------------


def check_types(op: str, call: Call) -> None:
    """TypeError for arguments of another type; ValueError for integers beyond 64 bits."""
    tensors = {"params": call.params, "weights": call.weights}
    for name in ("base", *_VECTORS[1:]):
        if (given := getattr(call, name)) is not None:
            tensors[name] = given
    _checks.check_tensors(op, **tensors)
    found = []
    for name in ("seed", "start", "zero_sign"):
        if not isinstance(given := getattr(call, name), (int, torch.SymInt)):
            found.append(f"{name} must be an integer, got {given!r}")
    if not isinstance(call.lam, (int, float, torch.SymInt, torch.SymFloat)):
        found.append(f"lam must be a number, got {call.lam!r}")
    for name in _WORDS:
        if not isinstance(given := getattr(call, name), str):
            found.append(f"{name} must be a string, got {given!r}")
    _checks.raise_all(op, found, TypeError)
    if not -(2**63) <= call.seed < 2**63:
        raise ValueError(f"{op}: seed must be a signed 64-bit integer, got {call.seed}")


def faults(call: Call) -> list[str]:
    """What is wrong with the form of the arguments."""
    params, base = call.params, call.base
    found = _arena.faults(params)
    for name in _VECTORS:
        if (vector := getattr(call, name)) is not None:
            found += _vector_faults(name, vector, params)
    if base is not None:
        found += _checks.layout_faults("base", base)
        if params.ndim == 2 and base.shape != params.shape[1:]:
            wanted = _checks.shape(params.shape[1:])
            found.append(f"base must be (P,) = {wanted}, got {_checks.shape(base)}")
        if (base.dtype, base.device) != (params.dtype, params.device):
            wanted, got = f"{params.dtype} on {params.device}", f"{base.dtype} on {base.device}"
            found.append(f"base must be {wanted} like params, got {got}")
    for name, of in _NEEDS.items():
        if getattr(call, name) is not None and getattr(call, of) is None:
            found.append(f"{name} is given without {of}")
    return found + _word_faults(call)


def _vector_faults(name: str, vector: Tensor, params: Tensor) -> list[str]:
    """Of one that has a number for every expert."""
    found = _checks.layout_faults(name, vector)
    if params.ndim == 2 and vector.shape != params.shape[:1]:
        wanted = _checks.shape(params.shape[:1])
        found.append(f"{name} must be (N,) = {wanted}, got {_checks.shape(vector)}")
    sums = _checks.accumulation_dtype(params.dtype)
    if name in _INTEGERS:
        if vector.dtype != torch.int64:
            found.append(f"{name} must be int64, got {vector.dtype}")
    elif not vector.is_floating_point():
        found.append(f"{name} must be floating point, got {vector.dtype}")
    elif name in _BOUNDS and torch.promote_types(vector.dtype, sums) != sums:
        found.append(f"{name} must be {sums} or a float type it holds, got {vector.dtype}")
    if vector.device != params.device:
        found.append(f"{name} must be on {params.device} like params, got {vector.device}")
    return found


def _word_faults(call: Call) -> list[str]:
    found = []
    for name, known in _WORDS.items():
        if (given := getattr(call, name)) not in known:
            words = ", ".join(map(repr, known))
            guess = _checks.did_you_mean(given, known)
            found.append(f"{name} must be one of {words}, got {given!r}{guess}")
    if call.combine == "max" and call.divide != "none":
        found.append(f"combine 'max' divides by nothing, got divide {call.divide!r}")
    if call.zero_sign not in (-1, 0, 1):
        found.append(f"zero_sign must be -1, 0 or 1, got {call.zero_sign}")
    if call.start < 0:
        found.append(f"start must not be negative, got {call.start}")
    return found


def check_values(op: str, call: Call) -> None:
    """ValueError for a density that is no share. Reads values: for the CPU only."""
    if call.density is not None and not ((call.density >= 0) & (call.density <= 1)).all():
        raise ValueError(f"{op}: density must be in [0, 1], got {call.density.tolist()}")


# -- the formulas ---------------------------------------------------------------------------------


def merged(call: Call, dtype: torch.dtype) -> Tensor:
    """The formulas in plain PyTorch, expert by expert."""
    acc = _checks.accumulation_dtype(call.params.dtype)
    w, zero = call.weights.to(acc), call.weights.new_zeros((), dtype=acc)
    origin = zero if call.base is None else call.base.to(acc)
    scaled, terms, taken = [], [], []
    for i, row in enumerate(call.params):
        d = row.to(acc) - origin
        kept = ~dropped(call, i, d)
        v = d if call.scales is None else d * call.scales[i].to(acc)
        scaled.append(torch.where(kept, v, zero))
        terms.append(torch.where(kept, w[i] * v, zero))
        taken.append(kept)
    if call.elect != "none":
        taken = _agreeing(call, w, scaled, terms)
        terms = [torch.where(agrees, t, zero) for agrees, t in zip(taken, terms, strict=True)]
    q = torch.zeros_like(terms[0])
    for t in terms:
        larger = (t.abs() > q.abs()) | t.isnan()
        q = torch.where(larger, t, q) if call.combine == "max" else q + t
    if call.divide != "none":
        q = q / _divisor(call, w, taken)
    q = torch.tensor(call.lam, dtype=acc, device=q.device) * q
    return _rounding.round_to(origin + q, dtype, None, 0)


def _agreeing(call: Call, w: Tensor, scaled: list[Tensor], terms: list[Tensor]) -> list[Tensor]:
    """Which experts' elements have the elected sign."""
    on = scaled if call.elect in ("sum", "count") else terms
    votes, zero = on, torch.zeros_like(w[0])
    if call.elect in ("count", "weighted_count"):
        each = torch.ones_like(w) if call.elect == "count" else w
        votes = [
            torch.where(v > 0, c, torch.where(v < 0, -c, zero))
            for v, c in zip(scaled, each, strict=True)
        ]
    total = torch.zeros_like(terms[0])
    for vote in votes:
        total = total + vote
    sign = torch.where(~(total > 0) if call.zero_sign < 0 else total < 0, -1.0, 1.0)
    nobody = (total == 0) & (call.zero_sign == 0)
    return [(~(x * sign <= 0) & ~nobody) | x.isnan() for x in on]


def _divisor(call: Call, w: Tensor, taken: list[Tensor]) -> Tensor:
    one = torch.ones_like(w[0])
    if call.divide == "weights" and call.elect == "none":
        total = torch.zeros_like(one)
        for weight in w:
            total = total + weight
        return torch.where(total.abs() < 1e-8, one, total)
    each = w if call.divide == "weights" else torch.ones_like(w)
    total = torch.zeros_like(taken[0], dtype=w.dtype)
    for agrees, weight in zip(taken, each, strict=True):
        total = total + torch.where(agrees, weight, 0.0)
    return torch.where(total == 0, one, total)


def dropped(call: Call, i: int, d: Tensor) -> Tensor:
    """Where expert i's task vector ``d`` (P,) is dropped."""
    index = torch.arange(d.shape[0], device=d.device) + call.start
    magnitude, found = d.abs(), torch.zeros_like(d, dtype=torch.bool)
    if call.lower is not None:
        bound = call.lower[i].to(d.dtype)
        found = found | (magnitude < bound)
        if call.lower_cut is not None:
            found = found | ((magnitude == bound) & (index >= call.lower_cut[i]))
    if call.upper is not None:
        bound = call.upper[i].to(d.dtype)
        found = found | (magnitude > bound)
        if call.upper_cut is not None:
            found = found | ((magnitude == bound) & (index < call.upper_cut[i]))
    if call.density is not None:
        stream = torch.tensor(i, device=d.device) if call.streams is None else call.streams[i]
        drawn = words(call.seed, call.start, len(d), stream)
        found = found | (drawn >= _thresholds(call.density)[i])
    return found


def words(seed: int, start: int, count: int, stream: Tensor) -> Tensor:
    """The random words, (count,) int64, of the elements from place ``start`` on."""
    first, last = start // 64, -(-(start + count) // 64)
    counter = torch.arange(8 * first, 8 * last, device=stream.device)
    upper, lower = (_halves(seed, counter, top, stream) for top in (0, 1 << 31))
    return (upper << 16 | lower)[start - 64 * first :][:count]


def _halves(seed: int, counter: Tensor, top: int, stream: Tensor) -> Tensor:
    """Halves of words in the order of places; ``top``: of the counter's upper word."""
    numbers = counter & _WORD, counter >> 32 | top, stream & _WORD, stream >> 32 & _WORD
    four = torch.stack(_rounding.philox(seed, *numbers, rounds=_ROUNDS)).view(4, -1, 8)
    return torch.stack((four & _HALF, four >> 16), dim=-1).transpose(0, 1).flatten()


def _thresholds(density: Tensor) -> Tensor:
    """(N,) int64: words below are kept."""
    return (density.double() * _ANY).round().clamp(0, _ANY).to(torch.int64)


# -- kernels --------------------------------------------------------------------------------------


def kernel_arguments(out: Tensor, call: Call) -> tuple[Any, ...]:
    """What the kernels take: ``out``, and tables of a row per kind of number."""
    return (
        *(out, call.params, call.base, *tables(call), call.seed, call.start),
        *(ELECTIONS.index(call.elect), call.zero_sign),
        *(DIVISORS.index(call.divide), COMBINATIONS.index(call.combine)),
    )


def tables(call: Call) -> tuple[Tensor, Tensor | None, int]:
    """numbers, places, and the rule that says which of their rows count; others hold anything.

    numbers (5, N) in the accumulation type: weights, scales, lower, upper, lam; places (4, N)
    int64: lower_cut, upper_cut, thresholds, streams.
    """
    n, rule, places = call.params.shape[0], 0, None
    acc = _checks.accumulation_dtype(call.params.dtype)
    numbers = call.params.new_empty((5, n), dtype=acc)
    numbers[0], numbers[4] = call.weights, call.lam
    for row, flag, given in ((1, SCALED, call.scales), (2, LOWER, call.lower),
                             (3, UPPER, call.upper)):  # fmt: skip
        if given is not None:
            numbers[row], rule = given, rule | flag
    if call.density is not None:
        rule |= DRAWN
    if rule & (LOWER | UPPER | DRAWN):
        places = call.params.new_empty((4, n), dtype=torch.int64)
        places[0] = torch.iinfo(torch.int64).max if call.lower_cut is None else call.lower_cut
        places[1] = 0 if call.upper_cut is None else call.upper_cut
        if call.density is not None:
            own = torch.arange(n, device=places.device)
            places[2] = _thresholds(call.density)
            places[3] = own if call.streams is None else call.streams
    return numbers, places, rule


def why_not(call: Call) -> str | None:
    """What the C++ kernel asks of a call beyond its form; None when it has it."""
    if call.params.shape[0] > MOST_EXPERTS:
        return f"{call.params.shape[0]} experts, more than {MOST_EXPERTS}"
    if call.base is not None and call.base.shape[0] > 1 and call.base.stride(0) != 1:
        return f"base is not contiguous (stride {call.base.stride(0)})"
    return _arena.why_not(call.params)
