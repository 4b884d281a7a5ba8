"""Test sets are the pinned ones or refused; suites weigh them as they say; golds count as right; the page says what the files say."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlzoo.data.problems import Problem
from rlzoo.data.templates import TEMPLATES
from rlzoo.evaluation.stats import clustered_mean
from rlzoo.evaluation.suites import Suite, find_suite, load_suite, suites
from rlzoo.evaluation.testsets import Hub, SetSpec, find_testset, shipped_sets
from rlzoo.rewards.math import Grader, GraderConfig, Kind

DATA = Path(os.environ.get("RLZOO_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "testsets"
PAGE = Path(__file__).parents[2] / "docs" / "testsets.md"
ROWS = {"math500": 500, "aime24": 30, "aime25": 30, "amc23": 40, "minerva_math": 272, "olympiadbench": 675, "gsm8k": 1319}
MINI = ("mini_chains", "mini_long", "mini_mixed", "mini_puzzle")

TOY = [{"id": f"toy-{i}", "problem": f"What is  {i} + 1?", "answer": str(i + 1)} for i in range(3)]
SPEC = SetSpec(
    name="toy",
    rows=3,
    sha256=sha256(b"what is 0 + 1?\nwhat is 1 + 1?\nwhat is 2 + 1?").hexdigest(),
    answers_sha256=sha256(b"1\n2\n3").hexdigest(),
    licence="none",
    template="plain",
    k=1,
    grader=GraderConfig(),
    hub=Hub("owner/toys:main", split="test", revision="a" * 40, columns={"problem": "wording", "answer": "key"}, id_prefix="toy-"),
)


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text and "\n" not in text
    return text


# --- what is shipped ---


def test_every_set_of_the_field_is_there() -> None:
    assert {name: find_testset(name).rows for name in shipped_sets()} == ROWS | {"amc23_83": 83} | dict.fromkeys(MINI, 100)


@pytest.mark.parametrize("name", shipped_sets())
def test_a_shipped_set_is_complete(name: str) -> None:
    spec = find_testset(name)
    assert spec.name == name
    assert (spec.hub is None) != (spec.generator is None)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in (spec.sha256, spec.answers_sha256))
    assert spec.licence and spec.template in TEMPLATES and spec.k >= 1
    assert spec.grader == GraderConfig()  # measured with the grader that training uses
    if spec.hub is not None and spec.hub.revision is not None:
        assert re.fullmatch("[0-9a-f]{40}", spec.hub.revision)


def test_the_embedded_sets_need_no_data() -> None:
    loaded = load_suite("mini")
    assert {name: len(problems) for name, problems in loaded.items()} == dict.fromkeys(MINI, 100)


def test_the_page_says_what_the_files_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    table = {row[0]: row[1:] for row in cells if len(row) == 6}
    for name in {*shipped_sets()} - {*MINI}:
        spec = find_testset(name)
        assert spec.hub is not None
        source, revision, _, rows, k = table[name]
        assert (source, rows, k) == (spec.hub.source, str(spec.rows), str(spec.k))
        assert revision == (f"`{spec.hub.revision}`" if spec.hub.revision else "none: folder only")
    listed = {row[0]: row[1].split(", ") for row in cells if len(row) == 4 and row[0] in suites()}
    assert listed == {name: [testset.name for testset in find_suite(name).sets] for name in suites()}


# --- loading ---


def test_a_folder_and_the_hub_give_the_same_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow.parquet

    asked: list[Any] = []

    def load_dataset(name: str, config: str | None = None, *, revision: str | None = None) -> Any:
        asked.append((name, config, revision))
        rows = [{"wording": row["problem"], "key": f"some words\n#### {row['answer']}"} for row in TOY]
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(rows[:1]), "test": datasets.Dataset.from_list(rows)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    key = [(p.id, p.problem, p.answer) for p in SPEC.load()]
    assert asked == [("owner/toys", "main", "a" * 40)]
    assert key == [(row["id"], row["problem"], row["answer"]) for row in TOY]
    assert [(p.id, p.problem, p.answer) for p in SPEC.load(write(tmp_path, TOY))] == key
    (tmp_path / "toy.jsonl").unlink()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TOY), tmp_path / "toy.parquet")
    assert [(p.id, p.problem, p.answer) for p in SPEC.load(str(tmp_path))] == key


def test_the_problem_text_is_pinned_up_to_case_and_spaces(tmp_path: Path) -> None:
    assert SPEC.load(write(tmp_path, [row | {"problem": row["problem"].upper() + " "} for row in TOY]))


BAD_ROWS = [
    (TOY[:2], "test set toy has 2 problems, expected 3"),
    ([*TOY, TOY[0] | {"id": "toy-3"}], "test set toy has 4 problems, expected 3"),
    ([TOY[0], TOY[2], TOY[1]], f"test set toy: its problems have checksum .*…, expected {SPEC.sha256[:12]}…"),
    ([*TOY[:2], TOY[2] | {"problem": "What is 2+1?"}], f"its problems have checksum .*…, expected {SPEC.sha256[:12]}…"),
    ([*TOY[:2], TOY[2] | {"answer": "4"}], f"test set toy: its answers have checksum .*…, expected {SPEC.answers_sha256[:12]}…"),
    (
        [{"id": "a", "question": "?", "answer": "1"}],
        "test set toy: line 1 of toy.jsonl: missing column 'problem'.*found id, question, answer",
    ),
    ([{"id": "a", "problem": "?", "gold": "1"}], "test set toy: line 1 of toy.jsonl: missing column 'answer'"),
    ([TOY[0], TOY[0], TOY[1]], "test set toy: duplicate id 'toy-0': line 1 of toy.jsonl and line 2 of toy.jsonl"),
    ([], "test set toy: empty problem set"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS)
def test_anything_but_the_pinned_problems_is_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    assert re.search(message, refusal(lambda: SPEC.load(write(tmp_path, rows))))


def test_a_half_written_last_line_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, TOY) / "toy.jsonl"
    path.write_text(path.read_text()[:-10])
    assert re.search(r"test set toy: line 3 of toy\.jsonl: not JSON", refusal(lambda: SPEC.load(tmp_path)))


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toy.parquet").write_bytes(b"PAR1 but not really")
    assert "test set toy: toy.parquet is not a Parquet file" in refusal(lambda: SPEC.load(tmp_path))


@pytest.mark.parametrize("folder", [".", "nowhere"])
def test_a_missing_file_is_named(tmp_path: Path, folder: str) -> None:
    found = refusal(lambda: SPEC.load(tmp_path / folder))
    assert found == f"test set toy: no toy.jsonl or toy.parquet in {tmp_path / folder}"


def test_the_hub_out_of_reach_is_one_sentence_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for spec, source in ((SPEC, "owner/toys:main@" + "a" * 40), (find_testset("amc23_83"), "AI-MO/aimo-validation-amc@69d78a4a")):
        found = refusal(spec.load)
        assert found.startswith(f"test set {spec.name}: cannot load problem set '{source}") and "no route" in found
        assert found.endswith(f"give --data-dir, a folder with {spec.name}.jsonl or {spec.name}.parquet)")


@pytest.mark.parametrize("name", ["aime25", "olympiadbench"])
def test_a_set_without_a_pinned_revision_asks_for_a_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("went to the hub"))
    found = refusal(find_testset(name).load)
    assert found.startswith(f"test set {name}: no hub revision is known to hold its {ROWS[name]} problems; give --data-dir")


def test_unknown_sets_and_suites_are_named() -> None:
    assert "unknown test set 'math501'; known: aime24, aime25, amc23" in refusal(lambda: find_testset("math501"))
    assert refusal(lambda: load_suite("../mini")) == "unknown suite '../mini'; known: mini, quick, treepo, treerpo"


@pytest.mark.parametrize(("old", "new", "message"), [("licence", "license", "license"), ("rows = 30", "rows = 'many'", "rows")])
def test_a_misspelt_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str) -> None:
    (tmp_path / "testsets").mkdir()
    shipped = (Path(__file__).parents[2] / "benchmarks" / "testsets" / "aime24.toml").read_text(encoding="utf-8")
    (tmp_path / "testsets" / "aime24.toml").write_text(shipped.replace(old, new), encoding="utf-8")
    monkeypatch.setattr("rlzoo.evaluation.testsets.files", lambda package: tmp_path)
    found = refusal(lambda: find_testset("aime24"))
    assert found.startswith("testsets/aime24.toml: ") and message in found


# --- suites ---


def test_members_weights_and_k() -> None:
    assert suites() == ["mini", "quick", "treepo", "treerpo"]
    treepo = find_suite("treepo")
    assert [s.name for s in treepo.sets] == ["aime24", "amc23_83", "math500", "minerva_math", "olympiadbench"]
    assert (treepo.weights, treepo.k) == ((30, 83, 500, 272, 675), (16,) * 5)
    treerpo = find_suite("treerpo")
    assert [s.name for s in treerpo.sets] == ["math500", "olympiadbench", "minerva_math", "aime24"]
    assert (treerpo.weights, treerpo.k) == ((1, 1, 1, 1), (4, 4, 4, 64))
    assert find_suite("mini").k == (16,) * 4 and len(set(find_suite("mini").weights)) == 1
    assert sum(s.rows * k for s, k in zip(find_suite("quick").sets, find_suite("quick").k, strict=True)) == 280


@pytest.mark.parametrize(("name", "k"), [("treerpo", 4), ("treepo", 16)])
def test_the_overall_is_the_weighted_mean_with_its_interval(name: str, k: int) -> None:
    rng = np.random.default_rng(7)
    suite = find_suite(name)
    values = {s.name: rng.binomial(k, p, s.rows) / k for s, p in zip(suite.sets, (0.8, 0.4, 0.3, 0.1, 0.5), strict=False)}
    found = suite.overall(dict(reversed(values.items())), level=0.9)
    x = [values[s.name] for s in suite.sets]
    if name == "treepo":
        assert found.mean == pytest.approx(np.concatenate(x).mean())  # weighted by size: every problem counts the same
    else:
        assert found.mean == pytest.approx(np.mean([v.mean() for v in x]))
    each = [clustered_mean(v, 0.9) for v in x]
    share = np.array(suite.weights) / sum(suite.weights)
    below = np.sqrt(sum((w * (e.mean - e.low)) ** 2 for w, e in zip(share, each, strict=True)))
    above = np.sqrt(sum((w * (e.high - e.mean)) ** 2 for w, e in zip(share, each, strict=True)))
    assert (found.low, found.high) == (pytest.approx(found.mean - below), pytest.approx(found.mean + above))
    assert (found.n, found.level) == (sum(s.rows for s in suite.sets), 0.9)


@pytest.mark.parametrize("given", [{}, {"amc23": [1.0]}, {"amc23": [1.0], "aime24": [1.0], "gsm8k": [1.0]}])
def test_an_overall_of_other_sets_is_refused(given: dict[str, list[float]]) -> None:
    found = refusal(lambda: find_suite("quick").overall(given))
    assert found == f"the overall of suite quick needs values of amc23, aime24; given are {', '.join(given) or 'none'}"


def test_a_suite_names_the_set_that_fails(tmp_path: Path) -> None:
    suite = Suite("two", (SPEC, replace(SPEC, name="other")), (1.0, 1.0), (1, 1))
    assert refusal(lambda: suite.load(write(tmp_path, TOY))).startswith("test set other: no other.jsonl or other.parquet in")


# --- the real sets ---


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data folder at {DATA}")
class TestRealSets:
    @pytest.fixture(scope="class")
    def problems(self) -> dict[str, list[Problem]]:
        """Loading checks counts and checksums."""
        return {name: find_testset(name).load(DATA) for name in ROWS}

    def test_counts_and_checksums_hold(self, problems: dict[str, list[Problem]]) -> None:
        assert {name: len(found) for name, found in problems.items()} == ROWS
        for name, found in problems.items():  # the definition of the checksum, spelled out
            raw = [json.loads(line) for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]
            joined = "\n".join(re.sub(r"\s+", " ", row["problem"].lower()).strip() for row in raw)
            assert sha256(joined.encode()).hexdigest() == find_testset(name).sha256
            assert [(p.id, p.answer) for p in found] == [(row["id"], row["answer"].strip()) for row in raw]

    def test_golds_given_as_boxed_responses_are_right(self, problems: dict[str, list[Problem]]) -> None:
        bad: dict[str, list[tuple[str, str]]] = {}
        with Grader(GraderConfig(workers=1)) as grader:
            for name, found in problems.items():
                verdicts = grader.grade([(p.answer, f"So the answer is $\\boxed{{{p.answer}}}$.") for p in found])
                bad[name] = [(p.id, v.kind.value) for p, v in zip(found, verdicts, strict=True) if v.kind is not Kind.RIGHT]
        assert bad == {name: [] for name in ROWS}  # the page says so; 99.5 % of each set would be the least

    def test_golds_of_other_problems_are_wrong(self, problems: dict[str, list[Problem]]) -> None:
        pairs = list(pairwise(problems["math500"]))
        with Grader(GraderConfig(workers=1)) as grader:
            verdicts = grader.grade([(p.answer, f"\\boxed{{{q.answer}}}") for p, q in pairs])
        others = {p.id: (p.answer, q.answer) for (p, q), v in zip(pairs, verdicts, strict=True) if v.correct and p.answer != q.answer}
        assert others == {"test/algebra/1837.json": ("5", "x=5")}

    def test_bad_golds_are_bad_as_the_page_says(self, problems: dict[str, list[Problem]]) -> None:
        gold = {p.id: p.answer for found in problems.values() for p in found}
        refused = [
            ("minerva-5", r"\arcsin(10/13)"),
            ("minerva-27", r"\frac{10^{5} L_{\odot}}{0.007 c^{2} M_{\odot}^{6}} M^{6}"),
            ("minerva-269", "E_1, E_2"),
            ("olympiadbench-1782", "n^2-n-1"),
            ("olympiadbench-2045", "(0,4]"),
            ("olympiadbench-2592", "4.25"),
        ]
        accepted = [
            ("minerva-1", r"4.5 \times 10^{33}"),
            ("minerva-38", r"-\frac{1}{3}"),
            ("minerva-49", "-1.5"),
            ("minerva-72", r"x_{0} \cos (\omega t)+\dot{x}_{0} \sin (\omega t) / \omega"),
            ("minerva-86", r"I(0) e^{-t/(RC)}"),
            ("olympiadbench-2349", "221,8"),
        ]
        with Grader(GraderConfig(workers=1)) as grader:
            verdicts = grader.grade([(gold[id], f"\\boxed{{{answer}}}") for id, answer in refused + accepted])
        assert [v.correct for v in verdicts] == [False] * len(refused) + [True] * len(accepted)

    def test_no_problem_stands_in_two_sets(self, problems: dict[str, list[Problem]]) -> None:
        texts = [" ".join(p.problem.lower().split()) for found in problems.values() for p in found]
        assert len(texts) == len(set(texts)) == sum(ROWS.values())

    def test_a_suite_from_a_folder(self) -> None:
        assert {name: len(found) for name, found in load_suite("treerpo", DATA).items()} == {
            name: ROWS[name] for name in ("math500", "olympiadbench", "minerva_math", "aime24")
        }
        if not (DATA / "amc23_83.jsonl").exists():
            found = refusal(lambda: load_suite("treepo", DATA))
            assert found == f"test set amc23_83: no amc23_83.jsonl or amc23_83.parquet in {DATA}"
