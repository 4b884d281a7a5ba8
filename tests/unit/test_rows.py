"""The schema of result rows, and the leaderboard made of them."""

import copy
import hashlib
import json
import re
from pathlib import Path

import pytest

from rlzoo.cli import main
from rlzoo.evaluation.rows import config_hash, overall, read_row, validate
from rlzoo.evaluation.stats import stratified_mean
from rlzoo.report.leaderboard import BEGIN, END, filled, leaderboard
from rlzoo.store.cost import Ledger
from tests.rows import PROBLEMS, result, row, store


def test_a_row_is_valid_and_says_what_was_measured():
    read = validate(row())
    assert (read.schema_version, read.model, read.seed, read.suite, read.arm.name) == (1, "some/model", 0, "both", "model")
    one, two = read.testsets["one"], read.testsets["two"]
    assert (one.n, one.source, one.revision, two.source, two.revision) == (3, "some:thing", "seed 7", "owner/two", "abc")
    assert two.sha256 == hashlib.sha256(b"two 0?\ntwo 1?\ntwo 2?\ntwo 3?\ntwo 4?").hexdigest()
    assert two.answers_sha256 == hashlib.sha256(b"0\n1\n2\n3\n4").hexdigest()
    metrics = read.results["model"]["two"]
    assert (metrics.unparsable, metrics.timed_out, list(metrics.pass_at)) == (0.1, 0.0, ["2", "4"])
    assert metrics.lengths == [6.5, 10.5, 14.5, 18.5, 22.5] and metrics.truncated == 4 / 20
    assert read.environment.versions["torch"] and read.ledger.devices == 2


def test_the_hash_is_of_the_whole_config_but_the_seed():
    config = row()["config"]
    text = '{"model":"some/model","nested":{"a":[1,2.5],"é":null},"suite":"both"}'
    assert config_hash(config) == hashlib.sha256(text.encode()).hexdigest() == config_hash(config | {"seed": 5})
    assert config_hash(config | {"suite": "other"}) != config_hash(config)


def test_overall_is_weighted():
    sets = {name: result(name, 3) for name in PROBLEMS}
    made = overall(sets, {"one": 3.0, "two": 5.0})
    assert made["weights"] == {"one": 0.375, "two": 0.625} and made["n"] == 8
    expected = stratified_mean([sets["one"].means, sets["two"].means], [3, 5])
    assert made["pass_at_1"] == expected.as_dict() and expected.mean == pytest.approx(
        0.375 * sets["one"].means.mean() + 0.625 * sets["two"].means.mean()
    )
    assert made["length"]["mean"] == pytest.approx(0.375 * 10.5 + 0.625 * 14.5)
    assert made["unparsable"] == pytest.approx(0.375 * 2 / 12 + 0.625 * 0.1)
    assert made["sampled_tokens"] == sum(r.sampled_tokens for r in sets.values()) and made["greedy"] is None
    assert overall(sets | {"two": result("two", 3, votes=False)}, {"one": 1, "two": 1})["maj_at_k"] is None


def put(path, value):
    """A change of a row: the value at a path of keys, or without one."""

    def change(plain):
        *above, last = path.split(".")
        for key in above:
            plain = plain[key]
        if value is REMOVED:
            del plain[last]
        else:
            plain[last] = value

    return change


REMOVED = object()
WRONG = [
    (put("schema_version", REMOVED), "there is no schema_version"),
    (put("schema_version", 2), "schema_version is 2; known is 1"),
    (put("arm", REMOVED), "arm: required field missing"),
    (put("surprise", 1), r"the row: extra fields found \(surprise\)"),
    (put("kind", "guess"), "kind: "),
    (put("seed", "0"), "seed: invalid value for type, expected int"),
    (put("seed", True), "seed: invalid value for type, expected int"),
    (put("arm.config_sha256", "0" * 64), "arm.config_sha256: it is not the hash of config"),
    (put("config.suite", "other"), "arm.config_sha256: it is not the hash of config"),
    (put("model", "other"), "model: it is 'other', but in config 'some/model'"),
    (put("protocol.k", {"one": "4"}), r"protocol.k\['one'\]: invalid value"),
    (put("protocol", 3), "protocol: expected a table of fields"),
    (put("results.model.two.n", 4.0), r"results\['model'\]\['two'\].n: invalid value for type, expected int"),
    (put("results.model.two.n", 4), "results.model.two.problems: 5 values for 4 problems"),
    (put("results.model.two.right", [1]), "results.model.two.right: 1 values for 5 problems"),
    (put("results.model.two.pass_at_1", None), r"results\['model'\]\['two'\].pass_at_1: invalid value for type, expected Interval"),
    (put("results.model.one", REMOVED), "overall.model: it is not over the sets of results.model"),
    (put("overall.model", REMOVED), "overall.model: it is not over the sets"),
    (put("testsets.one.n", 4), "results.model.one.n: 3 problems, but 4 in testsets"),
    (put("testsets.one", REMOVED), "results.model: its sets are not those of testsets"),
    (put("ledger.wall_s", 9.0), "ledger.wall_s: it is 9.0, but the phases sum to"),
    (put("environment.commit", REMOVED), "environment.commit: required field missing"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_does_not_fit_the_schema_is_named(change, message, tmp_path):
    plain = row()
    change(plain)
    with pytest.raises(ValueError, match=message):
        validate(plain)
    (tmp_path / "bad.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / 'bad.json'))} is not a result row: "):
        read_row(tmp_path / "bad.json")


def test_the_leaderboard_ranks_what_was_measured_alike(tmp_path):
    rows = [row(2, seed=1), row(5, seed=2), row(4, template="chat"), row(3, seed=3, vote="string")]
    alike, other = sorted((own.runs for own in leaderboard(store(tmp_path / "results", *rows))), key=lambda g: -len(g.rows))
    assert [line[2] for line in alike.rows] == ["2", "3", "1"] and [line[0] for line in alike.rows] == ["1", "2", "3"]
    shares = [float(line[3].split()[0]) for line in alike.rows]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) == 3
    assert len(other.rows) == 1 and "template chat" in other.notes[0] and "template plain" in alike.notes[0]


def test_a_base_model_stands_there_once(tmp_path):
    trained = []
    for seed in (0, 1):
        plain = row(3, seed=seed)
        plain["results"] = {"base": row(2)["results"]["model"], "trained": plain["results"]["model"]}
        plain["overall"] = {"base": row(2)["overall"]["model"], "trained": plain["overall"]["model"]}
        ledger = Ledger(2, "cpu core").as_dict()
        ledger["seconds"]["update"] = ledger["wall_s"] = 3600.0
        ledger["device_seconds"]["update"], ledger["device_hours"] = 7200.0, 2.0
        trained.append(plain | {"kind": "run", "algo": "some", "training": ledger, "sampled_tokens": 1234567})
        trained[-1]["arm"]["name"] = "some"
    (tables,) = leaderboard(store(tmp_path / "results", *trained))
    grid = tables.runs
    assert [line[1] for line in grid.rows] == ["some", "some", "some/model"]
    assert [line[9:11] for line in grid.rows] == [["1.23M", "2.000 (2 x cpu core)"]] * 2 + [["-", "-"]]


def test_the_pages_repeat_byte_by_byte_and_link_to_nothing(tmp_path):
    results = store(tmp_path / "results", row(2), row(3, model="<b>bold & co</b>"))
    assert main(["leaderboard", "--results", str(results)]) == 0
    pages = [(results / f"leaderboard.{kind}").read_bytes() for kind in ("md", "html")]
    assert main(["leaderboard", "--results", str(results)]) == 0
    assert pages == [(results / f"leaderboard.{kind}").read_bytes() for kind in ("md", "html")]
    page = pages[1].decode()
    assert not re.search(r"href|src=|url\(|https?:|@import|<script", page) and "<b>" not in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no result row"),
        ("", "is not JSON"),
        (json.dumps(row())[:-500], "is not JSON"),
        ("[]", "is not a result row: there is no schema_version"),
        (json.dumps({k: v for k, v in row().items() if k != "ledger"}), "is not a result row: ledger: required field missing"),
    ],
)
def test_a_row_that_is_none_is_one_sentence_and_no_page_changes(text, message, tmp_path, capsys):
    results = store(tmp_path / "results", *([copy.deepcopy(row())] if text is not None else []))
    (results / "leaderboard.md").write_text("as it was")
    if text is not None:
        (results / "deep").mkdir()
        (results / "deep" / "bad.json").write_text(text)
    assert main(["leaderboard", "--results", str(results)]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and (text is None or "deep/bad.json" in said)
    assert (results / "leaderboard.md").read_text() == "as it was" and not (results / "leaderboard.html").exists()


def test_a_page_gets_its_place_filled_between_its_marks(tmp_path, capsys):
    results, page = store(tmp_path / "results", row(2), row(3)), tmp_path / "page.md"
    page.write_text(f"# Mine\n\n{BEGIN}\nold\n{END}\n\nthe end\n")
    for _ in range(2):
        assert main(["leaderboard", "--results", str(results), "--page", str(page)]) == 0
        before, _, rest = page.read_text().partition(BEGIN)
        block, _, after = rest.partition(END)
        assert (before, after) == ("# Mine\n\n", "\n\nthe end\n") and "old" not in block
        link = "[results/leaderboard.md](results/leaderboard.md)"
        assert block.strip() == f"No arm has two seeds yet.\n\nEvery run and every model before training: {link}."


@pytest.mark.parametrize(
    "text", [None, "no marks", f"{BEGIN} alone", f"{END} then {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}", f"{BEGIN} {END} {END}"]
)
def test_a_page_without_a_place_for_them_is_left_alone(text, tmp_path, capsys):
    results, page = store(tmp_path / "results", row(2)), tmp_path / "page.md"
    if text is not None:
        page.write_text(text)
    assert main(["leaderboard", "--results", str(results), "--page", str(page)]) == 2
    said = capsys.readouterr().err
    assert ("has no place for the leaderboard" if text else "cannot read") in said and len(said.splitlines()) == 1
    assert text is None or page.read_text() == text
    assert not (results / "leaderboard.md").exists()


def test_the_committed_pages_are_those_of_the_committed_rows():
    root = Path(__file__).parents[2]
    tables = leaderboard(root / "results")
    assert filled(root / "README.md", root / "results", tables) == (root / "README.md").read_text(), (
        "run: rlzoo leaderboard --page README.md"
    )
    told = (root / "results" / "leaderboard.md").read_text()
    grids = [grid for own in tables for grid in (own.arms, own.runs) if grid]
    assert told.endswith("\n".join(grid.markdown() for grid in grids)), "run: rlzoo leaderboard --page README.md"


def test_a_run_s_own_model_has_the_run_s_name(tmp_path):
    plain = row(2, model="runs/mine-s0/final")
    plain["arm"]["name"] = "final"
    (tables,) = leaderboard(store(tmp_path / "results", plain))
    assert tables.arms is None and tables.runs.rows[0][1] == "mine-s0/final"


def test_no_folder_no_leaderboard(tmp_path, capsys):
    assert main(["leaderboard", "--results", str(tmp_path / "nosuch")]) == 2
    assert "no folder" in capsys.readouterr().err
