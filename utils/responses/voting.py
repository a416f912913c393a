"""Blind voting on a local page: a person sees two responses without their models' names and says which is better.

The page is served on this machine alone, under an address that nobody can guess. It works without scripts; its own,
for the keys, is the only one that may run. Every vote is on the disk before the next match is shown, so that voting can
be resumed where it stopped.
"""

from __future__ import annotations

import http.server
import secrets
import socket
import sys
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ..data.tools import show_prompt
from ..errors import UserError
from ..report.html import make_document
from ..report.markdown import render_markdown
from ..runtime import say
from .ballots import VOTES, Ballots, Match

# choice -> its button, its key
CHOICES = {
    "left": ("1 is better", "1"),
    "right": ("2 is better", "2"),
    "tie": ("Equally good", "3"),
    "bad": ("Both bad", "4"),
    "skip": ("Skip", "s"),
}
END = "end"
KEYS = """document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const target = document.querySelector(`[aria-keyshortcuts="${CSS.escape(event.key.toLowerCase())}"]`);
  if (target) { event.preventDefault(); target.click(); }
});"""
LONGEST_FORM_BYTES = 1000
OVER = make_document("All votes are in", "<h1>Thank you</h1><p>The votes are in. The terminal shows the result.</p>")


def check_port(port: int) -> None:
    """Refuses a port that the page cannot be served at.

    Raises:
        UserError: it is taken, or not allowed.
    """
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise _refusal(port, error) from None


def _refusal(port: int, error: OSError) -> UserError:
    return UserError(f"--vote_port {port}: the page cannot be served there ({error.strerror}); choose another port")


def collect_votes(matches: Sequence[Match], folder: Path, seed: int, port: int = 0) -> list[float | None]:
    """Has a person vote on the matches, until all are voted on or Ctrl-C.

    Args:
        folder: where ballots.jsonl and votes.jsonl are written, and read to go on.
        seed: of the order and the sides.
        port: of the page on this machine; 0 for any that is free.

    Returns:
        For each match 1 where A's response won, 0 where B's did, 0.5 for neither, None where there is no vote.

    Raises:
        UserError: the port is taken, or the ballots in the folder cannot be read.
    """
    ballots = Ballots(matches, folder, seed)
    if ballots.waiting():
        try:
            _serve(ballots, port)
        except OSError as error:
            raise _refusal(port, error) from None
        if (folder / VOTES).is_file():
            say(f"votes with a winner, as preference rows that train reads: {folder / VOTES}")
    outcomes = ballots.outcomes
    return [outcomes.get(match.key) for match in matches]


def _serve(ballots: Ballots, port: int) -> None:
    """Serves the page until the last vote or Ctrl-C."""
    done = threading.Event()
    path = f"/{secrets.token_urlsafe(16)}/"
    with _Server(("127.0.0.1", port), _Page) as server:
        server.page = Voting(ballots, path, done)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        count = len(ballots.shown)
        say(f"{len(ballots.waiting()):,} of {count:,} matches to vote on; open this page in a browser:")
        say(f"  http://127.0.0.1:{server.server_address[1]}{path}")
        say("Ctrl-C ends the voting; votes so far count, and the same command continues.")
        try:
            done.wait()
        except KeyboardInterrupt:
            say("voting ended")
        server.shutdown()


@dataclass(frozen=True)
class Voting:
    """What the page shows and changes."""

    ballots: Ballots
    path: str
    done: threading.Event
    lock: threading.Lock = field(default_factory=threading.Lock)
    skipped: set[int] = field(default_factory=set)  # places, for as long as the page is served

    def next_place(self) -> int | None:
        """The first match without a vote that was not skipped."""
        return next((place for place in self.ballots.waiting() if place not in self.skipped), None)

    def render(self, place: int | None) -> str:
        """The match at a place, or what is said when there are no more."""
        ballots = self.ballots
        if place is None:
            return self._render_end()
        match, left, right = ballots.sides(place)
        sides = _show_text(left, "<h2>Response 1</h2>") + _show_text(right, "<h2>Response 2</h2>")
        buttons = "".join(
            f'<button name="choice" value="{choice}" aria-keyshortcuts="{key}"'
            f"{' aria-pressed=true' if ballots.choice(place) == choice else ''}>{label}<kbd>{key}</kbd></button>"
            for choice, (label, key) in CHOICES.items()
        )
        before = ""
        if place:
            address = f"{escape(self.path)}?at={place - 1}"
            before = f' <a href="{address}" aria-keyshortcuts="b">previous</a><kbd>b</kbd>'
        count = len(ballots.shown)
        voted = count - len(ballots.waiting())
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        content = (
            f'<progress max="{count}" value="{voted}" aria-label="votes"></progress>'
            f'<p class="soft">Match {place + 1} of {count}: {voted} voted{skipped}.{before}</p>'
            "<h1>Which response is better?</h1>"
            f'{_show_text(show_prompt(match.prompt, match.told))}<div class="sides">{sides}</div>'
            f'<form method="post" action="{escape(self.path)}" class="choices">'
            f'<input type="hidden" name="match" value="{ballots.shown[place]}">{buttons}</form>'
        )
        return make_document("Which response is better?", content, KEYS)

    def _render_end(self) -> str:
        if not self.ballots.waiting():
            return OVER
        first, count = min(self.skipped), len(self.skipped)
        content = (
            f"<h1>{count} skipped</h1><p>All other matches are voted on. Skipped ones count for neither side.</p>"
            f'<p><a href="{escape(self.path)}?at={first}" aria-keyshortcuts="b">Vote on the first one</a></p>'
            f'<form method="post" action="{escape(self.path)}" class="choices">'
            f'<button name="choice" value="{END}" aria-keyshortcuts="e">End the voting<kbd>e</kbd></button></form>'
        )
        return make_document("Skipped matches are left", content, KEYS)

    def take(self, form: Mapping[str, list[str]]) -> bool:
        """Counts the vote of a form; whether voting is over. LookupError for one that is not of this page."""
        choice = form["choice"][0]
        if choice == END:
            return True
        with self.lock:
            place = self.ballots.shown.index(form["match"][0]) if form["match"][0] in self.ballots.shown else None
            if place is None:
                raise LookupError(form["match"][0])
            if choice == "skip":
                if self.ballots.choice(place) is None:
                    self.skipped.add(place)
                return False
            self.ballots.vote(self.ballots.shown[place], choice)
            self.skipped.discard(place)
            return not self.ballots.waiting()


def _show_text(text: str, content: str = "") -> str:
    """A text in a box of its own, under `content`."""
    inner = render_markdown(text.strip() or "(nothing)")
    return f'<article class="example">{content}<div class="text">{inner}</div></article>'


class _Server(http.server.ThreadingHTTPServer):
    """Serves one voting; a browser that goes away in the middle of an answer is no fault."""

    daemon_threads = True
    request_queue_size = 128  # connections that wait to be taken; beyond that they are reset
    page: Voting

    def handle_error(self, *request: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(*request)


class _Page(http.server.BaseHTTPRequestHandler):
    """Answers the browser; whoever does not know the address gets nothing."""

    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        if not self._is_ours(address.path):
            return
        ballots = self._voting.ballots
        at = urllib.parse.parse_qs(address.query).get("at", [""])[0]
        known = at.isdecimal() and len(at) < 10 and int(at) < len(ballots.shown)
        place = int(at) if known else self._voting.next_place()
        self._send(200, self._voting.render(place))

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length") or ""
        length = int(size) if size.isdecimal() and len(size) < 10 else 0
        self.close_connection = length > LONGEST_FORM_BYTES  # the rest would be taken for a request
        body = self.rfile.read(min(length, LONGEST_FORM_BYTES)).decode("utf-8", "replace")
        if not self._is_ours(self.path):
            return
        try:
            over = self._voting.take(urllib.parse.parse_qs(body))
        except LookupError:
            self._send(400, make_document("Invalid vote", "<p>This vote is not valid; go back.</p>"))
            return
        except OSError as error:
            say(f"warning: a vote could not be written ({error}); fix that, then vote again")
            text = f"<p>The vote could not be written ({escape(str(error.strerror))}). Go back and vote again.</p>"
            self._send(500, make_document("Not written", text))
            return
        if over:
            try:
                self._send(200, OVER)
            finally:
                self._voting.done.set()
            return
        self.send_response(303)
        self.send_header("Location", self._voting.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    @property
    def _voting(self) -> Voting:
        return self.server.page

    def _is_ours(self, path: str) -> bool:
        """Whether the request is for this page; else it is answered here."""
        host = (self.headers.get("Host") or "").partition(":")[0]
        if host in ("127.0.0.1", "localhost") and secrets.compare_digest(path.encode(), self._voting.path.encode()):
            return True
        self._send(404, make_document("Nothing here", "<p>Nothing here.</p>"))
        return False

    def _send(self, code: int, page: str) -> None:
        content = page.encode("utf-8", "backslashreplace")  # a prompt may hold half a surrogate pair
        self.send_response(code)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'; form-action 'self'")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Requests are nobody's business."""
