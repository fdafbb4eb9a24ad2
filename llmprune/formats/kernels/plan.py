"""How the decode kernel is launched: its tile and pipeline by number of tokens, and how many programs share the work.

`SETTINGS` is what `scripts/kernel_facts.py` shows to compile well; `BY_SHAPE` is for what a sweep on a device has found better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MOST = 64  # tokens
_SIZES = (8, 16, 32, 64)  # what tokens are padded to


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the decode kernel.

    Attributes:
        rows: of a tile.
        warps, stages: of a program, and of its pipeline.
        waves: programs a multiprocessor that the grid is made for.
        joined: one tensor-core product for four planes of groups, rather than four.
    """

    rows: int = 64
    warps: int = 4
    stages: int = 3
    waves: int = 2
    joined: bool = False


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


SETTINGS = {8: Settings(joined=True), 16: Settings(), 32: Settings(), 64: Settings(stages=2)}  # by padded tokens
BY_SHAPE: dict[tuple[int, int, int], Settings] = {}  # by rows, columns (padded to whole chunks), padded tokens


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
    tile = 36 * settings.rows * words + 2 * 32 * words * padded(tokens)  # values, codes, inputs
    return tile * max(settings.stages - 1, 1) + 16 * 1024


def plan(
    rows: int, chunks: int, words: int, tokens: int, processors: int, shared: int, settings: Settings | None = None
) -> Plan:
    """The launch for a matrix of `rows` and of `chunks` chunks of 32 * `words` columns.

    Args:
        processors: multiprocessors of the device; `shared`: bytes of shared memory that one program may have there.
        settings: as they are; else those of the tables, with as many stages as fit.
    """
    if settings is None:
        size = padded(tokens)
        settings = BY_SHAPE.get((rows, 32 * words * chunks, size), SETTINGS[size])
        while settings.stages > 1 and shared_memory(settings, words, tokens) > shared:
            settings = replace(settings, stages=settings.stages - 1)
    blocks = -(-rows // settings.rows)
    tiles = blocks * chunks
    each = -(-tiles // (settings.waves * processors))
    return Plan(settings, blocks, -(-tiles // each), each, each % chunks != 0)
