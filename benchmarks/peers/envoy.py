"""Envoy as a bare proxy, without any limit: what proxying alone costs a C++ proxy."""

from __future__ import annotations

import re
import subprocess

from benchmarks.peers import Peer, Site
from benchmarks.processes import pinned, start, wait_ready
from benchmarks.tools import envoy
from cli.embedded import free_port

_CONFIG = """
static_resources:
  listeners:
    - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: bench
                generate_request_id: false
                route_config:
                  virtual_hosts:
                    - {{name: all, domains: ["*"], routes: [{{match: {{prefix: "/"}}, route: {{cluster: stub}}}}]}}
                http_filters:
                  - name: envoy.filters.http.router
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
  clusters:
    - name: stub
      type: STATIC
      connect_timeout: 1s
      circuit_breakers:
        thresholds: [{{max_connections: 4096, max_pending_requests: 4096, max_requests: 4096}}]
      load_assignment:
        cluster_name: stub
        endpoints:
          - lb_endpoints:
              - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}}}
"""  # noqa: E501


def bare(site: Site) -> Peer:
    """Envoy with one worker thread.

    Raises:
        MissingError: there is no Envoy.
    """
    tool = envoy()
    port = free_port()
    config = site.folder / "envoy.yaml"
    config.write_text(_CONFIG.format(port=port, upstream=site.stack.upstream_port))
    options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    process = start(
        site.cleanup,
        pinned(site.stack.cores.gateway, [str(tool.path), "-c", str(config), *options]),
        log=site.folder / "envoy.log",
    )
    wait_ready(f"http://127.0.0.1:{port}/1k")
    text = subprocess.run(
        [tool.path, "--version"], check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"/(\d+\.\d+\.\d+)", text)
    return Peer(
        "envoy",
        "Envoy, bare proxy",
        port,
        [process.pid],
        limits=False,
        uses_redis=False,
        version=found.group(1) if found else "",
    )
