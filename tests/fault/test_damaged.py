"""Damaged run folders, rows and problem files: every reading verb says one sentence that names the file, and never hangs."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlzoo import cli
from rlzoo.data.loading import load_problems
from rlzoo.evaluation.recorded import read_outputs
from rlzoo.evaluation.rows import read_row, validate
from rlzoo.store.files import lines_of
from rlzoo.store.runs import RunFolder, read_rows
from tests.summaries import make_run

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "results" / "mini").glob("*.json"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("whole") / "run")


def text(*lines: str) -> Callable[[Path], None]:
    return lambda path: path.write_text("\n".join(lines))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(bytes(data))


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": text(""),
    "a number": text("3", ""),
    "NaN": text("NaN", ""),
    "a list": text("[1, 2]", ""),
    "a text": text('"x"', ""),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00\n"),
    "flipped bit": flipped,
    "halved": halved,
    "a folder": folder,
    "a pipe": pipe,
    "deep": lambda path: path.write_text("[" * 100_000 + "\n"),
    "texts for numbers": text(
        '{"step": "one", "steps": "many", "reward": {}, "dev/pass_at_1": [[]], "seed": "x", "ledger": 3, "table": 4}', ""
    ),
    "another table": text('[schedule]\nsteps = "x"', ""),
}
FILES = ["config.toml", "metrics.jsonl", "summary.json", "trees/step-3.parquet"]
VERBS: dict[str, Callable[[Path, Path], list[str]]] = {
    "show": lambda run, out: ["show", str(run)],
    "report": lambda run, out: ["report", str(run), "--out", str(out / "r.html")],
    "compare": lambda run, out: ["compare", str(run), str(run), "--out", str(out / "c")],
    "run --resume": lambda run, out: ["run", "--resume", "--out", str(run)],
    "eval --resume": lambda run, out: ["eval", "--resume", "--out", str(run)],
    "leaderboard": lambda run, out: ["leaderboard", "--results", str(run)],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_every_reading_verb_on_a_damaged_file(
    tmp_path: Path, whole: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    DAMAGE[damage](run / name)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    for verb, command in VERBS.items():
        if verb == "run --resume" and name != "config.toml":
            continue  # a run of this fixture cannot go on: its parts are tested by test_resume
        status = cli.main(command(run, tmp_path))
        said = capsys.readouterr().err.strip().splitlines()
        assert status in (0, 1, 2), verb
        if status:
            assert said and said[-1].startswith("rlzoo: ") and len(said[-1]) < 600, (verb, said)
            assert "Traceback" not in "".join(said)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", "3\n", "line 1 of .*metrics.jsonl holds 3, not a row"),
        ("metrics.jsonl", '{"step": 1}\n{"reward": NaN}\n', "line 2 of .*metrics.jsonl is not JSON: NaN is no number"),
        ("metrics.jsonl", '{"step": "1"}\n', "line 1 of .*metrics.jsonl: step is '1', not a number"),
        ("summary.json", "NaN", "summary.json is not JSON: NaN is no number of JSON"),
        ("summary.json", "[]", r"summary.json holds \[\], not a table"),
        ("config.toml", "a = \x00", "config.toml is not TOML"),
    ],
)
def test_the_sentence_names_the_file_and_the_place(tmp_path: Path, whole: Path, name: str, content: str, said: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / name).write_text(content)
    folder = RunFolder.open(run)
    with pytest.raises(ValueError, match=said):
        folder.config(), folder.metrics(), folder.summary()


@given(st.binary(max_size=80))
@settings(deadline=None)
def test_any_bytes_are_rows_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    for read in (read_rows, read_row, read_outputs):
        try:
            read(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error).strip()


# -- lines ------------------------------------------------------------------------------------------------------------------

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    assert lines_of(f"{SEPARATORS}\r\n{SEPARATORS}\n") == [SEPARATORS, SEPARATORS, ""]
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"gold": "1", "prediction": SEPARATORS}, ensure_ascii=False)
    for mark, end in (("", "\n"), ("\ufeff", "\r\n")):
        path.write_text(mark + (row + end) * 3, encoding="utf-8", newline="")
        assert [r["prediction"] for r in read_outputs(path)] == [SEPARATORS] * 3
    path.write_text((row + "\n") * 3, encoding="utf-8")
    assert [r["prediction"] for r in read_rows(path)] == [SEPARATORS] * 3


@pytest.mark.parametrize(("mark", "end"), [("", "\n"), ("\ufeff", "\r\n")])
def test_problems_hold_any_separator(tmp_path: Path, mark: str, end: str) -> None:
    path = tmp_path / "problems.jsonl"
    rows = [json.dumps({"id": str(i), "problem": f"{SEPARATORS}{i}", "answer": "1"}, ensure_ascii=False) for i in range(3)]
    path.write_text(mark + "".join(row + end for row in rows), encoding="utf-8", newline="")
    assert [p.problem for p in load_problems(str(path))] == [f"{SEPARATORS}{i}" for i in range(3)]


# -- result rows ------------------------------------------------------------------------------------------------------------


def changed(row: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(row)
    at: Any = made
    *above, last = place.split("/")
    for name in above:
        at = at[int(name)] if isinstance(at, list) else at[name]
    at[int(last) if isinstance(at, list) else last] = value
    return made


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("results/trained/mini_long/pass_at_1/mean", 5.0),
        ("results/trained/mini_long/pass_at_1/mean", -0.1),
        ("results/trained/mini_long/pass_at_1/high", 0.0),
        ("results/trained/mini_long/pass_at_1/low", float("-inf")),
        ("results/trained/mini_long/sampled_tokens", -1),
        ("results/trained/mini_long/length/mean", -2.0),
        ("results/trained/mini_long/truncated", 1.5),
        ("results/trained/mini_long/n", 0),
        ("results/trained/mini_long/k", 0),
        ("results/trained/mini_long/right/0", 17),
        ("results/trained/mini_long/right/0", -1),
        ("results/trained/mini_long/lengths", [float("nan")] * 100),
        ("overall/trained/pass_at_1/mean", 5.0),
        ("overall/trained/greedy/mean", float("nan")),
        ("overall/trained/weights/mini_long", -0.25),
        ("sampled_tokens", -5),
        ("steps", -1),
        ("ledger/wall_s", -1.0),
        ("training/device_hours", float("inf")),
        ("best/pass_at_1", 7.0),
    ],
)
def test_impossible_figures_are_refused(place: str, value: Any) -> None:
    row = json.loads(COMMITTED[0].read_text())
    validate(row)
    with pytest.raises(ValueError, match=place.split("/")[0]):
        validate(changed(row, place, value))


def test_every_committed_row_is_valid() -> None:
    found = [path for path in (ROOT / "results").rglob("*.json") if "schema_version" in json.loads(path.read_text())]
    assert len(found) > 40
    for path in found:
        read_row(path)
