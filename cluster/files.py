"""Files that are whole or not there, and folders that can be written to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from model.errors import InputError


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small text file so that nobody ever reads half of it, also after a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def require_writable_folder(folder: Path, option: str) -> None:
    """Said before the work, whose results would be lost. option: how the user named the folder.

    Raises InputError if the folder could not be made or filled.
    """
    whole = folder.absolute()
    nearest = next(path for path in (whole, *whole.parents) if path.exists())
    if not nearest.is_dir():
        fault = f"{nearest} is a file"
    elif not os.access(nearest, os.W_OK):
        fault = f"{nearest} is not yours to write to"
    else:
        return
    raise InputError(f"{option} {folder} cannot be written to, because {fault}: name another folder", code="bad_output")


def require_free_folder(folder: Path, option: str, earlier: Sequence[Path], overwrite: bool) -> None:
    """As require_writable_folder; and raises InputError if there are earlier results that are not to be replaced."""
    require_writable_folder(folder, option)
    if earlier and not overwrite:
        raise InputError(
            f"{option} {folder} holds an earlier report ({earlier[0].relative_to(folder)}): name another folder, or "
            "give --overwrite",
            code="report_exists",
        )


def require_writable_file(path: Path, option: str) -> None:
    """Said before the work. Raises InputError unless a file can be written or replaced in a folder that is there."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        text = f"{path} cannot be written: name a file in a folder that is there and yours with {option}"
        raise InputError(text, code="bad_output")
