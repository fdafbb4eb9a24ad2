"""What a run is told, from flags, a YAML file or Python: one set of names, one set of checks. Imports no torch."""

from __future__ import annotations

import dataclasses
import keyword
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from llmprune.base.errors import InputError, unknown
from llmprune.base.notation import ALLOWANCES, AUTO_DTYPE, DTYPES, Allowance, Amount, read_sparsity, read_speedup, sparsity_text

PLACES = ("memory", "disk")
LAYER_SCORES = ("influence", "loss")
PHASES = ("decode", "prefill")
TARGETS = ("target_params", "target_bytes", "target_macs", "target_speedup")
_USE = ("for_", "for_batch", "for_context")  # at what a speed is measured
_STRUCTURE = ("heads", "neurons", "layers", *TARGETS, *_USE, "score", "layer_score", "per_layer", "round_to")
_AMOUNTS = {
    "sparsity": "0.5, 50% or N:M",
    **dict.fromkeys(("heads", "neurons", "layers"), "a share such as 25% or a count"),
    **{option: f"a share such as 75% or a number such as {counted.example}" for option, counted in ALLOWANCES.items()},
    "target_speedup": "a factor such as 1.5x",
}
_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", str: "text", tuple[str, ...]: "a list of text"}


def _option(help: str, default: Any = dataclasses.MISSING, *, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig:
    """The options of `llmprune.prune` and of the command; each field's help text is in its metadata.

    Raises:
        InputError: a value is of the wrong type or out of range.
    """

    model: str = _option("bundled name (llama), local folder, or Hub id such as meta-llama/Llama-3.2-1B")
    sparsity: str | None = _option(
        "0.5 or 50%% (unstructured), or N:M such as 2:4, which keeps N of every M weights; after heads, neurons, layers", None
    )
    heads: str | None = _option("attention heads to remove, such as 25%% or 8, in each layer", None, metavar="AMOUNT")
    neurons: str | None = _option("neurons (MLP channels) to remove, such as 25%%, in each layer", None, metavar="AMOUNT")
    layers: str | None = _option("layers to remove, such as 4 or 12%%", None, metavar="AMOUNT")
    target_params: str | None = _option(
        "instead: parameters that stay, such as 75%% or 6B; heads, neurons and layers go where that costs least", None,
        metavar="AMOUNT",
    )  # fmt: skip
    target_bytes: str | None = _option(
        "the same for bytes of the weights' files, such as 75%% or 12GB; budgets may be given together", None, metavar="AMOUNT"
    )
    target_macs: str | None = _option(
        "the same for multiplications a token, such as 75%% or 6B; of experts, as many count as a token is sent to", None,
        metavar="AMOUNT",
    )  # fmt: skip
    target_speedup: str | None = _option(
        "how many times as fast as the dense model, such as 1.5x, by what layers of every size are measured to take on this "
        "machine; ends by measuring both models", None, metavar="FACTOR",
    )  # fmt: skip
    for_: str = _option("what --target-speedup is about: decode or prefill (default: %(default)s)", "decode")
    for_batch: int = _option("sequences at once that --target-speedup is about (default: %(default)s)", 1)
    for_context: int = _option(
        "tokens of the prompt (prefill), or before the one that is decoded, that --target-speedup is about "
        "(default: %(default)s)", 512,
    )  # fmt: skip
    score: str = _option("what chooses heads and neurons (default: %(default)s)", "second_order")
    layer_score: str = _option(
        "what chooses layers: influence (how little they turn the hidden states; one pass) or loss (calibration loss without "
        "them; a pass a candidate) (default: %(default)s)",
        "influence",
    )  # fmt: skip
    per_layer: bool = _option(
        "let layers differ in heads and neurons, by what each would lose; the result loads with llmprune.load", False
    )
    round_to: int | None = _option("neurons stay in multiples of this (default: 64, or 8 below 1024)", None, metavar="N")
    quality: str | None = _option("preset: fast, balanced or best (default: balanced, unless --method is given)", None)
    method: str | None = _option("instead of a preset, one method alone", None)
    refit: bool | None = _option(
        "fit what is kept by least squares: on a mask (default: off with --method, on in presets), and of what reads heads "
        "and neurons (default: on)", None,
    )  # fmt: skip
    target: str | None = _option(
        "dense: each matrix imitates itself on the pruned model's inputs; corrected: it imitates what the dense model puts "
        "out (default: dense with --method)",
        None,
    )  # fmt: skip
    reconstruct: bool | None = _option(
        "fit the kept weights and norms of each block to the dense block's output (default: in best only)", None
    )
    allocate: str = _option(
        "how the sparsity is spread over matrices, which a scan of the dense model comes before (default: %(default)s)",
        "uniform",
    )
    search_minutes: int = _option("how long --allocate search may look, at most (default: %(default)s)", 10, metavar="N")
    scan: str | None = _option("the scan to go by: scan.json of llmprune scan (default: scan first)", None, metavar="FILE")
    allocation: str | None = _option(
        "instead of --sparsity: a JSON file of patterns by matrix, as llmprune scan writes them", None, metavar="FILE"
    )
    calibration: str = _option(
        "calibration text: pydoc, wikitext2, c4, ptb, a Hub dataset id, or a .txt, .jsonl, .json, .parquet file, plain or "
        ".gz (default: pydoc for the bundled model, else c4)",
        "auto", metavar="TEXT",
    )  # fmt: skip
    samples: int = _option("calibration windows (default: %(default)s)", 128)
    seqlen: int = _option("tokens a window, capped at the model's positions (default: %(default)s)", 2048)
    activations: str = _option(
        "where hidden states rest: memory, or disk, which takes room beside the output (default: %(default)s)", "memory"
    )
    batch_size: int | None = _option(
        "windows run at once (default: 8; on a CPU no more than 4096 tokens of them, or one)", None, metavar="N"
    )
    seed: int = _option("seed of the calibration draw (default: %(default)s)", 0)
    true_sequential: bool | None = _option(
        "within a block, solve each stage on inputs from the stages already pruned; --no-true-sequential solves a block "
        "in one pass, which is faster (default: as the method was published: on, but for magnitude, wanda, ria and dsnot)",
        None,
    )  # fmt: skip
    all_experts: bool = _option(
        "mixtures of experts: let every expert's statistics count every calibration token, not only those routed to it",
        False,
    )  # fmt: skip
    only: tuple[str, ...] = _option("prune only sites that match these globs, e.g. '*.mlp.*'", (), metavar="GLOB")
    skip: tuple[str, ...] = _option("leave out sites that match these globs, e.g. '*.down_proj'", (), metavar="GLOB")
    eval_text: str = _option(
        "text to measure perplexity on, before and after: as --calibration, or none (default: pydoc for the bundled "
        "model, else none)",
        "auto", metavar="TEXT",
    )  # fmt: skip
    output: str | None = _option(
        "folder to write (default: auto, here, named after the model and what was asked for)", None, metavar="DIR"
    )
    overwrite: bool = _option("replace the output folder if it is not empty", False)
    restart: bool = _option("begin anew where an unfinished run to the same output could be continued", False)
    push_to_hub: str | None = _option(
        "push the output folder to this repository on the Hub, too; `llmprune push` can do so later", None, metavar="USER/NAME"
    )
    device: str = _option("auto, cpu, cuda, cuda:1, ... (default: %(default)s)", "auto")
    dtype: str = _option(f"compute dtype: {', '.join(DTYPES)}; auto is {AUTO_DTYPE}", "auto")

    def __post_init__(self) -> None:
        for name in ("samples", "seqlen", "batch_size", "round_to", "for_batch", "for_context", "search_minutes"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise InputError(f"{name} {number} is impossible: give at least 1")
        if self.sparsity is not None and self.allocation is not None:
            raise InputError("sparsity and allocation exclude each other: the file says how sparse each matrix becomes")
        if not self.sparse and not self.structured:
            raise InputError(
                "sparsity is required: pass --sparsity, --allocation, --heads, --neurons, --layers or --target-params, -bytes, "
                "-macs, -speedup (in YAML, Python alike)"
            )
        self._check_roads()
        if self.seqlen < 2:
            raise InputError("seqlen 1 is impossible: a window needs a token to predict")
        for name, known in (("dtype", DTYPES), ("activations", PLACES), ("layer_score", LAYER_SCORES), ("for_", PHASES)):
            if getattr(self, name) not in known:
                raise unknown(name.rstrip("_"), getattr(self, name), known)

    def _check_roads(self) -> None:
        """No option may be without effect."""
        amounts = [name for name in ("heads", "neurons", "layers") if getattr(self, name) is not None]
        budget = bool(self.budgets)
        if budget and amounts:
            raise InputError(
                f"{next(iter(self.budgets))} and {amounts[0]} cannot be combined: a budget decides about heads, neurons and "
                "layers"
            )
        weights, chosen = self.sparse, self.heads is not None or self.neurons is not None or budget
        uses = {
            "to spread --sparsity": (self.sparsity is not None, ("allocate",)),
            "to spread --sparsity otherwise than uniformly, with --allocate": (self.allocate != "uniform", ("scan",)),
            "to bound a search, with --allocate search": (self.allocate == "search", ("search_minutes",)),
            "to prune weights, with --sparsity or --allocation": (
                weights, ("method", "quality", "reconstruct", "true_sequential", "only", "skip")
            ),
            "to say what --target-speedup is about": (self.target_speedup is not None, _USE),
            "to remove --heads or --neurons, or with a budget": (chosen, ("score", "per_layer")),
            "to remove --neurons, or with a budget": (self.neurons is not None or budget, ("round_to",)),
            "to remove --layers": (self.layers is not None, ("layer_score",)),
            "to fit what is left, with --sparsity, --heads, --neurons or a budget": (weights or chosen, ("refit",)),
            "to fit what is left, with --sparsity, or without --no-refit": (
                weights or (chosen and self.refit is not False), ("target",)
            ),
            "to write a folder, with output": (self.output is not None, ("overwrite", "restart")),
        }  # fmt: skip
        given = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        for purpose, (there, names) in uses.items():
            if idle := [name for name in names if name in given and not there]:
                raise InputError(f"{idle[0].rstrip('_')} has no effect here: it is there {purpose}")

    @property
    def sparse(self) -> bool:
        """Whether weights are to be pruned."""
        return self.sparsity is not None or self.allocation is not None

    @property
    def structured(self) -> bool:
        """Whether heads, neurons or layers are to be removed."""
        return bool(self.budgets) or any(amount is not None for amount in (self.heads, self.neurons, self.layers))

    @property
    def budgets(self) -> dict[str, str]:
        """Those of `TARGETS` that are given."""
        return {name: value for name in TARGETS if (value := getattr(self, name)) is not None}

    def weights_only(self, output: Path) -> PruneConfig:
        """Without all that is about structure, and with the name of the output."""
        default: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(self) if field.name in _STRUCTURE}
        return dataclasses.replace(self, output=str(output), **default)

    @classmethod
    def create(cls, options: Mapping[str, Any], *, where: str = "") -> PruneConfig:
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
    def recorded(cls, arguments: Mapping[str, Any]) -> PruneConfig:
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
        return sparsity_text(read_sparsity(value))
    if name in ALLOWANCES:
        return Allowance.parse(value, name).text
    if name == "target_speedup":
        return f"{read_speedup(value):g}x"
    if name in _AMOUNTS:
        return Amount.parse(name, value).text
    if not value.strip() and name != "model":  # which a record may call anything
        raise InputError(f"{name} is empty: give it a value, or leave it out")
    return value
