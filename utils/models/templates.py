"""Chat templates for tokenizers that have none: built only from text and from tokens the tokenizer already has."""

from __future__ import annotations

from os.path import expanduser
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from utils.data.tokenizing import read_tools
from utils.errors import UserError
from utils.models.bounds import TimeIsUp, bounded

# Turns as in Anthropic's HH-RLHF transcripts: rendering their turns gives the transcript back.
TRANSCRIPT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ '\\n\\nAssistant: ' + message['content'] }}"
    "{%- elif message['role'] == 'user' -%}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{%- else -%}{{ '\\n\\n' + message['role'] | capitalize + ': ' + message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\\n\\nAssistant:' }}{%- endif -%}"
)

# "User: ...", "Assistant: ..." on lines of their own; each of the assistant's turns ends with the end-of-text token.
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '\\n\\n' if not loop.first else '' -}}"
    "{{- message['role'] | capitalize + ': ' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n\\nAssistant:' -}}{%- endif -%}"
)

GREETING = "Hello"  # what a template is tried on
# What a template may take for it: real ones take a millisecond and no memory to speak of.
MOST_SECONDS, MOST_BYTES, MOST_CHARACTERS = 10, 1 << 30, 1_000_000


def read_chat_template(wish: str) -> str:
    """The template that --chat_template names: the text of a file, or the given text itself."""
    path = Path(expanduser(wish))
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--chat_template {wish}: not a text file in UTF-8 ({error})") from None
    except OSError:  # a template as text can be longer than a file name may be
        pass
    if "{" not in wish:
        raise UserError(f"--chat_template {wish}: no such file, and not a Jinja template either")
    return wish


def choose_template(
    rows: Dataset, transcript: bool, tokenizer: PreTrainedTokenizerBase, wish: str | None
) -> str | None:
    """Sets the chat template that converted rows need; returns it as a phrase, None for rows of plain text.

    Raises:
        UserError: a template is wished for plain texts, or it cannot be used.
    """
    if isinstance(rows[0]["prompt"], str):
        if wish is not None:
            raise UserError("--chat_template: these rows are plain texts, which no template renders; leave it out")
        return None
    listed = rows["tools"] if "tools" in rows.column_names else []
    tools = next((read_tools(text) for text in listed if text), None)
    return set_chat_template(tokenizer, wish, transcript, tools)


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, wish: str | None, transcript: bool, tools: list[dict[str, Any]] | None = None
) -> str:
    """Gives the tokenizer the chat template to use, and returns a phrase that says which one it is.

    Args:
        transcript: whether the data are "Human: / Assistant:" transcripts, whose own form is then the default.
        tools: those of a row, where rows list any.

    Raises:
        UserError: the template cannot be read, does not render a conversation, or leaves out the tools.
    """
    said = _set_template(tokenizer, wish, transcript)
    if tools and _render(tokenizer, tools=tools) == _render(tokenizer):
        raise UserError(
            f"the chat template ({said.partition(';')[0]}) leaves out the tools that the rows list; pass a "
            "--chat_template that shows them, or remove the column"
        )
    return said


def _set_template(tokenizer: PreTrainedTokenizerBase, wish: str | None, transcript: bool) -> str:
    if wish is not None:
        tokenizer.chat_template = read_chat_template(wish)
        _check_renders(tokenizer, "--chat_template")
        return "as given with --chat_template"
    if tokenizer.chat_template:
        _check_renders(tokenizer, "the tokenizer's chat template")
        return "the tokenizer's own"
    begin = "{{- bos_token -}}" if _adds_bos(tokenizer) else ""
    tokenizer.chat_template = begin + (TRANSCRIPT_TEMPLATE if transcript else PLAIN_TEMPLATE)
    form = "Human: / Assistant:" if transcript else "User: / Assistant:"
    return f"the tokenizer has none; using plain '{form}' turns, saved with it (--chat_template sets another)"


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _render(tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    turns = [{"role": "user", "content": GREETING}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)


def _check_renders(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    try:
        with bounded(MOST_SECONDS, MOST_BYTES):
            text = _render(tokenizer)
    except TimeIsUp:
        raise UserError(f"{name} takes more than {MOST_SECONDS} seconds for one short turn; mend its loops") from None
    except MemoryError:
        raise UserError(f"{name} takes more than {MOST_BYTES >> 30} GiB of memory for one short turn") from None
    except RecursionError:
        raise UserError(f"{name} does not render a user's turn: it is nested too deeply") from None
    except Exception as error:  # a template can make Python raise anything
        raise UserError(f"{name} does not render a user's turn: {' '.join(str(error).split())[:300]}") from None
    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"{name} makes {len(text):,} characters of one short turn; at most {MOST_CHARACTERS:,} are read"
        )
    if GREETING not in text:
        raise UserError(f"{name} leaves out what the user says; it renders a turn as {text[:200]!r}")
