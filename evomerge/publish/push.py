"""An exported folder, uploaded to Hugging Face's hub (or to where HF_ENDPOINT points)."""

import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evomerge.errors import EvoMergeError, InputError, in_one_line

STALE = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json"]
"""Files of an earlier upload that would be loaded instead of, or together with, what is uploaded now."""
SIGN_IN = "sign in with: hf auth login (a token that may write), or set HF_TOKEN"


def require_pushable(repo_id: str) -> None:
    """Check before an export what would stop its upload: the name, the token, the network. Raises: as ``push``."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo_id):
        raise InputError(f"--push: expected OWNER/NAME such as someone/merged, found {repo_id!r}")
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise InputError(f"--push {repo_id}: no token of the hub was found; {SIGN_IN}")
    _asking(repo_id, "", lambda: HfApi().whoami())


def push(folder: Path, repo_id: str, message: str, *, private: bool) -> str:
    """Upload a folder as a model, in a new repository or over what an old one has; return its address.

    private: of a new repository; an old one keeps what it is. Weights of an earlier upload that this one does not
    replace are removed with the same commit.
    Raises: InputError for a name, a token or rights that do not suffice; EvoMergeError if the hub cannot be reached or
    refuses the files. Both say how to upload what was exported.
    """
    from huggingface_hub import HfApi

    again = f"; the export is in {folder}, upload it with: hf upload {repo_id} {shlex.quote(str(folder))} ."

    def upload() -> str:
        api = HfApi()
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=STALE)
        return str(address)

    address: str = _asking(repo_id, again, upload)
    return address


def _asking(repo_id: str, again: str, call: Callable[[], Any]) -> Any:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the hub about metadata that it does not know
            return call()
    except HFValidationError as error:
        raise InputError(f"--push {repo_id}: {in_one_line(error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            raise InputError(f"--push {repo_id}: the hub does not take the token (401); {SIGN_IN}{again}") from error
        if status == 403:
            owner = repo_id.split("/", maxsplit=1)[0]
            raise InputError(
                f"--push {repo_id}: the token has no right to write there (403); use one that may write to "
                f"{owner}'s models, or another OWNER{again}"
            ) from error
        raise EvoMergeError(f"--push {repo_id}: the hub refused ({in_one_line(error)}){again}") from error
    except Exception as error:  # the hub's client raises a dozen unrelated classes: offline, no route, timed out, ...
        raise EvoMergeError(
            f"--push {repo_id}: the hub could not be reached or refused the files ({in_one_line(error)}){again}"
        ) from error
