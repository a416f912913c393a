"""A chat in the terminal, or one message and its answer for a script."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ..console import lost_output
from ..engine.memory import ran_out_of_memory
from ..errors import Interrupted, UserError
from ..interruptions import heeded_signals
from ..run.paths import read_path
from ..run.writing import write_json
from ..runtime import make_visible
from ..settings.training import Settings
from ..settings.verbs import ChatSettings, SamplingSettings
from .models import Speaker, load_speakers
from .terminal import Answer, let_lines_be_edited, read_stdin

HELP = """\
/help          this
/reset         start over, with the same system prompt
/system TEXT   set the system prompt from now on; /system shows it, /system - removes it
/undo          remove the last message and its answer
/retry         answer the last message again, sampled anew
/tool TEXT     answer as the tool that the model called
/save FILE     write the conversation as JSON
/quit          end (Ctrl-D too); Ctrl-C stops an answer
//...          a message that begins with a slash"""


def chat(settings: Settings) -> int:
    """Answers one message (--prompt, or piped in), or those that are typed until the person ends it."""
    if settings.of(ChatSettings).prompt is None and sys.stdin.isatty():
        with _termination_ends():
            Chat(load_speakers(settings), settings).run()
        return 0
    return answer_once(settings)


def answer_once(settings: Settings) -> int:
    """One answer on stdout, all else on stderr; the exit code."""
    stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            text = settings.of(ChatSettings).prompt
            text = read_stdin() if text is None else text
            speakers = load_speakers(settings)
            talk = Chat(speakers, settings)
            for speaker in speakers:
                speaker.dialogue.ask(text)
                if len(speakers) > 1:
                    stdout.write(f"{'' if speaker is speakers[0] else chr(10)}[{speaker.name}]\n")
                if not talk.answer(speaker, stdout):
                    raise KeyboardInterrupt
                stdout.write("\n")
                stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _termination_ends() -> Iterator[None]:
    """Ctrl-C stops an answer; SIGTERM, or SIGHUP where the terminal is closed, ends the chat."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise Interrupted("terminated")

    ending = [number for number in heeded_signals() if number != signal.SIGINT]
    former = {number: signal.signal(number, end) for number in ending}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class Chat:
    """A conversation with one model, or with two at a time."""

    def __init__(self, speakers: list[Speaker], settings: Settings) -> None:
        self.speakers = speakers
        self.settings = settings
        self.attempt = 0  # of the last message
        self.saved: set[Path] = set()
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(HELP),
            "/reset": self._reset,
            "/system": self._set_system,
            "/undo": self._undo,
            "/retry": self._retry,
            "/save": self._save,
            "/tool": self._give_result,
        }

    def run(self) -> None:
        """Reads lines until the person ends it."""
        let_lines_be_edited()
        print("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the chat")
        while True:
            try:
                line = input("\nyou> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit ends the chat)")
                continue
            if line.strip() in ("/quit", "/exit"):
                return
            if line.strip():
                self._take(line)

    def _take(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        try:
            if line.startswith("//"):
                self._say(line[1:])
            elif not line.startswith("/"):
                self._say(line)
            elif word in self.commands:
                self.commands[word](rest.strip())
            else:
                print(f"({word}: no such command; /help lists them)")
        except UserError as error:
            print(make_visible("\n".join(f"({fault})" for fault in error.faults)))
        except KeyboardInterrupt:
            print("\n(stopped; the message was undone)")

    def _say(self, text: str, attempt: int = 0, role: str = "user") -> None:
        """One message of the user or of a tool, answered by each model. What cannot be answered is taken back."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("that line is not UTF-8 text; it was not sent") from None
        self.attempt = attempt
        for speaker in self.speakers:
            speaker.dialogue.ask(text, role)
        try:
            for speaker in self.speakers:
                self._say_what_is_left_out(speaker)
                print(f"\n{make_visible(speaker.name)}> ", end="", flush=True)
                if not self.answer(speaker, sys.stdout):
                    print(" (stopped)", end="")
                print()
        except BaseException:
            self._take_back()
            raise

    def answer(self, speaker: Speaker, stream: TextIO) -> bool:
        """Writes the model's answer to the stream as it grows, and keeps it; False where Ctrl-C stopped it.

        Raises:
            UserError: the message does not fit, or the template refuses it.
        """
        sampling = self.settings.of(SamplingSettings)
        shown, answer = speaker.shown(sampling.max_new_tokens), Answer(stream)
        seed, finished, written = self.settings.training.seed + self.attempt, True, None
        try:
            with contextlib.closing(speaker.stream(shown, sampling, seed)) as growing:
                for written in growing:
                    answer.grow(written.text)
                    if lost_output() is not None:  # nobody reads on
                        return True
                answer.grow(written.text, written.ended)
        except KeyboardInterrupt:
            finished = False
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            raise UserError("out of memory for this answer; try /reset, or a smaller --max_new_tokens") from None
        speaker.dialogue.answer(answer.text)
        if finished and not written.ended:
            full = shown.room < sampling.max_new_tokens
            why = f"the context of {speaker.context} tokens is full" if full else f"--max_new_tokens {shown.room}"
            print(f" (cut: {why})", end="" if stream is sys.stdout else "\n")
        return finished

    def _say_what_is_left_out(self, speaker: Speaker) -> None:
        left_out = speaker.shown(self.settings.of(SamplingSettings).max_new_tokens).left_out
        if left_out > speaker.dialogue.said_left_out:
            rounds = "round is" if left_out == 1 else f"{left_out} rounds are"
            print(f"(the context of {speaker.context} tokens is full: the oldest {rounds} not shown to {speaker.name})")
        speaker.dialogue.said_left_out = left_out

    def _reset(self, _: str) -> None:
        for speaker in self.speakers:
            speaker.dialogue.reset()
        print("(a new conversation)")

    def _set_system(self, text: str) -> None:
        dialogues = [speaker.dialogue for speaker in self.speakers]
        if all(dialogue.is_text for dialogue in dialogues):
            raise UserError("this model completes plain text, which has no system prompt")
        if text:
            for dialogue in dialogues:
                dialogue.system = None if text == "-" else text
        print(f"(system prompt: {dialogues[0].system or 'none'})")

    def _take_back(self) -> dict[str, str] | None:
        """The last message, which no model has seen now."""
        first, *_ = [speaker.dialogue.undo() for speaker in self.speakers]
        return first

    def _undo(self, _: str) -> None:
        taken = self._take_back()
        print("(nothing to undo)" if taken is None else f"(undone: {taken['content']})")

    def _retry(self, _: str) -> None:
        taken = self._take_back()
        if taken is None:
            raise UserError("nothing to retry")
        self._say(taken["content"], self.attempt + 1, taken["role"])

    def _give_result(self, text: str) -> None:
        if any(not speaker.dialogue.turns or speaker.dialogue.tools is None for speaker in self.speakers):
            raise UserError("/tool answers a call: start the chat with --tools FILE, and ask something first")
        self._say(text, role="tool")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save FILE: name a file")
        path = read_path(name).resolve()
        if path.exists() and path not in self.saved:
            raise UserError(f"{path} exists; name another file")
        content = [{"model": speaker.source, "messages": speaker.dialogue.messages()} for speaker in self.speakers]
        try:
            write_json(path, content[0] if len(content) == 1 else content)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror})") from None
        self.saved.add(path)
        print(f"(saved: {path})")
