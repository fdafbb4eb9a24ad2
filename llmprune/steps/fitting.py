"""The fit of a pruned block: its kept weights, norms and biases learn to put out what the dense block does.

The dense block's output for the dense model's hidden states is the target, the pruned model's hidden states are the
input, so that the fit also takes back what earlier blocks lost. Adam on float32 copies; masks are kept exactly. The best
state on held-out windows is kept, the initial one included, so that a block never ends worse than it began.
Matrices without a mask are left alone. (A window that contains a nonlinearity, as in BRECQ, Li et al., 2021.)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from llmprune.base.errors import InputError
from llmprune.base.processes import Ranks
from llmprune.job.recipes import PASSES
from llmprune.job.record import Reconstruction
from llmprune.models.sites import Block
from llmprune.stream.activations import Activations

RATE = 0.05  # Adam's highest learning rate, relative to a parameter's scale
RISE = 0.3  # share of the steps in which the rate rises to that; then it falls to zero
HELD_OUT = 8  # one batch in so many


def check_batches(feed: Activations, ranks: Ranks) -> None:
    """There must be a batch to fit and one to hold out.

    Raises:
        InputError: there is one batch only.
    """
    if max(ranks.all(len(feed.hidden))) < 2:
        raise InputError(
            "reconstruction holds a batch of windows out: give more samples or a smaller batch_size, or --no-reconstruct"
        )


class BlockFit:
    """Float32 copies of a block's kept weights, norms and biases, by their names within the block.

    A batch is the batches of that number of all processes together; its error and gradients are the same on each.

    Attributes:
        batches: how many there are.
    """

    def __init__(
        self, block: Block, masks: Mapping[str, Tensor], feed: Activations, targets: Sequence[Tensor], ranks: Ranks
    ) -> None:
        self._block, self._feed, self._targets, self._ranks = block, feed, targets, ranks
        self.batches = max(ranks.all(len(targets)))
        self._dropped: dict[str, Tensor] = {}
        self.masters: dict[str, Tensor] = {}
        for path, parameter in block.module.named_parameters():
            sites = [site for site in block.sites if site.parameter == f"{block.name}.{path}"]
            if sites and all(site.name in masks for site in sites):
                self._dropped[path] = torch.zeros_like(parameter, dtype=torch.bool)
                for site in sites:
                    dropped = ~masks[site.name]
                    self._dropped[path][site.part] = dropped.T if site.transposed else dropped
            if path in self._dropped or parameter.ndim == 1:
                self.masters[path] = parameter.detach().float().clone().requires_grad_()

    def parameters(self) -> dict[str, Tensor]:
        """What the block computes with: masked, in its own dtype."""
        own = dict(self._block.module.named_parameters())
        return {path: self._masked(path).to(own[path].dtype) for path in self.masters}

    def _masked(self, path: str) -> Tensor:
        master = self.masters[path]
        return master.masked_fill(self._dropped[path], 0) if path in self._dropped else master

    def _lost(self, index: int, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Squared error of the block's output on this process's batch `index`, and the square of the target."""
        module = self._block.module
        out = self._feed.call(self._block, index, lambda *args, **kwargs: functional_call(module, parameters, args, kwargs))
        target = self._feed.real_tokens(self._targets[index].to(out.device), index).float()
        return (self._feed.real_tokens(out, index).float() - target).square().sum(), target.square().sum()

    def differentiate(self, index: int) -> None:
        """Set the copies' gradients of the relative error on batch `index`; the model's own parameters get none."""
        masters = list(self.masters.values())
        gradients: Sequence[Tensor | None] = [None] * len(masters)
        lost = whole = torch.zeros(())
        with torch.enable_grad():
            if index < len(self._targets):
                lost, whole = self._lost(index, self.parameters())
            if self._ranks.size > 1:
                whole = whole.new_tensor(self._ranks.totals(float(whole))[0])
            if lost.requires_grad:
                gradients = torch.autograd.grad(lost / whole, masters, allow_unused=True)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = torch.zeros_like(master) if gradient is None else gradient
            self._ranks.add_up(master.grad)

    def error(self, indices: Sequence[int]) -> float:
        """Mean relative squared error of the block's output on the batches `indices`."""
        with torch.no_grad():
            parameters, numbers = self.parameters(), []
            for index in indices:
                numbers += [float(x) for x in self._lost(index, parameters)] if index < len(self._targets) else [0.0, 0.0]
        numbers = list(self._ranks.totals(*numbers))
        return sum(lost / whole for lost, whole in zip(numbers[::2], numbers[1::2], strict=True)) / len(indices)

    def scales(self) -> dict[str, float]:
        """The root mean square of each copy. A vector's is at least the least matrix's: from it the steps are taken, and a
        bias of zeros, or a norm stored as its distance from one, would stay as it is."""
        own = {path: float(master.detach().square().mean().sqrt()) for path, master in self.masters.items()}
        least = min((own[path] for path, master in self.masters.items() if master.ndim > 1 and own[path]), default=0.0)
        return {path: max(own[path], least) if master.ndim == 1 else own[path] for path, master in self.masters.items()}

    def state(self) -> dict[str, Tensor]:
        return {path: master.detach().clone() for path, master in self.masters.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for path, master in self.masters.items():
                master.copy_(state[path])

    def round(self) -> None:
        """Round to what will be stored."""
        with torch.no_grad():
            for path, master in self.masters.items():
                master.copy_(self._masked(path).to(self._block.storage[f"{self._block.name}.{path}"]))

    def write(self) -> list[str]:
        """Put the parameters into the block; returns their full names."""
        with torch.no_grad():
            for path, value in self.parameters().items():
                self._block.module.get_parameter(path).copy_(value)
        return [f"{self._block.name}.{path}" for path in self.masters]


def rate_at(step: int, steps: int) -> float:
    """The share of `RATE` that step number `step` of `steps` is taken with. It rises first: Adam's first steps are as long as
    the rate allows, whatever the gradient, and the block begins close to where it should end.
    """
    place = (step + 1) / (steps + 1)
    return min(place / RISE, (1 - place) / (1 - RISE))


def fit_block(
    block: Block, masks: Mapping[str, Tensor], feed: Activations, targets: Sequence[Tensor], ranks: Ranks, passes: int = PASSES
) -> tuple[Reconstruction, list[str]]:
    """Fit `block` in place; returns what came of it and the full names of the parameters that changed.

    Args:
        masks: site name -> (out, in) bool, True where kept.
        feed: the pruned model's hidden states, the inputs.
        targets: the dense block's outputs, one a batch of `feed`.
        passes: over the windows that are not held out.
    """
    start = time.perf_counter()
    fit = BlockFit(block, masks, feed, targets, ranks)
    held = range(fit.batches)[HELD_OUT // 2 :: HELD_OUT] or range(fit.batches)[-1:]
    train = [index for index in range(fit.batches) if index not in held]
    before = best = fit.error(held)
    kept = fit.state()
    groups = [{"params": [fit.masters[path]], "lr": RATE * scale} for path, scale in fit.scales().items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    steps = passes * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    for _ in range(passes):
        for index in train:
            fit.differentiate(index)
            optimizer.step()
            schedule.step()
        if (error := fit.error(held)) < best:
            best, kept = error, fit.state()
    fit.restore(kept)
    fit.round()
    after = fit.error(held)
    changed = fit.write() if after <= before else []
    nbytes = 5 * sum(master.nbytes for master in fit.masters.values())  # masters, gradients, two moments, the best state
    return Reconstruction(block.index, before, min(after, before), steps, RATE, nbytes, time.perf_counter() - start), changed
