"""The segments sampler: geometry, budget transfer, splits, stop rules, fallback, and the known bugs of the released code."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlzoo.backends.protocol import SegmentResult
from rlzoo.backends.scripted import ScriptedBackend, respond
from rlzoo.sampling import segments
from rlzoo.sampling.fallback import Finished, cut_at, ordered
from rlzoo.sampling.grow import Prompt, grow
from rlzoo.sampling.segments import Segments
from rlzoo.sampling.shares import scheduled, softmax, uniform_shares, weighted_shares
from rlzoo.sampling.stopping import StopRules
from rlzoo.tree import ROOT, Stop, Tree

CUTS = ("random", "min_logprob_token", "block", "inverse_block", "from_start")
CANDIDATES = ("soft_boxed_and_eos", "random_all", "finished_first", "finished_first_strict", "longer_first", "boxed_ge_window")
RNG = np.random.default_rng


def prompts_of(tokenizer: Any, count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", tokenizer.encode(f"{i}+{i}=")) for i in range(count)]


def endless(context: Any, seed: int) -> list[int]:
    """Never ends and hardly repeats."""
    return RNG(seed).integers(70, 250, 400).tolist()


def same_trees(a: list[Tree], b: list[Tree]) -> bool:
    return all(np.array_equal(x.parent, y.parent) and np.array_equal(x.tokens, y.tokens) for x, y in zip(a, b, strict=True))


class Moody:
    """Answers, ends, repeats itself, falls silent or goes on, as the seed decides."""

    def __init__(self, tokenizer: Any) -> None:
        say = tokenizer.encode
        eos = [tokenizer.eos_token_id]
        think = list(range(70, 100))
        self.moods = [
            say("so \\boxed{7}.") + eos,
            think + say("\\boxed{7}") + eos,
            think + eos,
            say("enough") + eos,
            say("ab" * 60),
            say("hm"),
            say("\\boxed{1"),
        ]

    def __call__(self, context: Any, seed: int) -> list[int]:
        rng = RNG(seed)
        mood = int(rng.integers(len(self.moods) + 3))
        return self.moods[mood] if mood < len(self.moods) else rng.integers(70, 250, 400).tolist()


class Noisy(ScriptedBackend):
    """Follows its script with log-probs made up from the tokens."""

    def step(self) -> list[SegmentResult]:
        return [replace(r, logprobs=-RNG(r.tokens).exponential(size=len(r.tokens))) for r in super().step()]


# -- geometry -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "branching", "saved"), [(4, 2, 53), (5, 2, 42), (6, 2, 35), (7, 2, 30), (14, 2, 15), (28, 2, 8), (14, 4, 10), (14, 8, 6)]
)
def test_tokens_saved_on_full_length_paths(depth: int, branching: int, saved: int, tiny_tokenizer: Any) -> None:
    sampler = Segments(width=16, depth=depth, segment_tokens=3, branching=(branching,), initial=(2,))
    (tree,) = grow(sampler, ScriptedBackend(tiny_tokenizer, endless), prompts_of(tiny_tokenizer, 1), seed=0)
    assert len(tree.leaves) == 16 and (tree.response_lengths() == 3 * depth).all()
    assert tree.unrolled_tokens == 16 * 3 * depth
    assert 100 * (1 - tree.sampled_tokens / tree.unrolled_tokens) == pytest.approx(
        saved, abs=0.51
    )  # the claims are whole per cent; 42.5 is called 42


def test_an_ended_path_gives_its_budget_to_the_others(tiny_tokenizer: Any) -> None:
    """Four starts, three of which end: with b = 2 the survivor gets 2 * (3 + 1) = 8 continuations."""
    eos = tiny_tokenizer.eos_token_id

    class Script:
        asked = 0

        def __call__(self, context: Any, seed: int) -> list[int]:
            self.asked += 1
            return [90, eos] if self.asked <= 3 else [95] * 400

    sampler = Segments(width=16, depth=3, segment_tokens=4, branching=(2,), initial=(4,))
    (tree,) = grow(sampler, ScriptedBackend(tiny_tokenizer, Script()), prompts_of(tiny_tokenizer, 1), seed=0)
    assert [len(tree.children(n)) for n in range(tree.nodes)][:5] == [4, 0, 0, 0, 8]
    assert len(tree.leaves) == 16  # and at the next boundary 13 paths are left for 8 open ones: 5 of them get two
    assert sorted(len(tree.children(n)) for n in tree.children(4)) == [1, 1, 1, 2, 2, 2, 2, 2]


def test_a_tree_stops_short_without_fallback_and_is_full_with_it(tiny_tokenizer: Any) -> None:
    for fallback in ("none", "random"):
        backend = ScriptedBackend(tiny_tokenizer, lambda c, s: [tiny_tokenizer.eos_token_id])
        (tree,) = grow(Segments(width=7, initial=(2,), fallback=fallback), backend, prompts_of(tiny_tokenizer, 1), seed=0)
        assert len(tree.leaves) == (7 if fallback == "random" else 2)
        report = tree.meta["sampler"]
        assert report["fallback_paths"] == report["restarts"] == len(tree.leaves) - 2


def test_a_budget_of_tokens_limits_the_paths(tiny_tokenizer: Any) -> None:
    counts = {}
    for tokens in (0, 40, 80, 200):
        sampler = Segments(width=16, depth=4, segment_tokens=5, initial=(2,), max_tree_tokens=tokens, min_width=3)
        (tree,) = grow(sampler, ScriptedBackend(tiny_tokenizer, endless), prompts_of(tiny_tokenizer, 1), seed=0)
        counts[tokens] = len(tree.leaves)
    assert counts[0] == 16 and 3 <= counts[40] <= counts[80] <= counts[200] <= 16 and counts[40] < counts[200]


@pytest.mark.parametrize("length", [1, 3, 5, 11])
def test_a_budget_of_tokens_takes_another_path_for_as_long_as_the_finished_ones(tiny_tokenizer: Any, length: int) -> None:
    """Fallback continues while a whole path more fits, not while a segment does."""
    eos, long = tiny_tokenizer.eos_token_id, 250

    def script(context: Any, seed: int) -> list[int]:
        return [long] * (length - 1 - list(context).count(long)) + [eos]

    for paths in (2, 5, 12):
        sampler = Segments(width=64, depth=6, segment_tokens=4, branching=(1,), initial=(2,), fallback="from_start")
        sampler = replace(sampler, max_tree_tokens=paths * length + length - 1)
        (tree,) = grow(sampler, ScriptedBackend(tiny_tokenizer, script), prompts_of(tiny_tokenizer, 1), seed=0)
        assert len(tree.leaves) == paths and tree.response_lengths().tolist() == [length] * paths


# -- splits -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 9))
def test_even_shares(paths: int, extra: int, seed: int) -> None:
    total = paths + extra
    last, drawn = uniform_shares(total, paths, "last", RNG(seed)), uniform_shares(total, paths, "random", RNG(seed))
    assert last == [total // paths] * (paths - 1) + [total // paths + total % paths]
    assert sum(drawn) == total and max(drawn) - min(drawn) <= 1


def test_the_remainder_goes_to_every_path_alike() -> None:
    got = np.zeros(3)
    for seed in range(3000):
        got += uniform_shares(4, 3, "random", RNG(seed))
    assert np.abs(got / 3000 - 4 / 3).max() < 0.05


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8), st.integers(0, 30))
def test_weighted_shares_follow_largest_remainders(weights: list[float], extra: int) -> None:
    normal = np.array(weights) / sum(weights)
    shares = np.array(weighted_shares(len(weights) + extra, normal))
    assert shares.sum() == len(weights) + extra and shares.min() >= 1
    assert np.abs(shares - 1 - normal * extra).max() < 1 + 1e-9


def test_weighted_shares_by_hand() -> None:
    assert weighted_shares(10, np.array([0.5, 0.3, 0.2])) == [5, 3, 2]  # 1 + 3.5, 2.1, 1.4: the odd one to the first
    assert softmax([0.0, np.log(3.0)], 1.0).tolist() == pytest.approx([0.25, 0.75])
    assert softmax([0.0, 2 * np.log(3.0)], 2.0).tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    ("split", "favours", "shares"),
    [
        # two open paths of log-probs -1 -1 -1 -1 and -3 -1 -0.1 -0.1 (segments of two); sums -4, -4.2; means of the last two -1, -0.1
        ("response_sum", "low", [4, 4]),
        ("segment_mean", "low", [5, 3]),
        ("segment_mean", "high", [3, 5]),
        ("response_mean", "high", [4, 4]),
    ],
)
def test_splits_by_log_prob(split: Any, favours: Any, shares: list[int], tiny_tokenizer: Any) -> None:
    from rlzoo.builder import TreeBuilder

    builder = TreeBuilder([5])
    sampler = Segments(width=16, segment_tokens=2, split=split, split_favours=favours)
    growth = sampler.plant(builder, RNG(0), 0.0)
    paths = ([-1.0, -1.0, -1.0, -1.0], [-3.0, -1.0, -0.1, -0.1])
    leaves = [builder.add(builder.add(ROOT, [9, 9], values[:2]), [9, 9], values[2:]) for values in paths]
    assert growth._shares(leaves, 8) == shares  # exp(0.9 / 2) : 1 is 0.61 : 0.39 of six


def test_the_temperature_follows_half_a_sine() -> None:
    assert scheduled((2.0,), 0.3) == 2.0
    assert [round(scheduled((5.0, 1.0), t), 4) for t in (0, 0.25, 0.5, 1)] == [5.0, 4.4142, 3.0, 1.0]
    assert [scheduled((0.5, 10.0), t) for t in (0, 1)] == pytest.approx([0.5, 10.0])
    assert Segments(split_temperature=(5.0, 1.0)).plant(None, None, 0.5).temperature == pytest.approx(3.0)  # type: ignore[arg-type]


# -- fallback -----------------------------------------------------------------------------------------------------------


def finished(tokens: int, stop: Stop = Stop.EOS, logprobs: Any = None) -> Finished:
    return Finished(tokens, stop, np.full(tokens, -1.0) if logprobs is None else np.array(logprobs))


@pytest.mark.parametrize(("tokens", "most", "cuts"), [(10, 0, {0, 4, 8}), (8, 0, {0, 4}), (10, 2, {4, 8}), (4, 0, {0}), (3, 0, {0})])
def test_random_cuts_are_window_boundaries(tokens: int, most: int, cuts: set[int]) -> None:
    drawn = Counter(cut_at(finished(tokens), "random", window=4, max_windows=most, block=128, rng=RNG(s)) for s in range(300))
    assert set(drawn) == cuts and min(drawn.values()) > 300 / len(cuts) * 0.7


def test_cuts_by_log_prob() -> None:
    path = finished(9, logprobs=[-1, -9, -1, -1, -2, -2, -0.1, -0.1, -0.1])

    def cuts(policy: Any, **options: int) -> Counter[int]:
        values = {"window": 3, "max_windows": 0, "block": 3} | options
        return Counter(cut_at(path, policy, rng=RNG(s), **values) for s in range(600))

    assert cuts("min_logprob_token") == {1: 600}
    assert cuts("min_logprob_token", max_windows=2) == {4: 600}
    assert cuts("from_start") == {0: 600}
    low, high = cuts("block"), cuts("inverse_block")  # means -3.67, -1.67, -0.1
    weights = np.exp([3.667, 1.667, 0.1])
    assert [low[c] / 600 for c in (0, 3, 6)] == pytest.approx((weights / weights.sum()).tolist(), abs=0.06)
    assert high[6] > high[3] > high[0]


def test_candidates() -> None:
    paths = [
        finished(5, Stop.EOS),
        finished(20, Stop.ANSWER),
        finished(9, Stop.LENGTH),
        finished(3, Stop.ANSWER),
        finished(4, Stop.REPETITION),
    ]

    def first(policy: Any) -> Counter[int]:
        return Counter(ordered(paths, policy, 4, RNG(s))[0].tokens for s in range(2000))

    assert set(first("soft_boxed_and_eos")) == {5, 20, 3}
    assert set(first("random_all")) == {5, 20, 9, 3, 4}
    assert set(first("boxed_ge_window")) == {20}
    weighted = first("finished_first")
    assert weighted[20] / 2000 == pytest.approx(7 / 24, abs=0.03) and weighted[4] / 2000 == pytest.approx(2 / 24, abs=0.03)
    assert first("longer_first")[20] / 2000 == pytest.approx(20 / 41, abs=0.03)


class Watch:
    """Every state in which the sampler asks for something: paths it will have active, and finished so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: list[tuple[int, int]] = []
        ask = segments._Boundaries._ask

        def watched(growth: Any, continuations: Any) -> Any:
            extends = ask(growth, continuations)
            self.states.append((growth.awaited, len(growth.finished)))
            return extends

        monkeypatch.setattr(segments._Boundaries, "_ask", watched)


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("cut", CUTS)
def test_every_fallback_fires_and_keeps_the_invariant(
    cut: Any, candidates: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    sampler = Segments(
        width=8, depth=4, segment_tokens=48, initial=(1, 3), fallback=cut, fallback_from=candidates, fallback_window=8,
        fallback_block_tokens=5, stopping=StopRules(repetition="last"),
    )  # fmt: skip
    trees = grow(sampler, Noisy(tiny_tokenizer, Moody(tiny_tokenizer), capacity=64), prompts_of(tiny_tokenizer, 150), seed=3)
    total: Counter[str] = Counter()
    for tree in trees:
        total.update(tree.meta["sampler"])
    assert total["fallback_rounds"] >= 20
    if cut != "from_start":  # restarts apart, there are real cuts
        assert total["fallback_paths"] - total["restarts"] >= 20 and total["fallback_kept_tokens"] < total["fallback_path_tokens"]
    assert all(active + done <= 8 for active, done in watch.states)
    assert all(len(t.leaves) == 8 for t in trees)
    assert max(int(t.response_lengths().max()) for t in trees) <= 4 * 48


@pytest.mark.parametrize("repetition", ["first", "last"])
def test_every_stop_rule_fires(repetition: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    sampler = Segments(width=8, depth=3, segment_tokens=48, stopping=StopRules(repetition=repetition), fallback_from="random_all")
    trees = grow(sampler, ScriptedBackend(tiny_tokenizer, Moody(tiny_tokenizer), capacity=64), prompts_of(tiny_tokenizer, 150), seed=4)
    stops = Counter(Stop(int(s)) for t in trees for s in t.stop[t.leaves])
    assert all(stops[s] >= 20 for s in (Stop.ANSWER, Stop.EOS, Stop.LENGTH, Stop.DEPTH, Stop.REPETITION)), stops
    assert all(active + done <= 8 for active, done in watch.states)


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(1, 10), depth=st.integers(1, 5), tokens=st.integers(1, 6), branching=st.integers(1, 4), cut=st.sampled_from(CUTS),
    candidates=st.sampled_from(CANDIDATES), window=st.integers(0, 7), ends=st.integers(1, 60), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_tree_is_full_within_limits_and_free_of_order(
    tiny_tokenizer: Any, width: int, depth: int, tokens: int, branching: int, cut: Any, candidates: Any, window: int, ends: int, seed: int
) -> None:
    """The same trees for any capacity; exactly `width` paths; siblings drawn from different seeds."""
    sampler = Segments(
        width=width, depth=depth, segment_tokens=tokens, branching=(1, min(branching, width)), initial=(1, min(3, width)), fallback=cut,
        fallback_from=candidates, fallback_window=window, fallback_block_tokens=3,
    )  # fmt: skip
    trees, seeds = {}, []
    for capacity in (2, 64):
        backend = ScriptedBackend(tiny_tokenizer, capacity=capacity, eos_ids=range(ends))
        submit = backend.submit

        def spy(requests: Any, submit: Any = submit) -> None:
            requests = list(requests)
            seeds.extend(r.seed for r in requests)
            submit(requests)

        backend.submit = spy  # type: ignore[method-assign]
        trees[capacity] = grow(sampler, backend, prompts_of(tiny_tokenizer, 3), seed=seed)
    assert same_trees(trees[2], trees[64])
    assert len(set(seeds)) == len(seeds) // 2
    for tree in trees[64]:
        assert len(tree.leaves) == width
        assert tree.response_lengths().max() <= depth * tokens
        assert (tree.stop[tree.leaves] != Stop.OPEN).all()
        inner = np.setdiff1d(np.arange(tree.nodes), tree.leaves)
        assert (tree.stop[inner] == Stop.OPEN).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"width": 0}, "sampler.width is 0"),
        ({"branching": ()}, "sampler.branching"),
        ({"branching": (3, 2)}, "sampler.branching"),
        ({"initial": (17,)}, "sampler.initial is .* to sampler.width = 16"),
        ({"split": "fair"}, "sampler.split is 'fair'; allowed: uniform"),
        ({"fallback": "back"}, "sampler.fallback is 'back'; allowed: none, random"),
        ({"split_temperature": (0.0,)}, "sampler.split_temperature"),
        ({"fallback_window": -1}, "sampler.fallback_window is -1; allowed: a whole number from 0 to "),
        ({"min_width": 20}, "sampler.min_width"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Segments(**options)


# -- bugs of the released code (numbers of the specification) -------------------------------------------------------------


def test_b1_a_random_initial_divergence_takes_effect(tiny_tokenizer: Any) -> None:
    trees = grow(Segments(initial=(2, 8)), ScriptedBackend(tiny_tokenizer, endless), prompts_of(tiny_tokenizer, 60), seed=0)
    assert {len(t.children(ROOT)) for t in trees} == set(range(2, 9))


def test_b2_b_repetition_priority_is_read_or_refused(tiny_tokenizer: Any) -> None:
    from rlzoo.config import build

    chosen = {"sampler": {"name": "segments", "stopping": {"repetition": "first"}}}
    assert build([("file", chosen)], {"algo": "grpo"}).algorithm.sampler.stopping.repetition == "first"
    with pytest.raises(ValueError, match=r"unknown key sampler\.repetition_es_policy"):
        build([("file", {"sampler": {"name": "segments", "repetition_es_policy": "first"}})], {"algo": "grpo"})


def test_b3_the_fallback_window_left_unset_is_the_segment_length() -> None:
    assert Segments(segment_tokens=24).window == 24 and Segments(segment_tokens=24, fallback_window=8).window == 8
    with pytest.raises(ValueError, match="fallback_window is -1"):
        Segments(fallback_window=-1)


def test_b4_an_end_token_that_begins_a_segment_ends_the_path(tiny_tokenizer: Any) -> None:
    eos = tiny_tokenizer.eos_token_id
    backend = ScriptedBackend(tiny_tokenizer, lambda c, s: [eos] if len(c) > 7 else [90] * 9)
    (tree,) = grow(Segments(width=2, depth=4, segment_tokens=4, initial=(1,)), backend, prompts_of(tiny_tokenizer, 1), seed=0)
    assert (tree.stop[tree.leaves] == Stop.EOS).all() and (tree.response_lengths() == 5).all()
    assert all(tree.path_tokens(leaf)[-1] == eos for leaf in tree.leaves)


def test_b5_every_one_of_several_end_tokens_ends_a_path(tiny_tokenizer: Any) -> None:
    backend = ScriptedBackend(tiny_tokenizer, lambda c, s: [90, 91 + s % 3, 99, 99], eos_ids=[91, 92, 93])
    (tree,) = grow(Segments(width=12, initial=(8,), branching=(4,)), backend, prompts_of(tiny_tokenizer, 1), seed=0)
    ends = [int(tree.path_tokens(leaf)[-1]) for leaf in tree.leaves]
    assert set(ends) == {91, 92, 93} and (tree.stop[tree.leaves] == Stop.EOS).all()


@pytest.mark.parametrize("boxed", ["ended", "alone"])
def test_b6_a_box_that_crosses_a_segment_boundary_is_seen(boxed: Any, tiny_tokenizer: Any) -> None:
    prompt = "1+1="
    backend = ScriptedBackend(tiny_tokenizer, respond(tiny_tokenizer, {prompt: ["that is \\boxed{2}"]}))
    sampler = Segments(width=2, depth=4, segment_tokens=12, initial=(2,), fallback="none", stopping=StopRules(boxed=boxed))
    (tree,) = grow(sampler, backend, [Prompt("p", tiny_tokenizer.encode(prompt))], seed=0)
    assert (tree.stop[tree.leaves] == Stop.ANSWER).all() and (tree.depth[tree.leaves] == 2).all()


def test_b8_a_cut_at_zero_restarts_and_keeps_the_finished_path(tiny_tokenizer: Any) -> None:
    backend = ScriptedBackend(tiny_tokenizer, lambda c, s: [90, 90, 90, tiny_tokenizer.eos_token_id])
    (tree,) = grow(Segments(width=3, initial=(1,), fallback="from_start"), backend, prompts_of(tiny_tokenizer, 1), seed=0)
    assert tree.parent.tolist() == [-1, 0, 0, 0] and tree.lengths[1:].tolist() == [4, 4, 4]


def test_b9_block_fallback_works_with_a_bound_on_windows() -> None:
    path = finished(12, logprobs=-np.arange(12.0))
    cuts = {cut_at(path, "block", window=4, max_windows=2, block=4, rng=RNG(s)) for s in range(50)}
    assert cuts <= {4, 8} and cuts


def test_b10_paths_that_end_together_each_keep_their_own_length(tiny_tokenizer: Any) -> None:
    backend = ScriptedBackend(tiny_tokenizer, lambda c, s: [90] * (s % 5) + [tiny_tokenizer.eos_token_id])
    trees = grow(Segments(width=8, initial=(8,), fallback="none"), backend, prompts_of(tiny_tokenizer, 6), seed=0)
    assert len({int(n) for t in trees for n in t.response_lengths()}) == 5
    assert all(t.path_tokens(leaf)[-1] == tiny_tokenizer.eos_token_id for t in trees for leaf in t.leaves)


def test_b11_the_last_segment_is_asked_for_no_more_than_the_response_has_left(tiny_tokenizer: Any) -> None:
    """After an unaligned cut full segments would overshoot the limit of 4 x 6 tokens."""
    backend, asked = ScriptedBackend(tiny_tokenizer, lambda c, s: RNG(s).integers(70, 250, 5 + s % 2).tolist(), capacity=8), []
    submit = backend.submit

    def spy(requests: Any) -> None:
        requests = list(requests)
        asked.extend(requests)
        submit(requests)

    backend.submit = spy  # type: ignore[method-assign]
    sampler = Segments(width=8, depth=6, segment_tokens=6, fallback="min_logprob_token", fallback_from="random_all", initial=(1,))
    prompts = prompts_of(tiny_tokenizer, 4)
    trees = grow(sampler, backend, prompts, seed=1)
    assert all(len(r.context) - len(prompts[0].ids) + r.max_tokens <= 36 for r in asked)
    assert max(int(t.response_lengths().max()) for t in trees) <= 36


def test_b13_strict_order_takes_the_best_reason_first() -> None:
    paths = [finished(n, stop) for n, stop in enumerate((Stop.REPETITION, Stop.LENGTH, Stop.ANSWER, Stop.DEPTH, Stop.EOS), 1)]
    order = [p.stop for p in ordered(paths, "finished_first_strict", 1, RNG(0))]
    assert order == [Stop.ANSWER, Stop.EOS, Stop.DEPTH, Stop.LENGTH, Stop.REPETITION]
