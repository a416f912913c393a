"""The judge behind an endpoint: what it is asked, what it is believed, and endpoints that fail in every way."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from shared.endpoint import KEY
from shared.runs import ROOT, start

from utils.errors import UserError
from utils.responses.judging import EndpointJudge, JudgeLimits, mask, read_verdict


def make_judge(endpoint, cache: Path, waits: list[float] | None = None, **limits) -> EndpointJudge:
    async def sleep(seconds: float) -> None:
        if waits is not None:
            waits.append(seconds)

    return EndpointJudge(endpoint.url, "judge-1", cache, JudgeLimits(**limits), sleep=sleep)


def test_a_judge_is_asked_in_both_orders_and_only_once(endpoint, tmp_path):
    judge = make_judge(endpoint, tmp_path)
    prompts, responses = ["p"] * 3 + ["q"] * 2, ["aaa", "bb", "c", "dd", "ee"]
    # "dd" and "ee" are equally long: the answer goes by the order, and both orders together say neither.
    assert judge.score(prompts, responses) == [1.0, 0.5, 0.0, 0.5, 0.5]
    assert judge.asked == len(endpoint.seen) == 8
    path, authorization, body = endpoint.seen[0]
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    again = make_judge(endpoint, tmp_path)
    assert again.score(prompts, responses) == [1.0, 0.5, 0.0, 0.5, 0.5]
    assert (again.asked, len(endpoint.seen)) == (0, 8)


def test_passing_failures_are_tried_again_after_longer_waits(endpoint, tmp_path):
    endpoint.failures = [(503, {}), (500, {}), (429, {"Retry-After": "7"})]
    waits: list[float] = []
    assert make_judge(endpoint, tmp_path, waits).prefer("p", "longer", "short") == 1.0
    assert waits == [1.0, 2.0, 7.0]
    endpoint.failures = [(502, {})] * 6
    with pytest.raises(UserError, match="no answer in 6 attempts"):
        make_judge(endpoint, tmp_path).prefer("p", "other", "one")


@pytest.mark.parametrize(("code", "fault"), [(401, "refused .401"), (400, "400 Bad Request: no: Bearer ...$")])
def test_lasting_failures_are_said_at_once_and_without_the_key(endpoint, tmp_path, code, fault):
    endpoint.failures = [(code, {})]
    with pytest.raises(UserError, match=fault) as caught:
        make_judge(endpoint, tmp_path).prefer("p", "longer", "short")
    assert KEY not in str(caught.value)
    assert len(endpoint.seen) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_key_goes_nowhere_else(endpoint, tmp_path, code):
    elsewhere = endpoint.url.replace("127.0.0.1", "localhost") + "/elsewhere"
    endpoint.failures = [(code, {"Location": f"{elsewhere}?key={KEY}"})]
    with pytest.raises(UserError, match=f"redirects .*{elsewhere}.*give the final URL") as caught:
        make_judge(endpoint, tmp_path).prefer("p", "longer", "short")
    assert KEY not in str(caught.value)
    assert [path for path, *_ in endpoint.seen] == ["/v1/chat/completions"]


def test_the_number_of_requests_and_their_rate_are_bounded(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.responses.judging.time", SimpleNamespace(monotonic=lambda: 5.0))  # a clock that stands
    waits: list[float] = []
    judge = make_judge(endpoint, tmp_path, waits, requests=3, requests_per_minute=60)
    judge.prefer("p", "aa", "d")
    with pytest.raises(UserError, match="--max_judge_requests 3 are used up"):
        judge.prefer("p", "bbb", "d")
    assert len(endpoint.seen) == 3
    assert waits == [1.0, 2.0]
    again = make_judge(endpoint, tmp_path)
    again.prefer("p", "bbb", "d")
    assert again.asked == 1, "the answer before the limit was kept"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A", 1.0),
        ("B", 0.0),
        ("TIE", 0.5),
        (" **B**\n", 0.0),
        ("Response A.", 1.0),
        ("Answer: 'B'", 0.0),
        ("**Answer:** Response A", 1.0),
        ("Tie.", 0.5),
        ("B. It gives a better answer", 0.0),
        ("B\n\nResponse A is a list.", 0.0),
        ("A - the other one is a guess.", 1.0),
        ("B is slightly better.", 0.0),
        ("A better answer is given by B", None),
        ("A and B are alike.", None),
        ("B is worse.", None),
        ("a", None),
        ("Both have a point; B is fine", None),
        ("Banana", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_first_word_of_an_answer(answer, verdict):
    assert read_verdict(answer) == verdict


def test_an_answer_without_a_verdict_is_counted_and_is_neither(endpoint, tmp_path):
    endpoint.answer = "Both have their merits."
    judge = make_judge(endpoint, tmp_path)
    assert judge.prefer("p", "one", "two") == 0.5
    assert (judge.unreadable, judge.unreadable_example) == (2, "Both have their merits.")


def test_the_beginning_of_a_long_answer_is_read_and_kept_without_thoughts_and_key(endpoint, tmp_path):
    endpoint.answer = f"<think>A. or B? {KEY}</think>\nB. {KEY} {'It is a better answer. ' * 40}A"
    for _ in range(2):
        judge = make_judge(endpoint, tmp_path)
        assert judge.weigh_all([("p", "one", "two")]) == [(0.0, 1.0)]
    assert len(endpoint.seen) == 2
    kept = "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert KEY not in kept
    assert "B. ... It is" in kept


class RawEndpoint:
    """A server that sends just these bytes, or does what a function does with the connection, to every request."""

    def __init__(self, answer: bytes | Callable[[socket.socket], None]):
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.close()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._reply, args=(connection,), daemon=True).start()

    def _reply(self, connection: socket.socket):
        with connection, contextlib.suppress(OSError):
            request = b""
            while not request.endswith(b'"temperature":0}'):
                request += connection.recv(2**16)
            if callable(self._answer):
                self._answer(connection)
            else:
                connection.sendall(self._answer)


def completion(content: str) -> bytes:
    body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


SECRET = KEY.encode()
DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 401 invalid key " + SECRET + b"\r\n\r\n", "refused (401 invalid key ...); set OPENAI_API_KEY"),
        (b"HTTP/1.1 400 bad " + SECRET + b"\r\n\r\nno " + SECRET, "400 bad ...: no ..."),
        (b"HTTP/1.1 400 Bad\r\n\r\n" + b"x" * 290 + SECRET, "400 Bad: " + "x" * 290 + "..."),
        (b"HTTP/1.1 400 Bad\r\n\r\n" + SECRET.upper(), "400 Bad: ..."),
        (b"HTTP/1.1 503 over " + SECRET + b"\r\n\r\n", "no answer in 6 attempts (503 over ...)"),
        (b"HTTP/1.1 302 " + SECRET + b"\r\nLocation: http://b/" + SECRET + b"\r\n\r\n", "(302 ..., to http://b/...)"),
        (b"HTTP/1.1 302 F\r\n\r\n", "(302 F, to nowhere)"),
        (b"key " + SECRET + b"\r\n\r\n", "no answer in 6 attempts (RemoteProtocolError"),
        (b"", "no answer in 6 attempts (RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "no answer in 6 attempts (RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "no answer in 6 attempts (RemoteProtocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nno", "no answer in 6 attempts (DecodingError"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", "no answer in 6 attempts (RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 100_000 + b"\r\n", "no answer in 6 attempts (RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + DEEP, "no answer in 6 attempts (ValueError: not a chat completion: '[[["),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b'{"no": "' + SECRET + b'"}', 'not a chat completion: \'{"no": "..."}\''),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (2**23 + 1), "an answer of more than 8 MiB"),
        (b"HTTP/1.1 429 Later\r\nRetry-After: -1\r\n\r\n", "no answer in 6 attempts (429 Later)"),
        (b"HTTP/1.1 429 Later\r\nRetry-After: nan\r\n\r\n", "no answer in 6 attempts (429 Later)"),
    ],
)
def test_an_endpoint_that_fails_is_one_message_without_the_key(tmp_path, monkeypatch, answer, said):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    waits: list[float] = []
    with RawEndpoint(answer) as endpoint, pytest.raises(UserError) as caught:
        make_judge(endpoint, tmp_path, waits).prefer("p", "one", "other")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 600
    assert KEY[:8] not in str(caught.value).lower()
    # All workers see the same endpoint; each of them waits as long as one alone would.
    assert set(waits) <= {1.0, 2.0, 4.0, 8.0, 16.0}


@pytest.mark.parametrize(
    "drips",
    [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b""],
    ids=["header", "body", "endless", "status"],
)
def test_a_request_ends_in_time_however_slowly_its_answer_trickles_in(tmp_path, monkeypatch, drips):
    monkeypatch.setattr("utils.responses.judging.TIMEOUT_SECONDS", 0.3)

    def drip(connection):
        connection.sendall(drips)
        while True:
            connection.sendall(b"x")
            time.sleep(0.02)

    with RawEndpoint(drip) as endpoint, pytest.raises(UserError, match=r"no complete answer within 0\.3 seconds"):
        make_judge(endpoint, tmp_path).prefer("p", "one", "other")


def test_long_thoughts_are_read_in_no_time_and_without_their_end_there_is_no_verdict(tmp_path):
    for content, verdict in (("<think>" + "A. " * 2**20, None), ("<think>" + "B. " * 2**20 + "</think>A", 1.0)):
        with RawEndpoint(completion(content)) as endpoint:
            assert make_judge(endpoint, tmp_path).weigh_all([("p", "one", "two")])[0][0] == verdict


def test_a_signal_ends_the_wait_for_an_endpoint_at_once(tmp_path):
    asked, held = threading.Event(), threading.Event()

    def hold(connection):
        asked.set()
        held.wait(60)

    with RawEndpoint(hold) as endpoint:
        code = (
            "from pathlib import Path\n"
            "from utils.interruptions import interrupt_on_signals\n"
            "from utils.responses.judging import EndpointJudge, JudgeLimits\n"
            "interrupt_on_signals()\n"
            f"judge = EndpointJudge({endpoint.url!r}, 'm', Path({str(tmp_path)!r}), JudgeLimits())\n"
            "print('asking', flush=True)\n"
            "judge.weigh_all([('p', 'one', str(n)) for n in range(9)])\n"
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            process = start([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True)
            assert process.stdout.readline() == "asking\n"
            assert asked.wait(60)
            process.send_signal(number)
            assert process.communicate(timeout=50)[1].rstrip().endswith("KeyboardInterrupt")  # not when it is answered
            asked.clear()
        # One whose interruption Python drops, as it comes while an object is let go of.
        dropped = (
            "import os, signal\n"
            "class Last:\n"
            "    def __del__(self):\n"
            "        os.kill(os.getpid(), signal.SIGTERM)\n"
            "        for _ in range(1000): pass\n"
            "Last()\n"
        )
        code = code.replace("judge.weigh_all", f"{dropped}judge.weigh_all")
        process = start([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True)
        assert process.communicate(timeout=50)[1].rstrip().endswith("KeyboardInterrupt")
        held.set()


def test_the_key_is_masked_in_parts_too_and_other_words_are_left():
    assert mask("say sk-abcdefgh-12345678, or sk-abcdefg", "sk-abcdefgh-12345678") == "say ..., or ..."
    assert mask("xx12345678xx-abcdefgh", "sk-abcdefgh-12345678") == "xx...xx..."
    assert mask("a skilled answer", "sk-abcdefgh-12345678") == "a skilled answer"
    assert mask("a short one", "short") == "a ... one"
    assert mask("no key", "") == "no key"


def test_a_key_that_no_header_can_hold_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    for key in ("sk-one\nsk-two", "sk-schl\u00fcssel"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="OPENAI_API_KEY: contains a line break") as caught:
            EndpointJudge("http://127.0.0.1:9", "m", tmp_path, JudgeLimits())
        assert "sk-" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", " sk-from-a-file\n")
    EndpointJudge("http://127.0.0.1:9", "m", tmp_path, JudgeLimits())


def test_kept_answers_that_cannot_be_read_are_asked_for_again(endpoint, tmp_path):
    make_judge(endpoint, tmp_path).prefer("p", "longer", "short")
    (path,) = tmp_path.iterdir()
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\xff\n" + DEEP + b'\n{"question": "q", "begins": 3}\n{"question": []}\n' + second + first[:20])
    judge = make_judge(endpoint, tmp_path)
    assert (judge.prefer("p", "longer", "short"), judge.asked) == (1.0, 1)


def test_answers_that_cannot_be_kept_are_used_all_the_same(endpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    judge = make_judge(endpoint, tmp_path / "file" / "judge_answers")
    assert judge.weigh_all([("p", "longer", "short"), ("p", "one", "another")]) == [(1.0, 1.0), (0.0, 0.0)]
    assert capsys.readouterr().out.count("warning: the judge's answers cannot be cached in") == 1


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://h:port/v1", "http://127.0.0.1:99999/v1", "http://", "http://x\0y"]
)
def test_an_address_that_is_no_url_is_one_message_before_anything_is_asked(url, tmp_path):
    with pytest.raises(UserError, match=r"--scorer http://.*: not a usable URL"):
        EndpointJudge(url, "judge-1", tmp_path, JudgeLimits())
