"""Presets, methods by name, and what overrides them."""

from __future__ import annotations

import pytest

from llmprune.base.errors import InputError
from llmprune.job.options import PruneConfig
from llmprune.job.recipes import QUALITIES, Recipe, choose_recipe
from llmprune.solvers import METHODS


def recipe(**options: object) -> Recipe:
    return choose_recipe(PruneConfig.create({"model": "m", "sparsity": "2:4", **options}))


def test_balanced_is_the_default_and_presets_refit() -> None:
    assert recipe() == QUALITIES["balanced"] == recipe(quality="balanced")
    assert all(preset.refit and preset.method in METHODS.names() for preset in QUALITIES.values())


def test_a_method_by_name_is_as_published() -> None:
    for name in METHODS.names():
        assert recipe(method=name) == Recipe(name, name, refit=False, target="dense", reconstruct=False)


def test_options_win_over_presets() -> None:
    assert recipe(quality="best", reconstruct=False) == Recipe("best", "annealed", refit=True, target="corrected")
    assert recipe(method="wanda", refit=True, target="corrected") == Recipe("wanda", "wanda", refit=True, target="corrected")
    assert str(recipe(method="wanda", refit=True, reconstruct=True)) == "wanda + refit + block reconstruction"
    assert str(recipe(quality="fast", refit=False)) == "fast: annealed"


@pytest.mark.parametrize(("options", "words"), [
    ({"quality": "bset"}, "did you mean best"),
    ({"target": "correct"}, "did you mean corrected"),
    ({"method": "wanda", "quality": "fast"}, "exclude each other"),
    ({"refit": "yes"}, "refit must be true or false"),
])  # fmt: skip
def test_mistakes_are_named(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        recipe(**options)
