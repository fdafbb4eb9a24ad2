"""Train the bundled demo: a 4M-parameter Llama on Python's own documentation and the PEPs.

    python scripts/train_demo.py --peps peps.txt.xz --output llmprune/demo/llama

Training text: a file of public-domain PEPs (plain or .xz) and the *train* split of `llmprune.data.pydoc`, repeated
`--docs-weight` times; any docstring that also stands in the calibration or evaluation split is left out. Writes bf16
safetensors, config, tokenizer and `training.json`, which records how. AdamW, cosine decay to zero; about
35 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmprune.base.words import count
from llmprune.data.pydoc import documents, training

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
CONTEXT = 512


def read_peps(path: Path) -> list[str]:
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return ["PEP: " + text for text in raw.decode().split("\nPEP: ") if text]


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama-3-style special tokens; a BOS is put before every text."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT)


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    ids = tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    return torch.tensor([token for text in ids for token in (*text, eos)], dtype=torch.long)


def demo_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )


def batches(stream: Tensor, size: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(stream) - CONTEXT - 1, (size,), generator=generator)
    return torch.stack([stream[s : s + CONTEXT] for s in starts])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, windows: Tensor) -> float:
    model.eval()
    losses = [model(input_ids=w, labels=w).loss.item() for w in windows.split(8)]
    model.train()
    return sum(losses) / len(losses)


def parameter_groups(model: LlamaForCausalLM, decay: float) -> list[dict]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def train(
    model: LlamaForCausalLM, stream: Tensor, held_out: Tensor, args: argparse.Namespace, keep: Callable[[Path], None]
) -> list[dict]:
    """Warm up for 100 steps, then cosine to zero; evaluates every 250 steps and at the end. `keep` writes the model.

    A resumed run draws the windows that the whole run would have; Adam's moments start anew, warmed up again.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.resume):
        batches(stream, args.batch, generator)
    compiled = torch.compile(model)  # twice the tokens a second on two cores
    log: list[dict] = []
    start = time.monotonic()
    for step in range(args.resume + 1, args.steps + 1):
        rate = args.lr * min(1.0, (step - args.resume) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = batches(stream, args.batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in args.keep_at:
            keep(args.output / f"step-{step}")
        if step % 250 == 0 or step == args.steps:
            row = {"step": step, "tokens": step * args.batch * CONTEXT, "minutes": (time.monotonic() - start) / 60,
                   "lr": rate, "train_loss": loss.item(), "evaluation_loss": held_out_loss(model, held_out)}  # fmt: skip
            log.append(row)
            print(json.dumps(row), flush=True)
    return log


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peps", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("llmprune/demo/llama"))
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--keep-at", type=int, nargs="*", default=[], help="also keep the model after so many steps")
    parser.add_argument("--resume", type=int, default=0, metavar="STEP", help="go on from OUTPUT/step-STEP, kept before")
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.3, help="strong: the text is small and read several times")
    parser.add_argument("--docs-weight", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    docs, peps = training(), read_peps(args.peps)
    texts = peps + docs * args.docs_weight
    tokenizer = train_tokenizer(texts, args.vocabulary)
    stream = tokens_of(tokenizer, texts)
    evaluation = tokens_of(tokenizer, documents("evaluation"))
    held_out = evaluation[: len(evaluation) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:64]
    model = LlamaForCausalLM(demo_config(args, tokenizer)).train()
    if args.resume:
        kept = LlamaForCausalLM.from_pretrained(args.output / f"step-{args.resume}", dtype=torch.float32)
        model.load_state_dict(kept.state_dict())
    model.set_attn_implementation("eager")  # fused by the compiler, 1.35 times the tokens a second of sdpa with narrow heads
    print(f"{model.num_parameters():,} parameters, {len(stream):,} training tokens a pass", flush=True)

    def keep(folder: Path) -> None:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    log = train(model, stream, held_out, args, keep)
    keep(args.output)
    how = {
        "parameters": model.num_parameters(),
        "training_tokens_a_pass": len(stream),
        "characters": {"peps": sum(map(len, peps)), "docs": sum(map(len, docs)), "docs_weight": args.docs_weight},
        "arguments": {
            "steps": args.steps,
            "resumed_at": args.resume,
            "batch": args.batch,
            "lr": args.lr,
            "weight_decay": args.weight_decay,
            "seed": args.seed,
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "log": log,
    }
    (args.output / "training.json").write_text(json.dumps(how, indent=1) + "\n")
    print(f"wrote {args.output} after {count(log[-1]['step'], 'step')}", file=sys.stderr)


if __name__ == "__main__":
    main()
