"""The paths that a person writes."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError


def read_path(name: str | Path) -> Path:
    """The path of that name, with the home that a `~` stands for.

    Raises:
        UserError: it is the home of somebody unknown here.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        user = Path(name).parts[0]
        raise UserError(
            f"{name}: there is no user {user[1:]} here, whose home {user} would be; check the path"
        ) from None


def is_there(name: str | Path) -> bool:
    """Whether something of that name exists; not where it could be no name at all (too long, say).

    Raises:
        UserError: as `read_path`.
    """
    try:
        return read_path(name).exists()
    except (OSError, ValueError):
        return False
