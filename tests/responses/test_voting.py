"""Blind voting: what the page shows and takes, what is on the disk, and a whole vote in a real browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import socket
import struct
import threading
import urllib.parse
from pathlib import Path

import pytest
from shared.browser import open_browser

from utils.errors import UserError
from utils.responses.ballots import Ballots, Match
from utils.responses.voting import check_port, collect_votes

MATCHES_FOLDER = Path("nowhere")
MATCHES = [
    Match("Tell me a joke.", "A good one & <b>bold</b>.", "A bad one."),
    Match("Sing.", "La la.", "Li li.\nLi."),
    Match([{"role": "user", "content": "Dance."}], "A twist.", "<script>document.title='run'</script>"),
    Match("Stand still.", "Still.", " Still. "),
]


@pytest.fixture
def voting(tmp_path, monkeypatch):
    """Starts a vote in a thread; gives the address of its page, a list that takes its outcome, what it said."""

    def start(matches=MATCHES, folder=tmp_path / "votes", seed=3):
        said, outcome = queue.SimpleQueue(), []
        monkeypatch.setattr("utils.responses.voting.say", said.put)
        thread = threading.Thread(target=lambda: outcome.append(collect_votes(matches, folder, seed)), daemon=True)
        thread.start()
        lines = [said.get(timeout=60) for _ in range(3)]
        return lines[1].strip(), outcome, thread, lines[0], said

    return start


def ask(address, method="GET", form=None, path=None, **headers):
    url = urllib.parse.urlsplit(address)
    body = urllib.parse.urlencode(form) if form else None
    with contextlib.closing(http.client.HTTPConnection(url.netloc, timeout=60)) as connection:
        connection.request(method, path or url.path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_a_person_votes_in_a_browser_and_the_votes_are_trained_on(voting, run_script, tiny_model, tmp_path):
    matches = [Match(f"On day {n} it was", f" lovely {n}.", f" awful {n}.") for n in range(6)]
    address, outcome, thread, said, _ = voting(matches)
    assert "6 of 6 matches" in said
    with open_browser(tmp_path / "profile") as browser:
        browser.open(address)
        for number in range(6):
            assert f"Match {number + 1} of 6" in browser.text()
            left, right = (browser.text(f".sides article:nth-child({side}) .text") for side in (1, 2))
            assert {left[:5], right[:5]} == {"lovel", "awful"}
            assert browser.run("document.querySelector('progress').value") == number
            browser.type("3" if number == 5 else "1" if left.startswith("lovely") else "2")
        assert "Thank you" in browser.text()
        assert not browser.messages
        assert {urllib.parse.urlsplit(url).netloc for url in browser.requests} == {
            urllib.parse.urlsplit(address).netloc
        }
    thread.join(60)
    assert sorted(outcome[0]) == [0.5, 1, 1, 1, 1, 1]
    votes = tmp_path / "votes" / "votes.jsonl"
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    assert all(row["chosen"].startswith(" lovely") and row["rejected"].startswith(" awful") for row in rows)
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", votes, "--validation_split", "none")
    code, out, err = run_script(*flags, "--max_steps", 1, "--output_dir", tmp_path / "run")
    assert code == 0, err
    assert "5" in out


def test_a_match_may_be_skipped_or_have_two_bad_responses(voting, tmp_path):
    address, outcome, thread, *_ = voting()
    folder = tmp_path / "votes"
    with open_browser(tmp_path / "profile") as browser:
        browser.open(address)
        browser.type("s")
        assert "Match 2 of 3: 0 voted, 1 skipped." in browser.text()
        browser.type("4")
        assert "Match 3 of 3: 1 voted, 1 skipped." in browser.text()
        browser.type("b")
        assert browser.run("document.querySelector('[aria-pressed]').value") == "bad"
        browser.type("4")
        browser.type("3")
        assert "1 skipped" in browser.text("h1")
        browser.type("b")
        assert "Match 1 of 3" in browser.text()
        browser.type("s")
        browser.type("e")
        assert "Thank you" in browser.text()
        assert browser.messages == []
    thread.join(60)
    ballots = Ballots(MATCHES, folder, 3)
    assert (ballots.choice(0), ballots.choice(1), ballots.choice(2)) == (None, "bad", "tie")
    assert ballots.both_bad == 1
    skipped = next(place for place, match in enumerate(MATCHES) if match.key == ballots.shown[0])
    assert [place for place, found in enumerate(outcome[0]) if found is None] == [skipped]
    # Ballots of an older version, which knew of neither alone.
    rows = [json.loads(line) for line in (folder / "ballots.jsonl").read_text().splitlines()]
    assert [row.pop("both_bad", False) for row in rows] == [True, False]
    (folder / "ballots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [Ballots(MATCHES, folder, 3).choice(place) for place in (1, 2)] == ["tie", "tie"]


def test_texts_of_models_are_shown_as_text(voting, tmp_path):
    address, *_ = voting(MATCHES[2:])
    with open_browser(tmp_path / "profile") as browser:
        browser.open(address)
        assert "<script>document.title='run'</script>" in browser.text(".sides")
        assert browser.run("document.title") == "Which response is better?"
        assert browser.run("document.scripts.length") == 1  # the page's own
        assert "User: Dance." in browser.text()
        for width in (390, 1200):
            browser.resize(width)
            assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")


def test_votes_are_kept_and_can_be_changed(voting, tmp_path):
    address, *_ = voting()
    folder = tmp_path / "votes"
    ballots = Ballots(MATCHES, folder, 3)
    assert len(ballots.shown) == 3  # equal responses need no vote
    first, second, third = ballots.shown
    assert ask(address, "POST", {"match": first, "choice": "left"})[0] == 303
    assert ask(address, "POST", {"match": first, "choice": "right"})[0] == 303
    assert ask(address, "POST", {"match": second, "choice": "tie"})[0] == 303
    kept = Ballots(MATCHES, folder, 3)
    assert (kept.choice(0), kept.choice(1), kept.waiting()) == ("right", "tie", [2])
    assert len((folder / "votes.jsonl").read_text().splitlines()) == 1
    again, outcome, thread, said, _ = voting()
    assert "1 of 3 matches" in said
    status, page = ask(again, "POST", {"match": third, "choice": "left"})
    assert (status, "Thank you" in page) == (200, True)
    thread.join(60)
    _, left, _ = kept.sides(0)
    won = next(place for place, match in enumerate(MATCHES) if match.key == first)
    assert outcome[0][won] == (0 if left == MATCHES[won].a else 1)
    assert outcome[0][3] == 0.5
    assert collect_votes(MATCHES, folder, 3) == outcome[0]  # nothing is left to ask


def test_a_dialogue_is_kept_as_messages():
    row = MATCHES[2].as_pair(1)
    assert row["prompt"] == [{"role": "user", "content": "Dance."}]
    assert row["chosen"] == [{"role": "assistant", "content": "A twist."}]


def test_sides_tell_nothing():
    matches = [Match(str(n), "a", "b") for n in range(400)]
    ballots = Ballots(matches, MATCHES_FOLDER, 1)
    left = sum(ballots.sides(place)[1] == "a" for place in range(400))
    assert 160 < left < 240
    assert ballots.shown != [match.key for match in matches]


def test_whoever_does_not_know_the_address_gets_nothing(voting):
    address, *_ = voting()
    key = Ballots(MATCHES, MATCHES_FOLDER, 3).shown[0]
    assert ask(address, path="/")[0] == 404
    assert ask(address, "POST", {"match": key, "choice": "left"}, path="/wrong/")[0] == 404
    assert ask(address, Host="evil.example")[0] == 404
    for form in ({"match": key, "choice": "both"}, {"match": "none", "choice": "left"}, {"choice": "left"}, None):
        assert ask(address, "POST", form)[0] == 400
    assert ask(address)[0] == 200


def test_votes_on_other_matches_are_kept(tmp_path):
    line = "A line\u2028that is one."  # separated where JSON does not separate
    Ballots([Match(line, "one", "other"), Match("Sit.", "down", "up")], tmp_path, 1).vote(
        Match(line, "one", "other").key, "left"
    )
    former = (tmp_path / "votes.jsonl").read_text()
    ballots = Ballots(MATCHES, tmp_path, 3)
    assert ballots.waiting()[0] == 0
    ballots.vote(ballots.shown[0], "left")
    assert (tmp_path / "votes.jsonl").read_text().startswith(former)
    kept = [json.loads(row) for row in (tmp_path / "votes.jsonl").read_text().strip().split("\n")]
    assert [row["prompt"] for row in kept] == [line, ballots.sides(0)[0].prompt]
    again = Ballots([Match(line, "one", "other")], tmp_path, 1)
    assert (again.choice(0), again.waiting()) == ("left", [])


def test_a_vote_on_an_empty_response_counts_but_is_not_trained_on(tmp_path):
    ballots = Ballots([Match("Say.", " ", " something")], tmp_path, 1)
    ballots.vote(ballots.shown[0], "left")
    assert ballots.choice(0) == "left"
    assert (tmp_path / "votes.jsonl").read_text() == ""


def test_a_vote_that_cannot_be_written_does_not_count(voting, tmp_path, monkeypatch):
    address, _, _, _, said = voting()
    ballots = Ballots(MATCHES, tmp_path / "votes", 3)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        status, page = ask(address, "POST", {"match": ballots.shown[0], "choice": "left"})
    assert (status, "No space left" in page) == (500, True)
    assert "could not be written" in said.get(timeout=60)
    assert "Match 1 of 3" in ask(address)[1]
    assert "aria-pressed=true" not in ask(address)[1]
    assert ask(address, "POST", {"match": ballots.shown[0], "choice": "left"})[0] == 303


def fail(*_):
    raise OSError(28, "No space left on device")


def test_the_last_vote_counts_though_the_browser_went_away(voting, capfd):
    address, outcome, thread, *_ = voting(MATCHES[:1])
    url = urllib.parse.urlsplit(address)
    form = urllib.parse.urlencode({"match": MATCHES[0].key, "choice": "tie"})
    with socket.create_connection((url.hostname, url.port)) as browser:
        browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed without a goodbye
        head = f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {len(form)}\r\n\r\n"
        browser.sendall((head + form).encode())
    thread.join(60)
    assert outcome == [[0.5]]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["ballots.jsonl", "votes.jsonl"])
def test_a_file_of_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("my shopping list\n")
    with pytest.raises(UserError, match="has no votes"):
        collect_votes(MATCHES, tmp_path, 1)
    assert (tmp_path / name).read_text() == "my shopping list\n"


def test_a_port_that_is_taken_is_refused_before_anything_is_computed():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="choose another port"):
        check_port(taken.getsockname()[1])


def test_an_address_with_a_place_of_thousands_of_digits_shows_the_next_match(voting):
    address, *_ = voting()
    path = urllib.parse.urlsplit(address).path
    code, page = ask(address, path=f"{path}?at={'9' * 5000}")
    assert code == 200
    assert "Match 1 of 3" in page


def test_many_votes_at_once_are_all_taken(voting, tmp_path):
    matches = [Match(f"prompt {n}", f"one {n}", f"other {n}") for n in range(100)]
    address, outcome, thread, *_ = voting(matches)
    together, answers = threading.Barrier(99), []

    def vote(match):
        together.wait()
        answers.append(ask(address, "POST", {"match": match.key, "choice": "tie"})[0])

    voters = [threading.Thread(target=vote, args=(match,)) for match in matches[:99]]
    for voter in voters:
        voter.start()
    for voter in voters:
        voter.join(60)
    assert answers == [303] * 99
    assert ask(address, "POST", {"match": matches[99].key, "choice": "tie"})[0] == 200
    thread.join(60)
    assert outcome == [[0.5] * 100]
