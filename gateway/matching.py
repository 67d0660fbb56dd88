"""Which route a request takes, or what answers it without one.

Whatever is decided here is decided before anybody is asked for a key, and is not counted.
"""

from __future__ import annotations

from gateway import paths
from gateway.answers import problems
from gateway.answers.cors import asked_method
from gateway.answers.problems import Problem
from gateway.http.message import Header, Request
from gateway.paths import PathRefused, is_plain
from gateway.proxy.request import drop_parameters
from gateway.proxy.rewrite import Facts
from gateway.runtime import RouteRuntime, Runtime, StaticRoute


class Refusal(Exception):
    """Ends a request with a problem. `reason` is a limit's name or the problem's slug."""

    def __init__(self, problem: Problem, outcome: str, reason: str, decision_id: str = "") -> None:
        self.problem = problem
        self.outcome = outcome
        self.reason = reason
        self.decision_id = decision_id


class Direct(Exception):
    """Ends a request with an answer of the route's own, before anybody is asked for a key."""

    def __init__(
        self, route: str, outcome: str, status: int, headers: list[Header], body: bytes = b""
    ) -> None:
        self.route = route
        self.outcome = outcome
        self.answer = Problem(status, headers, body)


class Matcher:
    """Finds routes under one runtime."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def match(self, request: Request, request_id: str) -> RouteRuntime:
        """The route that goes upstream.

        Raises:
            Refusal: there is none, or the path is none that may be served.
            Direct: the answer needs no upstream.
        """
        path, method = request.path, request.method
        runtime = self._runtime
        host = _host(request) if runtime.match_host else ""
        if runtime.has_cors and method == "OPTIONS":
            self._preflight(request, host)
        route = runtime.router.match(path, method, host)
        if (request.odd or "//" in path) and not is_plain(request):
            self._check_readings(request, request_id, host, route)
        elif (
            route is not None
            and route.lookalikes is not None
            and route.lookalikes.hit_plain(path, method, host)
        ):
            raise _ambiguous(request_id)
        if isinstance(route, RouteRuntime):
            return route
        if route is not None:
            raise self._static(route, request, request_id)
        allowed = runtime.router.allowed(path, host)
        if allowed:
            problem = problems.method_not_allowed(allowed, request_id=request_id)
            raise Refusal(problem, "unrouted", "method-not-allowed")
        raise Refusal(problems.not_found(request_id=request_id), "unrouted", "not-found")

    def _preflight(self, request: Request, host: str) -> None:
        """Answers one, where the route of the request that it announces says how."""
        method = asked_method(request)
        route = self._runtime.router.match(request.path, method, host) if method else None
        if route is not None and route.cors is not None:
            raise Direct(route.route.name, "preflight", 204, route.cors.preflight(request))

    def _check_readings(
        self, request: Request, request_id: str, host: str, route: RouteRuntime | StaticRoute | None
    ) -> None:
        """However an upstream reads the path, it has to be one of the same route."""
        method = request.method
        try:
            readings = paths.readings(request.raw_path)
            if route is None:
                return
            slash = paths.encoded_slash(request.raw_path)
            if slash and not route.route.rules.encoded_slash:
                raise PathRefused(
                    "encoded-slash", f"The path contains {slash}, which is not accepted here."
                )
        except PathRefused as error:
            problem = problems.bad_request(str(error), request_id=request_id)
            raise Refusal(problem, "bad_request", error.reason) from None
        lookalikes = route.lookalikes
        for reading in readings:
            if self._runtime.router.match(reading, method, host) is not route or (
                lookalikes is not None and lookalikes.hit(reading, method, host)
            ):
                raise _ambiguous(request_id)

    def _static(self, route: StaticRoute, request: Request, request_id: str) -> Direct:
        runtime = self._runtime
        query = request.query
        key_query = runtime.snapshot.settings.gateway.key.query
        if key_query:
            query = drop_parameters(query, frozenset((key_query.encode(),)))
        name = route.route.name
        facts = Facts(request, request_id.encode(), runtime.trusted, name, query=query)
        headers = [*route.fields.of(facts)]
        if route.cors is not None:
            headers += route.cors.fields(request)
        return Direct(name, "static", route.answer.status, headers, route.answer.body)


def _ambiguous(request_id: str) -> Refusal:
    problem = problems.bad_request(
        "The path can be read as one of another route; send it in its plain form.",
        request_id=request_id,
    )
    return Refusal(problem, "bad_request", "ambiguous-path")


def _host(request: Request) -> str:
    for name, value in request.headers:
        if name == b"host":
            host: str = value.decode("latin-1").lower()
            if host.startswith("["):
                return host.partition("]")[0] + "]"
            return host.partition(":")[0].removesuffix(".")
    return ""
