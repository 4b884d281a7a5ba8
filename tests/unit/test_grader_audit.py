"""Agreement with the recorded verdicts of the shared data folder, and notation of golds that must be read as it is meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlzoo.rewards.audit import Agreement, audit, load_rows, main
from rlzoo.rewards.math import Grader, GraderConfig, Kind

DATA = Path(os.environ.get("RLZOO_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
needs_data = [pytest.mark.data, pytest.mark.skipif(not (DATA / "verifier").is_dir(), reason=f"no data folder at {DATA}")]

# What docs/grader.md reports, in disagreements. A change for the better may lower a number; nothing may raise one.
KNOWN = {
    ("mathverify_tests.jsonl", "response"): 8,
    ("other_grader_tests.jsonl", "response"): 5,
    ("outputs_mrgsm8k.jsonl", "response"): 6,
    ("outputs_openai_gsm8k.jsonl", "response"): 0,
    ("outputs_qwen25math_math100x8.jsonl", "response"): 0,
    ("outputs_qwen25math_math100x8.jsonl", "extracted"): 0,
    ("outputs_rho_gsm8k.jsonl", "response"): 1,
    ("outputs_rho_gsm8k.jsonl", "extracted"): 0,
    ("outputs_rho_math500.jsonl", "response"): 8,
    ("outputs_rho_math500.jsonl", "extracted"): 4,
    ("public_reports.jsonl", "response"): 1,
}


class TestOnData:
    """Everything that needs the data folder."""

    pytestmark = needs_data

    @pytest.fixture(scope="class")
    def agreements(self) -> Iterator[dict[tuple[str, str], Agreement]]:
        with Grader(GraderConfig(workers=2, require_box=False)) as grader:
            yield {(a.file, a.reading): a for a in audit(DATA, grader)}

    def test_agreement_per_file(self, agreements: dict[tuple[str, str], Agreement]) -> None:
        assert agreements.keys() == KNOWN.keys()
        assert {key: a.rows - a.agree for key, a in agreements.items() if a.rows - a.agree > KNOWN[key]} == {}
        assert all(len(a.disagreements) == a.rows - a.agree for a in agreements.values())

    def test_public_reports(self, agreements: dict[tuple[str, str], Agreement]) -> None:
        """Bug reports of public graders: 97% right, and nothing wrong called right."""
        found = agreements["public_reports.jsonl", "response"]
        assert found.agree >= 0.97 * found.rows
        assert [d for d in found.disagreements if not d.recorded] == []

    def test_no_grading_fails_or_times_out(self, agreements: dict[tuple[str, str], Agreement]) -> None:
        bad = {Kind.FAILED, Kind.TIMED_OUT}
        assert {key: a.kinds for key, a in agreements.items() if bad & a.kinds.keys()} == {}

    def test_minerva_scientific_notation_in_latex(self) -> None:
        with (DATA / "testsets" / "minerva_math.jsonl").open(encoding="utf-8") as lines:
            golds = [
                g
                for g in (json.loads(line)["answer"] for line in lines)
                if "e" in g and g.replace("e", "").replace("-", "").replace(".", "").isdigit()
            ]
        assert len(golds) == 58
        right = [(g, f"\\boxed{{{g.split('e')[0]} \\times 10^{{{int(g.split('e')[1])}}}}}") for g in golds]
        wrong = [(g, f"\\boxed{{{float(g.split('e')[0]) * 1.01:.6f} \\times 10^{{{int(g.split('e')[1])}}}}}") for g in golds]
        with Grader(GraderConfig(workers=2)) as grader:
            assert {v.kind for v in grader.grade(right)} == {Kind.RIGHT}
            assert [p for p, v in zip(wrong, grader.grade(wrong), strict=True) if v.kind is not Kind.WRONG] == []

    def test_fast_parsing_changes_no_answer(self) -> None:
        code = """
import json, sys
import rlzoo.rewards.judge as judge
golds = [json.loads(line)["answer"] for name in ("math500", "olympiadbench") for line in open(f"{sys.argv[2]}/testsets/{name}.jsonl")]
if sys.argv[1] == "two": judge.parse_in_two_stages()
print(json.dumps([repr(judge._parse_response(gold, True)) for gold in golds]))
"""
        environment = os.environ | {"PYTHONHASHSEED": "0"}
        printed = [
            subprocess.run(
                [sys.executable, "-c", code, stages, str(DATA)], capture_output=True, text=True, check=True, timeout=200, env=environment
            ).stdout
            for stages in ("one", "two")
        ]
        assert printed[0] == printed[1]
        assert len(json.loads(printed[0])) == 1175


def write(folder: Path, rows: list[dict[str, object]]) -> None:
    (folder / "verifier").mkdir()
    (folder / "verifier" / "outputs_some.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


ROWS: list[dict[str, object]] = [
    {"id": "a", "gold": "5", "prediction": "it is 5", "extracted": "5", "correct": True, "source": "s"},
    {"id": "b", "gold": "5", "prediction": "it is 6", "extracted": "5", "correct": True, "source": "s"},
    {"id": "c", "gold": "5", "prediction": "it is 7", "extracted": "7", "correct": True, "adjudicated": False, "source": "s"},
    {"id": "d", "gold": "5", "prediction": "?", "extracted": "?", "correct": True, "adjudicated": "ambiguous", "source": "s"},
]


def test_adjudication_wins_and_ambiguous_rows_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    assert [(row["id"], row["expected"]) for row in load_rows(tmp_path / "verifier" / "outputs_some.jsonl")] == [
        ("a", True),
        ("b", True),
        ("c", False),
    ]


def test_the_command_prints_both_readings_and_the_disagreements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, ROWS)
    main([str(tmp_path), "--workers", "1", "--json"])
    response, extracted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (response["reading"], response["rows"], response["agree"]) == ("response", 3, 2)
    assert [d["id"] for d in response["disagreements"]] == ["b"]
    assert (extracted["reading"], extracted["rows"], extracted["agree"]) == ("extracted", 3, 3)
    main([str(tmp_path), "--workers", "1"])
    assert "b: recorded True, we say wrong" in capsys.readouterr().out


def test_a_folder_without_verdicts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with verifier/\*\.jsonl"):
        main([str(tmp_path)])
