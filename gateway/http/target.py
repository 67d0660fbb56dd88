"""Request targets that are not simply a path (RFC 9112 section 3.2)."""

from __future__ import annotations

from typing import Final

_SCHEMES: Final = {b"http": b"80", b"https": b"443"}


class TargetError(ValueError):
    """The target cannot be served; `status` says how to answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def parse_target(method: str, target: bytes, host: bytes) -> bytes:
    """The path and query of a target in any form; `host` is the value of Host.

    The authority of an absolute target has to be that of Host: one of them would otherwise be
    matched, and the other one logged or believed.

    Raises:
        TargetError: it is in none of the forms that may be used here.
    """
    if b"#" in target:
        # An upstream that cuts it off would serve another path than the one we matched.
        raise TargetError("The request target has a fragment; send it without.")
    if target[:1] == b"/":
        return target
    if target == b"*" and method == "OPTIONS":
        return target
    scheme, found, rest = target.partition(b"://")
    scheme = scheme.lower()
    if not found or scheme not in _SCHEMES:
        raise TargetError("The request target is no path; send an absolute path.")
    cut = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    authority, path = rest[:cut], rest[cut:]
    if b"@" in authority or not authority:
        raise TargetError("The authority of the request target is no host.")
    port = _SCHEMES[scheme]
    if _named(authority, port) != _named(host, port):
        raise TargetError("The request target and Host name different hosts.")
    return path if path[:1] == b"/" else b"/" + path


def _named(authority: bytes, default_port: bytes) -> tuple[bytes, bytes]:
    host, colon, port = authority.lower().rpartition(b":")
    if not colon or port.endswith(b"]"):
        host, port = authority.lower(), b""
    return host.removesuffix(b"."), port or default_port
