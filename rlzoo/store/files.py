"""Files that are there whole or not at all, and a folder that one process has to itself."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"
"""How the names of things begin that are still being written, or that a death left half-written."""

LOCK = ".lock"


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or a folder to. At the end of the block it is brought to disk and then named
    `target`, in place of what had that name: neither a kill nor a power cut leaves half of it. An error leaves nothing. Of a link
    the link itself is replaced, not what it leads to.

    Raises:
        ValueError: what has that name is a device, a pipe or a socket.
    """
    refuse_special(target)
    partial = target.with_name(PARTIAL + target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    try:
        yield partial
        for path in [partial, *partial.rglob("*")]:
            _to_disk(path)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)  # rename() replaces a file, but no folder with something in it
        partial.replace(target)
        _to_disk(target.parent)
    except OSError as error:
        remove(partial)
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error  # some writers do not say which file it was
    except BaseException:
        remove(partial)
        raise


def write_aside(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_bytes(path: Path) -> bytes:
    """What is in a file.

    Raises:
        ValueError: it is missing, unreadable, or no regular file (a pipe would be waited for without end).
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'a device, a pipe or a socket'}, not a file")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def read_text(path: Path) -> str:
    """A file of UTF-8, with or without a byte order mark.

    Raises:
        ValueError: see `read_bytes`; or it is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file; NaN and infinities, which JSON does not know, are refused.

    Raises:
        ValueError: see `read_text`; or it is not JSON, or half of it.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; `where` names its place in messages.

    Raises:
        ValueError: it is not JSON, or holds NaN or an infinity.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def lines_of(text: str) -> list[str]:
    """The lines of a text, which end with "\\n" or "\\r\\n" and nothing else: U+2028 or U+0085 may occur within one."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_special(path: Path) -> None:
    """Nothing is there, or a file, a folder or a link.

    Raises:
        ValueError: a device, a pipe or a socket, which a file must not replace.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing there, or no right to look: writing will tell
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise ValueError(f"{path} is a device, a pipe or a socket; name a file")


def refuse_ways_out(folder: Path) -> None:
    """Nothing in `folder`, at any depth, leads elsewhere or is no file.

    Raises:
        ValueError: a link to outside, or a device, a pipe or a socket.
    """
    inside = folder.resolve()
    for above, folders, files in os.walk(folder):
        for path in (Path(above) / name for name in (*folders, *files)):
            refuse_special(path)
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise ValueError(f"{path} is a link to {path.resolve()}, outside the run folder: nothing is written through it; remove it")


def remove_partials(folder: Path) -> None:
    """Remove whatever an interrupted write left in `folder` and below."""
    for path in list(folder.rglob(f"{PARTIAL}*")):
        remove(path)


@contextmanager
def taken_back(folder: Path, made: Sequence[Path]) -> Iterator[Callable[[], None]]:
    """A function to call once what is in `folder` is to stay. An error before that removes all that is in it, and the folders
    `made` for it; a kill or an interrupt removes nothing. To be used under the folder's lock: nothing of another process goes."""
    stays = False

    def stay() -> None:
        nonlocal stays
        stays = True

    try:
        yield stay
    except Exception:
        if not stays:
            for path in folder.iterdir() if folder.is_dir() else ():
                remove(path)
            for path in made:
                if path.is_dir():
                    path.rmdir()
        raise


@contextmanager
def locked(folder: Path) -> Iterator[list[Path]]:
    """Have `folder` to oneself for a while; yields those of it and its parents that had to be made, the folder first. The kernel
    gives it back when the process ends, however it ends.

    Raises:
        ValueError: another process has it, it cannot be made or written, or something in it leads elsewhere.
    """
    refuse_ways_out(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise ValueError(f"cannot write the run folder {folder}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip()
            raise ValueError(f"process {owner or 'unknown'} is at work in {folder}; wait until it is done, or stop it") from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield made


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
