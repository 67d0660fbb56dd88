"""Rate limit headers of an answer: draft-ietf-httpapi-ratelimit-headers-11, and the legacy ones.

    RateLimit-Policy: "per_second";q=20;w=2, "monthly";q=10000
    RateLimit: "monthly";r=12;t=36000
    X-RateLimit-Limit: 10000
    X-RateLimit-Remaining: 12
    X-RateLimit-Reset: 36000
    X-Tallygate-Overage: monthly
    X-Tallygate-Shadow: per_day
    X-Tallygate-Warning: monthly;used=10001;limit=10000

RateLimit and the legacy headers describe one limit: one that refuses if there is any (the one that
refuses longest), otherwise the one nearest exhaustion, by remaining / limit, concurrency limits
aside. X-RateLimit-Reset is a
delta in seconds, as `t` is; implementations elsewhere disagree, some send an epoch time. Limits in
shadow mode (`enforce: false`) are advertised nowhere but in X-Tallygate-Shadow.

All of it is RFC 9651: Lists whose members are Strings (RateLimit*) or Tokens (X-Tallygate-*; a
String where a name is no Token). `PlanHeaders` is compiled once a plan; a request formats numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from core.policy import Meter, Plan
from gateway.answers.verdict import CONCURRENT_UNIT, REQUESTS_UNIT, LimitState, Policy, policy_of

Headers = list[tuple[bytes, bytes]]

# Who answered, where the upstream does not say; without it the HTTP server would name itself.
SERVER = (b"server", b"tallygate")

_TOKEN = re.compile(r"[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*")
_STRING = re.compile(r"[\x20-\x7e]*")
# RFC 9651 Integers have at most 15 digits.
_MAX_INTEGER = 999_999_999_999_999


def sf_string(text: str) -> bytes:
    """An RFC 9651 String.

    Raises:
        ValueError: a character outside printable ASCII, which the type cannot carry.
    """
    if not _STRING.fullmatch(text):
        raise ValueError(f"{text!r} cannot stand in a header: use printable ASCII characters only")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'.encode()


def sf_token(text: str) -> bytes:
    """An RFC 9651 Token where the text is one, otherwise a String."""
    return text.encode() if _TOKEN.fullmatch(text) else sf_string(text)


def retry_after_s(states: Iterable[LimitState]) -> int:
    """Whole seconds after which every limit that refused lets the request through; at least 1."""
    longest = max((state.reset_ms for state in states if not state.allowed), default=0)
    return max(1, -(-longest // 1000))


def headline(states: Sequence[LimitState]) -> LimitState:
    """The limit to tell the client about: refused for longest first, then nearest exhaustion.

    Raises:
        ValueError: no states.
    """
    refused = [state for state in states if not state.allowed]
    if refused:
        return max(refused, key=lambda state: state.reset_ms)
    return min(states, key=lambda state: state.remaining / (state.limit or 1))


class PlanHeaders:
    """The headers of one plan's answers.

    Args:
        plan: its limits' names must be printable ASCII (ValueError otherwise).
        meters: all meters by name.
        ratelimit: send RateLimit and RateLimit-Policy.
        legacy: send X-RateLimit-Limit, -Remaining and -Reset.
    """

    __slots__ = ("_items", "_legacy", "_limits", "_policy", "_ratelimit", "_shadow", "policies")

    def __init__(
        self,
        plan: Plan,
        meters: Mapping[str, Meter],
        *,
        ratelimit: bool = True,
        legacy: bool = True,
    ) -> None:
        self.policies: tuple[Policy, ...] = tuple(policy_of(limit, meters) for limit in plan.limits)
        self._ratelimit = ratelimit
        self._legacy = legacy
        self._shadow = frozenset(p.static[0] for p in self.policies if not p.enforce)
        enforced = [p for p in self.policies if p.enforce]
        self._policy = (b"ratelimit-policy", b", ".join(_policy_item(p) for p in enforced))
        # Per limit: RateLimit with and without t, and X-RateLimit-Limit. % is legal in a name.
        self._items: dict[str, tuple[bytes, bytes]] = {}
        self._limits: dict[str, tuple[bytes, bytes]] = {}
        for policy in enforced:
            name, _kind, limit, _window, _unit = policy.static
            quoted = sf_string(name).replace(b"%", b"%%")
            self._items[name] = (quoted + b";r=%d;t=%d", quoted + b";r=%d")
            self._limits[name] = (b"x-ratelimit-limit", b"%d" % limit)

    def plain(self, policies: Sequence[Policy]) -> Callable[[Sequence[int]], Headers]:
        """A function that makes the headers where no limit has anything to report.

        It takes what Redis answers, `[now, status, flags, remaining, reset, ...]` in the order of
        `policies`, and gives what `of` gives for the same.
        """
        head = [self._policy] if self._ratelimit and self._items else []
        enforced = [(2 + 3 * n, p) for n, p in enumerate(policies) if p.enforce]
        counting = [(at, p) for at, p in enforced if p.static[1] != "concurrency"]
        if not self._ratelimit or len(counting) != len(enforced):
            # Seldom, and not worth a second spelling.
            return lambda numbers: self.of(
                [
                    LimitState(*p.static, numbers[3 * n + 3] // p.divisor, numbers[3 * n + 4])
                    for n, p in enumerate(policies)
                ]
            )
        rows = [
            (at + 1, p.divisor, p.static[2], self._items[p.static[0]][0], self._limits[p.static[0]])
            for at, p in counting
        ]
        legacy = self._legacy

        def headers(numbers: Sequence[int]) -> Headers:
            near = None
            near_remaining = near_limit = 0
            for row in rows:
                remaining = numbers[row[0]]
                if row[1] != 1:
                    remaining //= row[1]
                limit = row[2]
                if near is None or remaining * near_limit < near_remaining * limit:
                    near, near_remaining, near_limit = row, remaining, limit
            if near is None:
                return head.copy()
            if near_remaining < 0:
                near_remaining = 0
            reset_s = -(-numbers[near[0] + 1] // 1000)
            ratelimit = (b"ratelimit", near[3] % (near_remaining, reset_s))
            if not legacy:
                return [*head, ratelimit]
            return [
                *head,
                ratelimit,
                near[4],
                (b"x-ratelimit-remaining", b"%d" % near_remaining),
                (b"x-ratelimit-reset", b"%d" % reset_s),
            ]

        return headers

    def of(self, states: Sequence[LimitState]) -> Headers:
        """The headers for a decision: `states` is of this plan's limits, in any order, or empty.

        Names are lower case. Retry-After is there when a limit refused.
        """
        # One pass and no attribute access: this runs for each request (1 µs for four limits).
        shadow = self._shadow
        near: LimitState | None = None
        slots: LimitState | None = None
        near_remaining = near_limit = 0
        special = refused = False
        for state in states:
            name, kind, limit, _, _, remaining, _, allowed, overage, warned, shadowed = state
            if overage or warned or shadowed:
                special = True
            if not allowed:
                refused = True
            elif name in shadow:
                continue
            elif kind == "concurrency":
                # How many more may run beside this one says nothing of what is used up, so it is
                # told only where there is nothing else to tell.
                slots = state
            elif (
                # remaining / limit compared without dividing: a limit may be 0.
                near is None or remaining * near_limit < near_remaining * limit
            ):
                near, near_remaining, near_limit = state, remaining, limit
        headers: Headers = [self._policy] if self._ratelimit and self._items else []
        if refused:
            near = headline(states)
        elif near is None:
            near = slots
        if near is not None:
            name, kind, _, _, _, remaining, reset_ms, _, _, _, _ = near
            if remaining < 0:
                remaining = 0
            reset_s = -(-reset_ms // 1000)
            if refused and reset_s < 1:
                reset_s = 1  # "now" would send the client straight back
            if self._ratelimit:
                if kind == "concurrency":  # nobody knows when a request of others ends
                    value = self._items[name][1] % remaining
                else:
                    value = self._items[name][0] % (remaining, reset_s)
                headers.append((b"ratelimit", value))
            if self._legacy:
                headers += (
                    self._limits[name],
                    (b"x-ratelimit-remaining", b"%d" % remaining),
                    (b"x-ratelimit-reset", b"%d" % reset_s),
                )
            if refused:
                headers.append((b"retry-after", b"%d" % reset_s))
        if special:
            _add_vendor(headers, states)
        return headers


def _policy_item(policy: Policy) -> bytes:
    name, _kind, limit, window_s, unit = policy.static
    item = b"%b;q=%d" % (sf_string(name), min(limit, _MAX_INTEGER))
    if unit == CONCURRENT_UNIT:
        item += b";qu=" + sf_string(unit)
    elif unit != REQUESTS_UNIT:
        # `qu` has a registry, and a meter's unit is not in it: vendor parameters take a prefix.
        item += b";tallygate-unit=" + sf_string(unit)
    if window_s:
        item += b";w=%d" % window_s
    return item


def _add_vendor(headers: Headers, states: Sequence[LimitState]) -> None:
    overage = [sf_token(s.name) for s in states if s.overage]
    if overage:
        headers.append((b"x-tallygate-overage", b", ".join(overage)))
    shadow = [sf_token(s.name) for s in states if s.shadow_refused]
    if shadow:
        headers.append((b"x-tallygate-shadow", b", ".join(shadow)))
    warned = [
        b"%b;used=%d;limit=%d" % (sf_token(s.name), s.limit - s.remaining, s.limit)
        for s in states
        if s.warned
    ]
    if warned:
        headers.append((b"x-tallygate-warning", b", ".join(warned)))
