"""nginx: as the upstream, and with a Lua script and Redis as a peer."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

from benchmarks.peers import Peer, Site
from benchmarks.processes import family, pinned, start, wait_ready
from benchmarks.tools import Tool, lua_module, nginx
from cli.embedded import free_port

_HTTP = """
worker_processes 1;
worker_rlimit_nofile 20000;
daemon off;
pid {folder}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  default_type text/plain;
  sendfile on;
  tcp_nodelay on;
  keepalive_timeout 300s;
  keepalive_requests 1000000000;
  open_file_cache max=16 inactive=1h;
  open_file_cache_valid 1h;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
{http}
}}
"""
_UPSTREAM = """
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location = /1k {{ return 200 "{kib}"; }}
    location = /64k {{ alias {folder}/64k.txt; }}
    location / {{ return 200 "a body of twenty-seven bytes"; }}
  }}
"""
# One INCR a request, on a pool of kept-alive connections: as little as a limiter can do.
_LIMITER = """
  lua_package_path "{root}/usr/share/lua/5.1/?.lua;;";
  lua_socket_log_errors off;
  upstream stub {{
    server 127.0.0.1:{upstream};
    keepalive 1024;
    keepalive_requests 1000000000;
  }}
  proxy_http_version 1.1;
  proxy_set_header Connection "";
  proxy_buffers 32 8k;
  proxy_max_temp_file_size 0;
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      set $limit 1000000000;
      access_by_lua_file {script};
      proxy_pass http://stub;
    }}
    location /rejected/ {{
      set $limit 0;
      access_by_lua_file {script};
      proxy_pass http://stub/;
    }}
  }}
"""
_SCRIPT = Path(__file__).with_name("limit.lua")


def upstream(cleanup: ExitStack, folder: Path, cores: str) -> int:
    """The upstream of everything that is compared: nginx, answering from memory. Its port.

    Raises:
        MissingError: there is no nginx.
    """
    (folder / "64k.txt").write_text("x" * 65536)
    port = free_port()
    text = _UPSTREAM.format(port=port, folder=folder, kib="x" * 1024)
    _launch(nginx(lua=False), cleanup, folder, cores, "", text)
    wait_ready(f"http://127.0.0.1:{port}/1k")
    return port


def limiter(site: Site) -> Peer:
    """nginx + Lua + Redis.

    Raises:
        MissingError: there is no nginx with Lua.
    """
    tool = nginx(lua=True)
    port, (redis_port, password) = free_port(), site.redis
    modules = lua_module(tool.root)
    names = "ndk_http_module", "ngx_http_lua_module"
    top = "".join(f"load_module {modules}/{name}.so;\n" for name in names)
    top += "env BENCH_REDIS_PORT;\nenv BENCH_REDIS_PASSWORD;\n"
    http = _LIMITER.format(
        root=str(tool.root).rstrip("/"),
        upstream=site.stack.upstream_port,
        port=port,
        script=_SCRIPT,
    )
    environment = {"BENCH_REDIS_PORT": str(redis_port), "BENCH_REDIS_PASSWORD": password}
    pid = _launch(tool, site.cleanup, site.folder, site.stack.cores.gateway, top, http, environment)
    wait_ready(f"http://127.0.0.1:{port}/1k", {"authorization": "Bearer warm"})
    version = subprocess.run(
        [tool.path, "-v"], env=tool.env, check=True, capture_output=True, text=True
    ).stderr
    return Peer(
        "nginx",
        "nginx + Lua + Redis",
        port,
        family(pid),
        admitted=site.keys,
        rejected=site.keys,
        rejected_prefix="/rejected",
        version=version.rpartition("/")[2].strip(),
    )


def _launch(
    tool: Tool,
    cleanup: ExitStack,
    folder: Path,
    cores: str,
    top: str,
    http: str,
    environment: dict[str, str] | None = None,
) -> int:
    folder.chmod(0o711)  # as root, nginx gives its workers to nobody
    config = folder / "nginx.conf"
    config.write_text(top + _HTTP.format(folder=folder, http=http))
    command = [str(tool.path), "-p", str(folder), "-c", str(config)]
    process = start(
        cleanup,
        pinned(cores, command),
        env=os.environ | dict(tool.environment) | (environment or {}),
        log=folder / "nginx.log",
    )
    return process.pid
