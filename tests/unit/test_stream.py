import pytest

from rlzoo.data.problems import Problem
from rlzoo.data.stream import ProblemStream

PROBLEMS = [Problem(str(i), f"problem {i}", "1") for i in range(5)]


def keys(stream, count):
    return [key for key, _ in stream.take(count)]


def test_every_pass_uses_every_problem_once_in_its_own_order():
    stream = ProblemStream(PROBLEMS, seed=1)
    first, second = keys(stream, 5), keys(stream, 5)
    assert {k.split("/")[1] for k in first} == {k.split("/")[1] for k in second} == set("01234")
    assert len(set(first + second)) == 10 and [k.split("/")[1] for k in first] != [k.split("/")[1] for k in second]


def test_order_depends_on_seed_and_cursor_only():
    whole = keys(ProblemStream(PROBLEMS, seed=1), 12)
    resumed = ProblemStream(PROBLEMS, seed=1)
    resumed.cursor = 7
    assert keys(resumed, 5) == whole[7:]
    pieces = ProblemStream(PROBLEMS, seed=1)
    assert [k for n in (1, 4, 0, 7) for k in keys(pieces, n)] == whole
    assert keys(ProblemStream(PROBLEMS, seed=2), 12) != whole


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="empty"):
        ProblemStream([], seed=0)
