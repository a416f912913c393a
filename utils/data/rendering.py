"""Conversations as a chat template renders them: where a reply begins, what is left out, which day is written.

Nothing here knows token ids; `utils/data/encoding.py` makes them from the texts.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import meta
from markupsafe import escape
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from .calls import REASONING, RESULT_ROLES, extra_of, functions_of, whole_message
from .think_tags import CLOSING, KINDS, TAG, Tags
from .thoughts import find_thoughts, thought_of

Turns = list[dict[str, Any]]
Render = Callable[..., str]  # (turns, add_generation_prompt=False) -> text
Mark = Callable[[Turns, str], "Spans | None"]  # (turns, their text) -> what a template marks as the model's in it
Spans = tuple[tuple[int, int], ...]  # begin and end of parts of a text, in characters

# Stands for a reply, to see what a template writes around one; in private use, so no template writes it by itself.
ANY_REPLY = "\ue000"
SHORT = 3  # letters, which stand in other words too
TAIL = 80  # characters at the end of a prompt in which its last tags stand

REASONING_CUT = "the chat template cuts the reasoning out of {}"
DROPPED = "the chat template drops {}"
CHANGED = "the chat template leaves out or changes a part of {}"
SECOND_BLOCK = "the chat template puts an empty think block in front of the reasoning of {}"
ADVICE = " (--chat_template sets another template)"
LEFT_OUT = {
    "system": "the chat template leaves out the system turn",
    "user": "the chat template leaves out a turn of the user, or a part of it",
    "assistant": "the chat template leaves out an earlier turn of the assistant, or a part of it",
}
CALLS_LEFT_OUT = "the chat template leaves out the tool calls of an earlier turn"
CALLS_DROPPED = "the chat template drops the tool calls of {}"
REASONING_LEFT_OUT = "the chat template does not render the reasoning of {}: it is trained without it"
NOTHING_LEFT = "--reasoning drop leaves nothing of {}: it is reasoning alone"
UNREAD = "the chat template does not read '{}', which the row gives it"
LEFT_OUT_OTHER = "the chat template leaves out a turn of {}, or a part of it"
ALTERED = "the chat template changes the text of a turn of the {}"
UNDECIDED = "with this chat template, tool results cannot be separated from what the model writes in a reply"
IN_OPEN_BLOCK = (
    "the chat template opens a think block that the reply does not close: it is trained as the beginning of reasoning"
)
KEPT_REASONING = (
    "the chat template does not write the reasoning of a reply where it opens a think block for it; the reply is "
    "trained as it was written, behind the template's think tag"
)
OWN_REASONING = (
    "the reply has reasoning: prompt and reply are trained as the template writes them together, without the empty "
    "think block that it puts in front of a reply to come"
)


@dataclass(frozen=True)
class Rendered:
    """A row as text. `fault`: why it cannot be trained on; `notes`: what the person should know of it.

    `refused`: the template does not render the row at all, and the texts are empty. `results`: for each completion,
    where in it the results of tools stand, with all that the template writes around them for the next turn;
    `thoughts`: where its reasoning stands. `reasoned`: replies whose reasoning is rendered, or was left out as asked.
    """

    prompt: str
    completions: list[str]
    fault: str | None = None
    notes: tuple[str, ...] = ()
    refused: bool = False
    results: tuple[Spans, ...] = ()
    thoughts: tuple[Spans, ...] = ()
    reasoned: int = 0


def render_row(
    render: Render,
    prompt: str | Turns,
    replies: Sequence[str | Turns],
    names: Sequence[str],
    mark: Mark = lambda turns, whole: None,
) -> Rendered:
    """The text that generation would begin from, and for each reply the text that follows it.

    All replies follow the same prompt text. That is what the template writes for a reply to come, with one exception:
    where it ends with an empty think block and a reply brings reasoning, the block is left to the replies.

    Args:
        names: what the replies are called in faults.
        mark: asked where the model's turns stand, where the texts of parts of a reply do not tell.
    """
    if isinstance(prompt, str):
        return Rendered(prompt, [reply if isinstance(reply, str) else _words(reply) for reply in replies])
    start = render(prompt, add_generation_prompt=True)
    notes: dict[str, None] = dict.fromkeys(_find_left_out(start, prompt))
    wholes = [None if isinstance(reply, str) else render([*prompt, *reply]) for reply in replies]
    shorter = _without_empty_block(start, [whole for whole in wholes if whole is not None])
    if shorter is not None:
        start = shorter
        notes[OWN_REASONING] = None
    completions: list[str] = []
    fault = None
    for name, reply, whole in zip(names, replies, wholes, strict=True):
        if isinstance(reply, str):
            completions.append(reply)
            continue
        rest, begin, note = _follow(render, start, prompt, reply, whole)
        completions.append(rest)
        if begin is not None:
            fault = fault or _find_lost(render, whole, begin, prompt, reply, name)
        if _adds_block(start, reply, rest):
            fault = fault or SECOND_BLOCK.format(name) + ADVICE
        if any(function["name"] not in rest for turn in reply for function in functions_of(turn)):
            fault = fault or CALLS_DROPPED.format(name) + ADVICE
        if note is not None:
            notes[note] = None
    results = [
        () if isinstance(reply, str) else _find_results(render, mark, prompt, reply, whole, len(whole) - len(rest))
        for reply, whole, rest in zip(replies, wholes, completions, strict=True)
    ]
    if None in results:
        fault = fault or UNDECIDED + ADVICE
    told = tuple(spans or () for spans in results)
    thoughts = tuple(
        () if isinstance(reply, str) else find_thoughts(rest, reply, spans)
        for reply, rest, spans in zip(replies, completions, told, strict=True)
    )
    for name, reply, spans in zip(names, replies, thoughts, strict=True):
        if not isinstance(reply, str) and len(spans) < sum(map(bool, map(thought_of, reply))):
            notes[REASONING_LEFT_OUT.format(name)] = None
    return Rendered(start, completions, fault, tuple(notes), False, told, thoughts, sum(map(bool, thoughts)))


def _find_results(render: Render, mark: Mark, prompt: Turns, reply: Turns, whole: str, begin: int) -> Spans | None:
    """Where in a reply, which begins at `begin` of `whole`, stands what the model does not write: from the end of each
    of its turns that is followed by a result, to where generation would go on. None where that cannot be told."""
    are_results = [turn["role"] in RESULT_ROLES for turn in reply]
    borders = [number for number in range(1, len(reply)) if are_results[number] != are_results[number - 1]]
    runs = list(zip(borders[::2], borders[1::2], strict=True))
    spans = []
    for first, last in runs:
        ended = _end_within(render([*prompt, *reply[:first]]), whole)
        goes_on = _end_within(render([*prompt, *reply[:last]], add_generation_prompt=True), whole)
        if ended is None or goes_on is None or not begin < ended <= goes_on < len(whole):
            return _find_marked(render, mark, prompt, reply, runs, whole, begin)
        spans.append((ended - begin, goes_on - begin))
    return tuple(spans)


def _find_marked(
    render: Render, mark: Mark, prompt: Turns, reply: Turns, runs: Sequence[tuple[int, int]], whole: str, begin: int
) -> Spans | None:
    """The same by the template's own marks of what a model generates; None where it has none, or these do not agree
    with the results, which are `runs` of the reply's turns."""
    marks = mark([*prompt, *reply], whole) or ()
    gaps = [(ended, goes_on) for (_, ended), (goes_on, _) in pairwise(marks) if begin < ended < goes_on]
    if len(gaps) != len(runs):
        return None
    spans = []
    for (first, last), (ended, goes_on) in zip(runs, gaps, strict=True):
        place = ended
        for turn in reply[first:last]:
            said = str(turn.get("content") or "").strip()
            found = _find(whole[:goes_on], said, place)
            if found < 0:
                return None
            place = found + len(said)
        # Marks may begin with the header that generation is given.
        asked = render([*prompt, *reply[:last]], add_generation_prompt=True)
        header = asked[asked.rfind(whole[place:goes_on]) :] if whole[place:goes_on] in asked else ""
        if header and whole.startswith(header, place):
            goes_on = max(goes_on, place + len(header))
        spans.append((ended - begin, goes_on - begin))
    return tuple(spans)


def _end_within(text: str, whole: str) -> int | None:
    """Where a text ends that `whole` begins with: as it is, or without a think block that a template writes in the last
    turn alone, or for a turn to come. None where it does not begin with it."""
    if whole.startswith(text):
        return len(text)
    for tags in KINDS:
        for block in filter(None, (tags.opened.search(text), *tags.empty.finditer(text))):
            shorter = text[: block.start()] + text[block.end() :]
            if whole.startswith(shorter):
                return len(shorter)
    return None


def _words(reply: Turns) -> str:
    return "".join(str(turn.get("content") or "") for turn in reply)


def _without_empty_block(start: str, wholes: Sequence[str]) -> str | None:
    """The prompt without the empty think block at its end, where the template writes reasoning in its place."""
    tags = _tags_at_end(start)
    block = tags.empty_block.search(start[-TAIL:])
    if block is None:
        return None
    shorter = start[: len(start) - len(block[0])]
    if not all(whole.startswith(shorter) for whole in wholes):
        return None
    brings_own = any(not whole.startswith(start) and tags.own_block.match(whole, len(shorter)) for whole in wholes)
    return shorter if brings_own else None


def _tags_at_end(start: str) -> Tags:
    """The kind of think tags that a prompt ends with."""
    end = start[-TAIL:]
    return next((tags for tags in KINDS if tags.opened.search(end) or tags.empty_block.search(end)), KINDS[0])


def _adds_block(start: str, reply: Turns, rest: str) -> bool:
    """Whether the template puts a think block of its own in front of a reply that has one."""
    tags, words = _tags_at_end(start), _words(reply)
    own = 0 if len(reply) > 1 else len(tags.closing.findall(words))
    return own > 0 and bool(tags.empty_block.search(start[-TAIL:])) + len(tags.closing.findall(rest)) > own


def _follow(render: Render, start: str, prompt: Turns, reply: Turns, whole: str) -> tuple[str, int | None, str | None]:
    """The text that follows `start`, given `whole`, what the template makes of prompt and reply; where the reply begins
    in `whole` (None: the text is the reply's own); and a note."""
    tags, words = _tags_at_end(start), _words(reply)
    opened = tags.opened.search(start[-TAIL:])
    begin, rest = len(start), whole[len(start) :] if whole.startswith(start) else None
    if rest is None and opened and whole.startswith(start[: len(start) - len(opened[1])]):
        begin -= len(opened[1])  # the same think block, with other blanks behind its tag
        rest = whole[begin:].removeprefix(opened[1])
    reasons = opened is not None and tags.closing.search(words) is not None
    if rest is not None and not (reasons and _adds_block(start, reply, rest)):
        return rest, begin, IN_OPEN_BLOCK if opened and not tags.closing.search(rest) else None
    # The template writes something in front of a reply to come that it leaves out of a reply that is there (an empty
    # think block, say). The prompt keeps it, as in generation; the completion begins where any reply would.
    any_reply = render([*prompt, {**reply[0], "content": ANY_REPLY}])
    head, found, tail = any_reply.rpartition(ANY_REPLY)
    if found and reasons:  # a model goes on with its reasoning there, closes the block, and answers
        tag = tags.opening.match(words)
        own = words[tag.end() :].removeprefix(opened[1]) if tag else words
        return own + tail, None, KEPT_REASONING
    note = IN_OPEN_BLOCK if opened else None
    if found and start.startswith(head) and whole.startswith(head):
        return whole[len(head) :], len(head), note
    return words + (tail if found else ""), _count_common(start, whole), note


def _count_common(one: str, other: str) -> int:
    """Characters that both texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def _find_left_out(text: str, prompt: Turns) -> Iterator[str]:
    """What the template leaves out of a prompt, or changes; at inference it does the same."""
    met: Counter[str] = Counter()
    for turn in prompt:
        content, role = turn.get("content"), str(turn.get("role"))
        if any(function["name"] not in text for function in functions_of(turn)):
            yield CALLS_LEFT_OUT
        if not isinstance(content, str):
            continue
        # Most templates take the reasoning out of earlier replies, and mean it.
        said = (CLOSING.split(content)[-1] if role == "assistant" else content).strip()
        met[said] += 1
        again = met[said] > 1  # the same words in an earlier turn do not show that these are there
        if text.count(said) >= met[said] if again and said in text else _find(text, said, 0) >= 0:
            continue
        squeezed = _squeeze(said)
        if len(squeezed) > SHORT and not again and squeezed in _squeeze(text):
            yield ALTERED.format(role)
        else:
            yield LEFT_OUT.get(role) or LEFT_OUT_OTHER.format(f"the {role}")


def _squeeze(text: str) -> str:
    """The letters and digits alone, whatever their case."""
    return "".join(filter(str.isalnum, text.casefold()))


def _find_lost(render: Render, whole: str, begin: int, prompt: Turns, reply: Turns, name: str) -> str | None:
    """What the template does to the words of a reply that it should render from `begin` on."""
    place = begin
    for turn in reply:
        content = turn.get("content")
        if not isinstance(content, str):
            continue
        said = content.strip()
        found = whole.find(said, max(0, place - len(said) + 1) if place == begin and said else place)
        if found >= 0:  # the quick way for nearly all
            place = max(place, found + len(said))
            continue
        # Templates write think tags, and the blanks around them, in their own way.
        parts = [part.strip() for part in TAG.split(content)]
        for number, part in enumerate(parts):
            # A part may begin with what the generation prompt ends with; it must end behind it.
            found = _find(whole, part, max(0, place - len(part) + 1) if place == begin and part else place)
            if found < 0:
                cuts = number < len(parts) - 1 and _find(whole, parts[-1], place) >= 0
                dropped = not cuts and ANY_REPLY not in render([*prompt, {**reply[-1], "content": ANY_REPLY}])
                what = REASONING_CUT if cuts else DROPPED if dropped else CHANGED
                return what.format(name) + ADVICE
            place = max(place, found + len(part))
    return None


def _find(text: str, said: str, begin: int) -> int:
    """Where `said` stands in `text`, as it is or escaped as in JSON or HTML; -1 where it does not."""
    found = text.find(said, begin)
    if found >= 0:
        return found
    for form in (json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1], str(escape(said))):
        found = text.find(form, begin) if form != said else -1
        if found >= 0:
            return found
    return -1


# The clock.

MARKS = re.compile(r"{%-?\s*generation\s*-?%}")
FORM = "chat_template_call_form"  # attribute of a tokenizer: its template, and how that wants a call
HELD = "chat_template_moment"  # attribute of a tokenizer: the moment that its template is told, whenever it asks
REASONED = "chat_template_reasoning"  # attribute of a tokenizer: what becomes of reasoning, as --reasoning says
ARGUMENTS = "chat_template_arguments"  # attribute of a tokenizer: what its template is given beside the messages


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template may ask for the time; templates have one function for it."""
    return "strftime_now" in str(tokenizer.chat_template)


def held_moment(tokenizer: PreTrainedTokenizerBase) -> datetime | None:
    """The moment that the template is told; None where it does not ask."""
    return getattr(tokenizer, HELD, None)


def hold_moment(tokenizer: PreTrainedTokenizerBase, moment: datetime | None) -> None:
    """From now on the template is told this moment; it is part of the tokenizer, and so of the key of cached rows."""
    _hold(tokenizer, HELD, moment)


def held_arguments(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the template is given beside the messages, by name."""
    return getattr(tokenizer, ARGUMENTS, {})


def hold_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None) -> None:
    """From now on the template is given these, as part of the tokenizer."""
    _hold(tokenizer, ARGUMENTS, dict(arguments) if arguments else None)


def held_reasoning(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What becomes of the reasoning of turns, as --reasoning says; None for what the template does."""
    return getattr(tokenizer, REASONED, None)


def hold_reasoning(tokenizer: PreTrainedTokenizerBase, reasoning: str | None) -> None:
    """From now on the reasoning of turns is treated so, as part of the tokenizer."""
    _hold(tokenizer, REASONED, reasoning)


def _hold(tokenizer: PreTrainedTokenizerBase, name: str, value: Any) -> None:
    if value is not None:
        setattr(tokenizer, name, value)
    elif hasattr(tokenizer, name):
        delattr(tokenizer, name)


def names_read(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The names that the chat template reads and does not set itself."""
    template = tokenizer.chat_template
    texts = list(template.values()) if isinstance(template, dict) else [str(template)]
    return frozenset().union(*map(_names_in, texts))


@lru_cache
def _names_in(template: str) -> frozenset[str]:
    environment = chat_template_utils._compile_jinja_template(template).environment
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))


def render_chat(tokenizer: PreTrainedTokenizerBase, turns: Turns, **options: Any) -> str:
    """What the tokenizer's chat template makes of turns, at the moment and with the arguments that are held for it;
    `options` come first."""
    messages = list(map(whole_message, turns))
    with _clock_at(held_moment(tokenizer)):
        if any(map(extra_of, turns)):
            messages = _fit_messages(tokenizer, messages)
        return tokenizer.apply_chat_template(messages, tokenize=False, **{**held_arguments(tokenizer), **options})


@dataclass(frozen=True)
class Form:
    """How a template wants what a message says: arguments as JSON text or as an object, a turn without text as null or
    as an empty text, and the fields whose reasoning it renders."""

    as_text: bool
    empty: str | None
    reasoning: tuple[str, ...] = ()


FORMS = tuple(Form(*form) for form in product((False, True), (None, "")))


def _fit_messages(tokenizer: PreTrainedTokenizerBase, messages: Turns) -> Turns:
    """Messages as the template of a tokenizer reads them: the same said in the form and the field that it knows."""
    form = _form_of(tokenizer)
    return [_fit_message(message, form) for message in messages]


def _fit_message(message: dict[str, Any], form: Form) -> dict[str, Any]:
    fitted = dict(message)
    field = next((field for field in REASONING if field in fitted), None)
    if field is not None and form.reasoning and field not in form.reasoning:
        fitted[form.reasoning[0]] = fitted.pop(field)
    if "tool_calls" in fitted:
        fitted["content"] = fitted["content"] or form.empty
    if "tool_calls" in fitted and form.as_text:
        fitted["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": _as_json(call["function"]["arguments"])}}
            for call in fitted["tool_calls"]
        ]
    return fitted


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _form_of(tokenizer: PreTrainedTokenizerBase) -> Form:
    """The first of FORMS in which the template renders a call whole, with the fields of reasoning that it renders; kept
    with the tokenizer until that has another template."""
    template = (str(tokenizer.chat_template), held_arguments(tokenizer))
    known = getattr(tokenizer, FORM, None)
    if known is None or known[0] != template:
        form = next((form for form in FORMS if _renders_call(tokenizer, form)), FORMS[1])
        fields = tuple(field for field in REASONING if _renders_reasoning(tokenizer, field))
        known = (template, replace(form, reasoning=fields))
        setattr(tokenizer, FORM, known)
    return known[1]


def _renders_reasoning(tokenizer: PreTrainedTokenizerBase, field: str) -> bool:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi", field: ANY_REPLY}]
    try:
        return ANY_REPLY in tokenizer.apply_chat_template(turns, tokenize=False, **held_arguments(tokenizer))
    except Exception:  # a template can make Python raise anything
        return False


def _renders_call(tokenizer: PreTrainedTokenizerBase, form: Form) -> bool:
    call = {"type": "function", "id": "call00001", "function": {"name": "look_up", "arguments": {"word": "tree"}}}
    turns: Turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "name": "look_up", "content": "a plant"},
    ]
    messages = [_fit_message(turn, form) for turn in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **held_arguments(tokenizer))
    except Exception:  # a template can make Python raise anything
        return False
    return "look_up" in text and "tree" in text and "None" not in text and '\\"word' not in text


def find_marks(tokenizer: PreTrainedTokenizerBase, turns: Turns, whole: str, **options: Any) -> Spans | None:
    """What of `whole`, the text of these turns, the chat template marks as generated by a model ({% generation %}), or
    the variant of it with marks that TRL has; None where there are no marks, or they are in another text."""
    template = _with_marks(str(tokenizer.chat_template))
    if template is None:
        return None
    messages, fields = list(map(whole_message, turns)), _form_of(tokenizer).reasoning
    given = {**tokenizer.special_tokens_map, **held_arguments(tokenizer), **options}
    with _clock_at(held_moment(tokenizer)):
        for form in FORMS:
            said = [_fit_message(message, replace(form, reasoning=fields)) for message in messages]
            with contextlib.suppress(Exception):  # a template can make Python raise anything
                (text,), (marks,) = chat_template_utils.render_jinja_template(
                    [said], chat_template=template, return_assistant_tokens_mask=True, **given
                )
                if text == whole:
                    return tuple((begin, end) for begin, end in marks)
    return None


@lru_cache
def _with_marks(template: str) -> str | None:
    if MARKS.search(template):
        return template
    found = find_spec("trl")
    for place in (found.submodule_search_locations or []) if found is not None else []:
        for variant in sorted((Path(place) / "chat_templates").glob("*_training.jinja")):
            plain = variant.with_name(variant.name.replace("_training", ""))
            if plain.is_file() and plain.read_text(encoding="utf-8").strip() == template.strip():
                return variant.read_text(encoding="utf-8")
    return None


@contextlib.contextmanager
def _clock_at(moment: datetime | None) -> Iterator[None]:
    """`strftime_now` of transformers reads `datetime.now()` of its own module, and templates cannot be handed another
    function in its place."""
    if moment is None:
        yield
        return

    former = chat_template_utils.datetime
    chat_template_utils.datetime = SimpleNamespace(now=lambda: moment)
    try:
        yield
    finally:
        chat_template_utils.datetime = former
