"""Finds the route of a request: first match in the order of the file, over compiled rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from core.policy import Route

T = TypeVar("T")


class Router(Generic[T]):
    """Maps (path, method, host) to the value given with each route.

    A path that ends in `/*` matches everything below it, not itself; `*` alone never reaches here.
    """

    __slots__ = ("_rows",)

    def __init__(self, routes: Iterable[tuple[Route, T]]) -> None:
        self._rows: list[tuple[bool, str, frozenset[str], str, T]] = []
        for route, value in routes:
            prefix = route.path.endswith("/*")
            path = route.path[:-1] if prefix else route.path
            methods = route.methods
            if "GET" in methods:
                methods = methods | {"HEAD"}  # RFC 9110: HEAD is GET without the content
            self._rows.append((prefix, path, methods, route.host.lower(), value))

    def match(self, path: str, method: str, host: str) -> T | None:
        """The value of the first route that matches; `host` without port, lower case."""
        for prefix, start, methods, wanted, value in self._rows:
            if (
                (path.startswith(start) if prefix else path == start)
                and (not methods or method in methods)
                and (not wanted or wanted == host)
            ):
                return value
        return None

    def allowed(self, path: str, host: str) -> list[str]:
        """Methods that some route takes for this path: for a 405's Allow. Empty: no such path."""
        found: set[str] = set()
        for prefix, start, methods, wanted, _ in self._rows:
            if (path.startswith(start) if prefix else path == start) and (
                not wanted or wanted == host
            ):
                found |= methods
        return sorted(found)

    @property
    def by_host(self) -> bool:
        """Whether any route looks at the host, so that it has to be worked out."""
        return any(row[3] for row in self._rows)
