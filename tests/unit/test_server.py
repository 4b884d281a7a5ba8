"""The engine behind HTTP, against a server in this process."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from rlzoo.backends import wire
from rlzoo.backends.protocol import SamplingParams, SegmentRequest
from rlzoo.backends.server import ServerBackend
from rlzoo.cli import main
from rlzoo.evaluation.rows import read_row
from rlzoo.evaluation.suites import Suite
from rlzoo.sampling.chains import Chains
from rlzoo.sampling.grow import grow
from rlzoo.store.runs import read_rows
from rlzoo.tree import Stop
from tests.completions import Completions, serving, until
from tests.engines import EOS, KNOWN_IDS, PARAMS, Bigram, drain, prompts_of, requests_of, shape_of, teacher

LOCAL = 0.02  # retries after such delays


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    monkeypatch.setattr(wire, "RETRIES_AFTER_S", (LOCAL, LOCAL))


@pytest.fixture
def served():
    with serving(Completions(Bigram().bigram.detach().numpy())) as made:
        yield made


@pytest.fixture
def connect(served, tiny_tokenizer):
    """Makes backends; they are closed at the end."""
    made: list[ServerBackend] = []

    def make(**options: Any) -> ServerBackend:
        kept = {"eos_ids": EOS, "vocabulary": 272, "max_context": 512, "capacity": 8, "timeout_s": 5.0} | options
        made.append(ServerBackend(served.url, tiny_tokenizer, **kept))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


# What is sampled.


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_logprobs_are_those_of_the_distribution_sampled(params, connect, tiny_tokenizer):
    requests = requests_of(prompts_of(tiny_tokenizer), 3, 12, params)
    results = drain(connect(planned=[params]), requests)
    model = Bigram()
    for request in requests:
        result = results[request.id]
        expected = teacher(model, request.context, result.tokens.tolist(), params)
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-5, rtol=0)
        assert result.tokens.max() < KNOWN_IDS and result.logprobs.dtype == np.float32
        assert (result.stop == Stop.EOS) == (result.tokens[-1] in EOS) and not set(result.tokens[:-1].tolist()) & set(EOS)
        assert len(result.tokens) == 12 or result.stop == Stop.EOS


def test_a_tree_does_not_depend_on_capacity_and_siblings_differ(connect, tiny_tokenizer):
    sampler, prompts = Chains(group_size=6, max_response_tokens=20), prompts_of(tiny_tokenizer)
    first, second = ([shape_of(t) for t in grow(sampler, connect(capacity=c), prompts, seed=3)] for c in (1, 16))
    assert first == second
    trees = grow(sampler, connect(), prompts, seed=3)
    for tree in trees:
        assert len({tuple(tree.path_tokens(leaf).tolist()) for leaf in tree.leaves}) == 6


def test_every_option_with_a_default_of_the_server_is_given(connect, served, tiny_tokenizer):
    backend = connect()
    drain(backend, [SegmentRequest(5, 4, [7, 8], 3, 2**64 - 1, SamplingParams(0.7, 0.9, 20))])
    body = served.bodies[-1]
    assert (body["temperature"], body["top_p"], body["top_k"], body["prompt"], body["max_tokens"]) == (0.7, 0.9, 20, [7, 8], 3)
    assert (body["min_p"], body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (0, 1, 0, 0)
    assert 0 <= body["seed"] < 2**31 and body["stop_token_ids"] == EOS
    assert sorted(map(int, body["logit_bias"])) == list(range(KNOWN_IDS, 272))
    assert (backend.engine, backend.model, backend.max_context) == ("server:tests 1", "bigram", 512)
    assert backend.stats().sampled_tokens <= 3


def test_many_are_under_way_at_once_and_no_more_than_capacity(connect, served, tiny_tokenizer):
    backend = connect(capacity=5)
    served.before = lambda nth: time.sleep(0.05)
    drain(backend, requests_of(prompts_of(tiny_tokenizer), 3, 2, SamplingParams()))
    assert served.peak == 5


def test_scores_are_the_teacher_forced_pass(connect, served, tiny_tokenizer):
    served.table = served.table[:KNOWN_IDS, :KNOWN_IDS]
    backend = connect(vocabulary=KNOWN_IDS)
    trees = grow(Chains(group_size=3, max_response_tokens=9), backend, prompts_of(tiny_tokenizer), seed=0)
    for tree, scores in zip(trees, backend.score(trees), strict=True):
        start = len(tree.prompt)
        assert np.isnan(scores[:start]).all()
        np.testing.assert_allclose(scores[start:], tree.logprobs[start:], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="scores at temperature 1"):
        backend.score(trees, SamplingParams(temperature=0.5))
    with pytest.raises(ValueError, match="ids unknown to the tokenizer"):
        served.table = Bigram().bigram.detach().numpy()
        connect().score(trees)


def test_what_comes_after_the_end_of_a_text_is_cut_off(connect, served):
    backend = connect()
    served.table = np.full((272, 272), -30.0)
    for above, i in [(7, 8), (8, 40), (40, 9), (9, 9)]:
        served.table[above, i] = 30.0
    backend.eos_ids, ends = frozenset(), backend.eos_ids  # so the server is not told of them
    backend.submit([SegmentRequest(5, 4, [7], 6, 0)])
    until(lambda: not backend._done.empty())
    backend.eos_ids = ends
    (result,) = backend.step()
    assert result.tokens.tolist() == [8, 40] and len(result.logprobs) == 2 and result.stop == Stop.EOS


def test_released_requests_end_at_the_server_too(connect, served):
    backend = connect(eos_ids=[])
    served.spoil = lambda event, nth: time.sleep(0.02) or event
    backend.submit([SegmentRequest(5, 4, [7], 400, 0), SegmentRequest(6, 4, [7], 3, 1)])
    backend.release([5, 99])
    results = []
    while not results:
        results += backend.step()
    assert [r.id for r in results] == [6] and backend.step() == []
    assert until(lambda: served.running == 0, 3.0)


def test_it_takes_no_weights(connect):
    with pytest.raises(RuntimeError, match="cannot take over weights; training needs an engine in its own process"):
        connect().load_weights(Bigram().named_parameters(), 1)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SegmentRequest(5, 4, [], 3, 0), "0 context tokens"),
        (SegmentRequest(5, 4, [7], 0, 0), "max_tokens 0"),
        (SegmentRequest(5, 4, [7] * 500, 20, 0), "exceeds the model's context of 512"),
    ],
)
def test_impossible_requests_are_refused(request_, message, connect):
    with pytest.raises(ValueError, match=message):
        connect().submit([request_])


def test_the_key_is_sent_and_the_shorter_context_counts(connect, served):
    served.models["data"][0]["max_model_len"] = 64
    assert connect(key="secret").max_context == 64 and set(served.keys) == {"Bearer secret"}
    assert connect(max_context=32).max_context == 32


# Servers that will not do.


def without(*names):
    def spoil(event, nth):
        choice = event["choices"][0]
        for name in names:
            choice.pop(name, None)
        return event

    return spoil


def put(**fields):
    def spoil(event, nth):
        event["choices"][0] |= fields
        return event

    return spoil


def nameless(event, nth):
    """As servers do that know neither way to tell ids."""
    choice = event["choices"][0]
    del choice["token_ids"]
    choice["logprobs"]["tokens"] = ["?"]
    return event


BAD = [
    (nameless, "returns no token ids; it has to know return_token_ids"),
    (without("logprobs"), "returns 0 log-probs for [12] sampled tokens"),
    (put(token_ids=[271]), "sampled id 271, which the tokenizer does not know"),
    (put(logprobs={"tokens": ["token_id:5"], "token_logprobs": [0.7]}), "returns log-probs that are none, from 0.7"),
    (put(prompt_token_ids=[1, 2]), r"samples after the ids \[1, 2\] when given"),
    (lambda event, nth: {"choices": 3}, "does not answer as a completions server does"),
    (lambda event, nth: {"error": {"message": "engine is dead"}}, "failed in the middle of a response: engine is dead"),
    (lambda event, nth: None, "no answer from the server at"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_a_server_that_will_not_do_is_found_out_before_anything_is_sampled(spoil, message, connect, served):
    served.spoil = spoil
    with pytest.raises(ValueError, match=message) as caught:
        connect()
    assert served.url in str(caught.value) and "\n" not in str(caught.value)


def test_an_event_goes_on_after_the_line_separators_of_unicode(connect, served):
    served.spoil = put(text="a\u2028b\u2029c\x85d")
    drain(connect(), [SegmentRequest(5, 4, [7], 5, 0)])


def test_ids_may_come_as_names(connect, served):
    served.spoil = without("token_ids", "prompt_token_ids")
    drain(connect(), [SegmentRequest(5, 4, [7], 5, 0)])


@pytest.mark.parametrize("params", [SamplingParams(0.7), SamplingParams(top_p=0.9), SamplingParams(1.3, top_k=4)], ids=str)
def test_raw_logprobs_are_refused_where_they_differ(params, connect, served):
    served.raw = True
    with closing(connect()), closing(connect(planned=[SamplingParams(0)])):
        pass
    with pytest.raises(ValueError, match=r"from before temperature, top-p and top-k.*--logprobs-mode processed_logprobs"):
        connect(planned=[params])
    with pytest.raises(RuntimeError, match="from before temperature"):
        connect().submit([SegmentRequest(5, 4, [7], 3, 0, params)])


def test_greedy_logprobs_that_say_certain_are_refused(connect, served):
    certain = put(logprobs={"tokens": ["?"], "token_logprobs": [0.0]})
    served.spoil = lambda event, nth: event if served.bodies[nth]["temperature"] else certain(event, nth)
    connect()
    with pytest.raises(ValueError, match="gives greedy tokens other log-probs than at temperature 1"):
        connect(planned=[SamplingParams(0)])


def test_a_server_that_ignores_top_p_is_refused(connect, served):
    events = served.events
    served.events = lambda body: events(body | {"top_p": 1.0})
    with pytest.raises(ValueError, match="does not do as told by top_p"):
        connect(planned=[SamplingParams(top_p=0.9)])


@pytest.mark.parametrize(
    ("models", "model", "message"),
    [
        ({"data": [{"id": "a"}, {"id": "b"}]}, "", "does not say that it serves one model; it has: a, b; choose with --served-model"),
        ({"data": [{"id": "a"}]}, "c", "does not serve 'c'; it has: a;"),
        (None, "", "does not say that it serves one model; it has: none;"),
        ({"object": "else"}, "", "does not answer as a completions server does"),
    ],
)
def test_which_model(models, model, message, connect, served):
    served.models = models
    with pytest.raises(ValueError, match=message):
        connect(model=model)


def test_a_named_model_needs_no_list(connect, served):
    served.models = None
    assert connect(model="mine").model == "mine" and served.bodies[-1]["model"] == "mine"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "is not the address of a server"),
        ("ftp://host", "is not the address of a server"),
        ("http://", "is not the address of a server"),
        ("http://host:port", "expected http://HOST:PORT"),
        ("http://host:65536", "expected http://HOST:PORT"),
        ("http://me:secret@host", "set RLZOO_API_KEY instead"),
        ("http://me:secret@host:port", "set RLZOO_API_KEY instead"),
    ],
)
def test_bad_addresses(url, message):
    with pytest.raises(ValueError, match=message) as caught:
        wire.Server(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
def test_addresses_may_end_in_v1(tail, served):
    assert wire.Server(served.url + tail).ask("/version", timeout_s=5) == {"version": "1"}


# Servers that fail on the way.


def after(probes, fault):
    """A fault from the third completion after the probes on."""
    return lambda event, nth: fault(event) if nth >= probes + 2 else event


def hang(event):
    time.sleep(3)
    return event


FAULTS = [
    (lambda event: None, "no answer from the server at"),
    (lambda event: {"error": {"message": "out of memory"}}, "failed in the middle of a response: out of memory"),
    (lambda event: put(token_ids=[270])(event, 0), "sampled id 270, which the tokenizer does not know"),
    (lambda event: put(token_ids=[9], finish_reason="stop")(event, 0) if event["choices"][0]["finish_reason"] else None, "no answer"),
    (hang, "has said nothing for 0.5 s while [0-9]+ requests are in flight"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_a_fault_ends_in_one_sentence_with_nothing_in_flight(fault, message, connect, served, tiny_tokenizer):
    backend = connect(timeout_s=0.5, capacity=3)
    served.spoil = after(len(served.bodies), fault)
    requests = requests_of(prompts_of(tiny_tokenizer), 2, 6, SamplingParams())
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=message) as caught:
        drain(backend, requests)
    assert time.monotonic() - begun < 3 and served.url in str(caught.value) and backend.step() == []
    served.spoil = lambda event, nth: event
    drain(backend, requests)  # the ids are free again


def test_a_response_that_ends_without_an_end_is_refused(connect, served, tiny_tokenizer):
    backend = connect(eos_ids=[1])
    served.ends = set(range(5, 200))  # the server knows other ends
    with pytest.raises(RuntimeError, match=r"ended a response \(stop\) after [0-9]+ of 40 tokens with id [0-9]+, which ends no text"):
        drain(backend, requests_of(prompts_of(tiny_tokenizer), 2, 40, SamplingParams()))


def test_one_broken_connection_or_a_busy_server_is_tried_again(connect, served, tiny_tokenizer):
    requests = requests_of(prompts_of(tiny_tokenizer), 2, 6, SamplingParams())
    whole = {i: r.tokens.tolist() for i, r in drain(connect(), requests).items()}
    tried: set[int] = set()

    def first_try(nth):
        """Of a request, told by its seed; some seeds are left alone."""
        seed = served.bodies[nth]["seed"]
        fresh = seed not in tried and seed % 2 == 0
        tried.add(seed)
        return fresh

    backend = connect()
    served.before = lambda nth: 503 if first_try(nth) else None
    assert {i: r.tokens.tolist() for i, r in drain(backend, requests).items()} == whole
    served.before = lambda nth: None
    tried.clear()
    served.spoil = lambda event, nth: None if event["choices"][0]["finish_reason"] and first_try(nth) else event
    assert {i: r.tokens.tolist() for i, r in drain(backend, requests).items()} == whole and len(tried) == len(requests)


@pytest.mark.parametrize(
    ("status", "message"), [(400, r"refuses the request \(400 .*as told"), (500, r"failed \(500 .*as told"), (401, "KEY")]
)
def test_a_refusal_is_passed_on_and_not_tried_again(status, message, connect, served):
    served.before = lambda nth: status
    with pytest.raises(ValueError, match=message):
        connect()
    assert len(served.bodies) == 1


def test_a_server_that_accepts_and_says_nothing_is_not_asked_again(connect, served):
    served.before = lambda nth: time.sleep(1)
    with pytest.raises(ValueError, match=r"no answer from the server at .*: timed out"):
        connect(timeout_s=0.1)
    assert len(served.bodies) == 1


def test_an_abandoned_call_wakes_who_waits_before_the_server_said_a_word(served):
    awake, call = threading.Event(), wire.Call()
    served.before = lambda nth: 503 if awake.wait(5.0) else 500

    def wait():
        with pytest.raises(wire.ServerError, match="no answer from the server at"):
            wire.Server(served.url).stream("/v1/completions", {}, list, call)
        awake.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert until(lambda: served.running == 1)
    call.abandon()
    thread.join(2.0)
    assert awake.is_set() and len(served.bodies) == 1


def test_a_call_abandoned_before_it_begins_is_not_tried_again(served):
    told: list[str] = []

    class Told(wire.Call):
        def trace(self, event, info):
            told.append(event)
            super().trace(event, info)

    call = Told()
    call.abandon()
    with pytest.raises(wire.ServerError, match="no answer from the server at"):
        wire.Server(served.url).stream("/v1/completions", {}, list, call)
    assert told.count("connection.connect_tcp.complete") == 1 and not served.bodies


def test_proxies_of_the_environment_are_left_alone(served, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert wire.Server(served.url).ask("/version", timeout_s=5) == {"version": "1"}


def test_nobody_there(tiny_tokenizer):
    with serving(Completions(np.zeros((2, 2)))) as gone:
        pass
    with pytest.raises(ValueError, match=f"no answer from the server at {gone.url}: Connection refused"):
        ServerBackend(gone.url, tiny_tokenizer, eos_ids=EOS, vocabulary=272, max_context=512)


# `rlzoo eval --backend-url`.


@pytest.fixture
def bigram_of_tiny(monkeypatch):
    """A server with a bigram of the embedded model's vocabulary; two problems of each set."""
    whole = Suite.load
    monkeypatch.setattr(Suite, "load", lambda self, data_dir=None: {name: p[:2] for name, p in whole(self, data_dir).items()})
    from rlzoo.training.models import describe_model

    rows = describe_model("tiny").config.vocab_size
    with serving(Completions(np.random.default_rng(0).normal(size=(rows, rows)))) as made:
        yield made


def job(served, *flags):
    return ["eval", "tiny", "--k", "3", "--max-response-tokens", "24", "--backend.threads", "1", "--backend-url", served.url, *flags]


def test_an_evaluation_names_the_server_and_goes_on_after_its_death(bigram_of_tiny, tmp_path, capsys, monkeypatch):
    served, whole, cut = bigram_of_tiny, tmp_path / "whole", tmp_path / "cut"
    assert main(job(served, "--greedy", "--out", str(whole))) == 0
    row, _ = read_row(whole / "summary.json")
    assert (row.protocol.engine, row.ledger.device, row.ledger.devices) == ("server:tests 1", "server", 1)
    assert row.config["backend_url"] == served.url and row.weights_sha256 == {"model": None}
    first = len(served.bodies)
    served.before = lambda nth: 500 if nth > first + 12 else None
    assert main(job(served, "--greedy", "--backend.capacity", "2", "--out", str(cut))) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "failed (500" in said and said.endswith(f"once that is mended, go on with rlzoo eval --resume --out {cut}")
    assert 0 < len(read_rows(cut / "samples.jsonl")) < 32
    served.before = lambda nth: None
    assert main(["eval", "--resume", "--out", str(cut)]) == 0
    assert (cut / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_temperature_reaches_the_server_and_no_weights_are_needed(bigram_of_tiny, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("rlzoo.evaluation.job.load_model", refuse)
    assert main(job(bigram_of_tiny, "--temperature", "0.6", "--top-p", "0.9", "--out", str(tmp_path / "e"))) == 0
    assert {(b["temperature"], b["top_p"]) for b in bigram_of_tiny.bodies[-24:]} == {(0.6, 0.9)}
    bigram_of_tiny.raw = True
    assert main(job(bigram_of_tiny, "--temperature", "0.6", "--out", str(tmp_path / "raw"))) == 2
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "tiny", "--backend-url", "localhost:1"], "backend_url = 'localhost:1' is not the address of a server"),
        (["eval", "tiny", "--backend-url", "http://127.0.0.1:9"], "no answer from the server at http://127.0.0.1:9: Connection refused"),
        (["eval", "./nosuch", "--backend-url", "http://127.0.0.1:9"], "model folder './nosuch' does not exist"),
        (
            ["eval", "tiny", "--backend-url", "http://127.0.0.1:9", "--backend.dtype", "bfloat16"],
            "backend.dtype = 'bfloat16' does not go with",
        ),
        (["eval", "tiny", "--served-model", "m"], "needs backend_url"),
        (
            ["eval", "tiny", "--backend-url", "http://127.0.0.1:9", "--backend.timeout-s", "0"],
            "backend.timeout_s is 0.0; allowed: a number above 0, at most 1000000",
        ),
        (["run", "--algo", "grpo", "--backend-url", "http://127.0.0.1:9"], "a server cannot take over weights"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(argv, message, tmp_path, capsys):
    assert main([*argv, "--out", str(tmp_path / "deep" / "eval")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rlzoo: ") and message in said and len(said.splitlines()) == 1, said
    assert not list(tmp_path.iterdir())
