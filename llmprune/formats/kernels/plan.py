"""How the decode kernel is launched: its tile and pipeline by number of tokens, and how many programs share the work.

`SETTINGS` is what `scripts/kernel_facts.py` shows to compile well; `BY_SHAPE`, in `by_shape.json`, is what a sweep on a device
has found better (`scripts/gpu_check.py --only sweep`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

MOST = 64  # tokens
_SIZES = (8, 16, 32, 64)  # what tokens are padded to
_WARP_GROUP = (
    64  # rows from which on Triton multiplies by groups of warps, which read the inputs from shared memory, on some devices
)
_RESERVED = 1024  # bytes of shared memory that a program has besides its own


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the decode kernel.

    Attributes:
        rows: of a tile.
        warps, stages: of a program, and of its pipeline.
        waves: programs a multiprocessor that the grid is made for.
        joined: one tensor-core product for four planes of groups, rather than four.
    """

    rows: int = 32
    warps: int = 2
    stages: int = 3
    waves: int = 2
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """Of the kernel for one or two tokens: rows and warps of a program, and how many chunks of columns it takes at a time."""

    rows: int
    warps: int
    chunks: int


def rows_of(chunks: int) -> Rows:
    """For a matrix of so many chunks: within 5% of the quickest for Llamas' shapes on an H200 (`eval/results`)."""
    wide = next(size for size in (1, 2, 4, 8) if size >= chunks or size == 8)
    return Rows(rows=32, warps=wide, chunks=wide)


@dataclass(frozen=True, slots=True)
class Plan:
    """A launch: the tiles of `blocks` blocks of rows, `each` in a row to every one of `programs`.

    Attributes:
        shares: whether some block of rows is shared by several programs.
    """

    settings: Settings
    blocks: int
    programs: int
    each: int
    shares: bool


# By padded tokens. A warp multiplies 16 rows: more warps a tile would expand the same weights again, but 64 tokens need the
# registers of four.
SETTINGS = {8: Settings(joined=True), 16: Settings(), 32: Settings(), 64: Settings(warps=4)}
Shape = tuple[int, int, int]  # rows, columns (padded to whole chunks), padded tokens
FILE = Path(__file__).with_name("by_shape.json")


def read(path: Path = FILE) -> dict[Shape, Settings]:
    return {tuple(one.pop("shape")): Settings(**one) for one in json.loads(path.read_text())}


def write(found: dict[Shape, Settings], path: Path = FILE) -> None:
    lines = [json.dumps({"shape": shape, **asdict(own)}) for shape, own in sorted(found.items())]
    path.write_text("[" + ",\n ".join(lines) + "]\n")


BY_SHAPE = read()


def padded(tokens: int) -> int:
    """Tokens as the kernel has them.

    Raises:
        ValueError: they are more than `MOST`.
    """
    for size in _SIZES:
        if tokens <= size:
            return size
    raise ValueError(f"{tokens} tokens, where the decode kernel takes {MOST} at most")


def shared_memory(settings: Settings, words: int, tokens: int) -> int:
    """Bytes of shared memory a program takes at most, with chunks of so many words."""
    inputs = 64 * words * padded(tokens)  # of a chunk, as many as its weights are for
    buffers = max(settings.stages - 1, 1) * (36 * settings.rows * words + inputs)
    if settings.rows < _WARP_GROUP:
        return buffers
    return buffers + inputs + 2 * settings.rows * words * (16 if settings.joined else 4)  # a third buffer, expanded weights


def plan(
    rows: int, chunks: int, words: int, tokens: int, processors: int, shared: int, settings: Settings | None = None
) -> Plan:
    """The launch for a matrix of `rows` and of `chunks` chunks of 32 * `words` columns.

    Args:
        processors: multiprocessors of the device; `shared`: bytes of shared memory that one program may have there.
        settings: as they are; else as `choose` has them.
    """
    settings = settings or choose(rows, chunks, words, tokens, shared)
    blocks = -(-rows // settings.rows)
    tiles = blocks * chunks
    each = max(-(-tiles // (settings.waves * processors)), 1)
    return Plan(settings, blocks, -(-tiles // each), each, each % chunks != 0)


def choose(rows: int, chunks: int, words: int, tokens: int, shared: int) -> Settings:
    """What `BY_SHAPE` has, where it fits; else what `SETTINGS` has, with a shorter pipeline if two programs fit only then."""
    size = padded(tokens)
    found = BY_SHAPE.get((rows, 32 * words * chunks, size))
    if found and shared_memory(found, words, tokens) <= shared:
        return found
    found = SETTINGS[size]
    while found.stages > 2 and _fit(found, words, tokens, shared) < 2:
        found = replace(found, stages=found.stages - 1)
    if not (most := _fit(found, words, tokens, shared)):
        return replace(found, stages=1)
    return replace(found, waves=min(found.waves, most))


def _fit(settings: Settings, words: int, tokens: int, shared: int) -> int:
    """Programs a multiprocessor by shared memory, where one may have nearly all of it."""
    return (shared + _RESERVED) // (shared_memory(settings, words, tokens) + _RESERVED)
