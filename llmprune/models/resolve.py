"""From what the user calls a model to a folder on this machine: a bundled name, a folder, or a Hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from llmprune.errors import InputError, reason, unknown, user_path

BUNDLED = {"llama": Path(__file__).parent.parent / "demo" / "llama"}
EXAMPLE = "meta-llama/Llama-3.2-1B"
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*"]

_UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """Where a model's files are. `hub_id` is None for a folder; `bundled` says that it is the demo."""

    path: Path
    name: str
    hub_id: str | None = None
    bundled: bool = False


def resolve(model: str) -> ModelFolder:
    """Find `model`: a bundled short name, a local folder, or `owner/name` on the Hub, which is downloaded.

    Raises:
        InputError: no such name, folder or repository, or no network to fetch it.
    """
    if model in BUNDLED:
        return ModelFolder(BUNDLED[model], model, bundled=True)
    path = user_path(model, "model")
    if path.is_dir():
        return ModelFolder(path, path.resolve().name)
    if path.exists():
        raise InputError(f"model {model!r} is a file: pass the folder that holds config.json")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise InputError(f"model folder {model!r} does not exist")
    if "/" not in model:
        raise InputError(f"{unknown('model', model, BUNDLED)}; otherwise pass a folder or a Hub id such as {EXAMPLE}")
    return ModelFolder(_download(model), model.split("/")[1], hub_id=model)


def _download(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except HFValidationError as error:
        raise InputError(f"{hub_id!r} is neither a folder nor a Hub id: {reason(error)}") from None
    except GatedRepoError:
        raise InputError(f"{hub_id} is gated: accept its licence on the Hub and run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise InputError(f"no model {hub_id} on the Hub (a private one needs `hf auth login`), and no such folder") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise InputError(f"cannot fetch {hub_id} from the Hub ({reason(error)}); go online or pass a local folder") from None
