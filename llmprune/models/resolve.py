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
from huggingface_hub.utils import validate_repo_id

from llmprune.base.errors import InputError, MachineError, reason, unknown, user_path

BUNDLED = {"llama": Path(__file__).parent / "bundled" / "llama"}
EXAMPLE = "meta-llama/Llama-3.2-1B"
_TEMPLATES = "*.jinja"  # these in folders, too
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", _TEMPLATES, "README*.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]
_UNWANTED = [*(f"*/{name}" for name in _WANTED if name != _TEMPLATES), "consolidated*"]  # other formats of the same weights


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
    """A model as text, for `resolve` and the command line. A `Path` is always a folder, also where it is called as a bundled
    model is, or as an option."""
    odd = isinstance(model, Path) and (str(model) in BUNDLED or str(model).startswith("-"))
    return f"./{model}" if odd else str(model)


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository on the Hub, and what was asked for of it: a branch, tag or commit; None: its head."""

    hub_id: str
    revision: str | None

    @property
    def name(self) -> str:
        return self.hub_id.split("/")[1]


def resolve(model: str) -> ModelFolder:
    """Find `model`: a bundled short name, a local folder, or `owner/name` on the Hub, which is downloaded.

    `owner/name@revision` is a branch, tag or commit of it. Without a network, or with HF_HUB_OFFLINE=1, what was downloaded
    before is taken.

    Raises:
        InputError: no such name, folder, repository or revision, or one that this user may not read.
        MachineError: no network to fetch it.
    """
    found = look_up(model)
    if isinstance(found, ModelFolder):
        return found
    path = _download(found.hub_id, found.revision)
    return ModelFolder(path, found.name, found.hub_id, commit=path.name)


def look_up(model: str) -> ModelFolder | HubModel:
    """What `model` names, without a look at the Hub.

    Raises:
        InputError: no such name or folder, and no repository could be called so.
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
    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise InputError(f"{hub_id!r} is neither a folder nor a Hub id: {reason(error)}") from None
    return HubModel(hub_id, revision or None)


def _download(hub_id: str, revision: str | None) -> Path:
    """The snapshot of a commit; its folder has the commit's name."""
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
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
