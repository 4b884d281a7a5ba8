import io

import pytest
from rich.console import Console

from rlzoo.report.progress import Progress, counting, figures

ROW = {
    "reward": 0.5,
    "pass_at_1": 0.4321,
    "length": 55.4,
    "truncated": 0.01,
    "dead_groups": 0.25,
    "tokens_per_s": 25_400.0,
    "unique_tokens_per_s": 9_000.0,
    "update/ratio_mean": 1.0004,
    "update/kl_old": 0.0012,
    "device_hours": 0.0123,
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(total=100, every_s=10.0):
    out, clock = io.StringIO(), Clock()
    return Progress(total, console=Console(file=out), every_s=every_s, clock=clock), out, clock


def test_every_figure_is_named():
    assert figures(ROW) == (
        "reward 0.500 · Pass@1 43.2 % · length 55 · cut off 1.0 % · dead groups 25.0 % · tokens/s 25.4k · unique/s 9k · "
        "ratio 1.000 · KL 1.2e-03 · device-hours 0.0123"
    )
    assert figures({"reward": float("nan"), "length": None, "other": 3}) == ""
    assert figures({"update/kl_old": 1.0, "update/kl_ref": 2.0}) == "KL 2.0e+00"


def test_plain_lines_are_timed_rare_and_include_the_last():
    progress, out, clock = plain()
    for step in range(1, 36):
        clock.now = step - 1.0
        progress.update(ROW | {"step": step})
    progress.close()
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split("·")[0].strip() for line in lines] == [
        "[     0.0 s] step 1/100",
        "[    10.0 s] step 11/100",
        "[    20.0 s] step 21/100",
        "[    30.0 s] step 31/100",
        "[    34.0 s] step 35/100",
    ]
    assert all("reward 0.500" in line for line in lines)  # one unbroken line each


def test_the_last_row_is_not_printed_twice():
    progress, out, _ = plain()
    with progress:
        progress.update({"reward": 1.0}, step=7)
    assert out.getvalue().count("\n") == 1


def test_notes_come_at_once():
    progress, out, clock = plain()
    clock.now = 3.0
    progress.note("memory ran out")
    assert out.getvalue() == "[     3.0 s] memory ran out\n"


def test_a_terminal_gets_a_bar_and_the_figures():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    with Progress(10, "step", console=console) as progress:
        progress.update(ROW | {"step": 4})
        progress.note("a note")
    assert "4/10" in out.getvalue() and "Pass@1 43.2 %" in out.getvalue() and "a note" in out.getvalue()


def test_counting_shows_the_first_and_the_last():
    out = io.StringIO()
    with counting("responses", console=Console(file=out)) as count_up:
        for done in range(1, 101):
            count_up(done, 100)
    first, last = out.getvalue().splitlines()
    assert first.endswith("responses 1/100") and last.endswith("responses 100/100")
    with counting("nothing", console=Console(file=out)):
        pass


def test_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match="progress over 0 steps"):
        Progress(0)
