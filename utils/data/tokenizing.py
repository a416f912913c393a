"""Pairs -> token ids: one BOS, one EOS, the training prefix equal to the inference prompt, truncation that is counted.

A row becomes `prompt_ids`, `chosen_ids` and `rejected_ids` (for `sft`: `prompt_ids` and `completion_ids`). The prompt
ids are exactly those that generation would be given; the completion ids are what follows and end in an end-of-text
token, unless the completion had to be cut, in which case `cut` says so and nothing teaches the model to stop there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from utils.data.lengths import read_numbers
from utils.data.places import SHOWN, Place, list_places, row_places
from utils.data.row_cache import map_rows
from utils.errors import UserError

# Of a pair that is too long, the prompt keeps at least this share of max_length before a completion is cut.
PROMPT_SHARE_KEPT = 4

# Stands for a reply, to see what a template writes around one; in private use, so no template writes it by itself.
ANY_REPLY = "\ue000"

Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Truncation:
    """What `max_length` did to the rows of one split."""

    prompts_shortened: int
    completions_cut: int
    dropped: int

    @property
    def truncated(self) -> int:
        """Rows that are trained on in a shorter form."""
        return self.prompts_shortened + self.completions_cut


class PromptEncoder:
    """Turns rows into token ids with one tokenizer.

    `end_ids` are the tokens that end a reply: the tokenizer's EOS and those of the model's generation config (a chat
    model may end its turns with a token of its own).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Iterable[int] = ()):
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
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"the tokenizer cannot turn these texts into tokens: {said}") from error

    def encode_prompts(self, prompts: Sequence[str | Turns], tools: Sequence[Any] | None = None) -> list[list[int]]:
        """The ids that generation starts from, one list per prompt."""
        return self.encode_rows(prompts, [], tools)[0]

    def encode_continuations(
        self,
        prompts: Sequence[str | Turns],
        completions: Sequence[str | Turns],
        tools: Sequence[Any] | None = None,
    ) -> list[list[int]]:
        """The ids that follow each prompt's ids, ending in exactly one end-of-text token."""
        return self.encode_rows(prompts, [completions], tools)[1]

    def encode_rows(
        self, prompts: Sequence[str | Turns], sides: Sequence[Sequence[str | Turns]], tools: Sequence[Any] | None = None
    ) -> list[list[list[int]]]:
        """What `encode_prompts` gives and, for each of `sides`, what `encode_continuations` gives, in one go."""
        tools = tools or [None] * len(prompts)
        starts = [self._prompt_text(prompt, tool) for prompt, tool in zip(prompts, tools, strict=True)]
        start_ids = self.encode(starts)
        encoded = [[self._begin(prompt, ids) for prompt, ids in zip(prompts, start_ids, strict=True)]]
        for side in sides:
            rests = [self._rest_text(*parts) for parts in zip(starts, prompts, side, tools, strict=True)]
            whole = self.encode([start + rest for start, rest in zip(starts, rests, strict=True)])
            encoded.append(
                [
                    self._end_once(ids[len(begin) :] if ids[: len(begin)] == begin else self._encode_apart(rest))
                    for rest, ids, begin in zip(rests, whole, start_ids, strict=True)
                ]
            )
        return encoded

    def _begin(self, prompt: str | Turns, ids: list[int]) -> list[int]:
        # A template writes its own BOS or wants none; plain text gets one where the tokenizer adds it by itself.
        if isinstance(prompt, str) and self.bos_ids and ids[:1] != self.bos_ids:
            return self.bos_ids + ids
        return ids

    def _prompt_text(self, prompt: str | Turns, tools: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        return self._render(prompt, tools, add_generation_prompt=True)

    def _rest_text(self, start: str, prompt: str | Turns, completion: str | Turns, tools: Any) -> str:
        """The text that follows, where generation starts from `start`, the text of the prompt."""
        if isinstance(completion, str):
            return completion
        whole = self._render([*prompt, *completion], tools)
        if whole.startswith(start):
            return whole[len(start) :]
        # The template writes something in front of a reply to come that it leaves out of a reply that is there (an
        # empty think block, say). The prompt keeps it, as in generation; the completion begins where any reply would.
        any_reply = self._render([*prompt, {**completion[0], "content": ANY_REPLY}], tools)
        head, found, tail = any_reply.rpartition(ANY_REPLY)
        if found and start.startswith(head) and whole.startswith(head):
            return whole[len(head) :]
        contents = "".join(str(turn.get("content") or "") for turn in completion)
        return contents + (tail if found else "")

    def _render(self, turns: Turns, tools: Any, add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                turns, tools=read_tools(tools), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template can make Python raise anything
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(
                f"the chat template refuses a conversation of {roles}: {' '.join(str(error).split())[:300]}. "
                "Leave such rows out of the data, or give another template with --chat_template"
            ) from None

    def _encode_apart(self, completion: str) -> list[int]:
        """Ids of a completion whose first characters would merge into the prompt's last token.

        The text in front keeps tokenizers that put a space before a text's first word from doing it here; it has to
        be one that the completion does not merge into either.
        """
        for front in ("\n", "a", "."):
            anchor, ids = self.encode([front, front + completion])
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :]
        return self.encode([completion])[0]

    def _end_once(self, ids: list[int]) -> list[int]:
        """`ids` up to the first of the end-of-text tokens at their end, with nothing but blanks between and behind
        them (a template may write a line break there); without one, `ids` and the tokenizer's own."""
        ends = [index for index, token in enumerate(ids) if token in self.end_ids]
        end = len(ids)
        while ends and not self.tokenizer.decode(ids[ends[-1] + 1 : end]).strip():
            end = ends.pop()
        return [*ids[:end], ids[end] if end < len(ids) else self.tokenizer.eos_token_id]


def read_tools(tools: Any) -> Any:
    """The tools of a conversation as a template takes them; rows hold them as JSON text.

    Raises:
        UserError: the text is not a list of JSON objects.
    """
    if not isinstance(tools, str):
        return tools
    try:
        read = json.loads(tools)
    except ValueError:
        read = None
    if not isinstance(read, list) or not all(isinstance(tool, dict) for tool in read):
        raise UserError(f"the column 'tools' holds {tools[:60]!r}: must be a list of JSON objects, one for each tool")
    return read


def fit_lengths(prompt: int, completions: Sequence[int], max_length: int) -> tuple[int, list[int]]:
    """How many tokens of a prompt and of its completions are kept so that each pair of them fits `max_length`.

    The prompt gives way first, down to a quarter of `max_length`; then the completions are cut at their end.
    """
    room = max_length - max(completions)
    kept_prompt = min(prompt, max(room, max_length // PROMPT_SHARE_KEPT, 1))
    return kept_prompt, [min(length, max_length - kept_prompt) for length in completions]


def _fit_row(row: dict[str, Any], names: Sequence[str], max_length: int, opening_ids: list[int]) -> dict[str, Any]:
    """The row with its ids shortened to `max_length`; `shortened` and `cut` say what happened."""
    prompt, completions = row["prompt_ids"], [row[name] for name in names]
    kept_prompt, kept = fit_lengths(len(prompt), [len(ids) for ids in completions], max_length)
    shortened = kept_prompt < len(prompt)
    if shortened:
        begin = opening_ids if opening_ids and prompt[:1] == opening_ids and kept_prompt > 1 else []
        prompt = begin + prompt[len(prompt) - kept_prompt + len(begin) :]
    fitted = {"prompt_ids": prompt, "shortened": shortened, "cut": False}
    for name, ids, length in zip(names, completions, kept, strict=True):
        fitted[name] = ids[:length]
        fitted["cut"] = fitted["cut"] or length < len(ids)
    return row | fitted


def _tokenize_batch(
    batch: dict[str, list[Any]], encoder: PromptEncoder, completions: dict[str, str], max_length: int
) -> dict[str, list[Any]]:
    tools = batch.get("tools")
    prompt_ids, *sides = encoder.encode_rows(batch["prompt"], [batch[name] for name in completions.values()], tools)
    columns = {"prompt_ids": prompt_ids, "row": batch["row"], **dict(zip(completions, sides, strict=True))}
    columns |= {"id": batch["id"]} if "id" in batch else {}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    fitted = [_fit_row(row, list(completions), max_length, encoder.opening_ids) for row in rows]
    tokenized = {key: [row[key] for row in fitted] for key in (*columns, "shortened", "cut")}
    longest = [max(len(row[name]) for name in completions) for row in fitted]
    return tokenized | {LENGTH: [len(row["prompt_ids"]) + end for row, end in zip(fitted, longest, strict=True)]}


LENGTH = "length"  # tokens of the prompt with its longest completion; batches of similar length are made by it
PAIR_COLUMNS = {"chosen_ids": "chosen", "rejected_ids": "rejected"}
SFT_COLUMNS = {"completion_ids": "completion"}


def tokenize_rows(
    rows: Dataset,
    encoder: PromptEncoder,
    completions: dict[str, str],
    max_length: int,
    truncation: str,
    num_proc: int | None = None,
    place: Place | None = None,
) -> tuple[Dataset, Truncation]:
    """The rows as token ids, each fitting `max_length`, and what that took.

    Args:
        rows: `prompt`, the columns named by the values of `completions`, and `row`, as the data room makes them.
        completions: name of the new ids column -> text column, `PAIR_COLUMNS` or `SFT_COLUMNS`.
        max_length: most tokens of a prompt together with one completion.
        truncation: `shorten_prompt`, `drop` or `error`, as in --truncation.
        num_proc: processes that share the work; None for this one alone.
        place: says where a row is found, by its `row`.

    Raises:
        UserError: rows are too long under `error`, or none is left under `drop`.
    """
    tokenized = map_rows(
        rows,
        _tokenize_batch,
        decides=(encoder, completions, max_length),
        batched=True,
        num_proc=num_proc,
        fn_kwargs={"encoder": encoder, "completions": completions, "max_length": max_length},
        remove_columns=rows.column_names,
    )
    shortened, cut = (read_numbers(tokenized, name).astype(bool) for name in ("shortened", "cut"))
    too_long = np.flatnonzero(shortened | cut)
    if len(too_long) and truncation == "error":
        place = place or row_places("data")
        places = [place(row) for row in tokenized[too_long[:SHOWN]]["row"]]
        raise UserError(
            f"--max_length {max_length} is too short for {len(too_long)} of {len(rows)} rows "
            f"({list_places(places, len(too_long))}). "
            "Raise it, or pass --truncation shorten_prompt or drop"
        )
    if truncation == "drop":
        tokenized = tokenized.select(np.flatnonzero(~(shortened | cut)))
        if len(tokenized) == 0 and len(rows) > 0:
            raise UserError(f"--max_length {max_length} with --truncation drop leaves none of {len(rows)} rows")
        return tokenized, Truncation(0, 0, len(too_long))
    return tokenized, Truncation(int((shortened & ~cut).sum()), int(cut.sum()), 0)
