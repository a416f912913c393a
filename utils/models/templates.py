"""The chat template of a run: the tokenizer's own, a given one, or a plain one made of text and the tokens there are.

A template that writes the date is told one moment throughout a run, which the run's record keeps.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from os.path import expanduser
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.encoding import read_tools
from ..data.rendering import (
    held_moment,
    hold_arguments,
    hold_moment,
    hold_reasoning,
    names_read,
    reads_clock,
    render_chat,
)
from ..data.thoughts import SWITCHES
from ..errors import UserError
from ..run.record import seconds_at
from ..settings.flags import NAMES_TAKEN
from ..settings.training import ModelSettings
from .bounds import TimeIsUp, bounded

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

TEMPLATE_DATE = "template_date"  # in the data part of run.json
GREETING = "Hello"  # what a template is tried on
TOOL = {"type": "function", "function": {"name": "wait", "description": "Waits.", "parameters": {"type": "object"}}}
# From a moment to others, which a template that writes any part of date or time tells from it.
APART = ({"days": 1234, "hours": 5, "minutes": 43, "seconds": 17}, {"hours": 12}, {"days": 4})
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
    rows: Dataset,
    transcript: bool,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelSettings,
    moment: datetime | None = None,
) -> str | None:
    """Sets the chat template that converted rows need; returns it as a phrase, None for rows of plain text.

    `model` says which template, and what it is given; `moment` is what one that writes the date is told; None for now.

    Raises:
        UserError: a template is wished for plain texts, or it cannot be used.
    """
    if isinstance(rows[0]["prompt"], str):
        check_no_template(model, "these rows")
        return None
    listed = rows["tools"] if "tools" in rows.column_names else []
    tools = first_tools({"tools": text} for text in listed)
    return set_chat_template(
        tokenizer, model.chat_template, transcript, tools, moment, model.chat_template_kwargs, model.reasoning
    )


def first_tools(rows: Iterable[Mapping[str, str | None]]) -> list[dict[str, Any]] | None:
    """The tools of the first row that declares some (`told`)."""
    return next((read_tools(row["tools"]) for row in rows if row.get("tools")), None)


def check_no_template(model: ModelSettings, what: str) -> None:
    """Raises UserError where the settings wish something of a chat template for `what`, which are plain texts."""
    wishes = [
        name for name in ("chat_template", "chat_template_kwargs", "reasoning") if getattr(model, name) is not None
    ]
    if wishes:
        raise UserError(
            *(f"--{name}: {what} are plain texts, which no template renders; leave it out" for name in wishes)
        )


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    wish: str | None,
    transcript: bool,
    tools: list[dict[str, Any]] | None = None,
    moment: datetime | None = None,
    arguments: Mapping[str, Any] | None = None,
    reasoning: str | None = None,
) -> str:
    """Gives the tokenizer the chat template to use, and returns a phrase that says which one it is.

    Args:
        transcript: whether the data are "Human: / Assistant:" transcripts, whose own form is then the default.
        tools: those of a row, where rows list any.
        moment: what a template that writes the date is told; None for now.
        arguments: what the template is given beside the messages, by name.
        reasoning: what becomes of reasoning, as --reasoning says; None for what the template does.

    Raises:
        UserError: the template cannot be read, does not render a conversation, leaves out the tools, or does not read
            an argument.
    """
    hold_moment(tokenizer, None)
    hold_arguments(tokenizer, arguments)
    hold_reasoning(tokenizer, reasoning)
    said = _set_template(tokenizer, wish, transcript)
    if reasoning in ("keep", "mask"):
        arguments = arguments_read(tokenizer, SWITCHES) | dict(arguments or {})
        hold_arguments(tokenizer, arguments)
    said += _describe_arguments(tokenizer, arguments or {})
    said += _hold_date(tokenizer, moment or datetime.now())
    if tools and _render(tokenizer, tools=tools) == _render(tokenizer):
        raise UserError(
            f"the chat template ({said.partition(';')[0]}) leaves out the tools that the rows list; pass a "
            "--chat_template that renders them, or remove the column"
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


def arguments_read(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those that the template that a tokenizer has reads: for a model beside the one that they are for."""
    read = names_read(tokenizer)
    return {name: value for name, value in (arguments or {}).items() if name in read}


def _describe_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> str:
    read = names_read(tokenizer)
    unread = [name for name in arguments if name not in read]
    if unread:
        others = sorted(read - {*NAMES_TAKEN, "raise_exception", "strftime_now"})
        raise UserError(
            f"--chat_template_kwargs: the chat template reads no {' and no '.join(unread)}; "
            + (f"it reads {', '.join(others)}" if others else "it takes none")
        )
    given = ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
    return f" with {given}" if given else ""


def _hold_date(tokenizer: PreTrainedTokenizerBase, moment: datetime) -> str:
    """Has a template that asks for the time told one moment; returns it as the end of a phrase.

    The time of day is left out where the template does not write it, so that the runs of a day share their rows.
    """
    if not reads_clock(tokenizer):
        return ""
    moment = moment.replace(microsecond=0)
    day = moment.replace(hour=0, minute=0, second=0)
    held = day if _render_at(tokenizer, day) == _render_at(tokenizer, moment) else moment
    others = (_render_at(tokenizer, held + timedelta(**apart)) for apart in APART)
    told = _render_at(tokenizer, held)
    writes_date = any(other != told for other in others)
    hold_moment(tokenizer, held)
    return f", which writes the date: {describe_moment(held)} throughout" if writes_date else ""


def _render_at(tokenizer: PreTrainedTokenizerBase, moment: datetime) -> list[str]:
    """Conversations at a moment, with and without a system turn, an answer and tools: some templates write the date in
    one of these only."""
    hold_moment(tokenizer, moment)
    user, system = {"role": "user", "content": GREETING}, {"role": "system", "content": "Be brief."}
    texts = [_render(tokenizer)]
    for turns, tools in (
        ([system, user], None),
        ([user, {"role": "assistant", "content": GREETING}, user], None),
        ([user], [TOOL]),
    ):
        with contextlib.suppress(Exception):  # a template may refuse them, and can make Python raise anything
            texts.append(render_chat(tokenizer, turns, tools=tools, add_generation_prompt=True))
    return texts


def describe_moment(moment: datetime) -> str:
    """`2026-12-01`, with the time of day where that is not midnight."""
    return moment.isoformat(" ", "minutes").removesuffix(" 00:00")


def recorded_moment(record: Mapping[str, Any]) -> datetime | None:
    """The moment that the template of a run was told; None where the record of no run says it.

    Raises:
        UserError: the record holds something else.
    """
    said = (record.get("data") or {}).get(TEMPLATE_DATE)
    if said is None:  # the record of an earlier version of this script
        seconds = seconds_at(record.get("started"))
        return datetime.fromtimestamp(seconds) if seconds is not None else None
    try:
        return datetime.fromisoformat(said)
    except (TypeError, ValueError):
        raise UserError(
            f"run.json: data.{TEMPLATE_DATE} is {said!r:.60}: must be a date such as 2026-12-01T00:00:00"
        ) from None


def template_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The moment that the template is told, as the record keeps it; None for one that does not ask."""
    moment = held_moment(tokenizer)
    return moment.isoformat() if moment is not None else None


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _render(tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    return render_chat(tokenizer, [{"role": "user", "content": GREETING}], add_generation_prompt=True, **options)


def _check_renders(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    try:
        with bounded(MOST_SECONDS, MOST_BYTES):
            text = _render(tokenizer)
    except TimeIsUp:
        raise UserError(f"{name} takes more than {MOST_SECONDS} seconds for one short turn; fix its loops") from None
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
