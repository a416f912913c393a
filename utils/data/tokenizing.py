"""Pairs -> token ids: one BOS, one EOS, the training prefix equal to the inference prompt, truncation that is counted.

A row becomes `prompt_ids`, `chosen_ids` and `rejected_ids` (for `sft`: `prompt_ids` and `completion_ids`). The prompt
ids are exactly those that generation would be given; the completion ids are what follows and end in an end-of-text
token, unless the completion had to be cut, in which case `cut` says so and nothing teaches the model to stop there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import UserError
from .lengths import read_numbers
from .places import SHOWN, Place, describe_all_bad, list_places, row_places
from .rendering import ADVICE, Rendered, Turns, render_chat, render_row
from .row_cache import map_rows

# Of a pair that is too long, the prompt keeps at least this share of max_length before a completion is cut.
PROMPT_SHARE_KEPT = 4

REASONS_SHOWN = 10
# Another version may render or tokenize otherwise: rows that an earlier one made are not used again.
LIBRARIES = (transformers.__version__, tokenizers.__version__, jinja2.__version__)
REPLIES = {"chosen": "'chosen'", "rejected": "'rejected'", "completion": "the reply"}


@dataclass(frozen=True)
class Truncation:
    """What `max_length` and the chat template did to the rows of one split.

    `dropped` are rows that were too long. `bad_rows`: reason -> rows left out with --on_bad_rows skip. `warnings` are
    sentences on rows that are trained on in another form than they seem to.
    """

    prompts_shortened: int
    completions_cut: int
    dropped: int
    bad_rows: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def truncated(self) -> int:
        """Rows that are trained on in a shorter form."""
        return self.prompts_shortened + self.completions_cut


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
        """What `encode_prompts` gives and, for each of `sides`, what `encode_continuations` gives, in one go.

        Raises:
            UserError: the chat template does not render a row, or renders it without its reply.
        """
        rendered = self.render_rows(prompts, dict(zip(REPLIES, sides, strict=False)), tools)
        for row in rendered:
            if row.fault is not None:
                raise UserError(f"{row.fault}. Leave such rows out of the data")
        return self.encode_rendered(prompts, rendered) if rendered else [[] for _ in (prompts, *sides)]

    def render_rows(
        self,
        prompts: Sequence[str | Turns],
        sides: Mapping[str, Sequence[str | Turns]],
        tools: Sequence[Any] | None = None,
    ) -> list[Rendered]:
        """The rows as text, each with what is wrong with it; `sides` are columns of replies by their names."""
        names = [REPLIES.get(name, f"'{name}'") for name in sides]
        tools = tools or [None] * len(prompts)
        replies = zip(*sides.values(), strict=True) if sides else ([] for _ in prompts)
        return [
            self._render_row(prompt, row, tool, names)
            for prompt, row, tool in zip(prompts, replies, tools, strict=True)
        ]

    def encode_rendered(self, prompts: Sequence[str | Turns], rendered: Sequence[Rendered]) -> list[list[list[int]]]:
        """The ids of the prompts, then for each side those that follow them."""
        starts = [row.prompt for row in rendered]
        start_ids = self.encode(starts)
        encoded = [[self._begin(prompt, ids) for prompt, ids in zip(prompts, start_ids, strict=True)]]
        for rests in zip(*(row.completions for row in rendered), strict=True):
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

    def _render_row(
        self, prompt: str | Turns, replies: Sequence[str | Turns], tools: Any, names: Sequence[str]
    ) -> Rendered:
        if isinstance(prompt, str):
            return render_row(render_chat, prompt, replies, names)
        read = read_tools(tools)
        shown: Turns = []

        def render(turns: Turns, add_generation_prompt: bool = False) -> str:
            shown[:] = turns
            return render_chat(self.tokenizer, turns, tools=read, add_generation_prompt=add_generation_prompt)

        try:
            return render_row(render, prompt, replies, names)
        except Exception as error:  # a template can make Python raise anything
            roles = ", ".join(turn["role"] for turn in shown)
            said = " ".join(str(error).split())[:300].rstrip(".")
            fault = f"the chat template refuses a conversation of {roles}: {said}{ADVICE}"
            return Rendered("", [""] * len(replies), fault, refused=True)

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
    rendered = encoder.render_rows(
        batch["prompt"], {name: batch[name] for name in completions.values()}, batch.get("tools")
    )
    prompt_ids, *sides = encoder.encode_rendered(batch["prompt"], rendered)
    columns = {"prompt_ids": prompt_ids, "row": batch["row"], **dict(zip(completions, sides, strict=True))}
    columns |= {"id": batch["id"]} if "id" in batch else {}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    fitted = [_fit_row(row, list(completions), max_length, encoder.opening_ids) for row in rows]
    tokenized = {key: [row[key] for row in fitted] for key in (*columns, "shortened", "cut")}
    longest = [max(len(row[name]) for name in completions) for row in fitted]
    tokenized[LENGTH] = [len(row["prompt_ids"]) + end for row, end in zip(fitted, longest, strict=True)]
    tokenized[FAULT] = [
        text.fault or _find_same([row[name] for name in completions], row["cut"], max_length)
        for text, row in zip(rendered, fitted, strict=True)
    ]
    tokenized[NOTES] = ["\n".join(text.notes) for text in rendered]
    return tokenized


def _find_same(sides: Sequence[list[int]], cut: bool, max_length: int) -> str:
    if len(sides) < 2 or sides[0] != sides[1]:
        return ""
    return f"{SAME_TOKENS} once cut to --max_length {max_length} (raise it)" if cut else SAME_TOKENS


LENGTH = "length"  # tokens of the prompt with its longest completion; batches of similar length are made by it
FAULT, NOTES = "fault", "notes"  # why a row cannot be trained on; what is to be said of it, a line each
SAME_TOKENS = "'rejected' and 'chosen' are the same tokens"
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
    on_bad_rows: str = "error",
) -> tuple[Dataset, Truncation]:
    """The rows as token ids, each fitting `max_length`, and what that took.

    Args:
        rows: `prompt`, the columns named by the values of `completions`, and `row`, as the data room makes them.
        completions: name of the new ids column -> text column, `PAIR_COLUMNS` or `SFT_COLUMNS`.
        max_length: most tokens of a prompt together with one completion.
        truncation: `shorten_prompt`, `drop` or `error`, as in --truncation.
        num_proc: processes that share the work; None for this one alone.
        place: says where a row is found, by its `row`.
        on_bad_rows: `error` or `skip`, as in --on_bad_rows, for rows that the chat template does not render whole, or
            whose sides are the same tokens.

    Raises:
        UserError: rows are too long under `error`, rows cannot be trained on, or none is left.
    """
    place = place or row_places("data")
    tokenized = map_rows(
        rows,
        _tokenize_batch,
        decides=(encoder, completions, max_length, LIBRARIES),
        batched=True,
        num_proc=num_proc,
        fn_kwargs={"encoder": encoder, "completions": completions, "max_length": max_length},
        remove_columns=rows.column_names,
    )
    fitting = _leave_out_long(tokenized, max_length, truncation, place)
    good, bad_rows = _leave_out_bad(fitting, place, on_bad_rows)
    warnings = tuple(_describe_notes(good, place))
    shortened, cut = _read_fit(good)
    counts = (int((shortened & ~cut).sum()), int(cut.sum()), len(tokenized) - len(fitting))
    return good.remove_columns([FAULT, NOTES]), Truncation(*counts, bad_rows, warnings)


def _read_fit(tokenized: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, whether its prompt was shortened, and whether a completion was cut."""
    return tuple(read_numbers(tokenized, name).astype(bool) for name in ("shortened", "cut"))


def _leave_out_long(tokenized: Dataset, max_length: int, truncation: str, place: Place) -> Dataset:
    """The rows that are trained on as far as their length goes: all of them, or with `drop` those that fit."""
    is_long = np.logical_or(*_read_fit(tokenized))
    too_long = np.flatnonzero(is_long)
    if len(too_long) and truncation == "error":
        places = [place(row) for row in tokenized[too_long[:SHOWN]]["row"]]
        raise UserError(
            f"--max_length {max_length} is too short for {len(too_long)} of {len(tokenized)} rows "
            f"({list_places(places, len(too_long))}). "
            "Raise it, or pass --truncation shorten_prompt or drop"
        )
    if truncation != "drop":
        return tokenized
    if len(too_long) == len(tokenized) > 0:
        raise UserError(f"--max_length {max_length} with --truncation drop leaves none of {len(tokenized)} rows")
    return tokenized.select(np.flatnonzero(~is_long))


def _leave_out_bad(tokenized: Dataset, place: Place, on_bad_rows: str) -> tuple[Dataset, dict[str, int]]:
    """The rows that can be trained on, and reason -> how many cannot."""
    found = _find_in(tokenized, FAULT)
    if not found:
        return tokenized, {}
    if on_bad_rows == "error":
        faults = describe_all_bad(found, lambda index: place(tokenized[int(index)]["row"]))
        more = [f"{len(faults) - REASONS_SHOWN:,} more reasons of this kind"] if len(faults) > REASONS_SHOWN else []
        raise UserError(*faults[:REASONS_SHOWN], *more)
    bad = np.concatenate(list(found.values()))
    counts = {reason: len(indices) for reason, indices in found.items()}
    if len(bad) == len(tokenized):
        said = "; ".join(f"{reason}: {count:,}" for reason, count in list(counts.items())[:REASONS_SHOWN])
        raise UserError(f"--on_bad_rows skip: no usable row is left of {len(tokenized):,} ({said})")
    return tokenized.select(np.setdiff1d(np.arange(len(tokenized)), bad)), counts


def _describe_notes(tokenized: Dataset, place: Place) -> Iterator[str]:
    for note, indices in _find_in(tokenized, NOTES).items():
        places = list_places([place(row) for row in tokenized[indices[:SHOWN]]["row"]], len(indices))
        yield f"{note}, in {len(indices):,} row{'s' if len(indices) > 1 else ''} ({places})"


def _find_in(tokenized: Dataset, column: str) -> dict[str, np.ndarray]:
    return find_texts(tokenized.select_columns([column]).with_format("arrow")[:][column])


def find_texts(texts: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """Each line of a column of texts -> the indices of the rows that have it, in order; most rows have an empty one."""
    filled = pc.not_equal(texts, "")
    found: dict[str, list[int]] = {}
    for index, text in zip(np.flatnonzero(filled.to_numpy()), texts.filter(filled).to_pylist(), strict=True):
        for line in text.split("\n"):
            found.setdefault(line, []).append(int(index))
    return {line: np.array(indices) for line, indices in found.items()}
