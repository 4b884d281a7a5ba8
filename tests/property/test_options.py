"""Any value given for an option, from a file or from Python, is either kept unchanged or refused in one sentence."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlzoo import registry
from rlzoo.algorithm import load
from rlzoo.config import PLUGGABLE, RunConfig, build
from rlzoo.credit.ancestors import Ancestors
from rlzoo.evaluation.options import EvalConfig
from rlzoo.options import LARGEST, SMALLEST, Within, allow
from rlzoo.rewards.reward import PluginReward
from rlzoo.sampling.nary import Nary
from rlzoo.sampling.segments import Segments
from rlzoo.store.toml import dump_toml, parse_toml

ODD = [
    math.nan, math.inf, -math.inf, -1, 0, 1, 10**400, -(10**400), 10**5000, 2**63, 2**31, 1e-320, 1e300, -0.5, 2.5, 3.0, True, False, None,
    "", "abc", "none", "3", "auto", [], [1], [[1]], [1, [2]], ["a"], [2.5], [True], [math.nan], [0], [10**400], (), (1,), ("a",), {},
    {"a": 1},
    {"name": []}, b"x", object(), SimpleNamespace(),
]  # fmt: skip
CONFIGS = [
    {"algo": registry.names("algorithm")[0]} | {part: {"name": name} for part, name in zip(PLUGGABLE, names, strict=True)}
    for names in [
        *[(sampler, "group", "policy") for sampler in registry.names("sampler")],
        *[("nary", credit, "policy") for credit in registry.names("credit")],
        *[("chains", "group", loss) for loss in registry.names("loss")],
    ]
]


def options(value, path=()):
    """Paths to every option at or below a section."""
    if not dataclasses.is_dataclass(value):
        return [path]
    return [found for f in dataclasses.fields(value) if f.init for found in options(getattr(value, f.name), (*path, f.name))]


def places():
    """Every option of every registered part and section: base tables, path."""
    seen = {}
    for tables in CONFIGS:
        for section, value in build([("base", tables)]).sections().items():
            for path in options(value, (section,)):
                seen.setdefault((type(value), path), (tables, path))
                if len(path) == 2:  # a table of options itself may be replaced too
                    seen.setdefault((type(value), path[:1]), (tables, path[:1]))
    return list(seen.values())


PLACES = places()


def put(tables, path, value):
    (head, *rest) = path
    inner = tables.get(head, {})
    return tables | {head: put(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def at(value, path):
    for name in path:
        value = getattr(value, name)
    return value


def same(found, given):
    """Taken as it is: only arrays become tuples, whole numbers fractions where the option is one, and "none" no value."""
    if isinstance(found, tuple) and isinstance(given, list | tuple):
        return len(found) == len(given) and all(map(same, found, given))
    if isinstance(found, float) and isinstance(given, int) and not isinstance(given, bool):
        return found == given
    return (found is None and given == "none") or (type(found) is type(given) and found == given)


def refusal(error):
    said = str(error)
    assert said and "\n" not in said and len(said) < 500, said
    return said


@pytest.mark.parametrize(("tables", "path"), PLACES, ids=[f"{t['sampler']['name']}-{t['credit']['name']}:{'.'.join(p)}" for t, p in PLACES])
def test_every_option_takes_a_value_as_it_is_or_refuses_it(tables, path):
    for value in ODD:
        try:
            config = build([("c.toml", put(tables, path, value))])
        except ValueError as error:
            assert path[-1] in refusal(error) or "one response per problem" in str(error), (value, str(error))
            continue
        found = at(config.sections()[path[0]], path[1:])
        assert dataclasses.is_dataclass(found) or same(found, value), (value, found)
        kept = dump_toml(config.to_dict())
        assert build([("kept", parse_toml(kept, "kept"))]) == config


@pytest.mark.parametrize(
    ("tables", "path"), [p for p in PLACES if len(p[1]) > 1], ids=lambda p: ".".join(p) if isinstance(p, tuple) else ""
)
def test_every_option_given_in_python_is_judged_alike(tables, path):
    config = build([("base", tables)])
    owner = at(config.sections()[path[0]], path[1:-1])
    for value in ODD:
        try:
            part = dataclasses.replace(owner, **{path[-1]: value})
        except ValueError as error:
            refusal(error)
            continue
        assert same(getattr(part, path[-1]), value) and not isinstance(value, list)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(EvalConfig)])
def test_every_option_of_an_evaluation_is_judged_alike(name):
    for value in ODD:
        try:
            config = EvalConfig.from_dict({name: value}, "c.toml")
        except ValueError as error:
            assert name in refusal(error), (value, str(error))
            continue
        found = getattr(config, name)
        assert dataclasses.is_dataclass(found) or same(found, value)
        assert EvalConfig.from_dict(parse_toml(dump_toml(config.to_dict()), "kept"), "kept") == config


@pytest.mark.parametrize("key", ["algo", *PLUGGABLE])
def test_a_name_is_a_text(key):
    for value in [[], ["group"], {}, {"name": ["group"]}, {"name": {}}, {"name": 3}, 3, 2.5, True]:
        if (key, value) in [(part, {}) for part in PLUGGABLE]:
            continue  # an empty table changes nothing
        with pytest.raises(ValueError, match=key) as caught:
            build([("c.toml", {"algo": "grpo"} | {key: value})])
        refusal(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.floats(-2, 2) | st.integers(-2, 2) | st.floats(), st.booleans(), st.booleans())
def test_bounds_let_through_what_they_hold(value, above, below):
    inside = (value > 0 if above else value >= 0) and (value < 1 if below else value <= 1) and (value == 0 or value >= SMALLEST)
    try:
        allow(value, Annotated[float, Within(0, 1, above=above, below=below)], "here")
    except ValueError as error:
        assert not inside and refusal(error).startswith(f"here is {value!r}; allowed: a number ")
    else:
        assert inside


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3, 0.0099, -1.0, 1e4, math.nan, math.inf])
@pytest.mark.parametrize("algo", registry.names("algorithm"))
def test_temperatures_that_underflow_are_refused(algo, temperature):
    with pytest.raises(ValueError, match=r"sampler.temperature is .*; allowed: a number from 0.01 to 1000, or 0"):
        load(algo, temperature=temperature)


@pytest.mark.parametrize(("branching", "depth"), [(4, 40), (4, 9), (2, 17), (65536, 2), (2, 4096), (257, 2)])
def test_trees_of_too_many_leaves_are_refused(branching, depth):
    with pytest.raises(ValueError, match=r"sampler.branching = .* makes .* responses per problem; allowed: at most 65536"):
        Nary(branching=branching, depth=depth, segment_tokens=(4,))
    assert Nary(branching=4, depth=8, segment_tokens=(4,)).leaves_per_tree == 65536


@pytest.mark.parametrize("value", [math.inf, -math.inf, 10**400, 1e300, "good", None, 1j, [1], SimpleNamespace(correct="x", kind="k")])
def test_rewards_that_are_no_finite_number_stop_the_run(value):
    reward = PluginReward(lambda items: [value for _ in items], "m:f")
    with pytest.raises(RuntimeError, match=r"reward m:f returned .*; allowed are") as caught:
        reward.collect(reward.submit([("p", "text")]))
    refusal(caught.value)
    assert abs(PluginReward(lambda items: [LARGEST], "m:f").collect([("p", "text")])[0].reward) == LARGEST


LONE = [
    ("chains", {"group_size": 1}, "group", "compares the responses of a problem"),
    ("nary", {"branching": 1}, "group", "compares the responses of a problem"),
    ("nary", {"branching": 1}, "siblings", "compares the responses of a problem"),
    ("segments", {"width": 1, "initial": [1], "branching": [1]}, "siblings", "compares the responses of a problem"),
    ("chains", {"group_size": 1}, "ancestors", "filter.drop_dead drops"),
]


@pytest.mark.parametrize(("sampler", "values", "credit", "message"), LONE)
def test_a_lone_response_is_refused_where_it_would_train_nothing(sampler, values, credit, message):
    tables = {"algo": "grpo", "sampler": {"name": sampler} | values, "credit": {"name": credit}}
    with pytest.raises(ValueError, match=f"sampler {sampler} gives one response per problem, and .*{message}"):
        build([("c.toml", tables)])


def test_a_lone_response_trains_where_it_is_compared_with_the_batch():
    tables = {"algo": "grpo", "sampler": {"group_size": 1}, "credit": {"name": "ancestors"}, "filter": {"drop_dead": False}}
    config = build([("c.toml", tables)])
    assert config.algorithm.sampler.leaves_per_tree == 1 and config.algorithm.credit == Ancestors()
    assert isinstance(config, RunConfig)
    with pytest.raises(ValueError, match="compares the responses"):
        build([("c.toml", tables | {"credit": {"name": "ancestors", "level": "segment"}})])


def test_segments_that_never_branch_are_refused():
    with pytest.raises(ValueError, match="grows one path"):
        Segments(initial=(1,), branching=(1,), fallback="none")


@pytest.mark.parametrize("text", ["a = 1" + "0" * 5000, "a = " + "[" * 20000, "a = [1", "a = 1\na = 2", "\x00"])
def test_what_is_not_toml_is_said_with_its_place(text):
    with pytest.raises(ValueError, match=r"here\.toml is not TOML: "):
        parse_toml(text, "here.toml")
