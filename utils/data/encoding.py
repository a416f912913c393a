"""Prompts and replies -> token ids with one tokenizer: one BOS, one EOS, the prompt as generation would be given it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..engine.counted import uncount
from ..errors import UserError, in_one_line
from .calls import said_by
from .rendering import (
    ADVICE,
    NOTHING_LEFT,
    UNREAD,
    Rendered,
    Spans,
    Turns,
    find_marks,
    held_reasoning,
    names_read,
    render_chat,
    render_row,
)
from .template_kwargs import read_kwargs
from .thoughts import thought_of, without_thought
from .tools import list_tools

FRONTS = ("\n", "a", ".")  # what a completion is encoded behind where its beginning would merge into its prompt
REPLIES = {"chosen": "'chosen'", "rejected": "'rejected'", "completion": "the reply"}


class PromptEncoder:
    """Turns rows into token ids with one tokenizer.

    `end_ids` are the tokens that end a reply: the tokenizer's EOS and those of the model's generation config (a chat
    model may end its turns with a token of its own).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Iterable[int] = ()) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-text token (eos_token): the model could not learn to stop. "
                "Set one in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.end_ids = frozenset(end_ids) | {tokenizer.eos_token_id}
        probe = tokenizer("a")["input_ids"]  # this also switches off any truncation and padding of its own
        plain = PreTrainedTokenizerFast
        self._is_plain = isinstance(tokenizer, plain) and all(
            getattr(type(tokenizer), name) is getattr(plain, name) for name in ("__call__", "_encode_plus")
        )
        self.bos_ids = [tokenizer.bos_token_id] if probe[:1] == [tokenizer.bos_token_id] else []

    @property
    def opening_ids(self) -> list[int]:
        """The BOS that a prompt may begin with, from the tokenizer or the template; a shortened prompt keeps it."""
        if self.bos_ids or "bos_token" not in str(self.tokenizer.chat_template):
            return self.bos_ids
        return [self.tokenizer.bos_token_id]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with no token added."""
        if not texts:
            return []
        try:
            if self._is_plain:  # the same ids in two thirds of the time: where they stand in the text is not worked out
                encoded = self.tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
                return [encoding.ids for encoding in encoded]
            return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        except Exception as error:  # of the tokenizer's own library, which knows no other kind
            said = in_one_line(error, 200)
            raise UserError(f"the tokenizer cannot encode these texts: {said}") from error

    def encode_prompts(
        self,
        prompts: Sequence[str | Turns],
        tools: Sequence[Any] | None = None,
        kwargs: Sequence[str | None] | None = None,
    ) -> list[list[int]]:
        """The ids that generation starts from, one list per prompt."""
        return self.encode_rows(prompts, [], tools, kwargs)[0]

    def encode_continuations(
        self,
        prompts: Sequence[str | Turns],
        completions: Sequence[str | Turns],
        tools: Sequence[Any] | None = None,
    ) -> list[list[int]]:
        """The ids that follow each prompt's ids, ending in exactly one end-of-text token."""
        return self.encode_rows(prompts, [completions], tools)[1]

    def encode_rows(
        self,
        prompts: Sequence[str | Turns],
        sides: Sequence[Sequence[str | Turns]],
        tools: Sequence[Any] | None = None,
        kwargs: Sequence[str | None] | None = None,
    ) -> list[list[list[int]]]:
        """What `encode_prompts` gives and, for each of `sides`, what `encode_continuations` gives, in one go.

        Raises:
            UserError: the chat template does not render a row, or renders it without its reply.
        """
        rendered = self.render_rows(prompts, dict(zip(REPLIES, sides, strict=False)), tools, kwargs)
        for row in rendered:
            if row.fault is not None:
                raise UserError(f"{row.fault}. Remove such rows from the data")
        return self.encode_rendered(prompts, rendered) if rendered else [[] for _ in (prompts, *sides)]

    def render_rows(
        self,
        prompts: Sequence[str | Turns],
        sides: Mapping[str, Sequence[str | Turns]],
        tools: Sequence[Any] | None = None,
        kwargs: Sequence[str | None] | None = None,
    ) -> list[Rendered]:
        """The rows as text, each with what is wrong with it.

        `sides` are columns of replies by their names; `tools` and `kwargs` those of the rows, which their template is
        given.
        """
        names = [REPLIES.get(name, f"'{name}'") for name in sides]
        none = [None] * len(prompts)
        replies = zip(*sides.values(), strict=True) if sides else ([] for _ in prompts)
        return [
            self._render_row(prompt, row, read_tools(tool), read_kwargs(given), names)
            for prompt, row, tool, given in zip(prompts, replies, tools or none, kwargs or none, strict=True)
        ]

    def encode_rendered(self, prompts: Sequence[str | Turns], rendered: Sequence[Rendered]) -> list[list[list[int]]]:
        """The ids of the prompts, then for each side those that follow them; those of masked reasoning do not count."""
        masks = held_reasoning(self.tokenizer) == "mask"
        starts = [row.prompt for row in rendered]
        start_ids = self.encode(starts)
        encoded = [[self._begin(prompt, ids) for prompt, ids in zip(prompts, start_ids, strict=True)]]
        for side, rests in enumerate(zip(*(row.completions for row in rendered), strict=True)):
            whole = self.encode([start + rest for start, rest in zip(starts, rests, strict=True)])
            encoded.append(
                [
                    self._end_once(ids[len(begin) :] if ids[: len(begin)] == begin else self._encode_apart(rest))
                    for rest, ids, begin in zip(rests, whole, start_ids, strict=True)
                ]
            )
            for place, row in enumerate(rendered):
                results = row.results[side] if row.results else ()
                thoughts = row.thoughts[side] if row.thoughts and masks else ()
                if results or thoughts:
                    ids = encoded[-1][place]
                    encoded[-1][place] = self._uncount(ids, starts[place], rests[place], results, thoughts)
        return encoded

    def _uncount(self, ids: list[int], start: str, completion: str, results: Spans, thoughts: Spans) -> list[int]:
        """The ids of a completion with those of tools' results, and of reasoning that is masked, as ids that do not
        count (utils/engine/counted.py).

        A turn ends with its end-of-text token: what the template writes between that and a result does not count.

        Raises:
            UserError: the tokenizer does not say where its tokens stand in a text.
        """
        for front in (start, *FRONTS):
            try:
                encoded = self.tokenizer(front + completion, add_special_tokens=False, return_offsets_mapping=True)
            except NotImplementedError:
                raise UserError(
                    "parts of replies that do not count (results of tools, masked reasoning) need a fast tokenizer "
                    "(tokenizer.json)"
                ) from None
            begin = next((at for at, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(front)), 0)
            if encoded["input_ids"][begin:][: len(ids) - 1] == ids[:-1]:
                break
        else:
            raise UserError("the tokenizer splits a reply of which a part does not count differently from its parts")
        places = [place - len(front) for place, _ in encoded["offset_mapping"][begin:]]
        marked = list(ids)
        for first, last in results:
            inside = [at for at, place in enumerate(places[: len(ids)]) if first <= place < last]
            if not inside:
                continue
            turn = next((at for at in range(inside[0], 0, -1) if marked[at - 1] < 0), 0)
            ended = turn + self._find_end(ids[turn : inside[0]])
            for at in range(min(ended + 1, inside[0]), inside[-1] + 1):
                marked[at] = uncount(ids[at])
        for first, last in thoughts:
            for at, place in enumerate(places[: len(ids)]):
                if first <= place < last and marked[at] >= 0:
                    marked[at] = uncount(ids[at])
        return marked

    def _begin(self, prompt: str | Turns, ids: list[int]) -> list[int]:
        # A template writes its own BOS or wants none; plain text gets one where the tokenizer adds it by itself.
        if isinstance(prompt, str) and self.bos_ids and ids[:1] != self.bos_ids:
            return self.bos_ids + ids
        return ids

    def _render_row(
        self,
        prompt: str | Turns,
        replies: Sequence[str | Turns],
        tools: Any,
        kwargs: Mapping[str, Any],
        names: Sequence[str],
    ) -> Rendered:
        if isinstance(prompt, str):
            return render_row(render_chat, prompt, replies, names)
        shown: Turns = []

        def render(turns: Turns, add_generation_prompt: bool = False) -> str:
            shown[:] = turns
            return render_chat(
                self.tokenizer, turns, tools=tools, add_generation_prompt=add_generation_prompt, **kwargs
            )

        def mark(turns: Turns, whole: str) -> Spans | None:
            return find_marks(self.tokenizer, turns, whole, tools=tools, **kwargs)

        unread = [name for name in kwargs if name not in names_read(self.tokenizer)]
        dropped, empty = 0, None
        if held_reasoning(self.tokenizer) == "drop":
            dropped = sum(not isinstance(reply, str) and any(map(thought_of, reply)) for reply in replies)
            prompt = list(map(without_thought, prompt))
            replies = [reply if isinstance(reply, str) else list(map(without_thought, reply)) for reply in replies]
            silent = (name for name, reply in zip(names, replies, strict=True) if not _says_something(reply))
            empty = next(map(NOTHING_LEFT.format, silent), None)
        try:
            row = render_row(render, prompt, replies, names, mark)
            notes = (*row.notes, *map(UNREAD.format, unread))
            return replace(row, fault=empty or row.fault, notes=notes, reasoned=row.reasoned + dropped)
        except Exception as error:  # a template can make Python raise anything
            roles = ", ".join(turn["role"] for turn in shown)
            said = in_one_line(error).rstrip(".")
            fault = f"the chat template refuses a conversation of {roles}: {said}{ADVICE}"
            return Rendered("", [""] * len(replies), fault, refused=True)

    def _encode_apart(self, completion: str) -> list[int]:
        """Ids of a completion whose first characters would merge into the prompt's last token.

        The text in front keeps tokenizers that put a space before a text's first word from doing it here; it has to
        be one that the completion does not merge into either.
        """
        for front in FRONTS:
            anchor, ids = self.encode([front, front + completion])
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :]
        return self.encode([completion])[0]

    def _end_once(self, ids: list[int]) -> list[int]:
        """`ids` up to the first of the end-of-text tokens at their end, with nothing but blanks between and behind
        them (a template may write a line break there); without one, `ids` and the tokenizer's own."""
        end = self._find_end(ids)
        return [*ids[:end], ids[end] if end < len(ids) else self.tokenizer.eos_token_id]

    def _find_end(self, ids: Sequence[int]) -> int:
        """Where the first of the end-of-text tokens at the end of `ids` stands; their number where there is none."""
        ends = [index for index, token in enumerate(ids) if token in self.end_ids]
        end = len(ids)
        while ends and not self.tokenizer.decode(ids[ends[-1] + 1 : end]).strip():
            end = ends.pop()
        return end


def _says_something(reply: str | Turns) -> bool:
    return bool(reply) if isinstance(reply, str) else any(said_by(turn).strip() for turn in reply)


def read_tools(tools: Any) -> Any:
    """The tools of a conversation as a template takes them; rows hold them as JSON text.

    Raises:
        UserError: the text is not a list of JSON objects.
    """
    try:
        return None if tools is None else list_tools(tools)
    except ValueError:
        shown = str(tools)[:60]
        raise UserError(
            f"the column 'tools' holds {shown!r}: must be a list of JSON objects, one for each tool"
        ) from None
