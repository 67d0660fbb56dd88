"""The configuration of the WebSocket tests."""

from __future__ import annotations

_CONFIG = """
gateway:
  drain: 5s
  access_log: true
  key: {query: key}
  outage: {spool_dir: "${TALLYGATE_METRICS_DIR}-spool"}
redis: {url: "${TALLYGATE_REDIS_URL}", timeout: 5s}
postgres: {url: "${TALLYGATE_POSTGRES_URL}", timeout: 2s}
secrets: {key_pepper: "${TALLYGATE_KEY_PEPPER}"}
reconciler: {flush_interval: 50ms}
log: {format: json, level: info}
meters:
  messages: {unit: message}
  traffic: {unit: byte}
upstreams:
  live: {urls: ["http://127.0.0.1:%(port)d"], timeout: {connect: 2s, response: 3s}}
  plain: {urls: ["${UPSTREAM}"]}
  odd: {urls: ["http://127.0.0.1:%(odd)d"], timeout: {connect: 2s, response: 500ms}}
  nobody: {urls: ["http://127.0.0.1:1"]}
routes:
  - {match: {path: /plain/*}, upstream: plain}
  - {match: {path: /off/*}, upstream: live}
  - {match: {path: /odd/*}, upstream: odd, charge: on_response, websocket: true}
  - {match: {path: /nobody/*}, upstream: nobody, charge: on_response, websocket: true}
  - {match: {path: /free/*}, upstream: live, keyless: true, plan: anonymous, websocket: true}
  - match: {path: /shop/*}
    upstream: live
    websocket: {origins: ["https://shop.example"]}
  - {match: {path: /idle/*}, upstream: live, websocket: {idle_timeout: 1s}}
  - {match: {path: /small/*}, upstream: live, websocket: {max_message: 1000 B}}
  - {match: {path: /few/*}, upstream: live, websocket: {max_connections: 1, recheck: 1s}}
  - {match: {path: /paid/*}, upstream: live, charge: {status: [2xx]}, websocket: true}
  - match: {path: /messages/*}
    upstream: live
    websocket: {meters: {messages: {per: message, from: client}}}
  - match: {path: /kept/*}
    upstream: live
    outage: open
    websocket: {meters: {messages: {per: message, from: client}}}
  - match: {path: /both/*}
    upstream: live
    websocket:
      recheck: 1s
      meters: {messages: {per: message}, traffic: {per: byte, cost: 1}}
  - match: {path: /public/*}
    upstream: live
    keyless: true
    plan: anonymous
    websocket: {meters: {messages: {per: message, from: client}}}
  - {match: {path: /live/*}, upstream: live, strip_prefix: /live, websocket: {recheck: 1s}}
plans:
  anonymous: {limits: {talk: {rate: 5/d, burst: 5, meter: messages}}}
  open: {unlimited: true}
  five: {limits: {handshakes: {period: billing, limit: 5}}}
  slots: {limits: {at_once: {concurrency: 2, lease: 2s}}}
  talk: {limits: {talk: {period: billing, limit: 10, meter: messages}, at_once: {concurrency: 3}}}
  loose: {limits: {loose: {period: billing, limit: 5, meter: messages, action: warn}}}
  bytes: {limits: {volume: {period: billing, limit: 1000, meter: traffic}}}
"""


def config(port: int, odd: int) -> str:
    """With WebSocket upstreams on these ports, the second of which is not a good one."""
    return _CONFIG % {"port": port, "odd": odd}
