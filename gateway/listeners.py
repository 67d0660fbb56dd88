"""Listening sockets: bound by the supervisor, served by whichever worker has the slot.

Each slot has a SO_REUSEPORT socket of its own for each address, so that the kernel spreads
connections over the workers. The supervisor keeps every one open: connections that wait in the
queue of a worker that dies, or is replaced, wait on for the next one and are never reset.
Under systemd socket activation the sockets are the service manager's, and all workers share them.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import sys
from collections.abc import MutableMapping
from typing import Final, NamedTuple

from core.config import Address
from core.errors import TallygateError

HTTP: Final = "http"
HTTPS: Final = "https"

# Of systemd's protocol (sd_listen_fds): descriptors from this one on are ours.
_FIRST_FD: Final = 3

_SO_ATTACH_FILTER: Final = 26
# Classic BPF over the TCP header. Drops what asks for a new connection; everything that belongs to
# one, also the last packet of a handshake, goes on.
_NO_SYN: Final = (
    (0x30, 0, 0, 13),  # load the byte with the flags
    (0x45, 0, 1, 0x02),  # is SYN set?
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFF_FFFF),  # keep
)


class Listener(NamedTuple):
    """A bound socket. `kind` is what is spoken on it; `owned`: nobody but this gateway has it."""

    sock: socket.socket
    kind: str
    owned: bool

    def argument(self) -> str:
        """For a worker's command line; `parse_listener` reads it."""
        return f"{self.sock.fileno()}:{self.kind}:{'own' if self.owned else 'shared'}"

    @property
    def waiting(self) -> bool:
        """There is a connection that nobody has accepted."""
        poll = select.poll()
        poll.register(self.sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def refuse_new(self) -> None:
        """From now on the kernel completes no new handshake here.

        Closing a listening socket resets what has connected and was not accepted yet. After this,
        the queue can be emptied before the socket is closed. A client that comes meanwhile tries
        again a second later. Nothing happens to a socket that goes on without this gateway.
        """
        if not self.owned or sys.platform != "linux":
            return
        program = b"".join(struct.pack("HBBI", *instruction) for instruction in _NO_SYN)
        code = ctypes.create_string_buffer(program)
        filter_ = struct.pack("HL", len(_NO_SYN), ctypes.addressof(code))
        self.sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)


def parse_listener(argument: str) -> Listener:
    """What `Listener.argument` wrote, in the process that inherited the descriptor.

    Raises:
        ValueError: it was written by something else.
    """
    fd, kind, owner = argument.split(":")
    return Listener(socket.socket(fileno=int(fd)), kind, owner == "own")


def bind(address: Address, kind: str = HTTP) -> Listener:
    """A socket beside others on the same address. It refuses connections until it is served.

    Raises:
        TallygateError: the address cannot be listened on.
    """
    sock = socket.socket(_family(address), socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((address.host, address.port))
    except OSError as error:
        sock.close()
        raise _cannot_listen(address, kind, error) from None
    return Listener(sock, kind, owned=True)


def check_free(address: Address, kind: str = HTTP) -> None:
    """Workers share the port, and so would two gateways: refuse that with a plain bind.

    Raises:
        TallygateError: the address cannot be listened on.
    """
    with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise _cannot_listen(address, kind, error) from None


def inherited(environment: MutableMapping[str, str]) -> list[Listener]:
    """The sockets that a service manager listens on for us (`LISTEN_FDS`); mostly none.

    One named `https` in `LISTEN_FDNAMES` (`FileDescriptorName=`) is for TLS, any other for plain
    HTTP. The variables are removed: they are not for our children.

    Raises:
        TallygateError: one of them is no listening stream socket.
    """
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    found = []
    for number in range(int(count)):
        fd = _FIRST_FD + number
        os.set_inheritable(fd, False)
        try:
            sock = socket.socket(fileno=fd)
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:
            listens = 0
        if not listens or sock.type != socket.SOCK_STREAM:
            raise TallygateError(
                f"LISTEN_FDS: descriptor {fd} is no listening stream socket; "
                "write ListenStream= and leave Accept= out of the .socket unit"
            )
        name = names[number] if number < len(names) else ""
        found.append(Listener(sock, HTTPS if name == HTTPS else HTTP, owned=False))
    return found


def _family(address: Address) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET


def _cannot_listen(address: Address, kind: str, error: OSError) -> TallygateError:
    setting = "gateway.tls.listen" if kind == HTTPS else "gateway.listen"
    return TallygateError(
        f"{setting}: cannot listen on {address}: {error.strerror}; "
        "choose another port or stop what uses it"
    )
