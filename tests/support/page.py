"""A page in a browser, as far as the Fetch standard lets it see answers of another origin.

What is blocked raises `Blocked`, as `fetch` rejects; what may be read is left of the answer. Times
and caches of preflights are left out: each request that needs one sends it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

_SIMPLE_METHODS = {"GET", "HEAD", "POST"}
_SIMPLE_HEADERS = {"accept", "accept-language", "content-language"}
_SIMPLE_TYPES = {"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"}
_READABLE = {
    "cache-control", "content-language", "content-length", "content-type", "expires",
    "last-modified", "pragma",
}  # fmt: skip


class Blocked(Exception):
    """The browser keeps the answer from the page."""


class Page:
    """A page of `origin`; `send(path, method=…, headers=…)` makes its requests."""

    def __init__(self, origin: str, send: Callable[..., httpx.Response]) -> None:
        self.origin = origin
        self._send = send
        self.preflights = 0

    def fetch(
        self,
        path: str,
        method: str = "GET",
        headers: dict[str, str] | None = None,
        *,
        credentials: bool = False,
        **more: Any,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, readable fields and body of the answer."""
        headers = {name.lower(): value for name, value in (headers or {}).items()}
        unsafe = sorted(
            name
            for name, value in headers.items()
            if name not in _SIMPLE_HEADERS
            and not (name == "content-type" and value in _SIMPLE_TYPES)
        )
        if method not in _SIMPLE_METHODS or unsafe:
            self._preflight(path, method, unsafe, credentials)
        answer = self._send(path, method=method, headers={**headers, "origin": self.origin}, **more)
        self._check(answer, credentials)
        exposed = self._names(answer, "access-control-expose-headers")
        readable = _READABLE | (
            {*answer.headers} if "*" in exposed and not credentials else exposed
        )
        return (
            answer.status_code,
            {name: value for name, value in answer.headers.items() if name in readable},
            answer.content,
        )

    def _preflight(self, path: str, method: str, unsafe: list[str], credentials: bool) -> None:
        self.preflights += 1
        asked = {"origin": self.origin, "access-control-request-method": method}
        if unsafe:
            asked["access-control-request-headers"] = ",".join(unsafe)
        answer = self._send(path, method="OPTIONS", headers=asked)
        self._check(answer, credentials)
        if not 200 <= answer.status_code <= 299:
            raise Blocked(f"the preflight was answered {answer.status_code}")
        star = not credentials
        methods = {
            name.strip()
            for name in answer.headers.get("access-control-allow-methods", "").split(",")
        }
        if method not in methods | _SIMPLE_METHODS and not (star and "*" in methods):
            raise Blocked(f"the method {method} is not allowed")
        names = self._names(answer, "access-control-allow-headers")
        for name in unsafe:
            if name not in names and not (star and "*" in names and name != "authorization"):
                raise Blocked(f"the header {name} is not allowed")

    def _check(self, answer: httpx.Response, credentials: bool) -> None:
        """The CORS check: one value, ours, and a word about credentials where there are some."""
        origins = answer.headers.get_list("access-control-allow-origin")
        if len(origins) != 1 or not (
            origins[0] == self.origin or (origins[0] == "*" and not credentials)
        ):
            raise Blocked(f"{self.origin} is not the origin allowed: {origins}")
        if credentials and answer.headers.get_list("access-control-allow-credentials") != ["true"]:
            raise Blocked("no credentials are allowed")

    @staticmethod
    def _names(answer: httpx.Response, name: str) -> set[str]:
        return {part.strip().lower() for part in answer.headers.get(name, "").split(",")}
