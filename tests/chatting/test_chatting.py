"""The verb `chat`: the real script in a terminal and in pipes, with models whose answers are known."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import select
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shared.forked import Forked, read_from, take_terminal
from shared.models import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.chatting.dialogue import Dialogue
from utils.data.encoding import PromptEncoder
from utils.errors import UserError
from utils.runtime import make_visible

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
posix = pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")


def save_scripted_model(folder: Path, answer: bytes, loops: bool = False, context: int = 128) -> Path:
    """A model that answers anything with these bytes (no two the same), then ends; or says them over and over.

    Its layers add nothing: the state after a token is that token's own direction, which the head reads as the next.
    """
    save_tiny_model(folder, seed=1, max_position_embeddings=context, tie_word_embeddings=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    alphabet = tokenizer.convert_tokens_to_ids(list(_byte_letters(answer)))
    chain = [*alphabet, alphabet[0] if loops else tokenizer.eos_token_id]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" not in name and name != "model.norm.weight":
                parameter.zero_()
        model.model.embed_tokens.weight[:, 0] = 1.0
        for place, token in enumerate(alphabet):
            model.model.embed_tokens.weight[token] = torch.nn.functional.one_hot(torch.tensor(place + 1), 32).float()
        for place, token in enumerate(chain):
            model.lm_head.weight[token, place] = 10.0
    model.save_pretrained(folder)
    return folder


def _byte_letters(data: bytes) -> str:
    """How a byte-level tokenizer writes bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return "".join(bytes_to_unicode()[byte] for byte in data)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """Answers "Hi, all!"-like to anything, and has a chat template."""
    folder = save_scripted_model(tmp_path_factory.mktemp("chat") / "greeter", b"Hi, al!")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_run(tiny_model, pairs_file, tmp_path_factory) -> Path:
    """A run on plain texts."""
    import advanced_dpo_script

    folder = tmp_path_factory.mktemp("chat") / "run"
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", folder, "--use_lora",
             "--max_steps", 3, "--learning_rate", 5e-3]  # fmt: skip
    assert advanced_dpo_script.main([str(text) for text in flags]) == 0
    return folder


class Terminal:
    """The script in a terminal of its own: what is typed, what is shown."""

    def __init__(self, *arguments):
        import pty

        self.master, self.slave = pty.openpty()
        taking = functools.partial(take_terminal, os.ttyname(self.slave))
        self.process = Forked("chat", *arguments, before=taking, TERM="dumb")
        self.shown = b""
        self.place = 0

    def until(self, pattern: str, seconds: float = 240) -> str:
        """What is shown up to the pattern, from where the last such call ended."""
        end = time.monotonic() + seconds
        while True:
            found = re.search(pattern.encode(), self.shown[self.place :])
            if found:
                text = self.shown[self.place : self.place + found.end()]
                self.place += found.end()
                return text.decode().replace("\r\n", "\n")
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown[self.place :]!r}"
            self._read(0.2)

    def _read(self, seconds: float) -> None:
        if select.select([self.master], [], [], seconds)[0]:
            try:
                self.shown += os.read(self.master, 65536)
            except OSError:  # the other end is closed
                time.sleep(0.05)

    def interrupt(self) -> str:
        """What Ctrl-C at the prompt brings. Where it came just before Python began to wait for a line, Python sees it
        with the next key only, so it is pressed again."""
        for _ in range(20):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.until("\nyou> ", 5)
        raise AssertionError("Ctrl-C brought nothing")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def say(self, line: str) -> str:
        """Types a line at the prompt; what is shown up to the next prompt."""
        self.type(line + "\n")
        return self.until("\nyou> ")

    def end(self, keys: str = "\x04") -> int:
        self.type(keys)
        return self.wait()

    def wait(self) -> int:
        for _ in range(600):
            if self.process.returncode is not None:
                break
            self._read(0.1)
        os.close(self.master)
        os.close(self.slave)
        return self.process.wait(1)


@posix
def test_a_conversation_in_a_terminal(chat_model, tmp_path):
    terminal = Terminal("--model_name_or_path", chat_model, "--system_prompt", "Be kind", "--max_new_tokens", 16)
    opening = terminal.until("you> ")
    assert f"model: {chat_model}" in opening
    assert "chat template: the tokenizer's own" in opening
    assert "/help lists the commands" in opening
    assert "greeter> Hi, al!\n" in terminal.say("Good day")
    assert "greeter> Hi, al!\n" in terminal.say("/retry")
    assert "greeter> Hi, al!\n" in terminal.say("//slash")
    assert "(undone: /slash)" in terminal.say("/undo")
    assert "(system prompt: Be kind)" in terminal.say("/system")
    assert "(system prompt: Be brief)" in terminal.say("/system Be brief")
    assert "no such command; /help lists them" in terminal.say("/hepl")
    assert "/save FILE" in terminal.say("/help")
    assert "(saved: " in terminal.say(f"/save {tmp_path / 'talk.json'}")
    talk = json.loads((tmp_path / "talk.json").read_text())
    expected = [("system", "Be brief"), ("user", "Good day"), ("assistant", "Hi, al!")]
    assert [(turn["role"], turn["content"]) for turn in talk["messages"]] == expected
    assert "(saved: " in terminal.say(f"/save {tmp_path / 'talk.json'}")  # its own file is replaced
    (tmp_path / "other.json").write_text("mine")
    assert "exists; name another file" in terminal.say(f"/save {tmp_path / 'other.json'}")
    assert (tmp_path / "other.json").read_text() == "mine"
    assert "(a new conversation)" in terminal.say("/reset")
    assert "(nothing to undo)" in terminal.say("/undo")
    shown = [terminal.say("On day 1 we went to the cafe and it was lovely") for _ in range(5)]
    assert "the context of 128 tokens is full: the oldest round is not shown to greeter" in "".join(shown)
    assert all("Hi, al!" in text for text in shown)
    assert "reads at most 128; shorten it" in terminal.say("we " * 300)
    assert "Hi, al!" in terminal.say("again")
    assert "start the chat with --tools FILE" in terminal.say("/tool 12 degrees")
    assert "Ctrl-D or /quit ends the chat" in terminal.interrupt()
    assert terminal.end() == 0


@posix
def test_tools_are_shown_and_their_results_answered(chat_model, tmp_path):
    tool = {"name": "look_up", "parameters": {"type": "object", "properties": {}}}
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    template = "{{ tools[0]['function']['name'] if tools }}" + TEMPLATE
    terminal = Terminal("--model_name_or_path", chat_model, "--tools", tmp_path / "tools.json",
                        "--chat_template", template, "--max_new_tokens", 16)  # fmt: skip
    terminal.until("you> ")
    assert "ask something first" in terminal.say("/tool 12 degrees")
    for said in ("How warm?", "/tool 12 degrees", "/retry"):
        assert "greeter> Hi, al!\n" in terminal.say(said)
    assert "(saved: " in terminal.say(f"/save {tmp_path / 'talk.json'}")
    talk = json.loads((tmp_path / "talk.json").read_text())
    assert [turn["role"] for turn in talk["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert "(undone: 12 degrees)" in terminal.say("/undo")
    assert "(undone: How warm?)" in terminal.say("/undo")
    assert terminal.end() == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds no tools"),
        ("{", "must hold a JSON list"),
        ('{"a": 1}', "must hold a JSON list"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_tools_that_cannot_be_used_is_refused(tiny_model, run_script, tmp_path, content, said):
    path = tmp_path / "tools.json"
    if content is not None:
        path.write_text(content)
    code, _, err = run_script("chat", "--model_name_or_path", tiny_model, "--prompt", "x", "--tools", path)
    assert (code, err.count("\n")) == (2, 1)
    assert f"--tools {path}: {said}" in err


def test_tools_that_a_template_leaves_out_are_refused(chat_model, run_script, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([{"name": "look_up"}]))
    flags = ("--model_name_or_path", chat_model, "--tools", tmp_path / "tools.json", "--prompt", "x")
    code, _, err = run_script("chat", *flags)
    assert (code, err.count("\n"), "leaves out the tools" in err) == (2, 1, True)


@posix
def test_an_answer_cannot_steer_the_terminal_and_can_be_stopped(tmp_path):
    answer = "\x1b[2J é\x07".encode()
    model = save_scripted_model(tmp_path / "rude", answer, loops=True, context=200_000)
    terminal = Terminal("--model_name_or_path", model, "--max_new_tokens", 100_000)
    terminal.until("you> ")
    terminal.type("go\n")
    said = terminal.until(r"\\x07\\x1b\[2J")
    assert "rude> \\x1b[2J é\\x07\\x1b[2J" in said
    terminal.type("\x03")  # Ctrl-C
    assert "(stopped)" in terminal.until("\nyou> ")
    terminal.type("/retry\n")
    terminal.until(r"\\x07\\x1b\[2J")
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.wait() == 130
    assert b"Traceback" not in terminal.shown
    assert b"\x1b[2J" not in terminal.shown
    assert "\ufffd".encode() not in terminal.shown


def test_a_cut_answer_holds_no_half_character(tmp_path, run_script):
    model = save_scripted_model(tmp_path / "rude", "ab é".encode())
    flags = ("chat", "--model_name_or_path", model, "--prompt", "hello", "--max_new_tokens")
    assert run_script(*flags, 4)[:2] == (0, "ab \n")
    assert run_script(*flags, 5)[:2] == (0, "ab é\n")


def test_controls_are_shown_as_escapes():
    assert make_visible("a\tb\nc\x1b]0;x\x07\x9b\u202e\r") == "a\tb\nc\\x1b]0;x\\x07\\x9b\\u202e\\r"
    assert make_visible("héllo 東京 🙂") == "héllo 東京 🙂"


def test_a_message_through_a_pipe(tmp_path):
    answer = "Hi,\x1b[1m é".encode()
    model = save_scripted_model(tmp_path / "greeter", answer)
    (tmp_path / "message").write_bytes("What is\nyour näme?\n".encode())
    process = Forked("chat", "--model_name_or_path", model, before=functools.partial(read_from, tmp_path / "message"))
    out, err = process.communicate()
    assert (process.returncode, out.encode()) == (0, answer + b"\n")  # what the model wrote, byte by byte
    assert f"model: {model}" in err


@pytest.mark.parametrize(("piped", "said"), [(b"\n", "stdin is empty"), (b"\xff\xfe", "stdin: is not UTF-8 text")])
def test_what_is_piped_must_be_a_message(chat_model, run_script, monkeypatch, piped, said):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped)))
    code, out, err = run_script("chat", "--model_name_or_path", chat_model)
    assert (code, out) == (2, "")
    assert said in err


def test_a_run_on_texts_continues_texts_and_is_compared_with_its_reference(text_run, tiny_model, run_script):
    flags = ("chat", "--model_name_or_path", text_run, "--prompt", "On day 1 we went to the", "--max_new_tokens", 5)
    code, out, err = run_script(*flags)
    assert code == 0, err
    assert "plain text completion" in err
    assert "(cut: --max_new_tokens 5)" in err
    alone = out
    code, out, err = run_script(*flags, "--compare_with", "reference")
    assert code == 0, err
    policy, reference = re.fullmatch(r"\[run\]\n(.*)\n\n\[reference\]\n(.*)\n", out, flags=re.DOTALL).groups()
    assert policy + "\n" == alone
    assert "compared with: " + str(tiny_model) in err
    _, out, _ = run_script(*flags[:1], "--model_name_or_path", tiny_model, *flags[3:])
    assert out == reference + "\n"
    code, _, err = run_script(*flags, "--system_prompt", "Be kind")
    assert code == 2
    assert "which has no system prompt" in err


def test_the_same_seed_says_the_same_and_another_something_else(text_run, run_script):
    flags = ("chat", "--model_name_or_path", text_run, "--prompt", "On day 1", "--max_new_tokens", 20)
    answers = [run_script(*flags, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--model_name_or_path is missing"),
        (["--model_name_or_path", "./nowhere"], "no such folder"),
        (["--model_name_or_path", "MODEL", "--compare_with", "reference"], "has no record of a run"),
        (["--model_name_or_path", "MODEL", "--temperature", 0, "--top_p", 0.9], "has no effect at --temperature 0"),
        (["--model_name_or_path", "MODEL", "--bnb_4bit_quant_type", "fp4"], "has no effect without --use_4bit"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "x"], "--dataset_name: is a flag of the verb"),
        (["--model_name_or_path", "MODEL", "--prompt", "word " * 200], "reads at most 128; shorten it"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tiny_model, run_script, flags, said):
    flags = [tiny_model if flag == "MODEL" else flag for flag in flags]
    prompt = [] if "--prompt" in flags else ["--prompt", "x"]
    code, out, err = run_script("chat", *flags, *prompt)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_a_dialogue_may_fill_the_context_to_its_last_token():
    encoder = SimpleNamespace(encode_prompts=lambda prompts: [[0] * 10 * len(turns) for turns in prompts])
    dialogue = Dialogue(False)
    dialogue.ask("one")
    with pytest.raises(UserError, match="the message is 10 tokens long, and this model reads at most 10"):
        dialogue.fit(encoder, 10, 5)
    assert dialogue.fit(encoder, 11, 5).room == 1
    dialogue.answer("two")
    dialogue.ask("three")
    whole, cut = (dialogue.fit(encoder, context, 5) for context in (35, 34))  # 30 tokens, and 5 for the answer
    assert (whole.left_out, whole.room, len(whole.prompt)) == (0, 5, 3)
    assert (cut.left_out, cut.room, len(cut.prompt)) == (1, 5, 1)


def test_what_was_said_to_be_left_out_goes_back_with_the_rounds():
    dialogue = Dialogue(False)
    for number in range(3):
        dialogue.ask(f"question {number}")
        dialogue.answer("answer")
    dialogue.said_left_out = 2
    assert dialogue.undo()["content"] == "question 2"
    assert dialogue.said_left_out == 2
    assert dialogue.undo()["content"] == "question 1"
    assert dialogue.said_left_out == 1, "of the one round that is there"


def test_the_oldest_rounds_are_left_out_when_the_context_is_full(chat_model):
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(chat_model))
    dialogue = Dialogue(False, system="Be kind")
    for place in range(6):
        dialogue.ask(f"On day {place} we went")
        shown = dialogue.fit(encoder, 128, 20)
        ids = encoder.encode_prompts([shown.prompt])[0]
        assert len(ids) + shown.room <= 128
        assert shown.room == 20
        assert shown.prompt[0] == {"role": "system", "content": "Be kind"}
        assert shown.prompt[1]["content"] == f"On day {shown.left_out} we went"
        dialogue.answer("and it was lovely and bright")
    assert shown.left_out > 0
    assert len(dialogue.messages()) == 13
    dialogue.ask("we " * 200)
    with pytest.raises(UserError, match="reads at most 128"):
        dialogue.fit(encoder, 128, 20)
