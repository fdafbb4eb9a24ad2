"""What users write: how much (a sparsity, an amount to remove, a budget, a speed-up), dtypes, one name or several."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmprune.base.errors import InputError

DTYPES = ("auto", "float32", "bfloat16", "float16")  # to compute in
AUTO_DTYPE = "the checkpoint's; on a CPU float32, or bfloat16 where stored so and measured to be faster"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DEALT_OUT = 4  # columns of a group of N:M at most, for whose groups an order of the columns is looked for
_FORMS = "give 0.5, 50% or N:M such as 2:4"


def read_sparsity(text: str) -> float | tuple[int, int]:
    """The fraction to drop, of `0.5` or `50%`; or N and M of `2:4`, which keeps 2 of every 4.

    Raises:
        InputError: the text is neither, or impossible.
    """
    source = text.strip()
    if not source:
        raise InputError(f"sparsity is empty: {_FORMS}")
    if groups := re.fullmatch(r"(\d{1,6}):(\d{1,6})", source):
        n, m = int(groups[1]), int(groups[2])
        check_ratio(n, m)
        return n, m
    percent = source.endswith("%")
    try:
        value = float(source.removesuffix("%"))
    except ValueError:
        raise InputError(f"sparsity {source!r} is not a pattern: {_FORMS}") from None
    if not percent and 1 < value < 100 and math.isfinite(value):
        raise InputError(f"sparsity {source} is impossible: a fraction lies between 0 and 1 (did you mean {source}%?)")
    fraction = value / 100 if percent else value
    check_fraction(fraction)
    return fraction


def sparsity_text(sparsity: float | tuple[int, int]) -> str:
    """One text for each sparsity, which reads back exactly."""
    if isinstance(sparsity, tuple):
        return f"{sparsity[0]}:{sparsity[1]}"
    percent = f"{100 * sparsity:g}%"
    return percent if float(percent[:-1]) / 100 == sparsity else repr(sparsity)


BITS = (8, 4, 3)  # of codes that weights are rounded to


def in_file_name(amount: str) -> str:
    """An amount as file names have it: `2of4`, `50pct`."""
    return amount.replace(":", "of").replace("%", "pct")


def from_file_name(part: str) -> str:
    """The amount that `in_file_name` wrote."""
    return part.replace("pct", "%").replace("of", ":")


def check_fraction(fraction: float) -> None:
    """Raises: InputError: it drops nothing, all, or is no number."""
    if not 0 < fraction < 1:  # also rejects nan
        raise InputError(f"sparsity {fraction:g} is impossible: give a fraction between 0 and 1, or e.g. 50%")


def check_ratio(n: int, m: int) -> None:
    """Raises: InputError: n of m keeps nothing, or all."""
    if not 0 < n < m:
        raise InputError(f"sparsity {n}:{m}: N:M keeps N of every M weights, so 0 < N < M, as in 2:4")


@dataclass(frozen=True, slots=True)
class Amount:
    """A count or a fraction to remove, as the user wrote it: `4`, `25%` or `0.25`."""

    text: str
    fraction: float | None
    count: int | None

    @classmethod
    def parse(cls, what: str, text: str) -> Amount:
        """Raises: InputError: it is neither."""
        text = text.strip()
        match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)(%?)", text)
        if match:
            number, percent = float(match[1]), match[2]
            if percent and 0 < number < 100:
                return cls(text, number / 100, None)
            if not percent and "." in match[1] and 0 < number < 1:
                return cls(text, number, None)
            if not percent and "." not in match[1] and number > 0:
                return cls(text, None, int(number))
        raise InputError(f"{what} {text!r} is impossible: give a share to remove such as 25% or 0.25, or a count such as 4")

    def of(self, whole: int) -> float:
        """How many of `whole` that is."""
        return float(self.count) if self.count is not None else (self.fraction or 0.0) * whole


@dataclass(frozen=True, slots=True)
class _Counted:
    """What an allowance counts: its noun, how much a unit is (the first unit is none), and an example."""

    noun: str
    units: Mapping[str, int]
    example: str


ALLOWANCES = {
    "target_params": _Counted("parameters", _UNITS, "6.5B"),
    "target_bytes": _Counted("bytes", _BYTES, "12GB"),
    "target_macs": _Counted("multiplications a token", _UNITS, "6.5B"),
}


@dataclass(frozen=True, slots=True)
class Allowance:
    """How much of what `option` counts may stay, as the user wrote it: `6.5B`, `600M`, `75%` or `0.75`; of bytes `12GB`."""

    text: str
    option: str
    number: float
    unit: str

    @classmethod
    def parse(cls, text: str, option: str = "target_params") -> Allowance:
        """Raises: InputError: it is none."""
        text, counted = text.strip(), ALLOWANCES[option]
        match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)(%?|[A-Z]*)", text.upper())
        if not match or not float(match[1]) or match[2] not in ("%", *counted.units):
            raise InputError(
                f"{option} {text!r} is impossible: give a share to keep such as 75%, or a number such as {counted.example}"
            )
        return cls(text, option, float(match[1]), match[2])

    def of(self, whole: int) -> int:
        """How much of `whole` may stay.

        Raises:
            InputError: all.
        """
        counted = ALLOWANCES[self.option]
        share = self.unit == "%" or (not self.unit and self.number < 1)
        if share:
            left = int(self.number * (whole / 100 if self.unit == "%" else whole))
        else:
            left = int(self.number * counted.units[self.unit])
        if left >= whole:
            raise InputError(f"{self.option} {self.text} leaves all of the {whole:,} {counted.noun}: ask for fewer")
        return left


def read_count(what: str, text: str) -> int:
    """How many, of `2M`, `500K` or `4096`.

    Raises:
        InputError: it is no such number, or none.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)([KMB]?)", text.strip().upper())
    number = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not number:
        raise InputError(f"{what} {text.strip()!r} is impossible: give a number such as 500K or 2M")
    return number


def read_speedup(text: str) -> float:
    """How many times as fast, of `1.5x` or `1.5`.

    Raises:
        InputError: it is no such number, or not above 1.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)x?", text.strip().lower())
    if not match or not float(match[1]) > 1:
        raise InputError(f"target_speedup {text.strip()!r} is impossible: give a factor above 1, such as 1.5x")
    return float(match[1])


def listed(names: str | Path | Iterable[str | Path]) -> list[str]:
    """One name, or several, as a list."""
    return [str(names)] if isinstance(names, (str, Path)) else [str(name) for name in names]
