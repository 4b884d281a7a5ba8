"""Stop rules, seeds, samplers and the event loop, on the scripted backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from rlzoo.backends.drawing import uniforms
from rlzoo.backends.scripted import ScriptedBackend, respond
from rlzoo.builder import TreeBuilder
from rlzoo.sampling.base import Extend, Growth, SamplerOptions
from rlzoo.sampling.chains import Chains
from rlzoo.sampling.grow import Prompt, grow, grow_iter
from rlzoo.sampling.nary import Nary
from rlzoo.sampling.seeds import mix, request_seed, splitmix64
from rlzoo.sampling.stopping import StopRules, classify, has_boxed, repeats
from rlzoo.tree import ROOT, Role, Stop

LIMITS = {"response_tokens": 5, "max_response_tokens": 10, "depth": 1, "max_depth": 3}
LOOP = "all work and no play makes jack " * 9  # 32 characters, nine times
BOXED = r"so \boxed{\frac{1}{2}}."


# -- stop rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "given", "stop"),
    [
        ({}, {}, Stop.OPEN),
        ({}, {"ended": True}, Stop.EOS),
        ({}, {"ended": True, "response_text": BOXED}, Stop.ANSWER),
        ({}, {"response_text": BOXED}, Stop.OPEN),
        ({"boxed": "alone"}, {"response_text": BOXED}, Stop.ANSWER),
        ({"boxed": "off"}, {"ended": True, "response_text": BOXED}, Stop.EOS),
        ({}, {"ended": True, "response_text": r"\boxed{1"}, Stop.EOS),
        ({}, {"response_tokens": 10}, Stop.LENGTH),
        ({}, {"response_tokens": 10, "depth": 3}, Stop.LENGTH),
        ({}, {"response_tokens": 10, "ended": True}, Stop.EOS),
        ({}, {"depth": 3}, Stop.DEPTH),
        ({"repetition": "off"}, {"segment_text": LOOP}, Stop.OPEN),
        ({"repetition": "last"}, {"segment_text": LOOP}, Stop.REPETITION),
        ({"repetition": "last"}, {"segment_text": LOOP, "depth": 3}, Stop.DEPTH),
        ({"repetition": "last"}, {"segment_text": LOOP, "ended": True}, Stop.EOS),
        ({"repetition": "first"}, {"segment_text": LOOP, "ended": True, "response_text": BOXED}, Stop.REPETITION),
        ({"repetition": "first", "repetition_times": 10}, {"segment_text": LOOP}, Stop.OPEN),
        ({"repetition": "first"}, {"response_text": LOOP}, Stop.OPEN),  # only the newest segment is looked at
    ],
)
def test_stop_rules_and_their_order(rules: dict[str, Any], given: dict[str, Any], stop: Stop) -> None:
    assert classify(StopRules(**rules), **({"ended": False} | LIMITS | given)) == stop


def test_repetition_counts_overlaps() -> None:
    assert repeats("a" * 39, 32, 8)
    assert not repeats("a" * 38, 32, 8)
    assert not repeats("".join(str(i) for i in range(300)), 32, 8)
    assert not repeats("", 32, 8)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{3}", True),
        (r"\boxed {3}", True),
        (r"\boxed{\text{a}{{b}}}", True),
        (r"\boxed{\text{a}", False),
        (r"\boxed 3", False),
        (r"\boxed{\}", False),  # an escaped brace closes nothing
        (r"\boxed{\}}", True),
        (r"\boxed{1 and \boxed{2}", True),  # the second is complete
        ("boxed{3}", False),
        ("", False),
    ],
)
def test_boxed_answers_are_brace_matched(text: str, boxed: bool) -> None:
    assert has_boxed(text) == boxed


def test_bad_rules_are_refused() -> None:
    for bad in ({"boxed": "yes"}, {"repetition": "always"}, {"repetition_chars": 0}, {"repetition_times": 1}):
        with pytest.raises(ValueError, match="stopping"):
            StopRules(**bad)


# -- seeds --------------------------------------------------------------------------------------------------------------


def test_splitmix64_is_the_published_generator() -> None:
    """First outputs of the reference generator seeded with 0: its state grows by the golden ratio."""
    golden = 0x9E3779B97F4A7C15
    assert [splitmix64(i * golden % 2**64) for i in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_seeds_are_distinct_and_fixed() -> None:
    paths = [(), ((0, 0),), ((0, 1),), ((1, 0),), ((0, 0), (5, 0)), ((0, 0), (5, 1)), ((0, 5), (0, 0)), ((5, 0), (0, 0))]
    seeds = {request_seed(r, s, p, path) for r in range(3) for s in range(3) for p in ("a", "b", "ab") for path in paths}
    assert len(seeds) == 3 * 3 * 3 * len(paths)
    assert mix(1, 2) != mix(2, 1) != mix(12)
    assert mix("a", "b") != mix("ab")
    assert all(0 <= s < 2**64 for s in seeds)


def test_uniforms_depend_on_seed_and_index_alone() -> None:
    seeds = np.array([3, 2**64 - 1, 3], np.uint64)
    u = uniforms(seeds, np.array([0, 1, 7]))
    assert u[0] == uniforms(seeds[:1], np.array([0]))[0]
    assert u[0] == ((splitmix64(3) >> 11) + 0.5) * 2.0**-53
    many = uniforms(np.full(20_000, 9, np.uint64), np.arange(20_000))
    assert many.min() > 0 and many.max() < 1
    assert abs(many.mean() - 0.5) < 0.01 and abs(many.var() - 1 / 12) < 0.005
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.03


# -- samplers -----------------------------------------------------------------------------------------------------------


def test_samplers_describe_themselves() -> None:
    chains, nary = Chains(group_size=5, max_response_tokens=9), Nary(branching=3, segment_tokens=(2,), depth=4)
    assert (chains.max_depth, chains.max_response_tokens, chains.leaves_per_tree) == (1, 9, 5)
    assert (nary.max_depth, nary.max_response_tokens, nary.leaves_per_tree, nary.levels) == (4, 8, 81, (2, 2, 2, 2))
    assert chains.provides == {"siblings", "chains"} and nary.provides == {"siblings"}
    assert Nary(temperature=0.5, top_p=0.9, top_k=4).sampling.top_k == 4


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Chains(group_size=0), "group_size"),
        (lambda: Chains(max_response_tokens=0), "max_response_tokens"),
        (lambda: Nary(branching=0), "branching"),
        (lambda: Nary(segment_tokens=()), "segment_tokens"),
        (lambda: Nary(segment_tokens=(3, 0)), "segment_tokens"),
        (lambda: Nary(depth=2), "segment_tokens has 3 values"),
        (lambda: Nary(segment_tokens=(3,), depth=0), "depth"),
        (lambda: Chains(temperature=-1), "temperature"),
        (lambda: Nary(top_p=0), "top_p"),
        (lambda: Nary(top_k=-1), "top_k"),
    ],
)
def test_bad_options_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


# -- the event loop -----------------------------------------------------------------------------------------------------


def prompts_of(tokenizer: Any, count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", tokenizer.encode(f"{i}+{i}=")) for i in range(count)]


def test_nary_is_full_where_nothing_ends(tiny_tokenizer: Any) -> None:
    backend = ScriptedBackend(tiny_tokenizer, lambda context, seed: [seed % 50 + 9] * 99)
    (tree,) = grow(Nary(branching=3, segment_tokens=(2, 3, 4)), backend, prompts_of(tiny_tokenizer, 1), seed=0)
    assert tree.nodes == 1 + 3 + 9 + 27 and len(tree.leaves) == 27
    assert tree.lengths[1:].tolist() == [2] * 3 + [3] * 9 + [4] * 27
    assert tree.parent.tolist() == [-1, 0, 0, 0, *np.repeat(np.arange(1, 13), 3).tolist()]
    assert (tree.stop[tree.leaves] == Stop.LENGTH).all()
    assert tree.meta["problem"] == "p0"


def test_continuation_samples_one_answer_per_leaf_and_cuts_it(tiny_tokenizer: Any) -> None:
    """Three whole answers below the prompt, two fresh ones at each of their boundaries: 27 requests for the tree of 39 segments."""
    backend = ScriptedBackend(tiny_tokenizer, lambda context, seed: [seed % 50 + 9] * 99)
    sampler = Nary(branching=3, segment_tokens=(2, 3, 4), continuation=True)
    (tree,) = grow(sampler, backend, prompts_of(tiny_tokenizer, 1), seed=0)
    assert tree.nodes == 1 + 3 + 9 + 27 and len(tree.leaves) == 27
    assert tree.lengths[1:].tolist() == [2] * 3 + [3] * 9 + [4] * 27
    assert (tree.stop[tree.leaves] == Stop.LENGTH).all()
    for node in np.flatnonzero(tree.lengths > 0)[1:]:  # the first child is the rest of the answer: the script keeps its token
        children = [c for c in tree.children(int(node)) if set(tree.node_tokens(c)) == set(tree.node_tokens(int(node)))]
        assert len(tree.children(int(node))) == 0 or tree.children(int(node))[0] in children


def test_continuation_never_restarts_an_answer(tiny_tokenizer: Any) -> None:
    """Requests and forwarded work are counted: as many requests as leaves, and boundaries that an answer only touches are none."""
    for continuation in (False, True):
        backend = ScriptedBackend(tiny_tokenizer, eos_ids=range(40, 60), seed=3)
        asked: list[int] = []
        submit = backend.submit
        backend.submit = lambda requests, asked=asked, submit=submit: (asked.extend(r.max_tokens for r in requests), submit(requests))
        sampler = Nary(branching=3, segment_tokens=(2, 3, 4), continuation=continuation)
        trees = grow(sampler, backend, prompts_of(tiny_tokenizer, 40), seed=1)
        leaves, segments = sum(len(t.leaves) for t in trees), sum(t.nodes - 1 for t in trees)
        assert len(asked) == (leaves if continuation else segments) < (segments if continuation else segments + 1)
        assert set(asked) == ({9, 7, 4} if continuation else {2, 3, 4})
        for tree in trees:
            for node in range(1, tree.nodes):
                limit, children = (2, 3, 4)[int(tree.depth[node]) - 1], tree.children(node)
                assert len(children) in (0, 3) and tree.lengths[node] <= limit
                assert not children or (tree.lengths[node] == limit and tree.stop[node] == Stop.OPEN)
                assert children or tree.stop[node] in (Stop.EOS, Stop.ANSWER, Stop.LENGTH)


def test_continuation_keeps_the_distribution_of_trees(tiny_tokenizer: Any) -> None:
    """Segments, leaves and ends by level, over 400 trees of each form: means within four standard errors."""
    counted = []
    for continuation in (False, True):
        backend = ScriptedBackend(tiny_tokenizer, eos_ids=range(40, 80), seed=3, capacity=64)
        sampler = Nary(branching=3, segment_tokens=(2, 3, 4), continuation=continuation)
        trees = grow(sampler, backend, [Prompt(f"q{i}", [7, 8, 9]) for i in range(400)], seed=5)
        tokens = [np.bincount(t.tokens[3:], minlength=90)[[40, 50, 60, 79]].sum() for t in trees]
        levels = [np.bincount(t.depth[t.leaves], minlength=4)[1:] for t in trees]
        counted.append(np.column_stack([[t.nodes for t in trees], [t.sampled_tokens for t in trees], tokens, levels]))
    restarted, continued = counted
    error = np.sqrt(restarted.var(0, ddof=1) / 400 + continued.var(0, ddof=1) / 400)
    assert (error > 0).all() and (abs(restarted.mean(0) - continued.mean(0)) < 4 * error).all()
    assert not (restarted == continued).all()


def test_continuation_refuses_rules_that_end_an_answer_inside(tiny_tokenizer: Any) -> None:
    for stopping in (StopRules(boxed="alone"), StopRules(repetition="last")):
        with pytest.raises(ValueError, match=r"sampler.continuation samples whole answers"):
            Nary(continuation=True, stopping=stopping)


def test_a_segment_that_ends_is_a_leaf_at_once(tiny_tokenizer: Any) -> None:
    prompt = "1+1="
    script = respond(tiny_tokenizer, {prompt: ["2", "that is \\boxed{2}"]})
    backend = ScriptedBackend(tiny_tokenizer, script)
    trees = grow(
        Nary(branching=4, segment_tokens=(13, 13)), backend, [Prompt(str(i), tiny_tokenizer.encode(prompt)) for i in range(8)], seed=0
    )
    seen = set()
    for tree in trees:
        for leaf in tree.leaves:
            text, stop, depth = tiny_tokenizer.decode(tree.path_tokens(leaf).tolist()), Stop(tree.stop[leaf]), int(tree.depth[leaf])
            seen.add((text, stop, depth))
    # The box crosses the segment boundary after 13 tokens and is seen all the same.
    assert seen == {("2<eos>", Stop.EOS, 1), ("that is \\boxed{2}<eos>", Stop.ANSWER, 2)}


def test_the_last_level_is_cut_by_length_and_depth(tiny_tokenizer: Any) -> None:
    backend = ScriptedBackend(tiny_tokenizer, lambda context, seed: [7] * 3)  # the script falls silent after three tokens
    (tree,) = grow(Nary(branching=2, segment_tokens=(5, 5)), backend, prompts_of(tiny_tokenizer, 1), seed=0)
    assert (tree.stop[tree.leaves] == Stop.DEPTH).all()
    (tree,) = grow(Chains(group_size=2, max_response_tokens=3), backend, prompts_of(tiny_tokenizer, 1), seed=0)
    assert (tree.stop[tree.leaves] == Stop.LENGTH).all()


def test_repetition_ends_a_path(tiny_tokenizer: Any) -> None:
    backend = ScriptedBackend(tiny_tokenizer, lambda context, seed: [40] * 100)
    stopping = StopRules(repetition="last", repetition_chars=4, repetition_times=3)
    (tree,) = grow(Nary(branching=2, segment_tokens=(8, 8), stopping=stopping), backend, prompts_of(tiny_tokenizer, 1), seed=0)
    assert tree.nodes == 3 and (tree.stop[tree.leaves] == Stop.REPETITION).all()


def test_trees_arrive_as_they_finish_but_come_in_order(tiny_tokenizer: Any) -> None:
    script = respond(tiny_tokenizer, {f"{i}+{i}=": ["x" * (40 - 10 * i)] for i in range(4)})
    backend, arrived = ScriptedBackend(tiny_tokenizer, script), []
    prompts, sampler = prompts_of(tiny_tokenizer, 4), Chains(group_size=2, max_response_tokens=60)
    trees = grow(sampler, backend, prompts, seed=0, on_tree=lambda i, tree: arrived.append(i))
    assert arrived == [3, 2, 1, 0]
    assert [t.meta["problem"] for t in trees] == ["p0", "p1", "p2", "p3"]


def test_problems_in_flight_are_bounded_and_an_abandoned_loop_leaves_nothing(tiny_tokenizer: Any) -> None:
    backend = ScriptedBackend(tiny_tokenizer, capacity=8)
    submitted: list[int] = []
    submit = backend.submit

    def spy(requests: Any) -> None:
        requests = list(requests)
        submitted.extend(r.id for r in requests)
        submit(requests)

    backend.submit = spy
    loop = grow_iter(Chains(group_size=4, max_response_tokens=20), backend, prompts_of(tiny_tokenizer, 50), seed=0)
    index, tree = next(loop)
    assert len(tree.leaves) == 4
    assert len(submitted) <= 4 * (index + 1) + 8 + 2 + 4 * 4
    loop.close()
    assert not backend._queue and not backend._rows


def test_prompts_are_checked_before_anything_is_sampled(tiny_tokenizer: Any) -> None:
    backend, sampler = ScriptedBackend(tiny_tokenizer, max_context=20), Chains(max_response_tokens=10)
    for bad, match in (
        ([Prompt("a", [5]), Prompt("a", [6])], "'a' is given twice"),
        ([Prompt("a", [])], "'a' has an empty prompt"),
        ([Prompt("ok", [5]), Prompt("long one", [5] * 11)], "'long one': prompt of 11 tokens .* at most 10 .* 20 tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            grow_iter(sampler, backend, bad, seed=0)
    assert backend.stats().sampled_tokens == 0


@dataclass(frozen=True, kw_only=True)
class Cutting(SamplerOptions):
    """Two chains; when both are back, the lower-numbered is cut at token 3 and continued three times: like a fallback."""

    name: ClassVar[str] = "cutting"
    provides: ClassVar[frozenset[str]] = frozenset()
    max_response_tokens: int = 8
    max_depth: int = 3
    leaves_per_tree: int = 5
    wrong: bool = False
    forgets: bool = False  # settles what it extends later

    def plant(self, builder: TreeBuilder, rng: np.random.Generator, progress: float) -> Any:
        return CuttingGrowth(self, builder, rng)


class CuttingGrowth(Growth):
    def __init__(self, options: Cutting, builder: TreeBuilder, rng: np.random.Generator) -> None:
        self.options, self.builder, self.back, self.draw = options, builder, [], rng.integers(1 << 30)

    def start(self) -> list[Extend]:
        return [Extend(ROOT, 2, 8)]

    def grown(self, node: int) -> list[Extend]:
        self.back.append(node)
        if self.options.wrong:
            return [Extend(node, 1, 4)]
        if len(self.back) != 2:
            return []
        upper = self.builder.split(min(self.back), 3)
        again = self.builder.split(min(self.back), 2)  # cuts the lower part once more
        return [Extend(upper, 3, 99), Extend(again, 1, 99, Role.PROBE)]

    def settled(self, node: int) -> tuple[int, ...]:
        return (node,) if self.options.forgets else ()


@pytest.mark.parametrize("forgets", [False, True])
def test_a_sampler_may_cut_and_continue(forgets: bool, tiny_tokenizer: Any) -> None:
    for capacity in (2, 16):
        backend, seeds, submit, limits = ScriptedBackend(tiny_tokenizer, lambda c, s: [s % 100 + 70] * 99, capacity=capacity), [], None, []
        submit = backend.submit

        def spy(requests: Any, submit: Any = submit, seeds: Any = seeds, limits: Any = limits) -> None:
            requests = list(requests)
            seeds += [r.seed for r in requests]
            limits += [len(r.context) + r.max_tokens for r in requests]
            submit(requests)

        backend.submit = spy
        prompts = prompts_of(tiny_tokenizer, 3)
        trees = grow(Cutting(forgets=forgets), backend, prompts, seed=0)
        assert len(set(seeds)) == len(seeds) == 3 * 6
        assert set(limits) == {len(p.ids) + 8 for p in prompts}  # clamped to what the response has left
        for tree in trees:
            assert len(tree.leaves) == 5
            assert tree.parent.tolist() == [-1, 0, 0, 1, 1, 1, 1, 3, 3]
            assert tree.lengths[1:].tolist() == [3, 8, 2, 5, 5, 5, 3, 3]
            assert tree.role.tolist() == [0] * 8 + [1]
            assert (tree.response_lengths() == 8).all()


def test_a_sampler_that_extends_what_ended_is_stopped(tiny_tokenizer: Any) -> None:
    backend = ScriptedBackend(tiny_tokenizer, lambda c, s: [9] * 99)
    with pytest.raises(ValueError, match=r"'p0': sampler cutting extends node \d \(stop LENGTH"):
        grow(Cutting(wrong=True), backend, prompts_of(tiny_tokenizer, 1), seed=0)
    assert not backend._queue and not backend._rows
