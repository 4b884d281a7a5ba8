"""A completions server in this process, which samples from a bigram table and can be told to misbehave.

Written from the interface's documentation, with numpy alone; it shares nothing with the client.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import numpy as np


class Completions:
    """`table` [ids, ids]: logits of the next id by the last one; `ends`: ids that end a text. `spoil(event, nth)` may change an event
    of the nth completion (from 0) or return None for "break the connection". `before(nth)` runs before the nth one is answered and may
    return a status to answer with instead."""

    def __init__(self, table: Any, ends: Any = ()) -> None:
        self.table, self.ends = np.asarray(table, np.float64), set(ends)
        self.models: Any = {"data": [{"id": "bigram", "owned_by": "tests", "max_model_len": 512}]}
        self.spoil: Callable[[dict[str, Any], int], Any] = lambda event, nth: event
        self.before: Callable[[int], int | None] = lambda nth: None
        self.raw = False  # log-probs from before temperature and filters
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.running = self.peak = 0
        self.broken = threading.Event()  # the client went away
        self.lock = threading.Lock()
        self.url = ""

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng([body["seed"], *body["prompt"]])
        last = body["prompt"][-1]
        for place in range(body["max_tokens"]):
            logits = self.table[last].copy()
            for name, bias in body.get("logit_bias", {}).items():
                logits[int(name)] += bias
            shaped = self.shape(logits, body)
            last = int(np.argmax(logits)) if body["temperature"] == 0 else int(rng.choice(len(shaped), p=shaped))
            said = np.log(self.softmax(logits) if self.raw or body["temperature"] == 0 else np.maximum(shaped, 1e-300))
            best = np.argsort(-said)[: body["logprobs"]]
            ended = last in self.ends | set(body["stop_token_ids"])
            finish = "stop" if ended else "length" if place + 1 == body["max_tokens"] else None
            logprobs = {"tokens": [f"token_id:{last}"], "token_logprobs": [said[last]]}
            logprobs["top_logprobs"] = [{f"token_id:{i}": said[i] for i in {*best.tolist(), last}}]
            choice = {"index": 0, "text": "?", "logprobs": logprobs, "finish_reason": finish, "token_ids": [last]}
            yield {"choices": [choice | ({"prompt_token_ids": body["prompt"]} if place == 0 else {})]}
            if ended:
                return

    @staticmethod
    def softmax(logits: Any) -> Any:
        p = np.exp(logits - logits.max())
        return p / p.sum()

    def shape(self, logits: Any, body: dict[str, Any]) -> Any:
        p = self.softmax(logits / (body["temperature"] or 1.0))
        order = np.argsort(-p, kind="stable")
        if body["top_k"] > 0:
            p[order[body["top_k"] :]] = 0
            p /= p.sum()
        if body["top_p"] < 1:
            before = np.cumsum(p[order]) - p[order]
            p[order[(before >= body["top_p"]) & (np.arange(len(p)) > 0)]] = 0
            p /= p.sum()
        return p

    def scores(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt"]
        said: list[Any] = [None] + [{str(i): {"logprob": float(np.log(self.softmax(self.table[above])[i]))}} for above, i in pairwise(ids)]
        return {"choices": [{"token_ids": [1], "prompt_logprobs": said}]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Completions

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        known = {"/v1/models": self.served.models, "/version": {"version": "1"}}
        self.reply(200 if known.get(self.path) is not None else 404, known.get(self.path))

    def reply(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        served = self.served
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with served.lock:
            nth = len(served.bodies)
            served.bodies.append(body)
            served.keys.append(self.headers["Authorization"])
            served.running += 1
            served.peak = max(served.peak, served.running)
        self.answers = True
        try:
            if (status := served.before(nth)) is not None:
                return self.reply(status, {"error": {"message": "as told"}})
            if not body.get("stream"):
                return self.reply(200, served.scores(body))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in served.events(body):
                spoilt = served.spoil(event, nth)
                if spoilt is None:
                    self.close_connection = True
                    return None
                self.chunk(b"data: " + json.dumps(spoilt, ensure_ascii=False).encode() + b"\n\n")
            self.ended()  # before the client knows
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")
        except (BrokenPipeError, ConnectionResetError):
            served.broken.set()
            self.close_connection = True
        finally:
            self.ended()
        return None

    def ended(self) -> None:
        with self.served.lock:
            self.served.running -= self.answers
        self.answers = False

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


class _Http(ThreadingHTTPServer):
    request_queue_size, daemon_threads, block_on_close = 128, True, False


@contextmanager
def serving(served: Completions) -> Iterator[Completions]:
    """`served`, with its `url` set, as long as the block lasts."""
    handler = type("Handler", (_Handler,), {"served": served})
    with _Http(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


def until(what: Callable[[], bool], limit_s: float = 5.0) -> bool:
    end = time.monotonic() + limit_s
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    return what()
