"""What a run is told, from flags, a YAML file or Python: one set of names, one set of checks. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmprune.base.errors import InputError, unknown
from llmprune.base.notation import AUTO_DTYPE, BITS, DTYPES, read_sparsity
from llmprune.job.fields import PLACES, Options, option

LAYER_SCORES = ("influence", "loss")
PHASES = ("decode", "prefill")
MEANS = ("structure", "weights")
TARGETS = ("target_params", "target_bytes", "target_macs", "target_speedup")
_USE = ("for_", "for_batch", "for_context")  # at what a speed is measured
_ROUNDING = ("bits", "group_size", "rounding")
_WEIGHTS = (
    *("sparsity", "quality", "method", "refit", "target", "reconstruct", "allocate", "search_minutes", "scan", "allocation"),
    *("true_sequential", "by", "recover", "rotate", "permute"),
)
_STRUCTURE = ("heads", "neurons", "layers", *TARGETS, *_USE, "score", "layer_score", "per_layer", "round_to")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig(Options):
    """The options of `llmprune.prune` and of the command; each field's help text is in its metadata.

    Raises:
        InputError: a value is of the wrong type or out of range.
    """

    model: str = option("bundled name (llama), local folder, or Hub id such as meta-llama/Llama-3.2-1B")
    sparsity: str | None = option(
        "0.5 or 50%% (unstructured), or N:M such as 2:4, which keeps N of every M weights; after heads, neurons, layers. With "
        "--recover also several, such as 30%%,50%%,70%%: prune and train in turns",
        None,
    )
    heads: str | None = option("attention heads to remove, such as 25%% or 8, in each layer", None, metavar="AMOUNT")
    neurons: str | None = option("neurons (MLP channels) to remove, such as 25%%, in each layer", None, metavar="AMOUNT")
    layers: str | None = option("layers to remove, such as 4 or 12%%", None, metavar="AMOUNT")
    target_params: str | None = option(
        "instead: parameters that stay, such as 75%% or 6B; heads, neurons and layers go where that costs least", None,
        metavar="AMOUNT",
    )  # fmt: skip
    target_bytes: str | None = option(
        "the same for bytes of the weights' files, such as 75%% or 12GB; budgets may be given together", None, metavar="AMOUNT"
    )
    target_macs: str | None = option(
        "the same for multiplications a token, such as 75%% or 6B; of experts, as many count as a token is sent to", None,
        metavar="AMOUNT",
    )  # fmt: skip
    target_speedup: str | None = option(
        "how many times as fast as the dense model, such as 1.5x, by what layers of every size are measured to take on this "
        "machine; ends by measuring both models", None, metavar="FACTOR",
    )  # fmt: skip
    by: str = option(
        "what meets a budget: structure (heads, neurons and layers go), or weights, of which each matrix keeps all or some: "
        "2:4 as llmprune pack stores them for bytes, else any share (default: %(default)s)",
        "structure",
    )
    for_: str = option("what --target-speedup is about: decode or prefill (default: %(default)s)", "decode")
    for_batch: int = option("sequences at once that --target-speedup is about (default: %(default)s)", 1)
    for_context: int = option(
        "tokens of the prompt (prefill), or before the one that is decoded, that --target-speedup is about "
        "(default: %(default)s)", 512,
    )  # fmt: skip
    score: str = option("what chooses heads and neurons (default: %(default)s)", "second_order")
    layer_score: str = option(
        "what chooses layers: influence (how little they turn the hidden states; one pass) or loss (calibration loss without "
        "them; a pass a candidate) (default: %(default)s)",
        "influence",
    )  # fmt: skip
    per_layer: bool = option(
        "let layers differ in heads and neurons, by what each would lose; the result loads with llmprune.load", False
    )
    round_to: int | None = option("neurons stay in multiples of this (default: 64, or 8 below 1024)", None, metavar="N")
    quality: str | None = option("preset: fast, balanced, best or max (default: balanced, unless --method is given)", None)
    method: str | None = option("instead of a preset, one method alone", None)
    refit: bool | None = option(
        "fit what is kept by least squares: on a mask (default: off with --method, on in presets), and of what reads heads "
        "and neurons (default: on)", None,
    )  # fmt: skip
    target: str | None = option(
        "dense: each matrix imitates itself on the pruned model's inputs; corrected: it imitates what the dense model puts "
        "out (default: dense with --method)",
        None,
    )  # fmt: skip
    reconstruct: bool | None = option(
        "fit the kept weights and norms of each block to the dense block's output (default: in best and max)", None
    )
    rotate: bool | None = option(
        "first rotate channels so that pruning loses less; the model computes the same, at no cost when it runs but where the "
        "head is tied to the embeddings, which it then is no longer (default: in max only)", None,
    )  # fmt: skip
    permute: bool | None = option(
        "first put channels in an order in which N:M loses less; the model computes the same, at no cost when it runs "
        "(default: in max only)", None,
    )  # fmt: skip
    allocate: str = option(
        "how the sparsity is spread over matrices, which a scan of the dense model comes before (default: %(default)s)",
        "uniform",
    )
    search_minutes: int = option("how long --allocate search may look, at most (default: %(default)s)", 10, metavar="N")
    scan: str | None = option("the scan to go by: scan.json of llmprune scan (default: scan first)", None, metavar="FILE")
    allocation: str | None = option(
        "instead of --sparsity: a JSON file of patterns by matrix, as llmprune scan writes them", None, metavar="FILE"
    )
    bits: int | None = option(
        "then round what is left to codes of so many bits: 8, 4 or 3; zeros stay zero (default: no rounding)", None, metavar="N"
    )
    group_size: int | None = option(
        "columns that share a scale, with --bits (default: 128, or the largest divisor of it that divides a matrix's columns)",
        None, metavar="N",
    )  # fmt: skip
    rounding: str = option("how codes are found, with --bits (default: %(default)s)", "refined")
    recover: str | None = option(
        "then train what is left on so many tokens, such as 1M, as llmprune recover does (default: no training)", None,
        metavar="TOKENS",
    )  # fmt: skip
    calibration: str = option(
        "calibration text: pydoc, wikitext2, c4, ptb, a Hub dataset id, or a .txt, .jsonl, .json, .parquet file, plain or "
        ".gz (default: pydoc for the bundled model, else c4)",
        "auto", metavar="TEXT",
    )  # fmt: skip
    samples: int = option("calibration windows (default: %(default)s)", 128)
    seqlen: int = option("tokens a window, capped at the model's positions (default: %(default)s)", 2048)
    activations: str = option(
        "where hidden states rest: memory, or disk, which takes room beside the output (default: %(default)s)", "memory"
    )
    batch_size: int | None = option(
        "windows run at once (default: 8; on a CPU no more than 4096 tokens of them, or one)", None, metavar="N"
    )
    seed: int = option("seed of the calibration draw (default: %(default)s)", 0)
    true_sequential: bool | None = option(
        "within a block, solve each stage on inputs from the stages already pruned; --no-true-sequential solves a block "
        "in one pass, which is faster (default: as the method was published: on, but for magnitude, wanda, ria and dsnot)",
        None,
    )  # fmt: skip
    all_experts: bool = option(
        "mixtures of experts: let every expert's statistics count every calibration token, not only those routed to it",
        False,
    )  # fmt: skip
    only: tuple[str, ...] = option("prune only sites that match these globs, e.g. '*.mlp.*'", (), metavar="GLOB")
    skip: tuple[str, ...] = option("leave out sites that match these globs, e.g. '*.down_proj'", (), metavar="GLOB")
    eval_text: str = option(
        "text to measure perplexity on, before and after: as --calibration, or none (default: pydoc for the bundled "
        "model, else none)",
        "auto", metavar="TEXT",
    )  # fmt: skip
    output: str | None = option(
        "folder to write (default: auto, here, named after the model and what was asked for)", None, metavar="DIR"
    )
    overwrite: bool = option("replace the output folder if it is not empty", False)
    restart: bool = option("begin anew where an unfinished run to the same output could be continued", False)
    push_to_hub: str | None = option(
        "push the output folder to this repository on the Hub, too; `llmprune push` can do so later", None, metavar="USER/NAME"
    )
    device: str = option("auto, cpu, cuda, cuda:1, ... (default: %(default)s)", "auto")
    dtype: str = option(f"compute dtype: {', '.join(DTYPES)}; auto is {AUTO_DTYPE}", "auto")

    def __post_init__(self) -> None:
        numbers = ("samples", "seqlen", "batch_size", "round_to", "for_batch", "for_context", "search_minutes", "group_size")
        for name in numbers:
            if (number := getattr(self, name)) is not None and number < 1:
                raise InputError(f"{name} {number} is impossible: give at least 1")
        for name, known in (
            ("dtype", DTYPES),
            ("activations", PLACES),
            ("layer_score", LAYER_SCORES),
            ("for_", PHASES),
            ("by", MEANS),
        ):
            if getattr(self, name) not in known:
                raise unknown(name.rstrip("_"), getattr(self, name), known)
        if len(self.turns) > 1:
            self._check_turns()
        if self.sparsity is not None and self.allocation is not None:
            raise InputError("sparsity and allocation exclude each other: the file says how sparse each matrix becomes")
        if self.by == "weights":
            self._check_weight_budgets()
        if self.bits is not None and self.bits not in BITS:
            raise InputError(f"bits {self.bits} is impossible: give {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}")
        if not self.sparse and not self.structured and self.bits is None:
            raise InputError(
                "sparsity is required: pass --sparsity, --allocation, --heads, --neurons, --layers or --target-params, -bytes, "
                "-macs, -speedup, or --bits (in YAML, Python alike)"
            )
        self._check_roads()
        if self.seqlen < 2:
            raise InputError("seqlen 1 is impossible: a window needs a token to predict")

    def _check_turns(self) -> None:
        """Raises: InputError: there is no training between several sparsities, or they do not rise."""
        if self.recover is None:
            raise InputError(
                f"sparsity {self.sparsity} is for turns of pruning and training: pass --recover, or name one sparsity"
            )
        dropped = [1 - n[0] / n[1] if isinstance(n := read_sparsity(turn), tuple) else n for turn in self.turns]
        if any(after <= before for before, after in pairwise(dropped)):
            raise InputError(f"sparsity {self.sparsity} does not rise: each turn prunes more, as in 30%,50%,70%")
        if self.scan is not None:
            raise InputError("scan is of the dense model, and turns after the first prune another: leave it out")

    def _check_weight_budgets(self) -> None:
        """Raises: InputError: budgets that weights cannot meet, or something else that says how sparse matrices become."""
        if self.target_speedup is not None:
            raise InputError("target_speedup is met by structure only: how fast pruned weights run is not predicted")
        for name in ("sparsity", "allocation"):
            if self.budgets and getattr(self, name) is not None:
                raise InputError(
                    f"{name} and a budget by weights exclude each other: the budget says how sparse matrices become"
                )

    def _check_roads(self) -> None:
        """No option may be without effect."""
        amounts = [name for name in ("heads", "neurons", "layers") if getattr(self, name) is not None]
        budget = bool(self.budgets) and self.by == "structure"
        if self.budgets and amounts:
            raise InputError(
                f"{next(iter(self.budgets))} and {amounts[0]} cannot be combined: a budget decides about heads, neurons and "
                "layers"
            )
        weights, chosen = self.sparse, self.heads is not None or self.neurons is not None or budget
        uses = {
            "to spread --sparsity": (self.sparsity is not None, ("allocate",)),
            "to rotate channels, with --sparsity": (self.sparsity is not None, ("rotate",)),
            "to choose who shares a group of N:M, with --sparsity such as 2:4": (":" in (self.sparsity or ""), ("permute",)),
            "to say what meets a budget such as --target-bytes": (bool(self.budgets), ("by",)),
            "to spread --sparsity otherwise than uniformly, with --allocate, or with a budget by weights": (
                self.allocate != "uniform" or self.by == "weights", ("scan",)
            ),
            "to bound a search, with --allocate search": (self.allocate == "search", ("search_minutes",)),
            "to prune weights, with --sparsity, --allocation or --by weights": (
                weights, ("method", "quality", "reconstruct", "true_sequential")
            ),
            "to prune weights or round them, with --sparsity, --allocation, --by weights or --bits": (
                weights or self.bits is not None, ("only", "skip")
            ),
            "to round weights, with --bits": (self.bits is not None, ("group_size", "rounding")),
            "to say what --target-speedup is about": (self.target_speedup is not None, _USE),
            "to remove --heads or --neurons, or with a budget": (chosen, ("score", "per_layer")),
            "to remove --neurons, or with a budget": (self.neurons is not None or budget, ("round_to",)),
            "to remove --layers": (self.layers is not None, ("layer_score",)),
            "to fit what is left, with --sparsity, --heads, --neurons or a budget": (weights or chosen, ("refit",)),
            "to fit what is left, with --sparsity, or without --no-refit": (
                weights or (chosen and self.refit is not False), ("target",)
            ),
            "to write a folder, with output": (self.output is not None, ("overwrite", "restart", "recover")),
        }  # fmt: skip
        given = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        for purpose, (there, names) in uses.items():
            if idle := [name for name in names if name in given and not there]:
                raise InputError(f"{idle[0].rstrip('_')} has no effect here: it is there {purpose}")

    @property
    def sparse(self) -> bool:
        """Whether weights are to be pruned."""
        return self.sparsity is not None or self.allocation is not None or (bool(self.budgets) and self.by == "weights")

    @property
    def turns(self) -> list[str]:
        """The sparsities that are pruned to one after the other."""
        return self.sparsity.split(",") if self.sparsity is not None else []

    @property
    def structured(self) -> bool:
        """Whether heads, neurons or layers are to be removed."""
        amounts = any(amount is not None for amount in (self.heads, self.neurons, self.layers))
        return amounts or (bool(self.budgets) and self.by == "structure")

    @property
    def budgets(self) -> dict[str, str]:
        """Those of `TARGETS` that are given."""
        return {name: value for name in TARGETS if (value := getattr(self, name)) is not None}

    def weights_only(self, output: Path) -> PruneConfig:
        """Without all that is about structure, and with the name of the output."""
        return self._without(_STRUCTURE, output)

    def unquantised(self) -> PruneConfig:
        """Without all that is about rounding."""
        return self._without(_ROUNDING, self.output)

    def quantise_only(self, output: Path) -> PruneConfig:
        """Without all that is about structure and sparsity, and with the name of the output."""
        return self._without((*_STRUCTURE, *_WEIGHTS), output)

    def _without(self, names: Collection[str], output: Path | str | None) -> PruneConfig:
        default: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(self) if field.name in names}
        return dataclasses.replace(self, output=None if output is None else str(output), **default)
