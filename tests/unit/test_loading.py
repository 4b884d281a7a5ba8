import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlzoo.data.loading import load_problems

DATA = Path(os.environ.get("RLZOO_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
GOOD = {"id": "a", "problem": "1+1?", "answer": "2"}


def jsonl(folder: Path, *rows: object) -> str:
    path = folder / "problems.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def parquet(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def test_jsonl_with_every_field(tmp_path):
    row = GOOD | {"level": "Level 3", "type": "Algebra", "solution": "So \\boxed{2}.", "url": "x"}
    (problem,) = load_problems(jsonl(tmp_path, row, "", "  "))
    assert (problem.id, problem.problem, problem.answer) == ("a", "1+1?", "2")
    assert (problem.level, problem.subject, problem.solution, problem.meta) == (3, "Algebra", "So \\boxed{2}.", {"url": "x"})


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "q", "answer": "So 5 x 200.\n#### 1,000"}, "1000"),  # GSM8K
        ({"problem": "q", "solution": r"First \boxed{1}, then \boxed{\frac{1}{2}}."}, r"\frac{1}{2}"),  # MATH
        ({"question": "q", "final_answer": ["3", "4"]}, "3, 4"),  # OlympiadBench
        ({"problem": "q", "answer": None, "final_answer": "7"}, "7"),
        ({"problem": "q", "answer": 27.0}, "27"),
        ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "answer": "0"}, "0"),
    ],
)
def test_layouts_in_use(tmp_path, row, answer):
    (problem,) = load_problems(jsonl(tmp_path, row))
    assert (problem.id, problem.problem, problem.answer) == ("0", "q", answer)


def test_named_columns_reach_inside(tmp_path):
    row = {"prompt": "q", "reward_model": {"ground_truth": "8"}, "answer": "wrong one"}
    (problem,) = load_problems(jsonl(tmp_path, row), columns={"answer": "reward_model.ground_truth"})
    assert problem.answer == "8"
    with pytest.raises(ValueError, match=r"line 1 of problems.jsonl: missing column 'gold', named for 'answer'; found prompt, rew"):
        load_problems(jsonl(tmp_path, row), columns={"answer": "gold"})
    with pytest.raises(ValueError, match="unknown problem field 'reply' in columns; allowed are id, problem"):
        load_problems(jsonl(tmp_path, row), columns={"reply": "gold"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, "{oops"], r"line 2 of problems.jsonl: not JSON \(Expecting property name .* at character 2\)"),
        ([GOOD, "[1]"], "line 2 of problems.jsonl: not a JSON object but list"),
        (['{"problem": ' + "[" * 100_000], "line 1 of problems.jsonl: cannot be read as JSON"),
        (['{"problem": ' + "1" * 5000 + "}"], "line 1 of problems.jsonl: cannot be read as JSON"),
        ([GOOD, "", {"problem": "q"}], r"line 3 of problems.jsonl: missing column 'answer' .*; found problem"),
        ([{"answer": "1"}], "line 1 of problems.jsonl: missing column 'problem'"),
        ([GOOD | {"answer": " "}], "line 1 of problems.jsonl: column 'answer' is empty"),
        ([GOOD | {"problem": ""}], "line 1 of problems.jsonl: column 'problem' is empty"),
        ([GOOD | {"problem": "a \ud800 b"}], "line 1 of problems.jsonl: column 'problem' holds half a surrogate pair"),
        ([{"problem": "q", "solution": "no box"}], r"line 1 of problems.jsonl: no \\boxed"),
        ([GOOD, GOOD | {"id": "b"}, GOOD], "duplicate id 'a': line 1 of problems.jsonl and line 3 of problems.jsonl"),
        ([], "empty problem set"),
    ],
)
def test_bad_rows_say_where(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message) as error:
        load_problems(jsonl(tmp_path, *rows))
    assert "\n" not in str(error.value)


def test_not_utf8(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"problem": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"line 2 of p.jsonl: not UTF-8"):
        load_problems(str(tmp_path / "p.jsonl"))


def test_limit_is_read_lazily_and_checked(tmp_path):
    source = jsonl(tmp_path, GOOD, GOOD | {"id": "b"}, "broken")
    assert [p.id for p in load_problems(source, limit=2)] == ["a", "b"]
    with pytest.raises(ValueError, match="limit 0"):
        load_problems(source, limit=0)


def test_parquet_file(tmp_path):
    source = parquet(tmp_path / "p.parquet", [GOOD, {"id": None, "problem": "q", "answer": "3"}])
    assert [(p.id, p.answer) for p in load_problems(source)] == [("a", "2"), ("1", "3")]
    with pytest.raises(ValueError, match=r"row 0 of bad.parquet: missing column 'answer'"):
        load_problems(parquet(tmp_path / "bad.parquet", [{"problem": "q"}]))
    (tmp_path / "no.parquet").write_text("hello")
    with pytest.raises(ValueError, match=r"no.parquet is not a Parquet file"):
        load_problems(str(tmp_path / "no.parquet"))
    with pytest.raises(ValueError, match="one file and has no split"):
        load_problems(source, split="train")


@pytest.fixture
def hub_layout(tmp_path, monkeypatch):
    """A folder as hub datasets are laid out, read by the same code; its cache stays in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", [{"question": "q", "answer": "a #### 1"}])
    parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", [{"question": "r", "answer": "b #### 2"}])
    return str(tmp_path / "set")


def test_dataset_folder(hub_layout):
    (problem,) = load_problems(hub_layout, split="test")
    assert (problem.problem, problem.answer) == ("r", "2")
    with pytest.raises(ValueError, match="has the splits train, test; say which"):
        load_problems(hub_layout)
    with pytest.raises(ValueError, match="has the splits train, test; no split 'dev'"):
        load_problems(hub_layout, split="dev")


def test_unreachable_hub_name_is_one_sentence(monkeypatch):
    import datasets

    asked = {}

    def refuse(name, config, *, revision):
        asked.update(name=name, config=config, revision=revision)
        raise ConnectionError("Couldn't reach it\nand a long tail")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"cannot load problem set 'some/set:main@v1': Couldn't reach it$"):
        load_problems("some/set:main@v1")
    assert asked == {"name": "some/set", "config": "main", "revision": "v1"}


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./x y", "missing.jsonl", "missing.parquet", ""])
def test_no_such_source(source):
    with pytest.raises(ValueError, match=r"no problem set|cannot read problem set"):
        load_problems(source)


def test_generators():
    train, dev = load_problems("arithmetic:train", limit=50, seed=3), load_problems("arithmetic", split="dev", limit=50)
    assert len(train) == len(dev) == 50
    assert not {p.problem for p in train} & {p.problem for p in dev}
    assert train == load_problems("arithmetic", limit=50, seed=3) != load_problems("arithmetic", limit=50, seed=4)
    assert load_problems("mini_chains", limit=3) == load_problems("mini_chains")[:3]
    with pytest.raises(ValueError, match="unknown split 'test' of arithmetic; allowed are train, dev"):
        load_problems("arithmetic:test")
    with pytest.raises(ValueError, match="contradicts"):
        load_problems("arithmetic:train", split="dev")
    with pytest.raises(ValueError, match="allowed are mini_"):
        load_problems("mini_cosmos")


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="no data folder")
@pytest.mark.parametrize(
    ("file", "rows"),
    [
        ("testsets/math500", 500),
        ("testsets/aime24", 30),
        ("testsets/minerva_math", 272),
        ("testsets/olympiadbench", 675),
        ("testsets/gsm8k", 1319),
    ],
)
def test_real_sets(file, rows):
    problems = load_problems(str(DATA / f"{file}.jsonl"))
    assert len(problems) == rows == len({p.id for p in problems})
    raw = [json.loads(line) for line in (DATA / f"{file}.jsonl").open()]
    assert [p.answer for p in problems] == [r["answer"].strip() for r in raw]
