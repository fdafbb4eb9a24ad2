"""Folders that are written whole or not at all.

Everything goes into a hidden `.partial` folder beside the output, which takes the output's name in one rename when all
of it is on disk. Only a folder that llmprune wrote is ever replaced.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from llmprune.base.errors import InputError, MachineError, denied, reason
from llmprune.base.files import PACKED, RECORD, SCAN, fsync
from llmprune.base.words import size


def check_output(output: Path, model: Path | None, overwrite: bool) -> None:
    """Refuse an output folder that would cost the user something.

    Raises:
        InputError: it is a file or a mount point, overlaps the model's folder, cannot be written, or is not empty;
            with `overwrite`, a folder that llmprune wrote may be replaced, and no other.
    """
    target = output.resolve()
    if model is not None and (target == model.resolve() or model.resolve().is_relative_to(target)):
        raise InputError(f"output {output} is the model's own folder, or holds it: choose another output")
    if model is not None and target.is_relative_to(model.resolve()):
        raise InputError(f"output {output} lies inside the model's folder: choose another output")
    if target.exists() and not target.is_dir():
        raise InputError(f"output {output} is a file: choose a folder")
    if target.is_mount() or Path.cwd().is_relative_to(target):
        raise InputError(f"output {output} cannot be replaced as a whole: name a new folder inside it")
    if _filled(target):
        if not overwrite:
            raise InputError(f"output {output} is not empty: choose another, or pass --overwrite to replace it")
        if not _ours(target):
            raise InputError(f"output {output} holds no {RECORD}, so llmprune did not write it and will not replace it")
    parent = existing_parent(output)
    if not parent.is_dir():
        raise InputError(f"cannot write output {output}: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise MachineError(f"cannot write output {output}: {parent} is read-only; choose another")


def recover(output: Path) -> None:
    """Put right what a run that was killed while it replaced `output` has left. Where `output` is gone, the folder that was to
    be replaced gets its name back; where the new one has it, the old one goes.

    Raises:
        InputError: another run is replacing `output` just now, or what is left cannot be removed.
    """
    target = output.resolve()
    old = _replaced(target)
    if not old.is_dir():
        return
    with locked(old, output):
        if not target.is_file() and not _filled(target):
            old.rename(target)
        elif _ours(target):
            try:
                shutil.rmtree(old)
            except OSError as error:
                raise denied(error, f"cannot remove {old}, which an earlier run has replaced: {error.strerror}") from None


def _filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _ours(folder: Path) -> bool:
    """Whether llmprune wrote it."""
    return any((folder / name).is_file() for name in (RECORD, PACKED, SCAN))


def _replaced(target: Path) -> Path:
    """Where a folder is while another takes its name."""
    return target.parent / f".{target.name}.replaced"


@contextmanager
def locked(folder: Path, output: Path) -> Iterator[None]:
    """No other run has `folder`, and so `output`, meanwhile. The lock stays with the folder when it is renamed.

    Raises:
        InputError: one has.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing {output}: wait for it, or choose another --output") from None
        yield
    finally:
        os.close(descriptor)


def check_room(output: Path, nbytes: int) -> None:
    """There must be as much room on the output's disk.

    Raises:
        MachineError: there is less.
    """
    free = shutil.disk_usage(existing_parent(output)).free
    if free < nbytes:
        raise MachineError(
            f"output {output} needs {size(nbytes)} of disk, where {size(free)} are free: make room, or choose another"
        )


def existing_parent(output: Path) -> Path:
    """The nearest folder above `output` that there is: the new files will be on its disk."""
    return next(folder for folder in output.resolve().parents if folder.exists())


@contextmanager
def published(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `output` at the end. On any error before that, or ^C, it vanishes and what was at
    `output` stays; so it does if `output` was filled meanwhile and `overwrite` is off.
    """
    target = output.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield partial
        publish(partial, output, overwrite=overwrite)
    except SafetensorError as error:
        raise MachineError(f"cannot write the weights beside {output}: {reason(error)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, output: Path, *, overwrite: bool) -> None:
    """Give the folder `partial`, which stands beside `output`, the output's name, once all of it is on disk.

    Raises:
        InputError: `output` was filled meanwhile and `overwrite` is off.
    """
    target = output.resolve()
    settle(partial)
    _rename(partial, target, overwrite)
    with suppress(OSError):  # it is published; not every parent can be opened
        fsync(target.parent)


def settle(folder: Path) -> None:
    """Give the files the modes that the umask asks for (safetensors writes 0600) and bring them to the disk."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (*folder.rglob("*"), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        fsync(path)


def _rename(partial: Path, target: Path, overwrite: bool) -> None:
    """Rename `partial` to `target`. A folder that is replaced keeps its place, or gets it back, until the new one has it."""
    if not overwrite or not target.exists():
        try:
            partial.rename(target)  # takes the place of an empty folder, never of a full one
        except OSError as error:
            raise InputError(f"output {target} was filled meanwhile ({reason(error)}); nothing was written") from None
        return
    old = _replaced(target)
    with locked(target, target):
        target.rename(old)
        try:
            partial.rename(target)
        except BaseException:  # a signal too
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
