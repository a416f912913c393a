"""Tables of pairs -> tables of token ids, each row within a limit; what was cut or left out is counted.

A row becomes `prompt_ids`, `chosen_ids` and `rejected_ids` (for `sft`: `prompt_ids` and `completion_ids`). The prompt
ids are exactly those that generation would be given; the completion ids are what follows and end in an end-of-text
token, unless the completion had to be cut, in which case `cut` says so and nothing teaches the model to stop there.
Results of tools within a reply stand among its ids as tokens that do not count (utils/engine/counted.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers
from datasets import Dataset

from ..errors import UserError
from ..runtime import say
from .call_faults import CALL_FAULTS, find_call_faults
from .encoding import PromptEncoder
from .layouts import KWARGS
from .lengths import read_numbers
from .places import SHOWN, Place, describe_all_bad, describe_skipped, list_places, row_places, stops
from .row_cache import map_rows

# Of a pair that is too long, the prompt keeps at least this share of max_length before a completion is cut.
PROMPT_SHARE_KEPT = 4

REASONS_SHOWN = 10
# Another version may render or tokenize otherwise: rows that an earlier one made are not used again.
LIBRARIES = (transformers.__version__, tokenizers.__version__, jinja2.__version__)


@dataclass(frozen=True)
class Truncation:
    """What `max_length` and the chat template did to the rows of one split.

    `dropped` are rows that were too long. `bad_rows`: reason -> rows left out. `warnings` are
    sentences on rows that are trained on in another form than they seem to. `reasoned`: replies whose reasoning is
    rendered, or was left out as asked.
    """

    prompts_shortened: int
    completions_cut: int
    dropped: int
    bad_rows: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    reasoned: int = 0

    @property
    def truncated(self) -> int:
        """Rows that are trained on in a shorter form."""
        return self.prompts_shortened + self.completions_cut


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
        fitted[name] = _until_counted(ids[:length])
        fitted["cut"] = fitted["cut"] or length < len(ids)
    return row | fitted


def _until_counted(ids: list[int]) -> list[int]:
    """The ids up to the last one that counts: a tool's result at the end of a cut completion teaches nothing."""
    end = len(ids)
    while end and ids[end - 1] < 0:
        end -= 1
    return ids[:end]


def _tokenize_batch(
    batch: dict[str, list[Any]], encoder: PromptEncoder, completions: dict[str, str], max_length: int
) -> dict[str, list[Any]]:
    rendered = encoder.render_rows(
        batch["prompt"], {name: batch[name] for name in completions.values()}, batch.get("tools"), batch.get(KWARGS)
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
        text.fault or _find_useless(row, completions, max_length) for text, row in zip(rendered, fitted, strict=True)
    ]
    wanted = batch[next(name for name in completions.values() if name != "rejected")]
    tools = batch.get("tools") or [None] * len(rows)
    faults = map(_find_call_faults, batch["prompt"], wanted, tools)
    tokenized[REASONED] = [text.reasoned for text in rendered]
    tokenized[NOTES] = ["\n".join((*text.notes, *found)) for text, found in zip(rendered, faults, strict=True)]
    return tokenized


def _find_call_faults(prompt: Any, reply: Any, tools: str | None) -> list[str]:
    """What is wrong with the calls of a row where a model would learn it; a rejected reply may be wrong in this."""
    found = set().union(*find_call_faults(prompt, reply, tools))
    return [title for name, title in CALL_FAULTS.items() if name in found]


def _find_useless(row: Mapping[str, Any], completions: Mapping[str, str], max_length: int) -> str:
    """What the ids of a row, within the limit, are no good for."""
    sides = [row[name] for name in completions]
    if not all(sides):
        return f"{NOTHING_COUNTS} once truncated to --max_length {max_length} (raise it)"
    if len(sides) < 2 or sides[0] != sides[1]:
        return ""
    return f"{SAME_TOKENS} once truncated to --max_length {max_length} (raise it)" if row["cut"] else SAME_TOKENS


LENGTH = "length"  # tokens of the prompt with its longest completion; batches of similar length are made by it
REASONED = "reasoned"  # replies of a row whose reasoning is rendered, or was left out as asked
FAULT, NOTES = "fault", "notes"  # why a row cannot be trained on; what is to be said of it, a line each
SAME_TOKENS = "'rejected' and 'chosen' are the same tokens"
NOTHING_COUNTS = "a reply of which no token counts"
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
        on_bad_rows: `skip_few`, `skip` or `error`, as in --on_bad_rows, for rows that the chat template does not render
            whole, or whose sides are the same tokens.

    Raises:
        UserError: rows are too long under `error`, rows cannot be trained on, or none is left.
    """
    place = place or row_places("data")
    tokenized = map_rows(
        rows,
        _tokenize_batch,
        decides=(encoder, completions, max_length, LIBRARIES),
        batched=True,
        doing="tokenizing",
        num_proc=num_proc,
        fn_kwargs={"encoder": encoder, "completions": completions, "max_length": max_length},
        remove_columns=rows.column_names,
    )
    fitting = _leave_out_long(tokenized, max_length, truncation, place)
    good, bad_rows = _leave_out_bad(fitting, place, on_bad_rows)
    warnings = tuple(_describe_notes(good, place))
    shortened, cut = _read_fit(good)
    counts = (int((shortened & ~cut).sum()), int(cut.sum()), len(tokenized) - len(fitting))
    reasoned = int(read_numbers(good, REASONED).sum())
    return good.remove_columns([FAULT, NOTES, REASONED]), Truncation(*counts, bad_rows, warnings, reasoned)


def _read_fit(tokenized: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, whether its prompt was shortened, and whether a completion was cut."""
    shortened, cut = (read_numbers(tokenized, name).astype(bool) for name in ("shortened", "cut"))
    return shortened, cut


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
    bad = np.unique(np.concatenate(list(found.values())))
    counts = {reason: len(indices) for reason, indices in found.items()}
    if stops(len(bad), len(tokenized), on_bad_rows):
        faults = describe_all_bad(found, lambda index: place(tokenized[int(index)]["row"]))
        more = [f"{len(faults) - REASONS_SHOWN:,} more reasons of this kind"] if len(faults) > REASONS_SHOWN else []
        raise UserError(*faults[:REASONS_SHOWN], *more)
    if on_bad_rows == "skip_few":
        places = {
            reason: [place(tokenized[int(index)]["row"]) for index in indices[:SHOWN]]
            for reason, indices in found.items()
        }
        say(describe_skipped(dict([*places.items()][:REASONS_SHOWN]), counts, len(tokenized)))
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
