"""`rlzoo eval` and `rlzoo leaderboard` from the command line: the embedded model, real deaths, bad input."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rlzoo
from rlzoo.cli import main
from rlzoo.config import BackendOptions
from rlzoo.data.problems import normalise
from rlzoo.evaluation.rows import read_row, validate
from rlzoo.evaluation.suites import Suite
from rlzoo.store.files import locked
from rlzoo.store.runs import read_rows

KILLABLE = Path(__file__).parents[1] / "fault" / "killable.py"
DATA = Path(os.environ.get("RLZOO_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
SETS = ["mini_chains", "mini_long", "mini_mixed", "mini_puzzle"]
SMALL = ["--k", "3", "--greedy", "--max-response-tokens", "96", "--backend.threads", "1", "--backend.capacity", "16"]
JOB = ["eval", "tiny", *SMALL]

SAMPLED = "rlzoo.evaluation.runner:grow_iter"
VOTED = "rlzoo.evaluation.job:with_votes"
SUMMARISED = "rlzoo.store.runs:RunFolder.write_summary"


@pytest.fixture
def small(monkeypatch):
    """Two problems of each set."""
    whole = Suite.load
    monkeypatch.setattr(Suite, "load", lambda self, data_dir=None: {name: p[:2] for name, p in whole(self, data_dir).items()})


@pytest.fixture(scope="module")
def driver():
    """Runs command lines in forked children of one process, two problems of each set, and lets them die where it is told to:
    tests/fault/killable.py."""
    command = [sys.executable, str(KILLABLE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(argv, log, kill=None):
            kill = kill and dict(zip(("target", "how", "nth", "signals"), kill, strict=False))
            process.stdin.write(json.dumps({"argv": argv, "kill": kill, "log": str(log)}) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run
        process.stdin.close()


def timeless(folder):
    row = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in row.items() if name not in ("ledger", "environment")}


def test_the_row_is_what_the_samples_say(tmp_path, small, capsys):
    out = tmp_path / "eval"
    assert main([*JOB, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    row, plain = read_row(out / "summary.json")
    rows = read_rows(out / "samples.jsonl")
    assert len(rows) == 4 * 2 * (3 + 1) and sorted(p.name for p in out.iterdir()) == [
        ".lock",
        "config.toml",
        "samples.jsonl",
        "summary.json",
    ]
    means = {}
    for name in SETS:
        sampled = [r for r in rows if r["set"] == name and r["temperature"] == 1]
        greedy = [r for r in rows if r["set"] == name and r["temperature"] == 0]
        found = row.results["model"][name]
        means[name] = np.mean([r["correct"] for r in sampled])
        assert found.pass_at_1.mean == pytest.approx(means[name]) and found.k == 3 and found.n == 2
        assert found.greedy.pass_at_1.mean == np.mean([r["correct"] for r in greedy])
        assert found.length.median == np.median([r["tokens"] for r in sampled])
        assert found.truncated == np.mean([r["stop"] in ("LENGTH", "DEPTH", "REPETITION") for r in sampled])
        assert found.unparsable == np.mean([r["kind"] == "unparsable" for r in sampled])
        assert all(normalise(r["gold"]) in normalise(r["response"]) for r in sampled if r["correct"])
    whole = row.overall["model"]
    assert whole.pass_at_1.mean == pytest.approx(np.mean(list(means.values())))
    assert f"{100 * whole.pass_at_1.mean:.1f} [" in printed.out and f"evaluation folder: {out}" in printed.out
    assert "responses 32/32" in printed.err and "Pass@1 so far" in printed.err
    assert (row.arm.name, row.model, row.kind, row.protocol.vote, row.protocol.engine) == (
        "tiny",
        "tiny",
        "eval",
        "equivalent",
        "torch float32",
    )
    assert sum(row.ledger.seconds.values()) == pytest.approx(row.ledger.wall_s, rel=0.01) and row.ledger.seconds["sampling"] > 0
    assert plain["config"]["k"] == 3
    assert main(["eval", "--resume", "--out", str(out)]) == 0
    assert "finished already: nothing is left to do" in capsys.readouterr().out


def test_from_python(tmp_path, small):
    options = {"k": 1, "max_response_tokens": 16, "backend": BackendOptions(threads=1)}
    made = rlzoo.evaluate(rlzoo.EvalConfig("tiny", **options), out=tmp_path / "eval")
    assert made.row == json.loads((tmp_path / "eval" / "summary.json").read_text()) and made.folder == tmp_path / "eval"


def test_a_tree_of_segments_shares_tokens(tmp_path, small):
    out = tmp_path / "eval"
    tree = ["--sampler", "segments", "--segments.depth", "6", "--segments.initial", "2", "--k", "8"]
    assert main(["eval", "tiny", "--max-response-tokens", "96", "--backend.threads", "1", "--out", str(out), *tree]) == 0
    rows = read_rows(out / "samples.jsonl")
    row, _ = read_row(out / "summary.json")
    assert len(rows) == 8 * 8 and row.protocol.sampler == {"name": "segments", "top_p": 1.0, "depth": 6, "branching": [2], "initial": [2]}
    assert sum(m.sampled_tokens for m in row.results["model"].values()) < sum(r["tokens"] for r in rows)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_killed_again_and_again_it_is_the_evaluation_that_would_have_been(dtype, tmp_path, driver):
    job, log = [*JOB, "--backend.dtype", dtype], tmp_path / "log"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert driver([*job, "--out", str(whole)], log) == 0, log.read_text()
    samples, go_on = cut / "samples.jsonl", ["eval", "--resume", "--out", str(cut)]
    assert driver([*job, "--out", str(cut)], log, (SAMPLED, "items", 3)) == -9
    first = samples.read_bytes()
    assert 0 < len(read_rows(samples)) < 32 and not (cut / "summary.json").exists()
    with samples.open("a") as file:  # a row that was being written
        file.write('{"set": "mini_chains", "id"')
    assert driver(go_on, log, (SAMPLED, "items", 2)) == -9
    assert samples.read_bytes().startswith(first)
    assert driver(go_on, log, (VOTED, "before", 1)) == -9 and len(read_rows(samples)) == 32
    assert driver(go_on, log, (SUMMARISED, "before", 1)) == -9
    assert driver(go_on, log) == 0, log.read_text()
    assert timeless(cut) == timeless(whole)
    assert samples.read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert sorted(p.name for p in cut.iterdir()) == sorted(p.name for p in whole.iterdir())
    ledger = json.loads((cut / "summary.json").read_text())["ledger"]
    assert sum(ledger["seconds"].values()) == pytest.approx(ledger["wall_s"], rel=0.01)


def test_an_interrupt_keeps_the_samples_and_says_how_to_go_on(tmp_path, driver):
    out, log = tmp_path / "eval", tmp_path / "log"
    assert driver([*JOB, "--out", str(out)], log, (SAMPLED, "items", 4, ["SIGINT"])) == 130
    assert log.read_text().splitlines()[-1] == f"rlzoo: interrupted; to go on: rlzoo eval --resume --out {out}"
    assert read_rows(out / "samples.jsonl") and json.loads((out / "ledger.json").read_text())["wall_s"] > 0


@pytest.fixture(scope="module")
def begun(tmp_path_factory, driver):
    """An evaluation that died."""
    folder = tmp_path_factory.mktemp("begun")
    assert driver([*JOB, "--out", str(folder / "eval")], folder / "log", (SAMPLED, "items", 3)) == -9
    return folder / "eval"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "4"], "was started with k = 3, not 4"),
        (["--backend.capacity", "8"], "was started with backend.capacity = 16, not 8"),
        (["--segments.branching", "3"], "was started with segments.branching = "),
        (["nosuch"], "was started with model = 'tiny', not 'nosuch'"),
    ],
)
def test_it_goes_on_as_it_was_started(flags, message, begun, capsys):
    before = (begun / "samples.jsonl").read_bytes()
    assert main(["eval", *flags, "--resume", "--out", str(begun)]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and (begun / "samples.jsonl").read_bytes() == before


def test_one_process_at_a_time(begun, tmp_path, capsys):
    with locked(begun):
        assert main(["eval", "--resume", "--out", str(begun)]) == 2
    assert f"process {os.getpid()} is at work in {begun}" in capsys.readouterr().err


def test_a_broken_row_is_named_and_nothing_is_lost(begun, tmp_path, capsys, small):
    folder = shutil.copytree(begun, tmp_path / "eval")
    text = (folder / "samples.jsonl").read_text()
    broken = '{"set": "mini\n' + text
    (folder / "samples.jsonl").write_text(broken)
    assert main(["eval", "--resume", "--out", str(folder)]) == 1
    said = capsys.readouterr().err
    assert "line 1 of " in said and "samples.jsonl is not JSON" in said
    assert (folder / "samples.jsonl").read_text() == broken


def test_a_full_disk_stops_it_and_it_goes_on(tmp_path, small, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*JOB, "--out", str(whole)]) == 0
    size = (whole / "samples.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        assert main([*JOB, "--out", str(cut)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "File too large" in said and said.endswith(f"once that is mended, go on with rlzoo eval --resume --out {cut}")
    assert read_rows(cut / "samples.jsonl")
    assert main(["eval", "--resume", "--out", str(cut)]) == 0
    assert timeless(cut) == timeless(whole) and (cut / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


BAD = [
    (["tiny", "--suite", "nosuch"], "unknown suite 'nosuch'; known:"),
    (["--suite", "mini"], "no model given; rlzoo eval MODEL"),
    (["./nosuch"], "model folder './nosuch' does not exist"),
    (["tiny", "--k", "0"], "k is 0; allowed: a whole number from 1 to 65536 or none"),
    (["tiny", "--k", "some"], "--k some is not allowed"),
    (["tiny", "--temperature", "0"], "temperature 0 is greedy decoding"),
    (["tiny", "--temperature", "0", "--k", "2"], "temperature 0 is greedy decoding"),
    (
        ["tiny", "--sampler", "segments", "--max-response-tokens", "100"],
        "segments.depth is 8, which does not divide max_response_tokens = 100",
    ),
    (["tiny", "--sampler", "nosuch"], "invalid choice 'nosuch'"),
    (["tiny", "--max-response-tokens", "100000"], "exceeds the context of"),
    (["tiny", "--template", "nosuch"], "unknown template 'nosuch'"),
    (["tiny", "--nosuch", "1"], "--nosuch"),
    (["tiny", "--suite", "quick", "--data-dir", "/nosuch"], "test set amc23: no amc23.jsonl or amc23.parquet in /nosuch"),
    (["tiny", "--resume"], "no run folder at"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, message, tmp_path, capsys):
    assert main(["eval", *flags, "--out", str(tmp_path / "deep" / "eval")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rlzoo: ") and message in said and len(said.splitlines()) == 1, said
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    assert main([*JOB, "--out", str(tmp_path)]) == 2
    assert "is not empty; a run never overwrites another" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_a_run_leaves_a_row_too_and_both_make_a_leaderboard(tmp_path, small, capsys):
    results = tmp_path / "results"
    results.mkdir()
    run = ["run", "--algo", "grpo", "--schedule.steps", "1", "--schedule.problems-per-step", "4", "--evaluation.k", "3"]
    run += ["--evaluation.every", "0", "--evaluation.max-response-tokens", "96", "--backend.threads", "1"]
    assert main([*run, "--out", str(tmp_path / "run")]) == 0
    assert main([*JOB, "--out", str(tmp_path / "eval")]) == 0
    for name in ("run", "eval"):
        validate(json.loads((tmp_path / name / "summary.json").read_text()))
        shutil.copy(tmp_path / name / "summary.json", results / f"{name}.json")
    row, _ = read_row(results / "run.json")
    assert all(row.overall[model].maj_at_k is not None for model in ("base", "trained")) and row.protocol.vote == "equivalent"
    assert main(["leaderboard", "--results", str(results)]) == 0
    text, page = (results / "leaderboard.md").read_text(), (results / "leaderboard.html").read_text()
    assert capsys.readouterr().out.count("eval.json") == 1 and text.count("| grpo |") == 1 and text.count("| tiny |") == 2  # base, and eval
    assert text.count("## Suite mini") == 1  # measured in the same way: one table
    main(["leaderboard", "--results", str(results)])
    assert ((results / "leaderboard.md").read_text(), (results / "leaderboard.html").read_text()) == (text, page)


# Recorded outputs.


def outputs(path, *rows):
    path.write_text("".join(json.dumps({"gold": g, "prediction": p, "correct": c, "model": m}) + "\n" for g, p, c, m in rows))
    return str(path)


def test_recorded_outputs_are_graded_without_a_box(tmp_path, capsys):
    file = outputs(
        tmp_path / "o.jsonl", ("3", "So it is 3.", True, "one"), ("4", "I say 5", False, "one"), ("1/2", r"\boxed{0.5}", False, "two")
    )
    assert main(["eval", "--from-outputs", file]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("o ")] == [["o", "one"], ["o", "two"]] and "require_box False" in lines[
        -1
    ]
    assert main(["eval", "--from-outputs", file, "--json", "--out", str(tmp_path / "kept")]) == 0
    told = json.loads(capsys.readouterr().out)
    one, two = told["results"]
    assert (one["ours"]["mean"], one["recorded"]["mean"], one["agree"]) == (0.5, 0.5, 1.0)
    assert (two["ours"]["mean"], two["recorded"]["mean"], two["difference"]["mean"]) == (1.0, 0.0, 1.0)
    assert "math-verify" in told["grader"] and "commit" in told["environment"]
    kept = read_rows(tmp_path / "kept" / "recorded.jsonl")
    assert [r["model"] for r in kept] == ["one", "two"] and kept[0]["grader"] == told["grader"] and "versions" in kept[0]["environment"]
    assert "| two |" in (tmp_path / "kept" / "recorded.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nosuch.jsonl"], "cannot read nosuch.jsonl"),
        ([], "expected at least one argument"),
        (["{good}", "--k", "3"], "'--k' does not go with"),
    ],
)
def test_bad_recorded_outputs(flags, message, tmp_path, capsys):
    good = outputs(tmp_path / "o.jsonl", ("3", "3", True, "m"))
    assert main(["eval", "--from-outputs", *(flag.format(good=good) for flag in flags)]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="no data folder beside the checkout")
def test_every_recorded_model_comes_out_near_its_labels(capsys):
    files = sorted(str(p) for p in (DATA / "verifier").glob("outputs_*.jsonl"))
    assert len(files) == 5 and main(["eval", "--from-outputs", *files, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert len(results) == 14 and len({r["model"] for r in results}) >= 10
    for r in results:
        assert abs(r["difference"]["mean"]) < 0.01 and r["agree"] >= 0.98 and not r["kinds"].get("failed"), r
        assert r["ours"]["low"] <= r["recorded"]["mean"] <= r["ours"]["high"]
