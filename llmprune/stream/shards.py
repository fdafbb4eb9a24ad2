"""Write a checkpoint one block at a time, and publish it whole or not at all.

Everything goes into a hidden `.partial` folder beside the output, which takes the output's name in one rename when all
of it is on disk. Tensors keep the names and dtypes that the source has.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmprune.errors import InputError
from llmprune.models.checkpoint import INDEX
from llmprune.models.sites import Block
from llmprune.models.skeleton import Skeleton

_OUTSIDE_BYTES = 2**30  # a shard of tensors outside the blocks holds at most this, or one tensor
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")
_NOT_COPIED = frozenset({INDEX, "llmprune.json", "training.json"})


class NoSink:
    """A `Sink` that keeps nothing: the model in memory is the result."""

    def put(self, block: Block) -> None:
        pass


class ShardWriter:
    """A `Sink`: one safetensors shard a block, further ones for what is outside the blocks, then the index."""

    def __init__(self, skeleton: Skeleton, folder: Path) -> None:
        self._skeleton, self._folder = skeleton, folder
        self._outside = self._plan_outside()
        self._count = len(skeleton.blocks) + len(self._outside)
        self._weight_map: dict[str, str] = {}

    def put(self, block: Block) -> None:
        """Write the block's tensors: sites as they are now, the rest as the source has them."""
        names = {self._skeleton.names[name]: name for name in self._skeleton.inside(block.name)}
        sites = {f"{site.name}.weight": site for site in block.sites}
        tensors = {}
        for disk_name, tensor in self._skeleton.checkpoint.read(list(names)):
            site = sites.get(names[disk_name])
            tensors[disk_name] = tensor if site is None else site.stored()
        self._write(block.index + 1, tensors)

    def finish(self) -> None:
        """Write what is outside the blocks, and the index."""
        for number, names in enumerate(self._outside, len(self._skeleton.blocks) + 1):
            self._write(number, dict(self._skeleton.checkpoint.read(names)))
        total = self._skeleton.checkpoint.nbytes()
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._weight_map.items()))}
        write_json(self._folder / INDEX, index)

    def _plan_outside(self) -> list[list[str]]:
        skeleton = self._skeleton
        blocks = {skeleton.names[name] for block in skeleton.blocks for name in skeleton.inside(block)}
        shards: list[list[str]] = []
        room = 0
        for name, info in skeleton.checkpoint.tensors.items():
            if name in blocks:
                continue
            if info.nbytes > room:
                shards.append([])
                room = _OUTSIDE_BYTES
            shards[-1].append(name)
            room -= info.nbytes
        return shards

    def _write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        file = f"model-{number:05d}-of-{self._count:05d}.safetensors"
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, self._folder / file, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise InputError(f"cannot write {file} beside the output folder: {error}") from None
        self._weight_map |= dict.fromkeys(tensors, file)


def copy_extras(source: Path, folder: Path) -> None:
    """Copy configuration, tokenizer and licence files."""
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            if path.name not in _NOT_COPIED and path.is_file():
                shutil.copyfile(path, folder / path.name)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def check_output(output: Path, model: Path | None, overwrite: bool) -> None:
    """Refuse an output folder that would cost the user something.

    Raises:
        InputError: it is a file, is not empty, or overlaps the model's folder.
    """
    target = output.resolve()
    if model is not None and (target == model.resolve() or model.resolve().is_relative_to(target)):
        raise InputError(f"output {output} is the model's own folder, or holds it: choose another")
    if model is not None and target.is_relative_to(model.resolve()):
        raise InputError(f"output {output} lies inside the model's folder: choose another")
    if output.exists() and not output.is_dir():
        raise InputError(f"output {output} is a file: choose a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise InputError(f"output {output} is not empty: choose another, or pass --overwrite to replace it")
    parent = next(p for p in target.parents if p.exists())
    if not os.access(parent, os.W_OK):
        raise InputError(f"cannot write output {output}: {parent} is read-only")


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` at the end; on any error, or ^C, it vanishes and `output` stays as it was."""
    target = output.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield partial
        _settle(partial)
        _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Give the files the modes that the umask asks for (safetensors writes 0600) and bring them to the disk."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (*folder.iterdir(), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        _fsync(path)


def _replace(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; a folder that was there stays whole until the new one has its place."""
    if not target.exists():
        partial.rename(target)
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
