"""What a merge method is: a name, its parameters, and how a tile of a tensor is merged.

Tensors may be larger than memory. They come as *tiles*: some elements of one tensor, of all models
at once, as rows of a small arena. A method that only needs the elements themselves is a function
that says how to compute a tile. One that must know something of a whole tensor first, or of the
whole model (a threshold, a norm), is a generator of the statistics it needs:

    def measure(task):
        squares = yield Statistic(squares_of)      # summed over all blocks of the tensor
        return squares.sqrt()

    def apply(task, norms):
        return lambda tile, out: ...

Statistics of tiles are added up in the order of elements, in pieces of ``BLOCK`` elements whatever
the size of a tile: results depend on neither tiles, threads, ranks nor a restart.

To a method of the scope ``model`` all tensors are one, in the order of the plan: ``measure`` is
asked once, its tiles are those of all tensors, and an element's place is that in the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isinf, prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

from xxhash import xxh3_64_intdigest

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 16  # elements; tiles are whole blocks, but for the last one of a tensor

Value: TypeAlias = "float | bool | str"


class Parameter(NamedTuple):
    """A setting of a method in a recipe.

    Attributes:
        default: None where a recipe must give it (mergekit: for every model but the base).
        each: it belongs to a model (``weight``), else to the merge (``lambda``).
        low, high: bounds of numbers, inclusive.
        kind: of its values; an int is a float too.
        words: of which one it must be, where that is so.
    """

    default: Value | None
    each: bool = False
    low: float = float("-inf")
    high: float = float("inf")
    kind: type = float
    words: tuple[str, ...] = ()

    def faults(self, value: Value) -> Iterator[str]:
        """What is wrong with a value."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.kind in (int, float):
            whole = self.kind is float or isinstance(value, int)
            if not number or not whole or not self.low <= float(value) <= self.high:
                kind = "a number" if self.kind is float else "a whole number"
                yield f"must be {kind}{self._bounds()}, got {value!r}"
        elif not isinstance(value, self.kind):
            kind = "true or false" if self.kind is bool else "a word"
            yield f"must be {kind}, got {value!r}"
        elif self.words and value not in self.words:
            from .._checks import did_you_mean

            hint = did_you_mean(str(value), self.words)
            yield f"must be one of {', '.join(self.words)}, got {value!r}{hint}"

    def _bounds(self) -> str:
        if isinf(self.low) and isinf(self.high):
            return ""
        if isinf(self.high):
            return f" of at least {self.low:g}"
        return f" from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Task:
    """One tensor to be merged.

    Attributes:
        name: of the result.
        shape: of the result, and of every model's tensor.
        models: how many experts there are; rows 0 .. models - 1 of a tile.
        base: whether row ``models`` is the base model's.
        settings: by parameter: a value, or one for each expert.
        dtype: of a tile's rows, as safetensors files name it.
        seed: of random methods; with the name, an expert's number and an element's, all that a
            random decision depends on.
        parity: the framework whose meaning of the method is asked for.
    """

    name: str
    shape: tuple[int, ...]
    models: int
    base: bool
    settings: Mapping[str, Any]
    dtype: str = "F32"
    seed: int = 0
    parity: str = "mergekit"

    @property
    def elements(self) -> int:
        """Of the tensor."""
        return prod(self.shape)

    def streams(self) -> list[int]:
        """For every expert, where its random numbers for this tensor come from."""
        digests = [xxh3_64_intdigest(f"{self.name}/{i}".encode()) for i in range(self.models)]
        return [digest - 2**63 for digest in digests]

    def each(self, parameter: str) -> list[Any]:
        """Its value for every expert."""
        return list(self.settings[parameter])

    def value(self, parameter: str) -> Any:
        """Its value for the merge."""
        return self.settings[parameter]


class Tile(NamedTuple):
    """Elements ``start ..`` of a tensor: ``rows`` (N, P), an expert each, then the base, then what
    the method reads beside the experts."""

    rows: Tensor
    start: int


class Statistic(NamedTuple):
    """What is measured of tensors.

    Attributes:
        of: of a tile: its blocks' values, in order, one made after the other (small results that
            are kept between large temporary ones would hold their memory); or any one value where
            it is not summed.
        over: ``blocks``: the answer is the sum over all blocks, in order. ``whole``: of a tile that
            is the whole tensor; None is the answer where the tensor does not fit into memory.
            ``tiles``: a list of all tiles' values, the same tiles every time.
        starts: of tiles, where the first of their elements are: only these are looked at.

    Statistics that are equal are measured once where they are measured together.
    """

    of: Callable[[Tile], Any]
    over: str = "blocks"
    starts: frozenset[int] | None = None


class Aside(Protocol):
    """What a method writes of a tensor besides the merged one, into a file of its own.

    Attributes:
        file: its name in the result's folder.
        format: what its metadata say that it is.
    """

    file: ClassVar[str]
    format: ClassVar[str]

    def __init__(self, task: Task) -> None: ...

    @staticmethod
    def outputs(task: Task) -> Sequence[tuple[str, str, tuple[int, ...]]]:
        """Names, types and shapes of what is written."""
        ...

    def tile(self, tile: Tile) -> Iterator[tuple[int, memoryview]]:
        """The next bytes of outputs, by their numbers, from a tile of whole blocks."""
        ...

    def end(self) -> Iterator[tuple[int, memoryview]]:
        """The same, when all tiles were seen."""
        ...


# Merges a tile into its second argument, (P,) in the type of the result.
Apply: TypeAlias = "Callable[[Tile, Tensor], None]"
Measure: TypeAlias = "Generator[Statistic, Any, Any]"


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        name: in recipes.
        title, source: for people: what it is called and where it is from.
        apply: how to merge tiles of a task, given what ``measure`` returned (None without).
        measure: what must be known of a task first; tasks that agree in the settings that it reads
            may share what it returns.
        of_model: parameters that ``measure`` reads where the method sees the model as one tensor:
            they are the same for all tensors then. None where it can only look at tensors.
        scopes: by parity, the scope where a recipe names none; ``tensor`` where this says nothing.
        base: ``needed`` for methods of task vectors; ``subtracted`` where there is one; or it is
            ``one more`` model.
        beside: a parameter that names a model for each expert: its tensors of the same names are
            further rows of tiles.
        fewest, most: numbers of experts, without the base.
        parities: frameworks whose meaning of it there is; the first is the default.
        only: of parameters that not all parities read, those that do.
        faults: what is wrong with a task beyond its parameters' bounds.
        aside: what it writes besides.
        piece: of how many elements of each row formulas in PyTorch hold numbers at once, beside
            what ops take; tiles are whole pieces. 0 where a task has no such formulas.
    """

    name: str
    title: str
    source: str
    apply: Callable[[Task, Any], Apply]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    measure: Callable[[Task], Measure] | None = None
    of_model: tuple[str, ...] | None = None
    scopes: Mapping[str, str] = field(default_factory=dict)
    base: str = "one more"
    beside: str | None = None
    fewest: int = 1
    most: int | None = None
    parities: tuple[str, ...] = ("mergekit",)
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    faults: Callable[[Task], Iterable[str]] = lambda task: ()
    aside: type[Aside] | None = None
    piece: Callable[[Task], int] = lambda task: 0


def of_block(task: Task) -> int:
    """The piece of methods that compute block by block."""
    return BLOCK


def bounds(tile: Tile) -> list[int]:
    """A tile's blocks, as boundaries of segments."""
    columns = tile.rows.shape[1]
    return [*range(0, columns, BLOCK), columns]


def weights_tensor(values: Sequence[float], rows: Tensor) -> Tensor:
    """(N,) on the device of ``rows``, in the type that sums of them are formed in."""
    import torch

    from .._checks import accumulation_dtype

    return torch.tensor(values, dtype=accumulation_dtype(rows.dtype), device=rows.device)
