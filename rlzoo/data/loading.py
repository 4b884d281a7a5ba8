"""Problem sets: the embedded generators, local JSONL and Parquet files, local and hub datasets."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..rewards.extract import last_boxed
from .problems import Problem

COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id", "unique_id", "problem_id", "idx", "index"),
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "final_answer", "expected_answer", "ground_truth", "solution"),
    "level": ("level", "difficulty"),
    "subject": ("subject", "type", "category"),
    "solution": ("solution",),
}
"""Names under which each field of a problem is looked for, best first; a `solution` that must serve as the answer is read for
its last \\boxed{...}, an answer with a `####` line (GSM8K) for what follows it."""

GENERATED = 4096
"""Problems that a generator makes where no limit is given."""

Row = tuple[str, Mapping[str, Any]]  # where it stands ("line 17 of problems.jsonl"), and what it holds


def load_problems(
    source: str,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Problem]:
    """Read a problem set.

    `source` is one of
      - `arithmetic:train`, `arithmetic:dev` (generated from `seed`, `limit` many) or the name of a mini set (`mini_…`);
      - a local `.jsonl` or `.parquet` file;
      - a local folder or a hub name that `datasets.load_dataset` reads: `owner/name[:config][@revision]`.
    `columns` names columns that are called something else, e.g. {"answer": "reward_model.ground_truth"} (dots reach inside).

    Raises:
        ValueError: no such source, unreadable row, missing column, duplicate id or empty set; names where.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} of problem set {source!r}: must be at least 1")
    for name in columns or {}:
        if name not in COLUMNS:
            raise ValueError(f"unknown problem field {name!r} in columns; allowed are {', '.join(COLUMNS)}")
    head = source.partition(":")[0]
    if head == "arithmetic" or source.startswith("mini_"):
        return _generated(source, split, limit, seed)
    if source.endswith((".jsonl", ".parquet")):
        if split is not None:
            raise ValueError(f"{source} is one file and has no split {split!r}")
        rows = _jsonl(Path(source)) if source.endswith(".jsonl") else _parquet(Path(source))
    else:
        rows = _dataset(source, split)
    return _problems(islice(rows, limit), source, columns or {})


def _generated(source: str, split: str | None, limit: int | None, seed: int) -> list[Problem]:
    from . import arithmetic

    if source.startswith("mini_"):
        return arithmetic.mini_set(source)[:limit]
    named = source.partition(":")[2] or split or "train"
    if split is not None and named != split:
        raise ValueError(f"problem set {source!r} contradicts split {split!r}")
    makers = {"train": arithmetic.train_problems, "dev": arithmetic.dev_problems}
    if named not in makers:
        raise ValueError(f"unknown split {named!r} of arithmetic; allowed are {', '.join(makers)} (and the mini sets by name)")
    return makers[named](limit or GENERATED, seed)


def _jsonl(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            where = f"line {number} of {path.name}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason})") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg} at character {error.pos + 1})") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets nested as deep
                raise ValueError(f"{where}: cannot be read as JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: not a JSON object but {type(row).__name__}")
            yield where, row


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"cannot read problem set {path}: {error.strerror}") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with _opened(path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path.name} is not a Parquet file ({error})") from error
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                yield f"row {number} of {path.name}", row
                number += 1


_HUB = re.compile(r"^(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?$")


def _dataset(source: str, split: str | None) -> Iterator[Row]:
    folder = Path(source)
    found = _HUB.match(source)
    if not source or (not folder.is_dir() and found is None):
        raise ValueError(f"no problem set {source!r}: neither a generator, a .jsonl or .parquet file, a folder nor a hub name")
    from datasets import DatasetDict, load_dataset

    try:
        if folder.is_dir():
            data = load_dataset(str(folder))
        else:
            assert found is not None
            data = load_dataset(found["name"], found["config"], revision=found["revision"])
    except Exception as error:  # many kinds, from the hub, the network and the file readers; all mean the same to the user
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load problem set {source!r}: {first}") from error
    if isinstance(data, DatasetDict):
        splits = list(data)
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in data:
            wanted = "say which" if split is None else f"no split {split!r}"
            raise ValueError(f"problem set {source!r} has the splits {', '.join(splits)}; {wanted}")
        data = data[split]
    for number, row in enumerate(data):
        yield f"row {number} of {source}", row


def _problems(rows: Iterator[Row], source: str, columns: Mapping[str, str]) -> list[Problem]:
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for number, (where, row) in enumerate(rows):
        problem = _problem(where, row, columns, number)
        if problem.id in seen:
            raise ValueError(f"duplicate id {problem.id!r}: {seen[problem.id]} and {where}")
        seen[problem.id] = where
        problems.append(problem)
    if not problems:
        raise ValueError(f"empty problem set {source!r}")
    return problems


def _problem(where: str, row: Mapping[str, Any], columns: Mapping[str, str], number: int) -> Problem:
    names = {field: _column(row, field, columns, where) for field in COLUMNS}
    values = {field: None if name is None else _reach(row, name) for field, name in names.items()}
    for field in ("problem", "answer"):
        if names[field] is None:
            raise ValueError(f"{where}: missing column {field!r} (or {', '.join(COLUMNS[field][1:])}); found {', '.join(row) or 'nothing'}")
    text = _prompt_text(values["problem"])
    if not text.strip():
        raise ValueError(f"{where}: column {names['problem']!r} is empty")
    answer = _answer(values["answer"], str(names["answer"]), where)
    used = {name for name in names.values() if name is not None}
    for field, value in values.items():
        if isinstance(value, str) and not _encodable(value):
            raise ValueError(f"{where}: column {names[field]!r} holds half a surrogate pair, which is no text")
    return Problem(
        id=str(number) if _missing(values["id"]) else _text(values["id"]),
        problem=text,
        answer=answer,
        level=_level(values["level"]),
        subject=None if _missing(values["subject"]) else _text(values["subject"]),
        solution=None if _missing(values["solution"]) else _text(values["solution"]),
        meta={name: value for name, value in row.items() if name not in used},
    )


def _column(row: Mapping[str, Any], field: str, columns: Mapping[str, str], where: str) -> str | None:
    if field in columns:
        if _reach(row, columns[field]) is _ABSENT:
            raise ValueError(f"{where}: missing column {columns[field]!r}, named for {field!r}; found {', '.join(row) or 'nothing'}")
        return columns[field]
    return next((name for name in COLUMNS[field] if name in row and not _missing(row[name])), None) or next(
        (name for name in COLUMNS[field] if name in row), None
    )


_ABSENT = object()


def _reach(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _missing(value: Any) -> bool:
    return value is None or value is _ABSENT or (isinstance(value, float) and math.isnan(value)) or value == ""


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a column of whole numbers that a table library widened
    if isinstance(value, list | tuple):
        return ", ".join(_text(v) for v in value)
    return str(value)


def _prompt_text(value: Any) -> str:
    if isinstance(value, list):  # chat turns: the last one that the user speaks
        spoken = [turn.get("content", "") for turn in value if isinstance(turn, Mapping) and turn.get("role") == "user"]
        return str(spoken[-1]) if spoken else ""
    return "" if _missing(value) else _text(value)


def _answer(value: Any, column: str, where: str) -> str:
    text = "" if _missing(value) else _text(value).strip()
    if column == "solution":
        boxed = last_boxed(text)
        if boxed is None:
            raise ValueError(f"{where}: no \\boxed{{...}} in column 'solution', and no column 'answer'")
        text = boxed.strip()
    elif "####" in text:
        text = text.rpartition("####")[2].strip().replace(",", "")
    if not text:
        raise ValueError(f"{where}: column {column!r} is empty")
    return text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _level(value: Any) -> int | None:
    """The number in 3, "3" or "Level 3"; None where there is none (MATH has a few "Level ?")."""
    if _missing(value) or isinstance(value, list | dict):
        return None
    digits = re.search(r"\d+", _text(value))
    return int(digits.group()) if digits else None
