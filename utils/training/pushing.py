"""Uploading a folder to the hub: to a private repository, what is named and nothing else, and what can go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, in_one_line


def check_login(flag: str) -> None:
    """Refuses, before anything is trained, an upload without a login.

    Raises:
        UserError: there is none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(f"{flag}: there is no login here; run `hf auth login`, or leave it out")


def push_folder(
    flag: str,
    folder: Path,
    name: str,
    message: str,
    kept: str,
    files: Sequence[str] | None = None,
    private: bool = True,
) -> str:
    """Uploads files of the folder to the hub repository `name`, which is made where there is none; its address.

    Args:
        flag: what asked for it, with its value.
        kept: where the files are in any case, and how to upload them later.
        files: patterns of what is uploaded; everything by default.
        private: whether a repository that is made is private. One that exists stays as it is.

    Raises:
        UserError: there is no login, no network, no right to write there, or no such name.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    if api.token is None and get_token() is None:
        raise UserError(f"{flag}: there is no login here (`hf auth login`); {kept}")
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=repository.repo_id,
            commit_message=message,
            allow_patterns=list(files) if files is not None else None,
        )
    except HFValidationError:
        raise UserError(f"{flag}: not a possible name (owner/name); {kept}") from None
    except LocalTokenNotFoundError:
        raise UserError(f"{flag}: there is no login here (`hf auth login`); {kept}") from None
    except HfHubHTTPError as error:
        reason = getattr(error, "server_message", None) or in_one_line(error)
        raise UserError(f"{flag}: the hub refuses it ({reason}); {kept}") from None
    except (OfflineModeIsEnabled, OSError, HfHubHTTPError.__bases__[0]) as error:  # the last: of the hub's own client
        reason = in_one_line(error)
        raise UserError(f"{flag}: the hub cannot be reached ({reason}); {kept}") from None
    return str(repository)
