"""From a folder whose matrices have zeros to a packed one, and back."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmprune.base.errors import InputError, plain_errors, user_folder, user_path
from llmprune.base.files import INDEX, PACKED, RECORD, check_record, read_record, sums, write_json
from llmprune.base.folders import check_output, check_room, published, recover
from llmprune.formats.matrices import Layer, encode, encode_codes
from llmprune.formats.packed import FORMAT, VERSION, DenseView, PackedFolder, open_checkpoint, packable
from llmprune.formats.quantised import CodesView
from llmprune.models.checkpoint import Checkpoint, read_header
from llmprune.models.extras import copy_extras
from llmprune.models.resolve import resolve, spelled
from llmprune.models.skeleton import Skeleton, load_config

_CARD, _DENSE_CARD = "README.md", "README.dense.md"
_DENSE, _PACKED = "\nlibrary_name: transformers\n", "\nlibrary_name: llmprune # transformers, once unpacked\n"
_NOTE = f"""
# A packed model

Zeros of its matrices are not stored. transformers do not read this folder; llmprune does:

```python
import llmprune

model = llmprune.load(FOLDER)  # dense=True for plain layers
```

`llmprune unpack` gives back the model that was packed, whose card is `{_DENSE_CARD}`.
"""


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written.

    Attributes:
        layers: how many matrices are packed.
        dense: matrices of the blocks that are not, and why.
        weights: of the packed matrices, zeros counted.
        before, after: bytes of the packed matrices, as they were and packed.
        total_before, total_after: bytes of all tensors.
    """

    output: Path
    layers: int
    dense: dict[str, str]
    weights: int
    before: int
    after: int
    total_before: int
    total_after: int


def pack(
    folder: str | Path, output: str | Path, *, overwrite: bool = False, tell: Callable[[str], None] | None = None
) -> Converted:
    """Write a folder's matrices without their zeros, wherever that takes fewer bytes; everything else as it is.

    Args:
        folder: a bundled name, a folder or a Hub id; quantised or not.
        tell: hears of every file that is done.

    Raises:
        InputError: no matrix gains by it, or a folder cannot be read or written; nothing is left behind.
    """
    output = user_path(output, "output")
    with plain_errors("free some, or use a machine with more"):
        place = resolve(spelled(folder))
        source = place.path
        if (source / PACKED).is_file():
            raise InputError(f"{source} is packed already")
        recover(output)
        check_output(output, source, overwrite)
        check_record(source, "pack it")
        checkpoint = open_checkpoint(source)
        skeleton = Skeleton(checkpoint, load_config(source, quantised=True), torch.device("cpu"), torch.float32)
        able, never = packable(skeleton)
        sizes = ((name, info.nbytes) for name, info in checkpoint.tensors.items())
        check_room(output, sum(nbytes // 4 if name in able else nbytes for name, nbytes in sizes))  # or thereabouts
        with published(output, overwrite=overwrite) as partial:
            found = _pack_files(skeleton, able, _Packing({"layers": {}, "files": {}}, never), partial, tell)
            if not found.layers:
                raise _nothing(f"{source}{place.shadowed}", found.dense, able)
            copy_extras(source, partial)
            if (source / RECORD).is_file():
                shutil.copyfile(source / RECORD, partial / RECORD)
            _write_card(source, partial)
            _seal(partial, found.manifest)
        return found.converted(output)


@dataclass(slots=True)
class _Packing:
    manifest: dict[str, dict[str, object]]
    dense: dict[str, str]
    weights: int = 0
    before: int = 0
    after: int = 0
    total_before: int = 0
    total_after: int = 0

    @property
    def layers(self) -> int:
        return len(self.manifest["layers"])

    def add(self, name: str, layer: Layer, tensors: Mapping[str, Tensor]) -> None:
        self.manifest["layers"][name] = layer.entry()
        self.weights += layer.rows * layer.columns
        self.before += layer.nbytes()
        self.after += sum(one.nbytes for one in tensors.values())

    def converted(self, output: Path) -> Converted:
        sizes = (self.weights, self.before, self.after, self.total_before, self.total_after)
        return Converted(output, self.layers, self.dense, *sizes)


def _pack_files(
    skeleton: Skeleton, able: dict[str, str], found: _Packing, folder: Path, tell: Callable[[str], None] | None
) -> _Packing:
    """Every file of the checkpoint, packed; adds to `found`."""
    checkpoint = skeleton.checkpoint
    files = sorted({info.file for info in checkpoint.tensors.values()})
    for number, file in enumerate(files, 1):
        written: dict[str, Tensor] = {}
        for name in (name for name, info in checkpoint.tensors.items() if info.file == file):
            result = _encode(checkpoint, name) if name in able else None
            if isinstance(result, tuple):
                layer, tensors = result
                found.add(name, layer, tensors)
            else:
                tensors = checkpoint.stored(name)
                if result and skeleton.block_of(able[name]):
                    found.dense[able[name]] = result
            found.total_before += checkpoint.tensors[name].nbytes
            found.total_after += sum(one.nbytes for one in tensors.values())
            written |= tensors
        packed = f"packed-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(written, folder / packed, metadata={"format": "pt"})
        found.manifest["files"][packed] = file
        if tell:
            tell(f"{file} -> {packed} ({number} of {len(files)})")
    return found


def least_bytes(folder: Path) -> tuple[int, int]:
    """Bytes that the blocks' matrices take, packed where that is less, and how many weights those are. Matrices that cannot be
    packed, whatever their zeros, are not counted.
    """
    checkpoint = open_checkpoint(folder)
    skeleton = Skeleton(checkpoint, load_config(folder, quantised=True), torch.device("cpu"), torch.float32)
    nbytes = weights = 0
    for name in (name for name, own in packable(skeleton)[0].items() if skeleton.block_of(own)):
        result, info = _encode(checkpoint, name), checkpoint.tensors[name]
        nbytes += info.nbytes if isinstance(result, str) else sum(one.nbytes for one in result[1].values())
        weights += math.prod(info.shape)
    return nbytes, weights


def _encode(checkpoint: Checkpoint, name: str) -> tuple[Layer, dict[str, Tensor]] | str:
    """A matrix, packed; or why it is not."""
    if isinstance(checkpoint, CodesView) and name in checkpoint.coded:
        return encode_codes(name, *checkpoint.codes(name), checkpoint.bits)
    return encode(name, checkpoint.stored(name)[name])


def _nothing(source: str, dense: dict[str, str], able: dict[str, str]) -> InputError:
    """Why nothing was packed."""
    own = [(name, why) for name, why in dense.items() if name in able.values()]
    if not own:
        name, why = next(iter(dense.items()), ("it", "no matrix of a block is known"))
        who = "only matrices that are tensors of their own, and not transposed, can"
        return InputError(f"nothing of {source} can be packed: {who} ({name}: {why})")
    why = f"{own[0][0]}: {own[0][1]}"
    return InputError(f"no matrix of {source} would get smaller ({why}): prune it with --sparsity 2:4 or 50% first")


def _seal(folder: Path, manifest: dict[str, dict[str, object]]) -> None:
    known = sums(folder, RECORD)  # which may grow
    write_json(folder / PACKED, {"format": FORMAT, "version": VERSION, **manifest, "sha256": known})


def _write_card(source: Path, folder: Path) -> None:
    """A card that says how to load the packed folder, with the metadata of the dense one's, which is kept beside it."""
    text = (source / _CARD).read_text(encoding="utf-8") if (source / _CARD).is_file() else ""
    head, mark, _ = text.partition("\n---\n") if text.startswith("---\n") else ("", "", text)
    (folder / _CARD).write_text(head.replace(_DENSE, _PACKED, 1) + mark + _NOTE, encoding="utf-8")
    if text:
        (folder / _DENSE_CARD).write_text(text, encoding="utf-8")


def unpack(
    folder: str | Path, output: str | Path, *, overwrite: bool = False, tell: Callable[[str], None] | None = None
) -> Converted:
    """Write the folder that was packed: the same tensors, bit for bit, in files of the same names.

    Raises:
        InputError: the folder is not packed, not whole, or cannot be written; nothing is left behind.
    """
    folder, output = user_folder(folder, "folder"), user_path(output, "output")
    with plain_errors("free some, or use a machine with more"):
        if not (folder / PACKED).is_file():
            raise InputError(f"{folder} holds no {PACKED}: give a folder that llmprune pack wrote")
        packed = PackedFolder.open(folder)
        recover(output)
        check_output(output, folder, overwrite)
        check_room(output, packed.unpacked_bytes())
        packed.check(sorted({*packed.files, *packed.sums} - {_CARD}))
        view = DenseView(packed)
        if (folder / RECORD).is_file():
            read_record(folder)
        with published(output, overwrite=overwrite) as partial:
            for number, (file, dense) in enumerate(packed.files.items(), 1):
                names = [name for name, info in view.tensors.items() if info.file == file]
                tensors = {own: tensor for name in names for own, tensor in view.stored(name).items()}
                save_file(tensors, partial / dense, metadata={"format": "pt"})
                if tell:
                    tell(f"{file} -> {dense} ({number} of {len(packed.files)})")
            if len(packed.files) > 1:
                _index(partial, packed)
            copy_extras(folder, partial)
            if (folder / RECORD).is_file():
                shutil.copyfile(folder / RECORD, partial / RECORD)
            if (folder / _DENSE_CARD).is_file():
                shutil.copyfile(folder / _DENSE_CARD, partial / _CARD)
    sizes = {name: packed.tensors[name].nbytes for name in packed.tensors}
    after = sum(layer.nbytes() for layer in packed.layers.values())
    weights = sum(layer.rows * layer.columns for layer in packed.layers.values())
    before = sum(sizes.values()) - sum(sizes[name] for name in packed.others())
    return Converted(output, len(packed.layers), {}, weights, before, after, sum(sizes.values()), packed.unpacked_bytes())


def _index(folder: Path, packed: PackedFolder) -> None:
    """The index of the dense files, as the stream writes it."""
    weight_map = {name: file for file in packed.files.values() for name in read_header(folder, file)}
    total = sum(info.nbytes for file in packed.files.values() for info in read_header(folder, file).values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
