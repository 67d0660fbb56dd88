"""What tests of every kind share: polling, ports, processes, real servers."""

from tests.support.processes import Process, run_module
from tests.support.servers import flush, redis_binaries
from tests.support.wait import free_port, wait_until, wait_until_async

__all__ = [
    "Process",
    "flush",
    "free_port",
    "redis_binaries",
    "run_module",
    "wait_until",
    "wait_until_async",
]
