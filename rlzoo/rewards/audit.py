"""Agreement with recorded verdicts: `python -m rlzoo.rewards.audit DATA_FOLDER [--json] [--list N]`.

Every file of DATA_FOLDER/verifier is graded and compared with `adjudicated` where it is set, else with `correct`; rows adjudicated
"ambiguous" are skipped. Model outputs are graded twice: the whole response, as a run would see it (a box is not required, because
some of these models were never asked for one), and the answer that the source recorded, in a box.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlzoo.rewards.math import Grader, GraderConfig, Kind, grader_version


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One row where the grader and the recorded verdict differ."""

    id: str
    gold: str
    answer: str
    recorded: bool
    kind: Kind


@dataclass(frozen=True, slots=True)
class Agreement:
    """One file, one way of reading the answer."""

    file: str
    reading: str  # "response" or "extracted"
    rows: int
    agree: int
    kinds: dict[str, int]
    disagreements: list[Disagreement] = field(default_factory=list)


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a verifier file that have a verdict; `expected` is that verdict: `adjudicated` where it is set, else what the file calls
    `expected` or `correct`."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    for row in rows:
        row["expected"] = row.get("adjudicated", row.get("expected", row.get("correct")))
    return [row for row in rows if isinstance(row["expected"], bool)]


def read_answers(rows: Sequence[dict[str, Any]], reading: str) -> list[tuple[str, str]]:
    """(gold, text) as the grader is to see them."""
    if reading == "response":
        return [(row["gold"], _response(row)) for row in rows]
    return [(row["gold"], f"\\boxed{{{row['extracted']}}}") for row in rows]


def _response(row: dict[str, Any]) -> str:
    text: str = row["response"] if "response" in row else row["prediction"]
    return f"\\boxed{{{text}}}" if _is_answer(row) else text


def _is_answer(row: dict[str, Any]) -> bool:
    """These two test suites compare answers, not responses: their predictions are LaTeX without delimiters."""
    return row["source"].startswith(("OpenBMB/OlympiadBench", "NVIDIA/NeMo-Skills")) and "\\boxed" not in row.get("prediction", "")


def audit_file(path: Path, grader: Grader) -> list[Agreement]:
    """Grade one file, in every reading that it offers."""
    rows = load_rows(path)
    found = []
    for reading in ("response", "extracted"):
        if reading == "extracted" and "extracted" not in rows[0]:
            continue
        pairs = read_answers(rows, reading)
        verdicts = grader.grade(pairs)
        wrong = [
            Disagreement(row["id"], pair[0], pair[1][-160:], row["expected"], verdict.kind)
            for row, pair, verdict in zip(rows, pairs, verdicts, strict=True)
            if verdict.correct is not row["expected"]
        ]
        kinds = Counter(str(v.kind) for v in verdicts)
        found.append(Agreement(path.name, reading, len(rows), len(rows) - len(wrong), dict(sorted(kinds.items())), wrong))
    return found


def audit(folder: Path, grader: Grader) -> list[Agreement]:
    """Grade every file of `folder`/verifier.

    Raises:
        ValueError: there is no such file.
    """
    files = sorted((folder / "verifier").glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder}: expected a folder with verifier/*.jsonl")
    return [agreement for path in files for agreement in audit_file(path, grader)]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the agreement table."""
    parser = argparse.ArgumentParser(prog="python -m rlzoo.rewards.audit", description="Agreement of the grader with recorded verdicts.")
    parser.add_argument("folder", type=Path, help="folder that holds verifier/*.jsonl")
    parser.add_argument("--json", action="store_true", help="one JSON object per file and reading, disagreements included")
    parser.add_argument("--list", type=int, default=20, metavar="N", help="list at most N disagreements per file and reading (20)")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(argv)
    with Grader(GraderConfig(workers=options.workers, require_box=False)) as grader:
        found = audit(options.folder, grader)
    if options.json:
        for agreement in found:
            print(json.dumps(asdict(agreement) | {"grader": grader_version()}, ensure_ascii=False))
        return
    print(grader_version())
    for a in found:
        print(f"{a.file:42} {a.reading:10} {a.agree:5} / {a.rows:5}  {100 * a.agree / a.rows:6.2f} %  {a.kinds}")
        for d in a.disagreements[: options.list]:
            print(f"    {d.id}: recorded {d.recorded}, we say {d.kind}; gold {d.gold!r}, answer …{d.answer!r}")


if __name__ == "__main__":
    main()
