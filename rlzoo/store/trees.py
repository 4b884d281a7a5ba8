"""Trees, with the credit that trained on them, to Parquet and back, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..credit.base import Credit
from ..tree import Tree
from .files import aside

TREE_COLUMNS: dict[str, Any] = {
    "parent": np.int32,
    "offsets": np.int64,
    "tokens": np.int32,
    "logprobs": np.float32,
    "stop": np.uint8,
    "role": np.uint8,
    "created": np.int32,
    "leaves": np.int32,
    "reward": np.float64,
    "correct": np.float64,
    "ref_logprobs": np.float32,
    "entropy": np.float32,
}
"""Array fields of `Tree`, one list column each; null where an optional one is absent."""

CREDIT_COLUMNS: dict[str, Any] = {
    "row": np.int32,
    "node": np.int32,
    "start": np.int32,
    "stop": np.int32,
    "advantage": np.float64,
    "row_leaf": np.int32,
    "row_weight": np.float64,
    "token_mask": np.bool_,
}
"""Array fields of `Credit`, as columns `credit_…`."""


@dataclass(frozen=True, slots=True)
class TreeRecord:
    """What a viewer needs beside the tree. `kinds` and `responses` [leaves]: verdict kind and decoded text; () where not kept."""

    problem_id: str = ""
    problem: str = ""
    gold: str = ""
    kinds: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class StoredTree:
    """A tree as stored: its credit is None where it was not trained on."""

    tree: Tree
    credit: Credit | None = None
    record: TreeRecord = field(default_factory=TreeRecord)


def write_trees(
    path: str | Path,
    trees: Sequence[Tree],
    credits: Sequence[Credit | None] | None = None,
    records: Sequence[TreeRecord] | None = None,
) -> None:
    """Write one row per tree, whole or not at all. `meta` and `extra` are kept as JSON: tuples come back as lists.

    Raises:
        ValueError: lengths differ, or a meta value that JSON cannot hold.
    """
    import pyarrow
    import pyarrow.parquet

    given_credits = list(credits) if credits is not None else [None] * len(trees)
    given_records = list(records) if records is not None else [TreeRecord()] * len(trees)
    if not len(trees) == len(given_credits) == len(given_records):
        raise ValueError(f"{len(trees)} trees but {len(given_credits)} credits and {len(given_records)} records")
    columns = _columns(trees, given_credits, given_records)
    schema = _schema()
    table = pyarrow.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
    with aside(Path(path)) as partial:
        pyarrow.parquet.write_table(table, partial, compression="zstd")


def read_trees(path: str | Path) -> list[StoredTree]:
    """Everything that `write_trees` wrote, in order.

    Raises:
        ValueError: no such file, not Parquet, or not trees.
    """
    import pyarrow
    import pyarrow.parquet

    if not Path(path).exists():
        raise ValueError(f"no stored trees at {path}")
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file; expected Parquet with trees")
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file of trees: {error}") from error
    missing = [name for name in _schema().names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} holds no trees: it lacks the columns {', '.join(missing)}")
    try:
        return [_stored(_Reader(table, i)) for i in range(table.num_rows)]
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} holds a broken tree: {error}") from error


def _schema() -> Any:
    import pyarrow as pa

    lists = {**TREE_COLUMNS, **{f"credit_{name}": kind for name, kind in CREDIT_COLUMNS.items()}}
    fields = [pa.field(name, pa.list_(pa.from_numpy_dtype(kind))) for name, kind in lists.items()]
    texts = [pa.field(name, pa.string()) for name in ("meta", "problem_id", "problem", "gold", "extra")]
    many = [pa.field(name, pa.list_(pa.string())) for name in ("kinds", "responses")]
    return pa.schema([*fields, pa.field("credit_shape", pa.list_(pa.int32())), *texts, *many], metadata={"rlzoo_trees": "1"})


def _columns(trees: Sequence[Tree], credits: Sequence[Credit | None], records: Sequence[TreeRecord]) -> dict[str, Any]:
    import pyarrow as pa

    columns = {name: _lists([getattr(t, name) for t in trees], kind) for name, kind in TREE_COLUMNS.items()}
    for name, kind in CREDIT_COLUMNS.items():
        columns[f"credit_{name}"] = _lists([None if c is None else getattr(c, name) for c in credits], kind)
    columns["credit_shape"] = _lists([None if c is None else np.array(c.shape) for c in credits], np.int32)
    texts = {name: [getattr(r, name) for r in records] for name in ("problem_id", "problem", "gold")}
    texts["meta"] = [_json(t.meta, "meta") for t in trees]
    texts["extra"] = [_json(r.extra, "extra") for r in records]
    columns |= {name: pa.array(values, pa.string()) for name, values in texts.items()}
    return columns | {n: pa.array([list(getattr(r, n)) for r in records], pa.list_(pa.string())) for n in ("kinds", "responses")}


def _lists(arrays: Sequence[Any], kind: Any) -> Any:
    """A list column out of one array (or None) per row, by whole buffers, not value by value."""
    import pyarrow as pa

    lengths = [0 if a is None else len(a) for a in arrays]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = np.concatenate([np.empty(0, kind), *(np.asarray(a, kind) for a in arrays if a is not None)])
    missing = np.array([a is None for a in arrays], np.bool_)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, from_pandas=False), mask=pa.array(missing))


def _json(value: Mapping[str, Any], what: str) -> str:
    try:
        return json.dumps(_plain(value), ensure_ascii=False)  # unlike in result rows NaN stays NaN: Python reads its own back
    except TypeError as error:
        raise ValueError(f"the {what} of a tree must be plain data: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


class _Reader:
    """One row of the table. Lists of numbers come out through Arrow buffers, so that NaN bits and types survive."""

    def __init__(self, table: Any, row: int) -> None:
        self._table, self._row = table, row

    def array(self, name: str, kind: Any) -> Any:
        cell = self._table.column(name)[self._row]
        return np.array(cell.values.to_numpy(zero_copy_only=False), dtype=kind) if cell.is_valid else None

    def value(self, name: str) -> Any:
        return self._table.column(name)[self._row].as_py()


def _stored(row: _Reader) -> StoredTree:
    tree = Tree(**{name: row.array(name, kind) for name, kind in TREE_COLUMNS.items()}, meta=json.loads(row.value("meta")))
    credit = None
    if row.value("credit_shape") is not None:
        arrays = {name: row.array(f"credit_{name}", kind) for name, kind in CREDIT_COLUMNS.items()}
        leaves, nodes = row.value("credit_shape")
        credit = Credit(**arrays, shape=(leaves, nodes))
    record = TreeRecord(
        problem_id=row.value("problem_id"),
        problem=row.value("problem"),
        gold=row.value("gold"),
        kinds=tuple(row.value("kinds")),
        responses=tuple(row.value("responses")),
        extra=json.loads(row.value("extra")),
    )
    return StoredTree(tree, credit, record)
