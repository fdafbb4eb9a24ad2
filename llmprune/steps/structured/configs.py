"""How small a model is to become: counts of heads, neurons and layers, and the configuration that has them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from transformers import AutoConfig, PretrainedConfig

from llmprune.base.errors import InputError, reason
from llmprune.base.notation import Amount
from llmprune.models.families import HEAD_WIDTH, IMPLIED_WIDTH, LAYER_LISTS, QUERY_HEADS, STRICTER, VALUE_HEADS, WIDTHS
from llmprune.models.heads import Heads
from llmprune.models.skeleton import FOREIGN


def kept_neurons(amount: Amount, count: int, multiple: int) -> int:
    """How many of `count` neurons stay: the nearest multiple of `multiple`.

    Raises:
        InputError: that would be none, or all.
    """
    left = count - amount.of(count)
    kept = round(left / multiple) * multiple
    if kept <= 0:
        raise InputError(f"neurons {amount.text} of {count} would leave none (multiples of {multiple}): remove fewer")
    if kept >= count:
        raise InputError(
            f"neurons {amount.text} of {count} rounds to none removed, in multiples of {multiple}: "
            "remove more, or pass --round-to 1"
        )
    return kept


def departure(what: str, amount: Amount, count: int, gone: int, reasons: Sequence[str]) -> str:
    """In words, that of `count` heads or neurons others are removed than were asked for, and why."""
    asked = f"{amount.of(count):,.1f}".removesuffix(".0")
    return f"{what} {amount.text} asks to remove {asked} of {count:,} {what} a layer, but {gone:,} go: {'; '.join(reasons)}"


def departs(amount: Amount, count: int, gone: int) -> bool:
    """Whether `gone` of `count` is something else than what was asked for, by more than a fraction of one."""
    return abs(gone - amount.of(count)) >= 1


def ways_to_keep_heads(amount: Amount, layout: Heads) -> list[tuple[int, bool]]:
    """How many query heads may stay, nearest to what is asked for first, and whether whole groups go, with their keys and
    values, or as many heads of each group.

    Raises:
        InputError: there is no way to remove some and leave some.
    """
    asked = layout.query - amount.of(layout.query)
    steps = {True: layout.query // layout.value, False: layout.value}
    ways = [(kept, whole) for whole, step in steps.items() for kept in range(step, layout.query, step)]
    nearest = sorted(ways, key=lambda way: abs(way[0] - asked))
    if not nearest or not 0 < asked < layout.query or 2 * abs(nearest[0][0] - asked) > min(steps.values()):
        counts = ", ".join(map(str, sorted({kept for kept, _ in ways})))
        raise InputError(f"heads {amount.text} of {layout} cannot be removed: {counts or 'no other number'} could stay")
    return nearest


def kept_layers(amount: Amount, count: int) -> int:
    """How many of `count` layers stay.

    Raises:
        InputError: that would be none, or all.
    """
    kept = count - round(amount.of(count))
    if not 0 < kept < count:
        raise InputError(f"layers {amount.text} of {count} would remove {'all' if kept <= 0 else 'none'}")
    return kept


def smaller_config(
    config: PretrainedConfig, *, neurons: tuple[int, int] | None, heads: Heads | None, layers: list[int] | None
) -> PretrainedConfig:
    """The configuration of the smaller model.

    A family that refuses a number of heads that does not divide its width becomes the one that computes the same, if there
    is one in `models/families.py`.

    Raises:
        InputError: transformers would not load it.

    Args:
        neurons: how many there were and how many stay.
        heads: the layout that stays.
        layers: the numbers of the layers that stay.
    """
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    strict = next((row for row in STRICTER if row.model_type == text.model_type), None)
    if heads is not None and text.hidden_size % heads.query and strict is not None:
        if any(getattr(text, name) for name in strict.biases):
            raise InputError(
                f"{strict.title} with biases loads only with a number of heads that divides its width: remove other heads"
            )
        own = {"model_type", "architectures", *strict.biases}
        values = {name: value for name, value in text.to_dict().items() if name not in own}
        smaller = text = AutoConfig.for_model(strict.equal, **values, **dict(strict.settings))
    try:
        for name, value in sizes_in(text, neurons, heads).items():
            setattr(text, name, value)
        if layers is not None:
            for row in LAYER_LISTS:
                if isinstance(each := getattr(text, row.name, None), list):
                    setattr(text, row.name, [each[i] for i in layers])
            text.num_hidden_layers = len(layers)
        type(text).from_dict(text.to_dict())  # what a change of attributes does not check
    except FOREIGN as error:
        raise InputError(f"transformers cannot load the smaller model: {reason(error)}") from None
    return smaller


def sizes_in(text: PretrainedConfig, neurons: tuple[int, int] | None, heads: Heads | None) -> dict[str, int]:
    """What a configuration says about sizes, by name: how many neurons stay of how many, and the heads that stay."""
    found: dict[str, int] = {}
    if neurons is not None:
        before, after = neurons
        names = [row.name for row in WIDTHS if getattr(text, row.name, None) == before]
        found |= dict.fromkeys(names or [IMPLIED_WIDTH.name], after)
    if heads is not None:
        found |= {QUERY_HEADS.name: heads.query, VALUE_HEADS.name: heads.value, HEAD_WIDTH.name: heads.width}
    return found


def uneven_config(config: PretrainedConfig, sizes: Sequence[tuple[int | None, Heads | None]], count: int) -> PretrainedConfig:
    """The configuration with sizes of its own for each layer: neurons that stay of `count`, heads that stay.

    Raises:
        InputError: transformers cannot express it.
    """
    text = config.get_text_config()
    each = [sizes_in(text, (count, neurons) if neurons else None, heads) for neurons, heads in sizes]
    try:
        text.per_layer_config = dict(enumerate(each))
    except FOREIGN as error:
        raise InputError(f"{config.model_type} cannot have layers of different sizes: {reason(error)}") from None
    return config
