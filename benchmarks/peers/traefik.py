"""Traefik with its rate limit in Redis, one bucket for each key.

`traefik-fast` has its experimental fast proxy switched on: about a fifth less CPU, not its default.
"""

from __future__ import annotations

import subprocess

from benchmarks.peers import Peer, Site
from benchmarks.processes import pinned, start, wait_ready
from benchmarks.tools import traefik
from cli.embedded import free_port

_STATIC = """
global: {{checkNewVersion: false, sendAnonymousUsage: false}}
log: {{level: ERROR}}
entryPoints: {{web: {{address: "127.0.0.1:{port}"}}}}
providers: {{file: {{filename: "{dynamic}", watch: false}}}}
serversTransport: {{maxIdleConnsPerHost: 1024}}
"""
_FAST = "experimental: {{fastProxy: {{}}}}\n"
# As many connections to Redis as there are clients in the main scenario: with the default of ten
# it would queue for them.
_DYNAMIC = """
http:
  routers:
    rejected:
      rule: "PathPrefix(`/rejected/`)"
      service: stub
      middlewares: [used_up]
    admitted: {{rule: "PathPrefix(`/`)", service: stub, middlewares: [limited]}}
  services:
    stub: {{loadBalancer: {{servers: [{{url: "http://127.0.0.1:{upstream}"}}]}}}}
  middlewares:
    limited:
      rateLimit:
        average: 1000000
        burst: 1000000
        sourceCriterion: {{requestHeaderName: Authorization}}
        redis: &redis {{endpoints: ["127.0.0.1:{redis}"], password: "{password}", poolSize: 64}}
    used_up:
      rateLimit:
        average: 1
        period: 24h
        burst: 1
        sourceCriterion: {{requestHeaderName: Authorization}}
        redis: *redis
"""


def limiter(site: Site) -> Peer:
    """Traefik, its defaults but for the sizes of its pools.

    Raises:
        MissingError: there is no Traefik.
    """
    return _start(site, "traefik", "Traefik + Redis limit", _STATIC)


def fast(site: Site) -> Peer:
    """The same with its experimental fast proxy.

    Raises:
        MissingError: there is no Traefik.
    """
    return _start(site, "traefik-fast", "Traefik fastProxy", _STATIC + _FAST)


def _start(site: Site, name: str, title: str, settings: str) -> Peer:
    tool = traefik()
    port, (redis_port, password) = free_port(), site.redis
    dynamic = site.folder / "dynamic.yaml"
    dynamic.write_text(
        _DYNAMIC.format(upstream=site.stack.upstream_port, redis=redis_port, password=password)
    )
    static = site.folder / "traefik.yaml"
    static.write_text(settings.format(port=port, dynamic=dynamic))
    process = start(
        site.cleanup,
        pinned(site.stack.cores.gateway, [str(tool.path), f"--configFile={static}"]),
        log=site.folder / "traefik.log",
    )
    wait_ready(f"http://127.0.0.1:{port}/1k", {"authorization": "Bearer warm"})
    text = subprocess.run([tool.path, "version"], check=True, capture_output=True, text=True).stdout
    return Peer(
        name,
        title,
        port,
        [process.pid],
        admitted=site.keys,
        rejected=site.keys,
        rejected_prefix="/rejected",
        version=text.split()[1],
    )
