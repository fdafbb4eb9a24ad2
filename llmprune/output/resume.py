"""What a run has finished, kept beside its shards, so that the same command goes on after it was killed.

The manifest holds a fingerprint of all that decides the result and, for each finished block, its shard's sha256 and what
was recorded of it. The hidden states are not kept: running the finished blocks once more gives the very same ones, for
about a fifth of the time that pruning them took and no disk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmprune.base.errors import InputError, MachineError, reason
from llmprune.base.files import fsync, read_json, sha256
from llmprune.base.folders import locked
from llmprune.base.words import count

MANIFEST = "llmprune.partial.json"
_TURN = ".turn"
_AGAIN = "pass --restart to begin anew"


class Manifest:
    """The finished blocks of the run in `folder`, in order.

    Args:
        run: where the folder is that of a step on the way, the manifest of the whole run, which then counts as begun, too.

    Attributes:
        blocks: of each finished block, what `commit` was given.
        known: what the blocks have in common (JSON), kept with the first one.
        folder: where the shards are.

    Raises:
        InputError: the folder holds another run's blocks, or a manifest or shard that is not whole.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], run: Manifest | None = None) -> None:
        self.folder, self._path, self._run = folder, folder / MANIFEST, run
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self.blocks: list[dict[str, Any]] = []
        self.known: dict[str, Any] = {}
        self._shards: dict[str, str] = {}
        if self._path.exists():
            self._read()

    def _read(self) -> None:
        try:
            saved = read_json(self._path)
        except InputError as error:
            raise InputError(f"{error}; {_AGAIN}") from None
        if saved.pop("sum", None) != _sum(saved):
            raise InputError(f"{self._path} is damaged; {_AGAIN}")
        was = saved["fingerprint"]
        if changed := [key for key in was | self._fingerprint if was.get(key) != self._fingerprint.get(key)]:
            what = ", ".join(f"{key} {was.get(key)} (now {self._fingerprint.get(key)})" for key in changed[:3])
            raise InputError(f"{self.folder} holds an unfinished run with other settings: {what}; repeat them, or {_AGAIN}")
        self.blocks, self.known, self._shards = saved["blocks"], saved.get("known", {}), saved["shards"]
        for file, expected in self._shards.items():
            path = self.folder / file
            if not path.is_file() or sha256(path) != expected:
                raise InputError(f"{path}, which an unfinished run wrote, is missing or damaged; {_AGAIN}")

    def commit(self, shard: Path, block: Mapping[str, Any]) -> None:
        """Count one more block as finished: its shard, and what is to be known of it later (JSON)."""
        fsync(shard)
        self._save(self._shards | {shard.name: sha256(shard)}, [*self.blocks, dict(block)])

    def begin(self) -> None:
        """Count what comes before the first block as finished."""
        self._save(self._shards, self.blocks)

    def on_the_way(self, folder: Path) -> Manifest:
        """Of a step that comes before the last one and writes `folder`."""
        return Manifest(folder, self._fingerprint, self)

    def _save(self, shards: dict[str, str], blocks: list[dict[str, Any]]) -> None:
        if self._run is not None:
            self._run.begin()
        content = {"fingerprint": self._fingerprint, "known": self.known, "shards": shards, "blocks": blocks}
        saved = json.loads(json.dumps(content))
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps({"sum": _sum(saved), **saved}), encoding="utf-8")
        fsync(draft)
        draft.replace(self._path)
        fsync(self.folder)
        self._shards, self.blocks = shards, blocks


def _sum(saved: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()


@contextmanager
def continued(
    output: Path,
    fingerprint: Mapping[str, Any],
    restart: bool,
    tell: Callable[[str], None],
    begun: str = "a step on the way, in part or whole",
) -> Iterator[Manifest]:
    """A hidden folder beside `output` to fill and publish, with what an earlier run of the same fingerprint finished in it.

    On an error or ^C it stays, if a block is finished. `restart` empties it first; `tell` hears what a user should know. The
    folders of steps on the way, `between_folders`, stay and go with it. `begun`: what is finished where no block is.

    Raises:
        InputError: another run works in it, or it cannot be continued.
    """
    target, partial, between = output.resolve(), partial_folder(output), between_folders(output)
    partial.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(partial, output):
        if restart or not (partial / MANIFEST).exists():
            for path in (*partial.iterdir(), *between):
                _remove(path)
        manifest = Manifest(partial, fingerprint)
        if manifest.blocks:
            tell(f"going on after block {len(manifest.blocks)}, which an earlier run finished")
        try:
            yield manifest
        except SafetensorError as error:
            raise MachineError(f"cannot write the weights beside {output}: {reason(error)}") from None
        finally:
            if (partial / MANIFEST).exists():
                done = count(len(manifest.blocks), "block") if manifest.blocks else begun
                tell(f"finished: {done}; the same command goes on from there")
            else:
                for folder in (partial, *between):
                    shutil.rmtree(folder, ignore_errors=True)
        (target / MANIFEST).unlink(missing_ok=True)


def partial_folder(output: Path) -> Path:
    """Where an unfinished run to `output` keeps what is finished."""
    target = output.resolve()
    return target.parent / f".{target.name}.partial"


def between_folders(output: Path) -> list[Path]:
    """Where a run to `output` of several steps keeps what the first, the second, ... came to, when another follows."""
    return [partial_folder(output).with_suffix(f".{which}") for which in ("first", "second", "third", "fourth")]


def turn_folder(output: Path, number: int) -> Path:
    """Where a run that prunes and trains in turns keeps what turn `number` came to."""
    target = output.resolve()
    return target.with_name(f".{target.name}{_TURN}{number}")


def is_turn(folder: Path) -> bool:
    return folder.name.startswith(".") and folder.name.rstrip("0123456789").endswith(_TURN)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
