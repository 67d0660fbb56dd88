"""From a route's rules as the file says them to what the hot path reads, with the checks between
them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from core.config.document import Path
from core.config.headerchanges import AnswerHeaderSpec, RequestHeaderSpec
from core.config.problems import Problems
from core.config.rules import (
    CorsSpec,
    RespondSpec,
    RewriteSpec,
    RuleKeys,
)
from core.rules import Cors, HeaderRules, Rewrite, RouteRules, StaticAnswer, Template

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")

# Of a path as it is sent: what RFC 3986 lets stand in a segment, and what is encoded already.
_SAFE = "/!$&'()*+,;=:@~%"

# Keys that say something of an upstream, or of a charge.
_NOT_WITH_RESPOND = (
    "strip_prefix", "add_prefix", "rewrite", "host", "request_headers", "response_headers",
    "max_body", "meters", "keyless", "plan", "forward_key", "charge", "outage", "websocket",
)  # fmt: skip


def check_upstream(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    """Report a route with an upstream and an answer of its own, or with neither."""
    if raw.get("respond") is None:
        if raw.get("upstream") is None:
            problems.add(
                (*path, "upstream"),
                "required, but missing; name an upstream, or write respond",
                value=False,
            )
        return
    if raw.get("upstream") is not None:
        problems.add((*path, "upstream"), "the route answers by itself; remove this, or respond")
    for key in _NOT_WITH_RESPOND:
        if key in raw:
            problems.add(
                (*path, key),
                "of no use beside respond: nothing goes upstream, and nothing is charged; "
                "remove it",
                value=False,
            )


def compile_rules(
    path: Path,
    spec: RuleKeys,
    *,
    match_path: str,
    methods: tuple[str, ...],
    keyless: bool,
    stripped: bool,
    max_body: int,
    problems: Problems,
) -> RouteRules:
    """The rules of a route. `max_body` is what holds where the route says nothing."""
    _check_variables(path, spec, keyless, problems)
    if spec.rewrite is not None:
        _check_rewrite(path, spec, match_path, stripped, problems)
    if spec.cors is not None and spec.response_headers is not None:
        changed = spec.response_headers
        for key in ("set", "add", "remove"):
            for name in getattr(changed, key):
                if name.startswith("access-control-"):
                    problems.add(
                        (*path, "response_headers", key),
                        f"{name} is written by cors; say it there",
                        value=False,
                    )
    preserve = spec.host == "preserve"
    return RouteRules(
        request=_headers(spec.request_headers),
        response=_headers(spec.response_headers),
        add_prefix=quote(spec.add_prefix or "", _SAFE.replace("%", "")),
        rewrite=_rewrite(spec.rewrite),
        host="" if preserve else spec.host or "",
        preserve_host=preserve,
        cors=_cors(spec.cors, methods),
        answer=_answer(spec.respond),
        max_body=max_body if spec.max_body is None else spec.max_body,
        encoded_slash=spec.encoded_slash == "allow",
    )


def _headers(spec: RequestHeaderSpec | AnswerHeaderSpec | None) -> HeaderRules | None:
    if spec is None or not (spec.set or spec.add or spec.remove):
        return None
    return HeaderRules(frozenset((*spec.set, *spec.remove)), (*spec.set.items(), *spec.add.items()))


def _check_variables(path: Path, spec: RuleKeys, keyless: bool, problems: Problems) -> None:
    if not keyless:
        return
    for section in ("request_headers", "response_headers"):
        changes: RequestHeaderSpec | AnswerHeaderSpec | None = getattr(spec, section)
        for key in ("set", "add") if changes is not None else ():
            fields: Mapping[str, Template] = getattr(changes, key)
            for name, template in fields.items():
                if "subscription" in template[1::2]:
                    problems.add(
                        (*path, section, key, name),
                        "a keyless route has no {subscription}; remove it",
                        value=False,
                    )


def _rewrite(spec: RewriteSpec | None) -> Rewrite | None:
    if spec is None:
        return None
    result = tuple(part if index % 2 else quote(part, _SAFE) for index, part in enumerate(spec.to))
    return Rewrite(spec.source, result)


def _check_rewrite(
    path: Path, spec: RuleKeys, match_path: str, stripped: bool, problems: Problems
) -> None:
    if stripped or spec.add_prefix is not None:
        problems.add(
            (*path, "rewrite"),
            "strip_prefix and add_prefix are of no use beside it; say all of it in `to`",
            value=False,
        )
    assert spec.rewrite is not None
    pattern = spec.rewrite.source
    prefix = match_path.endswith("/*")
    segments = (match_path[1:-2] if prefix else match_path[1:]).split("/")
    rest = pattern[-1].endswith("...}")
    fixed = pattern[:-1] if rest else pattern
    fits = all(
        wanted in (given,) or wanted.startswith("{")
        for wanted, given in zip(fixed, segments, strict=False)
    )
    if prefix:
        fits = fits and (rest or len(pattern) > len(segments))
    else:
        fits = fits and (len(fixed) <= len(segments) if rest else len(pattern) == len(segments))
    if not fits:
        problems.add(
            (*path, "rewrite", "from"),
            f"no path of this route ({match_path}) fits; begin it as the route's path does",
        )


def _cors(spec: CorsSpec | None, methods: tuple[str, ...]) -> Cors | None:
    if spec is None:
        return None
    return Cors(
        origins=spec.origins,
        methods=spec.methods or methods or _METHODS,
        headers=spec.headers or (),
        expose=spec.expose,
        credentials=spec.credentials,
        max_age_s=spec.max_age_ms // 1000,
    )


def _answer(spec: RespondSpec | None) -> StaticAnswer | None:
    if spec is None:
        return None
    fields = dict(spec.headers)
    body = spec.content
    if body and "content-type" not in fields:
        kind = "text/plain; charset=utf-8" if spec.json_ is None else "application/json"
        fields["content-type"] = (kind,)
    return StaticAnswer(spec.status, tuple(fields.items()), body)
