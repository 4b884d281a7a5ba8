"""Errors as a user reads them: one sentence."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """What an error says, in one line; of an OSError the file and what is wrong with it."""
    said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__
