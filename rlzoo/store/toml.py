"""TOML out and in."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dump_toml(tables: Mapping[str, Any]) -> str:
    """Plain data as TOML 1.0 that `tomllib` reads back equal; tuples become arrays, None is left out.

    Raises:
        ValueError: a value that TOML cannot say, with its key.
    """
    return "\n".join(_lines(tables, ())).strip("\n") + "\n"


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text; `where` names its place in messages.

    Raises:
        ValueError: it is not TOML, or nested too deep, or holds a number of thousands of digits.
    """
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not TOML: {error}") from error


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    for key, value in table.items():
        if key not in inner and value is not None:
            yield f"{_key(key)} = {_value(value, (*path, key))}"
    for key, value in inner.items():
        below = (*path, key)
        yield ""
        yield f"[{'.'.join(_key(k) for k in below)}]"
        yield from _lines(value, below)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _text(key)


def _value(value: Any, path: tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else ("nan" if math.isnan(value) else ("inf" if value > 0 else "-inf"))
    if isinstance(value, str | Path):
        return _text(str(value))
    if isinstance(value, list | tuple) and all(v is not None for v in value):
        return f"[{', '.join(_value(v, path) for v in value)}]"
    if isinstance(value, Mapping):
        pairs = (f"{_key(k)} = {_value(v, (*path, k))}" for k, v in value.items() if v is not None)
        return "{" + ", ".join(pairs) + "}"
    raise ValueError(f"config key {'.'.join(path)}: TOML cannot hold {value!r}")


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"TOML cannot hold the text {text!r}: {error.reason}") from error
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, DEL apart
