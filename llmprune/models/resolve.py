"""From what the user calls a model to a folder on this machine: a bundled name, a folder, or a Hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmprune.errors import InputError, MachineError, reason, unknown, user_path

BUNDLED = {"llama": Path(__file__).parent.parent / "demo" / "llama"}
EXAMPLE = "meta-llama/Llama-3.2-1B"
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]

_UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """Where a model's files are.

    Attributes:
        hub_id: None for a folder; `commit` is the commit of that repository.
        bundled: it is the demo.
    """

    path: Path
    name: str
    hub_id: str | None = None
    commit: str | None = None
    bundled: bool = False

    @property
    def theirs(self) -> bool:
        """Whether it is the user's own, to be written to: neither bundled nor a snapshot in the Hub's cache."""
        return not self.bundled and not self.path.resolve().is_relative_to(Path(constants.HF_HUB_CACHE).resolve())

    @property
    def shadowed(self) -> str:
        """What to say where a bundled name was taken and a folder here has it too; else nothing."""
        here = self.bundled and Path(self.name).is_dir()
        return f" (a folder here of that name is ./{self.name})" if here else ""


def spelled(model: str | Path) -> str:
    """A model as text, for `resolve`. A `Path` is always a folder, also where it is called as a bundled model is."""
    return f"./{model}" if isinstance(model, Path) and str(model) in BUNDLED else str(model)


def resolve(model: str) -> ModelFolder:
    """Find `model`: a bundled short name, a local folder, or `owner/name` on the Hub, which is downloaded.

    `owner/name@revision` is a branch, tag or commit of it. Without a network, or with HF_HUB_OFFLINE=1, what was downloaded
    before is taken.

    Raises:
        InputError: no such name, folder, repository or revision, or one that this user may not read.
        MachineError: no network to fetch it.
    """
    if model in BUNDLED:
        return ModelFolder(BUNDLED[model], model, bundled=True)
    path = user_path(model, "model")
    if path.is_dir():
        return ModelFolder(path, path.resolve().name)
    if path.exists():
        raise InputError(f"model {model!r} is a file: pass the folder that holds config.json")
    hub_id, _, revision = model.partition("@")
    if model.startswith(("/", ".", "~")) or hub_id.count("/") > 1:
        raise InputError(f"model folder {model!r} does not exist")
    if "/" not in hub_id:
        raise InputError(f"{unknown('model', model, BUNDLED)}; otherwise pass a folder or a Hub id such as {EXAMPLE}")
    path = _download(hub_id, revision or None)
    return ModelFolder(path, hub_id.split("/")[1], hub_id, commit=path.name)


def _download(hub_id: str, revision: str | None) -> Path:
    """The snapshot of a commit; its folder has the commit's name."""
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except HFValidationError as error:
        raise InputError(f"{hub_id!r} is neither a folder nor a Hub id: {reason(error)}") from None
    except GatedRepoError:
        where = f"{constants.ENDPOINT}/{hub_id}"
        raise InputError(
            f"{hub_id} is gated: accept its licence at {where}, then run `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(f"no model {hub_id} on the Hub (a private one needs `hf auth login`), and no such folder") from None
    except RevisionNotFoundError:
        raise InputError(f"{hub_id} on the Hub has no branch, tag or commit {revision!r}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise _unreached(error, hub_id) from None


def _unreached(error: BaseException, hub_id: str) -> InputError:
    """Why neither the Hub nor the cache of earlier downloads has given the model."""
    there = "only part of it" if isinstance(error, IncompleteSnapshotError) else "nothing of it"
    offline = constants.is_offline_mode()
    why = "HF_HUB_OFFLINE is set" if offline else reason(error.__cause__ or error)
    kind = InputError if offline else MachineError
    return kind(f"cannot fetch {hub_id} from the Hub ({why}), and the cache holds {there}; go online or pass a local folder")
