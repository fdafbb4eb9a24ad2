"""A transformers model without weights, into which tensors of a checkpoint come and go.

Parameters live on the meta device until they are loaded; buffers (rotary frequencies) are real from the start. Tensor
names on disk are matched to the model's by transformers' own rules (`names.py`). Leaves out checkpoints that would need
code from their repository.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmprune.base.errors import InputError, reason
from llmprune.base.files import read_json
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.discover import find_blocks, make_block
from llmprune.models.names import match_names
from llmprune.models.sites import Block

# what transformers raises on a configuration or tokenizer file that makes no sense
FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer.

    Raises:
        InputError: it has none, or a damaged one.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except FOREIGN as error:
        raise InputError(f"cannot read the tokenizer in {folder}: {reason(error)}") from None


def find_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None where it has none (calibration may come as tokens)."""
    if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        return None
    return load_tokenizer(folder)


def load_config(folder: Path, *, quantised: bool = False) -> PretrainedConfig:
    """The model's configuration.

    Args:
        quantised: read that of a quantised model as the one of the weights that its codes stand for.

    Raises:
        InputError: there is none, it needs code from its repository, or it describes a quantised model.
    """
    raw = read_json(folder / "config.json")
    if (quantisation := raw.get("quantization_config")) and not quantised:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise InputError(f"{folder} is already quantised ({method}): name the model that it was made from")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if quantisation:
            del config.quantization_config
        return config
    except FOREIGN as error:
        if "auto_map" in raw:
            raise InputError(f"{folder} needs code from its own repository, which llmprune never runs") from None
        raise InputError(f"{folder / 'config.json'} describes no model that transformers can build: {reason(error)}") from None


class Skeleton:
    """A model on the meta device and the checkpoint that fills it.

    Attributes:
        model: the transformers model, in eval mode.
        blocks: its decoder blocks by full module name, in order.
        names: where on disk each of the model's tensors is.

    Raises:
        InputError: the model cannot be built, or its tensors are not the checkpoint's.
    """

    def __init__(self, checkpoint: Checkpoint, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.model = empty_model(checkpoint.folder, config, dtype)
        self.blocks = find_blocks(self.model)
        self.names = match_names(self.model, checkpoint)
        self._move_buffers()

    def parameters(self) -> int:
        """How many there are; a tied head counts once."""
        tied = self.model.all_tied_weights_keys
        return sum(p.numel() for name, p in self.model.named_parameters(remove_duplicate=False) if name not in tied)

    def block_of(self, name: str) -> str | None:
        """The block that the model's tensor `name` belongs to."""
        return next((block for block in self.blocks if name.startswith(block + ".")), None)

    def outside_blocks(self) -> list[str]:
        """Tensors that belong to no block: embeddings, final norm, head."""
        return [name for name in self.names if self.block_of(name) is None]

    def outside_on_disk(self) -> dict[str, int]:
        """Tensors on disk that belong to no block, and their bytes."""
        inside = {piece.disk for name in self.names if self.block_of(name) for piece in self.names[name]}
        return {name: info.nbytes for name, info in self.checkpoint.tensors.items() if name not in inside}

    def inside(self, block: str) -> list[str]:
        """Tensors of one block."""
        return [name for name in self.names if name.startswith(block + ".")]

    def storage(self) -> dict[str, torch.dtype]:
        """The dtype on disk of each parameter, by full name."""
        tensors = self.checkpoint.tensors
        return {name: tensors[pieces[0].disk].dtype or self.dtype for name, pieces in self.names.items()}

    def describe(self) -> list[Block]:
        """The decoder blocks and their sites, whether their weights are loaded or not."""
        storage = self.storage()
        return [make_block(index, name, module, storage) for index, (name, module) in enumerate(self.blocks.items())]

    def fill(self, names: Iterable[str]) -> None:
        """Read tensors into the model, in the compute dtype.

        Raises:
            InputError: a weight is not finite.
        """
        places = {piece.disk: (name, piece.part) for name in names for piece in self.names[name]}
        state = self.model.state_dict() if any(part for _, part in places.values()) else {}
        merged: dict[str, Tensor] = {}
        for disk, tensor in self.checkpoint.read(list(places)):
            name, part = places[disk]
            value = tensor.to(self.device, self.dtype, copy=True)
            if not bool(torch.isfinite(value).all()):
                where = self.checkpoint.folder / self.checkpoint.tensors[disk].file
                raise InputError(f"tensor {disk} in {where} is not finite (NaN or infinity, in {self.dtype})")
            if not part:
                set_module_tensor_to_device(self.model, name, self.device, value)
                continue
            if name not in merged:
                merged[name] = torch.empty(state[name].shape, dtype=self.dtype, device=self.device)
            merged[name][part] = value
        for name, value in merged.items():
            set_module_tensor_to_device(self.model, name, self.device, value)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Have all that is outside the blocks in memory for a while, the head tied where the model ties it.

        As in transformers, tensors that both are on disk and differ are not tied, whatever the configuration says.
        """
        names = self.outside_blocks()
        self.fill(names)
        self.tie()
        try:
            yield
        finally:
            self.release(names)
            self.tie()

    def release(self, names: Iterable[str]) -> None:
        """Give back the memory of tensors that `fill` read."""
        for name in names:
            set_module_tensor_to_device(self.model, name, "meta")

    def tie(self) -> None:
        """Tie what the model ties, as transformers do."""
        absent = {name for name, _ in self.model.named_parameters(remove_duplicate=False) if name not in self.names}
        self.model.tie_weights(missing_keys=absent, recompute_mapping=False)

    def _move_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)


def _differ_by_layer(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Build the blocks that `per_layer_config` says: transformers read it, but do not build by it yet (5.23)."""
    text = model.config.get_text_config()
    if not text.is_heterogeneous:
        return
    for index, (name, block) in enumerate(find_blocks(model).items()):
        stack = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(stack, nn.ModuleList)
        stack[index] = type(block)(text.per_layer_config[index], index).to(dtype)
    model.eval()


def load_model(folder: Path, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model, its layers of different sizes where the configuration says so.

    Raises:
        InputError: it cannot be built, or its tensors are not the checkpoint's.
    """
    skeleton = Skeleton(Checkpoint(folder), config, device, dtype)  # raises unless tensors and configuration fit together
    if not config.get_text_config().is_heterogeneous:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, trust_remote_code=False)
    skeleton.fill(skeleton.names)
    skeleton.tie()
    if (folder / "generation_config.json").is_file():
        skeleton.model.generation_config = GenerationConfig.from_pretrained(folder)
    return skeleton.model


def empty_model(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of `config`, in eval mode; parameters on the meta device, buffers real.

    Raises:
        InputError: transformers cannot build it.
    """
    try:
        with init_empty_weights(include_buffers=False):
            if config.get_text_config().is_heterogeneous:
                config.get_text_config().allow_global_per_layer_attribute_access = True  # the model reads some sizes from it
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            _differ_by_layer(model, dtype)
    except FOREIGN as error:
        raise InputError(f"transformers cannot build a causal LM from {folder / 'config.json'}: {reason(error)}") from None
    return model.eval()
