"""HTTP to a completions server with what Python brings along: JSON both ways, streamed answers, few retries."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

CONNECT_S = 10.0  # longest wait for a connection
RETRIES_AFTER_S = (0.5, 2.0, 5.0)  # seeds are ours, so that asking again asks for the same
BUSY = (429, 503)

T = TypeVar("T")


class ServerError(RuntimeError):
    """The server cannot be reached, refuses, fails or breaks the protocol; one sentence that names it."""


class Call:
    """One request under way, which `abandon` ends from another thread."""

    def __init__(self) -> None:
        self.gone = threading.Event()
        self._socket: socket.socket | None = None

    def hold(self, connection: socket.socket) -> None:
        """What `abandon` closes."""
        self._socket = connection
        if self.gone.is_set():
            self.abandon()

    def abandon(self) -> None:
        """Close the connection: whoever waits for it wakes up with an error, and the server learns that nobody waits."""
        self.gone.set()
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class Server:
    """The server at `url`, which may end in /v1. `key` goes into the header Authorization.

    Raises:
        ValueError: `url` is no http(s) address, or holds a password.
    """

    def __init__(self, url: str, *, key: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"backend_url = {url!r}: {error}; expected http://HOST:PORT") from error
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise ValueError(f"backend_url = {url!r} is not the address of a server; expected http://HOST:PORT")
        if parts.username is not None:
            raise ValueError("backend_url holds a name or password, but options are written to files; set RLZOO_API_KEY instead")
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self._root = urlsplit(self.url).path
        self._host, self._port, self._key = host, port, key
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection

    def ask(self, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float) -> Any:
        """The JSON that answers GET, or POST with a body; None where the server has nothing at `path`.

        Raises:
            ServerError: see there.
        """

        def once() -> Any:
            with self._request(Call(), path, body, timeout_s) as response:
                return None if response.status == 404 and body is None else self._json(self._accepted(response).read())

        return self._tried(once, Call())

    def stream(
        self, path: str, body: Mapping[str, Any], take: Callable[[Iterator[Any]], T], call: Call, timeout_s: float | None = None
    ) -> T:
        """What `take` makes of the events (JSON) that answer `body`; it starts anew with every try. Without `timeout_s` (between two
        events) only `call` limits the wait.

        Raises:
            ServerError: see there.
        """

        def once() -> T:
            with self._request(call, path, body, timeout_s) as response:
                return take(self._events(self._accepted(response)))

        return self._tried(once, call)

    def _tried(self, once: Callable[[], T], call: Call) -> T:
        for delay in (*RETRIES_AFTER_S, None):
            try:
                return once()
            except (OSError, http.client.HTTPException) as error:
                if delay is None or call.gone.is_set() or isinstance(error, TimeoutError):
                    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                    raise ServerError(f"no answer from the server at {self.url}: {reason}") from error
            call.gone.wait(delay)
        raise AssertionError("the last try returns or raises")

    @contextmanager
    def _request(
        self, call: Call, path: str, body: Mapping[str, Any] | None, timeout_s: float | None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._kind(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.connect()
            connection.sock.settimeout(timeout_s)
            call.hold(connection.sock)
            headers = {"Content-Type": "application/json", "Connection": "close"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
            connection.request(method, self._root + path, data, headers)
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()

    def _accepted(self, response: http.client.HTTPResponse) -> http.client.HTTPResponse:
        if response.status == 200:
            return response
        if response.status in BUSY:
            raise ConnectionError(f"it is busy ({response.status} {response.reason})")
        said = response.read().decode("utf-8", "replace")
        with suppress(ValueError):
            said = _message(json.loads(said))
        if response.status in (401, 403):
            said += " (RLZOO_API_KEY has to hold its key)"
        verb = "failed" if response.status >= 500 else "refuses the request"
        raise ServerError(f"the server at {self.url} {verb} ({response.status} {response.reason}): {' '.join(said.split())[:300]}")

    def _events(self, response: http.client.HTTPResponse) -> Iterator[Any]:
        for line in response:
            if not line.startswith(b"data:"):
                continue
            text = line.removeprefix(b"data:").strip()
            if text == b"[DONE]":
                return
            event = self._json(text)
            if isinstance(event, dict) and event.get("error"):
                raise ServerError(f"the server at {self.url} failed in the middle of a response: {_message(event)}")
            yield event
        raise ConnectionError("it ended the connection in the middle of a response")

    def _json(self, text: bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise ServerError(f"the server at {self.url} answers with something that is not JSON: {text[:80]!r}") from error


def _message(body: Any) -> str:
    """The text of an error as the servers of this kind wrap it."""
    said = body.get("error", body) if isinstance(body, dict) else body
    return str(said.get("message", said) if isinstance(said, dict) else said)
