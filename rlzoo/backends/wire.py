"""HTTP to a completions server, by httpx2: JSON both ways, streamed answers, few retries."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import httpx2

CONNECT_S = 10.0  # longest wait for a connection
RETRIES_AFTER_S = (0.5, 2.0, 5.0)  # seeds are ours, so that asking again asks for the same
BUSY = (429, 503)
PASSING = (httpx2.NetworkError, httpx2.RemoteProtocolError)  # what may be gone at the next try: no time-out, no misuse

T = TypeVar("T")


class ServerError(RuntimeError):
    """The server cannot be reached, refuses, fails or breaks the protocol; one sentence that names it."""


class Call:
    """One request under way, which `abandon` ends from another thread."""

    def __init__(self) -> None:
        self.gone = threading.Event()
        self._socket: socket.socket | None = None

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """What httpx2 tells of the connection as it is made: what `abandon` closes, even before the server says a word."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")
            if self.gone.is_set():
                self.abandon()

    def abandon(self) -> None:
        """Close the connection: whoever waits for it wakes up with an error, and the server learns that nobody waits."""
        self.gone.set()
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class Server:
    """The server at `url`, which may end in /v1. `key` goes into the header Authorization. Proxies and passwords that the environment
    names are left alone; its certificates (SSL_CERT_FILE) count.

    Raises:
        ValueError: `url` is no http(s) address, or holds a password.
    """

    def __init__(self, url: str, *, key: str | None = None) -> None:
        if "@" in url:
            raise ValueError("backend_url holds a name or password, but options are written to files; set RLZOO_API_KEY instead")
        try:
            parts = httpx2.URL(url)
            known = parts.scheme in ("http", "https") and parts.host and (parts.port or 80) < 2**16 and not (parts.query or parts.fragment)
        except httpx2.InvalidURL:
            known = False
        if not known:
            raise ValueError(f"backend_url = {url!r} is not the address of a server; expected http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"Connection": "close"} | ({"Authorization": f"Bearer {key}"} if key else {}),  # a call has one of its own
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            verify=ssl.create_default_context(),
            trust_env=False,
        )

    def ask(self, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float) -> Any:
        """The JSON that answers GET, or POST with a body; None where the server has nothing at `path`.

        Raises:
            ServerError: see there.
        """

        def take(response: httpx2.Response) -> Any:
            return None if response.status_code == 404 and body is None else self._json(self._accepted(response).read())

        return self._tried(take, path, body, Call(), timeout_s)

    def stream(
        self, path: str, body: Mapping[str, Any], take: Callable[[Iterator[Any]], T], call: Call, timeout_s: float | None = None
    ) -> T:
        """What `take` makes of the events (JSON) that answer `body`; it starts anew with every try. Without `timeout_s` (between two
        events) only `call` limits the wait.

        Raises:
            ServerError: see there.
        """
        return self._tried(lambda response: take(self._events(self._accepted(response))), path, body, call, timeout_s)

    def _tried(
        self, take: Callable[[httpx2.Response], T], path: str, body: Mapping[str, Any] | None, call: Call, timeout_s: float | None
    ) -> T:
        method, timeout = "GET" if body is None else "POST", httpx2.Timeout(timeout_s, connect=CONNECT_S)
        for delay in (*RETRIES_AFTER_S, None):
            try:
                with self._client.stream(method, path, json=body, timeout=timeout, extensions={"trace": call.trace}) as response:
                    return take(response)
            except httpx2.RequestError as error:
                if delay is None or call.gone.is_set() or not isinstance(error, PASSING):
                    reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)).rstrip(".") or type(error).__name__
                    raise ServerError(f"no answer from the server at {self.url}: {reason}") from error
            call.gone.wait(delay)
        raise AssertionError("the last try returns or raises")

    def _accepted(self, response: httpx2.Response) -> httpx2.Response:
        if response.status_code == 200:
            return response
        status = f"({response.status_code} {response.reason_phrase})"
        if response.status_code in BUSY:
            raise httpx2.NetworkError(f"it is busy {status}")
        said = response.read().decode("utf-8", "replace")
        with suppress(ValueError):
            said = _message(json.loads(said))
        if response.status_code in (401, 403):
            said += " (RLZOO_API_KEY has to hold its key)"
        verb = "failed" if response.is_server_error else "refuses the request"
        raise ServerError(f"the server at {self.url} {verb} {status}: {' '.join(said.split())[:300]}")

    def _events(self, response: httpx2.Response) -> Iterator[Any]:
        for sent in httpx2.EventSource(response, max_event_size=None):
            if sent.data == "[DONE]":
                return
            event = self._json(sent.data)
            if isinstance(event, dict) and event.get("error"):
                raise ServerError(f"the server at {self.url} failed in the middle of a response: {_message(event)}")
            yield event
        raise httpx2.RemoteProtocolError("it ended the connection in the middle of a response")

    def _json(self, text: str | bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise ServerError(f"the server at {self.url} answers with something that is not JSON: {text[:80]!r}") from error


def _message(body: Any) -> str:
    """The text of an error as the servers of this kind wrap it."""
    said = body.get("error", body) if isinstance(body, dict) else body
    return str(said.get("message", said) if isinstance(said, dict) else said)
