"""What `llmprune recover` is told. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmprune.base.errors import InputError, unknown
from llmprune.base.notation import DTYPES, read_count
from llmprune.base.words import count
from llmprune.job.fields import PLACES, Options, option

BLOCKS = "blocks"
RECOVERED = "-recovered"  # follows the model's name in that of the output
TRAINED = ("kept", "lora", "small", BLOCKS)
SHARES = {"kd": 1.0, "mix": 2 / 3, "ce": 0.0}  # of the divergence from the teacher in the loss
RATES = {"kept": 3e-4, "lora": 2e-3, "small": 1e-3}  # peak learning rates of AdamW, measured at width 256 and below
_FALLS = {"kept": 1.0, "lora": 0.5, "small": 0.0}  # with which power of the width the rate falls above that
_MEASURED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverConfig(Options):
    """The options of `llmprune.recover` and of the command.

    Raises:
        InputError: a value is of the wrong type or out of range.
    """

    model: str = option("a folder that llmprune wrote, not packed")
    teacher: str | None = option(
        "the dense model to imitate: a bundled name, folder or Hub id (default: the one that was pruned)", None, metavar="MODEL"
    )
    train: str = option(
        "kept: all kept weights of the blocks; lora: adapters of low rank on pruned matrices, merged in the end; small: norms "
        "and biases; blocks: as kept, one block after the other in memory (default: %(default)s)",
        "kept",
    )
    rewind: str | None = option(
        "with --train kept, begin with the blocks' weights of this earlier checkpoint of the dense model, such as "
        "owner/name@step1000, zeros kept",
        None, metavar="MODEL",
    )  # fmt: skip
    rank: int = option("of adapters, with --train lora (default: %(default)s)", 16, metavar="N")
    loss: str = option(
        "kd: KL divergence from the teacher; ce: the text's own next tokens; mix: two thirds and one (default: %(default)s)",
        "kd",
    )
    teacher_top: int | None = option(
        "keep so many of the teacher's likeliest tokens on the disk, with the probability of all others, and no teacher in "
        "memory (default: it runs alongside)",
        None, metavar="N",
    )  # fmt: skip
    text: str = option(
        "text to train on: as --calibration (default: pydoc's own training part for the bundled model, else c4)", "auto",
        metavar="TEXT",
    )  # fmt: skip
    tokens: str = option("how many to train on, such as 2M (default: %(default)s)", "1M", metavar="N")
    batch_size: int = option("windows a step (default: %(default)s)", 2, metavar="N")
    seqlen: int = option("tokens a window, capped at the model's positions (default: %(default)s)", 512)
    rate: float | None = option(
        "peak learning rate of AdamW, after which it falls to zero (default: by the model's width, 3e-4 up to 256 and 2e-5 at "
        "4096; with --train lora 2e-3 and 5e-4; with --train small 1e-3)",
        None,
    )
    seed: int = option("seed of the order of the text (default: %(default)s)", 0)
    activations: str = option(
        "with --train blocks, where hidden states rest: memory, or disk, which takes room beside the output (default: "
        "%(default)s)",
        "memory",
    )  # fmt: skip
    eval_text: str = option(
        "text to measure perplexity on, dense, before and after, never trained on: as --calibration, or none (default: as the "
        "run that pruned it)",
        "auto", metavar="TEXT",
    )  # fmt: skip
    output: str | None = option("folder to write (default: auto, the model's name with -recovered)", None, metavar="DIR")
    overwrite: bool = option("replace the output folder if it is not empty", False)
    restart: bool = option("begin anew where an unfinished run to the same output could be continued", False)
    device: str = option("auto, cpu, cuda, cuda:1, ... (default: %(default)s)", "auto")
    dtype: str = option(
        "that models compute in, auto or float32, bfloat16, float16; what is trained is kept in float32 (default: float32)",
        "float32",
    )

    def __post_init__(self) -> None:
        for name, known in (("train", TRAINED), ("loss", SHARES), ("activations", PLACES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        for name, least in (("batch_size", 1), ("seqlen", 2), ("rank", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} {getattr(self, name)} is impossible: give at least {least}")
        if self.rate is not None and not 0 < self.rate < 1:
            raise InputError(f"rate {self.rate:g} is impossible: give a learning rate between 0 and 1, such as 3e-4")
        if self.train == BLOCKS:
            for name, usual in (("loss", "kd"), ("rate", None), ("teacher_top", None)):
                if getattr(self, name) != usual:
                    raise InputError(f"{name} has no effect here: blocks are fitted to what the dense model's put out")
        elif self.activations != "memory":
            raise InputError("activations has no effect here: it is there with --train blocks")
        if self.teacher_top is not None and self.loss == "ce":
            raise InputError("teacher_top has no effect here: with --loss ce no teacher is imitated")
        if self.teacher_top is not None and self.teacher_top < 1:
            raise InputError(f"teacher_top {self.teacher_top} is impossible: give at least 1")
        if self.rewind is not None and self.train != "kept":
            raise InputError("rewind has no effect here: it is there with --train kept")
        if self.rank != 16 and self.train != "lora":
            raise InputError("rank has no effect here: it is there with --train lora")
        if self.teacher is not None and self.loss == "ce" and self.eval_text == "none":
            raise InputError("teacher has no effect here: with --loss ce and --eval-text none nothing asks it")
        if self.steps() < 1:
            raise InputError(
                f"tokens {self.tokens} is less than one step of {count(self.batch_size, 'window')} of {self.seqlen} tokens: "
                "ask for more, or a smaller --batch-size or --seqlen"
            )

    def steps(self, seqlen: int | None = None) -> int:
        """Optimiser steps, with windows of `seqlen` tokens."""
        return read_count("tokens", self.tokens) // (self.batch_size * (seqlen or self.seqlen))

    def peak(self, width: int) -> float:
        """The highest learning rate, of training whole models `width` wide.

        Up to a width of 256 the default is what was measured to be best. Above, that of weights falls as one over the width
        (Yang et al., "Tensor programs V", 2022), which gives at 4096 the 2e-5 that is published for training under a mask
        (CAST, 2025), and that of adapters as one over its root, which gives the 5e-4 that is usual there.
        """
        if self.rate is not None:
            return self.rate
        return RATES[self.train] / max(width / _MEASURED, 1) ** _FALLS[self.train]


def measure(arguments: Mapping[str, Any], teacher: str | None) -> str:
    """What `loss_before` and `loss_after` are, in words."""
    if arguments["train"] == BLOCKS:
        return "output error of a block, mean"
    return f"KL from {teacher}" if arguments["loss"] == "kd" else "loss"


def shown(arguments: Mapping[str, Any], value: float) -> str:
    """Such a number: nats a token, or a share of what the block puts out, squared."""
    return f"{value:.3%}" if arguments["train"] == BLOCKS else f"{value:.4f}"
