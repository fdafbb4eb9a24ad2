"""Push a folder that llmprune wrote to the Hub: checked before, uploaded, and shown by a single commit at the end.

`upload_folder` of the Hub's client commits large folders in parts. Here the files are uploaded first, which shows nothing
and, after an interruption, is not done twice; then their sums are compared with the record's once more, and one commit
shows them all. It also removes weights of an earlier push that are none of the folder's: loaders would take or mix them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id

from llmprune.base.errors import InputError, MachineError, plain_errors, reason, user_path
from llmprune.base.files import PACKED, RECORD, as_json, read_json, sha256
from llmprune.base.words import count
from llmprune.formats.packed import open_checkpoint
from llmprune.models.skeleton import Skeleton, load_config
from llmprune.output.public import public
from llmprune.output.verify import verify

T = TypeVar("T")
_MAIN = "main"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", PACKED)
_WAITS = (1.0, 3.0, 9.0)  # seconds before a request that the client does not repeat by itself is made again
_PASSING = (500, 502, 503)
_AGAIN = "push again: what was uploaded is not sent twice"
_USERS = {
    401: "the token is invalid or has expired: run `hf auth login`, or set HF_TOKEN, and push again",
    403: "the token may not write there: name a repository of your own, or use a token with write access",
    404: "no such repository or branch, or the token may not see it",
    409: f"somebody else is changing it: {_AGAIN}",
    412: f"it was changed meanwhile: look at it and {_AGAIN}",
}
_MACHINES = {
    429: f"too many requests: wait some minutes and {_AGAIN}",
    507: f"no storage is left there: free some and {_AGAIN}",
}


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    *,
    tell: Callable[[str], None] | None = None,
) -> str:
    """Push a folder, dense or packed, that llmprune wrote; returns the URL of the commit or pull request.

    Args:
        repo_id: `user/name`; created if it is not there.
        private: create it private; one that is there and public is an error.
        revision: the branch to push to; created if it is not there.
        create_pr: open a pull request against main instead.
        tell: hears what is uploaded.

    Raises:
        InputError: the folder is damaged or changes meanwhile, or the Hub does not take it from this user, in one line.
        MachineError: the network or the Hub failed.
    """
    if create_pr and revision not in (None, _MAIN):
        raise InputError("pull requests are opened against main: leave out revision or create_pr")
    folder = user_path(folder, "folder")
    with plain_errors():
        check_ready(repo_id)
        sums = _checked(folder)
        with _explained(repo_id):
            state = _prepared(repo_id, private, revision)
            return _sent(folder, sums, state, revision, create_pr, tell or (lambda text: None))


def check_ready(repo_id: str) -> None:
    """Check that somebody who may write is signed in, before the work whose result is to be pushed to `repo_id`.

    Raises:
        InputError: the name is no repository's, no token is there, or it is invalid or may only read.
        MachineError: the network or the Hub failed.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no repository id: {reason(error)}") from None
    if repo_id.count("/") != 1:
        raise InputError(f"{repo_id!r} is no repository id: give user/name")
    with _explained(repo_id):
        user = _patiently(HfApi().whoami)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(f"cannot push to {repo_id}: the token may only read; make one with write access and set HF_TOKEN")


def _checked(folder: Path) -> dict[str, str]:
    """The sums of all files of a folder that is whole: they, the patterns, and tensors that fit the configuration."""
    found = verify(folder)
    if found.problems:
        more = f" and {len(found.problems) - 1} more" if len(found.problems) > 1 else ""
        raise InputError(f"{folder} does not pass `llmprune verify`, so it is not pushed: {found.problems[0]}{more}")
    Skeleton(open_checkpoint(folder), load_config(folder, quantised=True), torch.device("cpu"), torch.float32)
    return {**found.sums, **{own: sha256(folder / own) for own in (PACKED, RECORD) if (folder / own).is_file()}}


def _prepared(repo_id: str, private: bool, revision: str | None) -> ModelInfo:
    """The repository, created if need be, as it is at the head of the branch."""
    api = HfApi()
    _patiently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
    if private and not api.model_info(repo_id).private:
        raise InputError(f"{repo_id} is there already, and public: make it private on the Hub, or choose another name")
    if revision and revision != _MAIN and not revision.startswith("refs/"):
        _patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    return _patiently(lambda: api.model_info(repo_id, revision=revision))


def _sent(
    folder: Path, sums: dict[str, str], state: ModelInfo, revision: str | None, create_pr: bool, tell: Callable[[str], None]
) -> str:
    """Upload the files and commit them on top of `state`; returns the URL."""
    api, repo_id = HfApi(), state.id
    additions = [CommitOperationAdd(name, _content(folder, name)) for name in sorted(sums)]
    tell(f"uploading {count(len(additions), 'file')}, {sum(one.upload_info.size for one in additions):,} bytes, to {repo_id}")
    try:
        api.preupload_lfs_files(repo_id, additions, revision=revision, create_pr=create_pr, free_memory=False)
    except (HTTPError, OSError, RuntimeError, ValueError):
        _check_unchanged(folder, sums, additions)  # a file that changed fails the upload as well, and is the better reason
        raise
    _check_unchanged(folder, sums, additions)
    stale = _stale((file.rfilename for file in state.siblings or ()), sums)
    for name in stale:
        tell(f"{name} of an earlier push goes")
    commit = _patiently(
        lambda: api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message=f"{folder.resolve().name}, by llmprune",
            revision=revision,
            create_pr=create_pr,
            parent_commit=state.sha,
        )
    )
    if commit.oid == state.sha:
        tell(f"{repo_id} holds all of it already")
    return str(commit.pr_url or commit.commit_url)


def _content(folder: Path, name: str) -> Path | bytes:
    """What is uploaded: the file, or of the record, which has no sum in the folder, what others may see."""
    return as_json(public(read_json(folder / name))) if name == RECORD else folder / name


def _check_unchanged(folder: Path, sums: dict[str, str], additions: Iterable[CommitOperationAdd]) -> None:
    """Raises: InputError: a file is, or was when it was uploaded, not what was checked."""
    for addition in additions:
        name = addition.path_in_repo
        sent = sums[name] if name == RECORD else addition.upload_info.sha256.hex()  # its public form was made at once
        if {sha256(folder / name), sent} != {sums[name]}:
            raise InputError(f"{folder / name} changed during the upload, so nothing was committed: push again")


def _stale(there: Iterable[str], sums: dict[str, str]) -> list[str]:
    """Weights in the repository that are none of the folder's."""
    return [name for name in there if "/" not in name and name not in sums and any(fnmatch(name, w) for w in _WEIGHTS)]


def _patiently(request: Callable[[], T]) -> T:
    """Make a request again where the Hub says that it failed."""
    for wait in _WAITS:
        try:
            return request()
        except HfHubHTTPError as error:
            if error.response.status_code not in _PASSING:
                raise
        time.sleep(wait)
    return request()


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Say in one line what the Hub or its client did not like."""
    try:
        yield
    except InputError:
        raise
    except (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, KeyError, RuntimeError, ValueError) as error:
        raise _explanation(error, repo_id) from None


def _explanation(error: BaseException, repo_id: str) -> InputError:
    what, cause = f"cannot push to {repo_id}", error.__cause__
    if type(error) is RuntimeError and cause is not None:  # the client wraps what happens to a large file
        return _explanation(cause, repo_id)
    if isinstance(error, LocalTokenNotFoundError):
        return InputError(f"{what}: no token is there; run `hf auth login`, or set HF_TOKEN")
    if isinstance(error, OfflineModeIsEnabled):
        return InputError(f"{what}: HF_HUB_OFFLINE is set; unset it")
    if isinstance(error, HfHubHTTPError):
        return _answered(error, what)
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return InputError(f"{what}: {reason(error)}")
    return MachineError(f"{what} at {constants.ENDPOINT} ({reason(error)}): check the network and {_AGAIN}")


def _answered(error: HfHubHTTPError, what: str) -> InputError:
    """By the status of the Hub's answer."""
    status = error.response.status_code
    said = f"{what}: the Hub answered {status}" + (
        f" ({' '.join(error.server_message.split())})" if error.server_message else ""
    )
    if status >= 500 or status in _MACHINES:
        return MachineError(f"{said}; {_MACHINES.get(status, f'its own fault: wait and {_AGAIN}')}")
    return InputError(f"{said}; {_USERS.get(status, 'it does not take this')}")
