"""Hostile names, folders and models: nothing of them is executed, nothing leads outside, nothing drives the terminal."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlzoo import cli, escape, registry
from rlzoo.report.grid import Grid
from rlzoo.report.html import write_report
from rlzoo.report.progress import Progress
from rlzoo.rewards.math import Grader, GraderConfig, Kind
from rlzoo.rewards.reward import PluginReward
from rlzoo.store.files import aside, locked, write_aside
from rlzoo.store.processes import own_environment, own_program
from rlzoo.store.runs import RunFolder
from tests.fault.test_bad_input import GOOD, SHORT, SMALL, write_problems
from tests.fault.test_grader import boxed, faulty, until
from tests.summaries import make_run

ROOT = Path(__file__).parents[2]
NAMES = [
    "a|b",
    "[bold]x[/bold]",
    "\x1b[2J\x1b]0;title\x07",
    "two\nlines\r\n",
    "<img src=x onerror=alert(1)>",
    "[t](http://x)",
    "\u202eabc\u2028",
    "x\x9by",
]
DANGEROUS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

# -- names in every medium --------------------------------------------------------------------------------------------------


def test_a_grid_shows_hostile_names_harmlessly() -> None:
    grid = Grid(NAMES[0] + NAMES[2], ["name", *NAMES], [[name, *NAMES] for name in NAMES], notes=NAMES, strong=NAMES)
    page = grid.markdown()
    lines = page.splitlines()
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")]
    assert len(cells) == len(NAMES) + 2 and set(cells) == {len(NAMES) + 2}
    assert not DANGEROUS.search(page) and "<img" not in page and "](http" not in page
    assert len(lines) == 2 + len(cells) + 1 + len(NAMES)  # no name made a line of its own
    assert not DANGEROUS.search(grid.text())
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=4000, color_system=None, legacy_windows=False)
        grid.print(console)
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert not DANGEROUS.search(shown) and "[bold]x[/bold]" in shown


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_stays_in_its_cell(text: str) -> None:
    assert not DANGEROUS.search(escape.visible(text)) and "\n" not in escape.visible(text)
    (line,) = Grid("t", ["h"], [[text]]).markdown().splitlines()[4:]
    assert line.startswith("| ") and line.endswith(" |") and len(re.findall(r"(?<!\\)\|", line)) == 2
    assert escape.visible(escape.visible(text)) == escape.visible(text)


@pytest.mark.parametrize("name", NAMES)
def test_messages_and_progress_are_harmless(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        [name],
        ["run", "--algo", name],
        ["show", f"no-{name}"],
        ["report", name],
        ["reproduce", name],
        ["compare", "--arms", f"grpo,{name}"],
    ):
        assert cli.main(argv) == 2
        said = capsys.readouterr().err
        assert not DANGEROUS.search(said) and said.count("\n") == 1 and said.startswith("rlzoo: "), said
    console = Console(file=io.StringIO(), force_terminal=False)
    with Progress(3, console=console) as progress:
        progress.note(name)
    assert not DANGEROUS.search(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["[bold]x[", "<img src=x onerror=alert(1)>", "a|b", "\x1b[2J", "\u202eabc"])
def test_pages_of_runs_with_hostile_names(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / name)
    assert write_report([run], tmp_path / "page.html").size_bytes
    assert "<img" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert cli.main(["show", str(run)]) == 0
    assert not DANGEROUS.search(capsys.readouterr().out)


# -- nothing of a model folder is executed ----------------------------------------------------------------------------------


def test_every_loading_call_says_that_no_code_is_trusted() -> None:
    loading = 0
    for path in [p for folder in ("rlzoo", "benchmarks", "algorithms") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("from_pretrained", "from_config"):
                loading += 1
                said = {k.arg: k.value for k in node.keywords}.get("trust_remote_code")
                assert isinstance(said, ast.Constant) and said.value is False, f"{path.relative_to(ROOT)}:{node.lineno}"
    assert loading >= 6
    assert '"trust_remote_code": False' in (ROOT / "rlzoo/backends/vllm.py").read_text(encoding="utf-8")


CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nfrom transformers import {kind}\nclass Own({kind}):\n    model_type = 'own'\n"


@pytest.mark.parametrize("verb", ["run", "eval"])
def test_code_in_a_model_folder_is_refused_though_somebody_says_yes(tmp_path: Path, model_folder: Path, verb: str) -> None:
    folder, marker = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own_model.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(marker=str(marker), kind="PretrainedConfig"))
    (folder / "own_model.py").write_text(CODE.format(marker=str(marker), kind="PreTrainedModel"))
    tail = ["--suite", "mini"] if verb == "eval" else ["--algo", "grpo", *SMALL, *SHORT]
    head = [str(folder)] if verb == "eval" else ["--model", str(folder)]
    command = [*own_program("rlzoo.cli"), verb, *head, *tail, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, input="y\ny\ny\n", capture_output=True, text=True, timeout=200, check=False, env=own_environment())
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("rlzoo: model "), done.stderr
    assert not marker.exists() and not (tmp_path / "out").exists()


# -- links and special files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["checkpoints", "trees", "eval", "metrics.jsonl", "summary.json", ".lock", "checkpoints/step-1", "final"])
def test_a_link_that_leaves_the_run_folder_is_refused(tmp_path: Path, part: str) -> None:
    run, outside = make_run(tmp_path / "run"), tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    target = run / part
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    target.parent.mkdir(exist_ok=True)
    target.symlink_to(outside / "kept" if "." in part else outside)
    with pytest.raises(ValueError, match=rf"{re.escape(str(target))} is a link to .*outside the run folder"), locked(run):
        raise AssertionError("never here")
    assert [p.name for p in outside.iterdir()] == ["kept"] and (outside / "kept").read_text() == "kept"


def test_links_within_a_run_folder_and_to_it_are_no_hindrance(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "newest").symlink_to("trees")
    (tmp_path / "alias").symlink_to(run)
    with locked(tmp_path / "alias"):
        assert (run / ".lock").exists()


@pytest.mark.parametrize("verb", ["run", "eval"])
def test_a_command_that_would_write_through_a_link_is_refused(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "outside").mkdir()
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "checkpoints").symlink_to(tmp_path / "outside")
    (run / "summary.json").unlink(missing_ok=True)
    if verb == "run":
        assert cli.main(["run", "--resume", "--out", str(run)]) == 2
        said = capsys.readouterr().err
        assert "outside the run folder" in said or "started with" in said
    assert list((tmp_path / "outside").iterdir()) == []


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("force", [False, True])
def test_an_output_replaces_no_pipe(tmp_path: Path, force: bool, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = make_run(tmp_path / "run"), fifo(tmp_path / "pipe")
    assert cli.main(["report", str(run), "--out", str(out), *(["--force"] if force else [])]) == 2
    assert "is a device, a pipe or a socket; name a file" in capsys.readouterr().err
    assert out.is_fifo()
    with pytest.raises(ValueError, match="a pipe"):
        write_aside(out, "text")
    assert out.is_fifo() and [p.name for p in tmp_path.iterdir() if p.name.startswith(".partial")] == []


def test_of_a_link_the_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "folder").mkdir()
    for target, link in (("kept", "a"), ("folder", "b")):
        (tmp_path / link).symlink_to(tmp_path / target)
        with aside(tmp_path / link) as partial:
            partial.write_text("new")
        assert (tmp_path / link).read_text() == "new" and not (tmp_path / link).is_symlink()
    assert (tmp_path / "kept").read_text() == "kept" and (tmp_path / "folder").is_dir()


def test_a_pipe_in_a_run_folder_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    fifo(run / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics.jsonl is a device, a pipe"), locked(run):
        pass


# -- the caller's folder ----------------------------------------------------------------------------------------------------


def test_programs_start_with_this_package_wherever_they_are_started(tmp_path: Path) -> None:
    for name in ("rlzoo", "algorithms", "numpy", "tyro"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong one')")
    for folder in (tmp_path, ROOT.parent):
        done = subprocess.run(
            [*own_program("rlzoo.cli"), "--version"], cwd=folder, env=own_environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and done.stdout.startswith("rlzoo "), done.stderr


def test_no_program_is_started_in_another_way() -> None:
    for path in [p for folder in ("rlzoo", "benchmarks") for p in (ROOT / folder).rglob("*.py")]:
        if path.name != "processes.py":
            assert "sys.executable" not in path.read_text(encoding="utf-8"), path


@pytest.fixture
def wandering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[bool]]:
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.chdir(tmp_path)

    def reward(items: Any) -> list[bool]:
        os.chdir(away)
        return [True for _ in items]

    return reward


def test_a_reward_that_changes_directory_moves_nothing(tmp_path: Path, wandering: Callable[..., list[bool]]) -> None:
    plugin = PluginReward(wandering, "wandering")
    assert [g.correct for g in plugin.collect(plugin.submit([("p", "x"), ("p", "y")]))] == [1.0, 1.0]  # type: ignore[list-item]
    assert Path.cwd() == tmp_path


def test_a_run_whose_reward_changes_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path, wandering: Callable[..., list[bool]]
) -> None:
    module = type(sys)("wandering_module")
    module.reward = wandering  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandering_module", module)
    problems = write_problems(tmp_path / "problems.jsonl", *GOOD)
    argv = ["run", "--algo", "grpo", "--model", str(model_folder), "--problems", str(problems), "--reward", "wandering_module:reward"]
    assert cli.main([*argv, *SMALL, *SHORT, "--schedule.steps", "2", "--trackers", "none", "--out", "here"]) == 0
    assert len(RunFolder.open(tmp_path / "here").metrics()) == 2 and list((tmp_path / "away").iterdir()) == []


def test_a_module_that_changes_directory_on_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mover_plugin.py").write_text(f"import os\nos.chdir({str(tmp_path.parent)!r})\nreward = len\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert registry.plugin("mover_plugin:reward", "reward") is len
    assert Path.cwd() == tmp_path


def test_two_that_start_in_one_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    places = []
    for _ in range(3):
        places.append(RunFolder.place(None, "x", {}, resume=False, whole=lambda kept, origin: kept))
        RunFolder.create(places[-1], {"algo": "x"})
    assert len(set(places)) == 3 and all(str(os.getpid()) in place.name for place in places)


# -- graders killed from outside --------------------------------------------------------------------------------------------


def kill_in_turn(grader: Grader, number: signal.Signals, times: int, child: bool) -> int:
    """Kill a grading child or its supervisor `times` times, each as soon as there is one; the kills that hit."""
    hit, seen = 0, set()
    while hit < times:
        found = False
        for pid in grader.worker_pids():
            try:
                supervisor = psutil.Process(pid)
                for process in supervisor.children() if child else [supervisor]:
                    if process.pid not in seen:
                        seen.add(process.pid)
                        process.send_signal(number)
                        hit, found = hit + 1, True
            except psutil.Error:
                continue
        if not found:
            time.sleep(0.01)
    return hit


@pytest.mark.parametrize("child", [True, False], ids=["child", "supervisor"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_batch_survives_ten_kills(number: signal.Signals, child: bool) -> None:
    pairs = [boxed(f"x+{1 + i % 2}+0*{i}") for i in range(40)]
    with Grader(GraderConfig(workers=1)) as grader:
        killer = threading.Thread(target=kill_in_turn, args=(grader, number, 10, child), daemon=True)
        grader.warm()
        killer.start()
        verdicts = []
        while killer.is_alive():
            verdicts = grader.grade([(gold, f"{text} {len(verdicts)}") for gold, text in pairs])
            grader._cache.clear()
            assert {v.kind for v in verdicts[::2]} == {Kind.RIGHT} and {v.kind for v in verdicts[1::2]} == {Kind.WRONG}
        killer.join(60)
        assert not killer.is_alive() and grader.counts[Kind.FAILED] == grader.counts[Kind.TIMED_OUT] == 0


def test_a_pair_whose_graders_are_always_killed_fails_and_is_no_verdict() -> None:
    with faulty() as grader:
        verdicts = grader.grade([boxed("kill:now"), boxed("1+x")])
        assert [v.kind for v in verdicts] == [Kind.FAILED, Kind.RIGHT]
        assert "killed from outside" in verdicts[0].detail
        assert until(lambda: len(grader.worker_pids()) == 1)
