import threading

import pytest

from rlzoo.store.cost import PHASES, Ledger


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_phases_are_exclusive_and_sum_to_wall_time():
    clock = Clock()
    ledger = Ledger(devices=4, device="some core", clock=clock)
    clock.pass_(1)  # other
    with ledger.phase("sampling"):
        clock.pass_(10)
        with ledger.phase("grading"):
            clock.pass_(3)
            with ledger.phase("sampling"):  # a phase inside itself, by way of another, is not counted twice
                clock.pass_(0.5)
        clock.pass_(2)
    clock.pass_(4)  # other
    with ledger.phase("update"):
        clock.pass_(7)
    seconds = ledger.seconds()
    assert set(seconds) == set(PHASES)
    assert {k: v for k, v in seconds.items() if v} == {"other": 5, "sampling": 12.5, "grading": 3, "update": 7}
    assert ledger.wall_s == sum(seconds.values()) == clock.now - 100
    assert ledger.device_hours == pytest.approx(4 * 27.5 / 3600)


def test_reading_inside_a_phase_counts_up_to_now():
    clock = Clock()
    ledger = Ledger(clock=clock)
    with ledger.phase("evaluation"):
        clock.pass_(2)
        assert ledger.seconds()["evaluation"] == 2
        clock.pass_(3)
    assert ledger.seconds()["evaluation"] == 5


def test_a_phase_left_by_an_error_is_closed():
    clock = Clock()
    ledger = Ledger(clock=clock)
    with pytest.raises(KeyError), ledger.phase("sync"):
        clock.pass_(1)
        raise KeyError
    clock.pass_(2)
    assert (ledger.seconds()["sync"], ledger.seconds()["other"]) == (1, 2)


def test_resume_goes_on_counting_and_leaves_out_the_pause():
    clock = Clock()
    first = Ledger(devices=2, device="gpu", clock=clock)
    with first.phase("sampling"):
        clock.pass_(3600)
    saved = first.as_dict()
    clock.pass_(9999)
    again = Ledger(devices=2, device="gpu", clock=clock)
    again.resume(saved)
    assert again.as_dict() == saved
    more = Ledger(devices=8, device="gpu", clock=clock)
    more.resume(saved)
    with more.phase("update"):
        clock.pass_(1800)
    assert more.wall_s == 5400
    assert more.device_hours == pytest.approx(2 * 1 + 8 * 0.5)
    assert more.as_dict()["device_seconds"]["update"] == 8 * 1800


def test_overlapped_work_is_told_beside_the_phases_and_goes_on_after_a_resume():
    clock, graded = Clock(), [1.5]
    first = Ledger(clock=clock)
    assert first.as_dict()["overlapped"] == {}
    first.beside("grading_cpu_s", lambda: graded[0])
    with first.phase("sampling"):
        clock.pass_(10)
        graded[0] = 4.0
    saved = first.as_dict()
    assert saved["overlapped"] == {"grading_cpu_s": 4.0}
    assert saved["wall_s"] == sum(saved["seconds"].values()) == 10, "it is in no phase"
    again = Ledger(clock=clock)
    again.beside("grading_cpu_s", lambda: 0.5)  # of this session
    again.resume(saved)
    again.resume(saved)
    assert again.overlapped() == {"grading_cpu_s": 8.5}
    again.resume({name: value for name, value in saved.items() if name != "overlapped"})  # of an older version
    assert again.overlapped() == {"grading_cpu_s": 8.5}


def test_refusals():
    with pytest.raises(ValueError, match="devices = 0"):
        Ledger(devices=0)
    with pytest.raises(ValueError, match="unknown phase 'dreaming'; allowed are sampling"), Ledger().phase("dreaming"):
        pass
    with pytest.raises(ValueError, match="incomplete"):
        Ledger().resume({"devices": 1})
    good = Ledger().as_dict()
    with pytest.raises(ValueError, match="unknown phases: naps"):
        Ledger().resume(good | {"seconds": {"naps": 1.0}})


def test_another_thread_is_refused():
    ledger, caught = Ledger(), []

    def enter() -> None:
        try:
            with ledger.phase("grading"):
                pass
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert caught and "main-thread" in caught[0]
