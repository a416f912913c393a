"""As much of the hub as an upload asks for, played by a server in this process; it keeps what it is sent."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from .runs import read_record

TOKEN = "hf_me"  # any other is refused


class Hub(BaseHTTPRequestHandler):
    """Puts into `received` of its server the path and body of each call, and the status of the run in `run` by then."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        run: Path = self.server.run
        status = read_record(run)["status"] if (run / "run.json").is_file() else None
        self.server.received.append((self.path, body, status))
        place = f"http://{self.headers['Host']}/me/model"
        answer: dict = {"url": place}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{place}/commit/0", "commitOid": "0", "success": True}
        self._send(200, answer)

    def do_GET(self):
        self._send(200, {"id": "me/model", "sha": "0", "siblings": []})

    def _send(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def created_on(received: list[tuple[str, bytes, str | None]]) -> dict:
    """What was asked of the hub as the one repository was made."""
    (body,) = (body for path, body, _ in received if path == "/api/repos/create")
    return json.loads(body)


def files_sent(received: list[tuple[str, bytes, str | None]]) -> set[str]:
    """The names of the files in the one commit that was sent."""
    (commit,) = (body for path, body, _ in received if "/commit/" in path)
    return {line["value"]["path"] for line in map(json.loads, commit.splitlines()) if line["key"] == "file"}
