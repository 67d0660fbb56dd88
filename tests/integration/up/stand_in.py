"""Stands in for gateway, control and reconciler in the tests of `tallygate up`.

Copied as `NAME/__main__.py` into the directory `up` runs in. Answers every request 200, writes
what happens to it to `events` in the working directory, and does what the file `NAME.behave` says:
`fail` (exit 3 at once), `stubborn` (ignore SIGTERM).
"""

import http.server
import os
import signal
import sys
import threading
from pathlib import Path

name = Path(__file__).resolve().parent.name
behave = Path(f"{name}.behave")
behaviour = behave.read_text() if behave.exists() else ""


def note(event: str) -> None:
    with Path("events").open("a") as events:
        events.write(f"{name} {event}\n")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


if behaviour == "fail":
    print("config.yaml: 1 problem", file=sys.stderr)
    sys.exit(3)
stop = threading.Event()
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, lambda *_: note("ignored SIGTERM"))
else:
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
note(f"started {os.getpid()}")
for variable in sorted(os.environ):
    if variable.startswith("TALLYGATE_"):
        note(f"env {variable}={os.environ[variable]}")
print(f"{name} says hello", flush=True)
if "--listen" in sys.argv:
    host, port = sys.argv[sys.argv.index("--listen") + 1].split(":")
    server = http.server.ThreadingHTTPServer((host, int(port)), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
while not stop.wait(0.05):
    pass
note("stopped")
