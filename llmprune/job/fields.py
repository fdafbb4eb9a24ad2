"""What a user may ask for: fields with help texts, from flags, a YAML file or Python, and the checks that all share.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import keyword
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

from llmprune.base.errors import InputError, unknown
from llmprune.base.notation import ALLOWANCES, Allowance, Amount, read_count, read_sparsity, read_speedup, sparsity_text

Own = TypeVar("Own", bound="Options")
_AMOUNTS = {
    "sparsity": "0.5, 50% or N:M",
    **dict.fromkeys(("heads", "neurons", "layers"), "a share such as 25% or a count"),
    **{option: f"a share such as 75% or a number such as {counted.example}" for option, counted in ALLOWANCES.items()},
    "target_speedup": "a factor such as 1.5x",
    **dict.fromkeys(("tokens", "recover"), "a number such as 2M"),
}
PLACES = ("memory", "disk")  # where hidden states rest
_WORDS: dict[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple[str, ...]: "a list of text",
}  # fmt: skip


def option(help: str, default: Any = dataclasses.MISSING, *, metavar: str | None = None) -> Any:
    """A field: its default, and what the command line says of it."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """All that a command is told.

    Raises:
        InputError: a value is of the wrong type or out of range.
    """

    @classmethod
    def create(cls: type[Own], options: Mapping[str, Any], *, where: str = "") -> Own:
        """Check names and types of `options`; `where` (a file, say) goes into the message.

        Raises:
            InputError: a name is unknown (near matches are listed), a required one is missing, or a type is wrong.
        """
        kinds, values = get_type_hints(cls), {}
        try:
            for given, value in options.items():
                name = f"{given}_" if keyword.iskeyword(str(given)) else given
                if name not in kinds:
                    raise unknown("option", str(name), kinds)
                values[name] = _typed(name, value, kinds[name], in_file=bool(where))
            for f in dataclasses.fields(cls):
                if f.default is dataclasses.MISSING and f.name not in values:
                    raise InputError(f"{f.name} is required: pass --{f.name}, or {f.name}=... in Python or YAML")
            return cls(**values)
        except InputError as error:
            raise InputError(f"{where}: {error}" if where else str(error)) from None

    @classmethod
    def recorded(cls: type[Own], arguments: Mapping[str, Any]) -> Own:
        """As `create`, of the options in a run's record, without those that only another version has."""
        return cls.create({name: value for name, value in arguments.items() if name in cls.__dataclass_fields__})


def _typed(name: str, value: Any, kind: Any, *, in_file: bool) -> Any:
    """`value` as the type of its field. Raises: InputError: it is of another, or a text that means nothing."""
    try:
        typed = msgspec.convert(_as_meant(name, value, kind, in_file), kind)
    except msgspec.ValidationError:
        wanted = _AMOUNTS.get(name) or next(words for own, words in _WORDS.items() if kind in (own, own | None))
        raise InputError(f"{name} must be {wanted}, not {value!r}") from None
    return _text(name, typed) if isinstance(typed, str) else typed


def _as_meant(name: str, value: Any, kind: Any, in_file: bool) -> Any:
    """A number or a path as the text, and a single text as the tuple, that the field holds."""
    if kind == tuple[str, ...]:
        return (value,) if isinstance(value, str) else value
    if name not in _AMOUNTS or isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value) if isinstance(value, (str, Path)) else value
    if name == "sparsity" and in_file and isinstance(value, int) and value >= 60:
        hours, rest = divmod(value, 60)
        raise InputError(f'YAML reads an unquoted N:M as the number {value}: quote it, sparsity: "{hours}:{rest}"')
    return str(value)


def _text(name: str, value: str) -> str:
    """A text, checked as far as it can be by itself, and without blanks around it where it says how much."""
    if name == "sparsity":
        return ",".join(sparsity_text(read_sparsity(one)) for one in value.split(","))
    if name in ALLOWANCES:
        return Allowance.parse(value, name).text
    if name in ("tokens", "recover"):
        read_count(name, value)
        return value.strip()
    if name == "target_speedup":
        return f"{read_speedup(value):g}x"
    if name in _AMOUNTS:
        return Amount.parse(name, value).text
    if not value.strip() and name != "model":  # which a record may call anything
        raise InputError(f"{name} is empty: give it a value, or leave it out")
    return value
