"""A judge behind an endpoint, played by a server in this process."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler

KEY = "sk-a-key-that-must-not-be-written"


class Endpoint(BaseHTTPRequestHandler):
    """Prefers the longer response, and when they are of one length whichever stands first; fails when told to."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((self.path, self.headers.get("Authorization"), body))
        if server.failures:
            code, headers = server.failures.pop(0)
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(f"no: {self.headers.get('Authorization')}".encode())
            return
        text = body["messages"][0]["content"]
        one, other = re.search(r"\[Response A\]\n(.*)\n\n\[Response B\]\n(.*)\n\nAnswer", text, re.DOTALL).groups()
        content = server.answer or ("A" if len(one) >= len(other) else "B")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": content}}]}).encode())

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Authorization"), None))
        self.send_error(404)

    def log_message(self, *arguments):
        pass
