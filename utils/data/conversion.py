"""Rows of any known shape -> one shape.

`prompt`, `chosen`, `rejected` (sft: `prompt`, `completion`), all texts or all message lists; `row`, the index in the
source; `reason`, why the row cannot be trained on (else null). Where the source has them: `tools` and
`chat_template_kwargs` (with the row's documents), JSON texts;
`chosen_score` and `rejected_score`; `group`, the text of the column that --group_by names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets

from ..errors import UserError
from .adapter import read_code, run_adapter
from .calls import EXTRA, RESULT_ROLES, BadRow, keeps_extra, turn_key
from .checks import find_fault
from .columns import list_heads, reach, unpack_row
from .exact import TOOLS
from .files import quiet
from .labels import check_labels, read_number, read_yes_or_no
from .layouts import KWARGS
from .ranking import EXPANSIONS, NOT_WANTED, SMALL_GAP, add_context
from .row_cache import map_rows
from .schemas import Reading
from .template_kwargs import kwargs_text
from .tools import list_tools
from .unpaired import pair_up
from .written_calls import read_written

TEXT = datasets.Value("string")
PLAIN_TURNS = datasets.List({"role": TEXT, "content": TEXT})
WHOLE_TURNS = datasets.List({"role": TEXT, "content": TEXT, EXTRA: TEXT})

NO_TOOLS: tuple[Any, ...] = (None, "", "[]", [])


class NeedsExtra(Exception):
    """A turn says something beside its text, where tables were to have turns of role and text alone."""


def convert_rows(rows: datasets.Dataset, reading: Reading, num_proc: int | None = None) -> datasets.Dataset:
    """The rows in the one shape, in order, cached by content. A row that cannot be read has a `reason`, no values.

    A row of the source may become several, each with the same `row`. Raises UserError when a column of the reading is
    missing, or a number is no label of two answers, as it may be in a held-out split.
    """
    try:
        converted = _convert(rows, reading, num_proc)
    except NeedsExtra:
        reading = replace(reading, keeps_extra=True)
        converted = _convert(rows, reading, num_proc)
    return pair_up(converted, reading) if reading.layout.pairs_up and not reading.choice.best_only else converted


def _convert(rows: datasets.Dataset, reading: Reading, num_proc: int | None) -> datasets.Dataset:
    paths = [*reading.columns.values(), *([reading.group] if reading.group else [])]
    heads = {path: [name for name in list_heads(path) if name in rows.column_names] for path in paths}
    missing = [path for path, names in heads.items() if not names]
    if missing:
        raise UserError(
            f"column '{missing[0]}' is missing in the held-out split, which has: {', '.join(rows.column_names)}; "
            "name another with --validation_split, or none"
        )
    check_labels(rows, reading.columns)
    needed = {name for names in heads.values() for name in names}
    wanted = rows.column_names if reading.adapter else [name for name in rows.column_names if name in needed]
    source = rows.select_columns(wanted)
    own_code = read_code(reading.adapter) if reading.adapter else b""
    padded = padded_columns(source.features)
    with quiet(source.data.nbytes):
        return map_rows(
            source,
            convert_batch,
            decides=(_key_of(reading), own_code, padded),
            batched=True,
            with_indices=True,
            fn_kwargs={"reading": reading, "padded": padded},
            remove_columns=source.column_names,
            features=features_of(reading),
            num_proc=num_proc,
            desc="Reading the rows",
        )


def _key_of(reading: Reading) -> tuple[Any, ...]:
    """What of a reading decides the converted rows, in values that hash alike in every process."""
    how = (reading.layout.name, sorted(reading.columns.items()), reading.shape.name, reading.replies)
    told = (repr(reading.choice), reading.group, reading.adapter, reading.scored, reading.packed, reading.keeps_extra)
    return (*how, *told, reading.gives_kwargs)


def features_of(reading: Reading) -> datasets.Features:
    """The columns of converted rows."""
    value = TEXT if reading.is_text else WHOLE_TURNS if reading.keeps_extra else PLAIN_TURNS
    features = dict.fromkeys(("prompt", *reading.outputs), value)
    features |= {name: datasets.Value(kind) for name, kind in _extras(reading).items()}
    return datasets.Features({**features, "row": datasets.Value("int64"), "reason": datasets.Value("string")})


def _extras(reading: Reading) -> dict[str, str]:
    """Columns besides prompt and replies, each with its type."""
    extras = {"tools": "string"} if reading.adapter or "tools" in reading.columns else {}
    extras |= {KWARGS: "string"} if reading.gives_kwargs else {}
    if reading.scored:
        extras |= {"chosen_score": "float64", "rejected_score": "float64"}
    if reading.layout.pairs_up and not reading.choice.best_only:
        extras |= {"label": "bool"}
    return extras | ({"group": "string"} if reading.group else {})


def padded_columns(features: datasets.Features | None) -> tuple[str, ...]:
    """The columns in which a table adds nulls that matter: of tools, and of objects within objects, each has the fields
    of all."""
    return tuple(name for name, kind in (features or {}).items() if _depth(kind) > (name not in TOOLS))


def _depth(kind: Any) -> int:
    """How many objects stand one within the other in values of a type."""
    if isinstance(kind, dict):
        return 1 + max(map(_depth, kind.values()), default=0)
    return _depth(kind.feature) if hasattr(kind, "feature") else 0


def convert_batch(
    batch: Mapping[str, list[Any]], indices: list[int], reading: Reading, padded: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """Columns of converted rows, from columns of the source; `indices` are the rows' own.

    `padded`: columns whose objects have nulls that are the table's, not the user's. Raises NeedsExtra where a turn says
    more than the columns of the reading hold.
    """
    names = (*reading.labels, *_extras(reading))
    output: dict[str, list[Any]] = {name: [] for name in (*names, "row", "reason")}
    for position, index in enumerate(indices):
        row = {name: column[position] for name, column in batch.items()}
        for converted, reason in _convert_row(row, reading, padded):
            for name in names:
                output[name].append(converted.get(name))
            output["row"].append(index)
            output["reason"].append(reason)
    return output


def _convert_row(
    row: Mapping[str, Any], reading: Reading, padded: Sequence[str]
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """What one row becomes, each with the reason why it cannot be trained on, or None."""
    group = {"group": _group_text(reach(row, reading.group))} if reading.group else {}
    try:
        simple = _expand(row, reading)
    except BadRow as error:
        yield {}, str(error)
        return
    objects = _list_objects([row.get(name) for name in padded])
    for parts in simple:
        if objects:
            parts = {part: _without_padding(value, objects) for part, value in parts.items()}
        try:
            converted = _read_parts(parts, reading)
            converted |= group
            yield converted, find_fault(converted, reading.labels, reading.shape.prompt_may_be_empty)
        except BadRow as error:
            yield {}, str(error)


def _expand(row: Mapping[str, Any], reading: Reading) -> list[dict[str, Any]]:
    """The row's parts; for one that holds several answers, the parts of each pair."""
    if reading.adapter is not None:
        return run_adapter(reading.adapter, row)
    row = unpack_row(row, reading.packed)
    parts = {part: reach(row, path) for part, path in reading.columns.items()}
    expand = reading.layout.expand
    return [parts] if expand is None else EXPANSIONS[expand](parts, reading.columns, reading.choice)


def _read_parts(parts: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """The parts in the one shape. Raises BadRow when they cannot be read."""
    for name in ("prompt", *reading.replies):
        parts.setdefault(name)
    if "context" in parts and isinstance(parts["prompt"], str):
        parts["prompt"] = add_context(parts["prompt"], parts["context"])
    shape, names = reading.shape, reading.names
    sides = [shape.split(parts, reply, names) for reply in reading.replies]
    _check_same_tools(parts, names)
    if parts.get("tools") not in NO_TOOLS:
        sides = [(_with_calls(prompt), _with_calls(answer)) for prompt, answer in sides]
    for reply, (_, answer) in zip(reading.replies, sides, strict=True):
        if isinstance(answer, list) and not _is_reply(answer):
            raise BadRow(f"'{names[reply]}' has a turn that is neither the assistant's nor a result of its tools")
    # A reply that is missing or an empty list is for the checks to report: its side has no prompt to compare.
    sides = _share_beginning(sides)
    prompts = [prompt for prompt, answer in sides if answer not in (None, [])]
    if len(prompts) == 2 and prompts[0] != prompts[1]:
        raise BadRow(f"the two {'transcripts' if shape.is_transcript else 'sides'} differ before the last reply")
    prompt = prompts[0] if prompts else sides[0][0]
    prompt = _without_reply(prompt, [answer for _, answer in sides])
    values = dict(zip(reading.labels, (prompt, *(answer for _, answer in sides)), strict=True))
    if not reading.keeps_extra and any(map(keeps_extra, values.values())):
        raise NeedsExtra
    converted = {**values, **_read_extras(parts, reading)}
    if reading.adapter is not None:  # what is read from a table is Unicode already
        _check_unicode(converted)
    return converted


def _check_same_tools(parts: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raises BadRow where each side has tools of its own, and they differ."""
    if "rejected_tools" not in parts or "rejected" not in parts:
        return
    try:
        tools, others = (list_tools(parts.get(part)) for part in ("tools", "rejected_tools"))
    except ValueError:
        raise BadRow(f"'{names['rejected_tools']}' is not a list of JSON objects, one for each tool") from None
    if tools != others:
        raise BadRow("the tools of the two sides differ: their prompts are not the same")


def _with_calls(value: Any) -> Any:
    return read_written(value) if isinstance(value, list) else value


def _is_reply(turns: Sequence[Mapping[str, str]]) -> bool:
    """Whether turns are a reply: those of the assistant, with the results of its tools in between."""
    roles = [turn["role"] for turn in turns]
    return {*roles[:1], *roles[-1:]} <= {"assistant"} and {*roles} <= {"assistant", *RESULT_ROLES}


def _share_beginning(sides: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """The sides with the turns that two replies with tool results begin with as part of the prompt."""
    answers = [answer for _, answer in sides]
    if len(sides) < 2 or not all(isinstance(answer, list) for answer in answers):
        return sides
    if sides[0][0] != sides[1][0] or not any(turn["role"] != "assistant" for answer in answers for turn in answer):
        return sides
    shared = next((i for i, (one, other) in enumerate(zip(*answers, strict=False)) if one != other), 0)
    while shared and any(answer[shared]["role"] != "assistant" for answer in answers):
        shared -= 1
    return [(prompt + answer[:shared], answer[shared:]) for prompt, answer in sides]


def _without_reply(prompt: Any, answers: Sequence[Any]) -> Any:
    """A prompt's turns, without the reply that a dialogue ends with where it is one of the answers."""
    if not isinstance(prompt, list):
        return prompt
    for answer in answers:
        end = prompt[-len(answer) :] if isinstance(answer, list) and answer else []
        if end and list(map(turn_key, end)) == list(map(turn_key, answer)):
            return prompt[: -len(end)]
    return prompt


def _check_unicode(converted: Mapping[str, Any]) -> None:
    """Raises BadRow where a text that an adapter made holds half a character, which no file can."""
    for name, value in converted.items():
        texts = [text for turn in value for text in turn.values()] if isinstance(value, list) else [value]
        try:
            "".join(text for text in texts if isinstance(text, str)).encode()
        except UnicodeEncodeError:
            raise BadRow(f"'{name}' has half a character (an unpaired surrogate)") from None


def _read_extras(parts: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    extras: dict[str, Any] = (
        {"tools": tools_text(parts["tools"], reading.names.get("tools", "tools"), reading.is_text)}
        if "tools" in parts
        else {}
    )
    if reading.gives_kwargs:
        extras[KWARGS] = kwargs_text(parts, reading.names)
    if reading.scored:
        extras |= {name: read_number(parts.get(name)) for name in ("chosen_score", "rejected_score")}
        gap, chosen, rejected = reading.choice.min_score_gap, extras["chosen_score"], extras["rejected_score"]
        if gap is not None and (chosen is None or rejected is None or chosen - rejected < gap):
            raise BadRow(SMALL_GAP)
    if reading.layout.pairs_up:
        extras["label"] = read_yes_or_no(parts["label"])
        if extras["label"] is None:
            raise BadRow(f"'{reading.columns['label']}' is neither true nor false")
        if reading.choice.best_only and not extras["label"]:
            raise BadRow(NOT_WANTED)
    return extras


def _group_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def tools_text(tools: Any, name: str, is_text: bool) -> str | None:
    """The tools of a row, in the column of that name, as a JSON text, key for key.

    Raises BadRow for others than a chat template takes, unless the row `is_text`, which no template renders.
    """
    if not tools:
        return None
    if not is_text:
        try:
            list_tools(tools)
        except ValueError:
            raise BadRow(f"'{name}' is not a list of JSON objects, one for each tool") from None
    return tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)


def _list_objects(value: Any) -> set[int]:
    """The identities of all objects in a value."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    own = {id(value)} if isinstance(value, Mapping) else set()
    return own.union(*map(_list_objects, inner))


def _without_padding(value: Any, padded: set[int]) -> Any:
    """The value without the nulls of those objects; a null that a user or an adapter wrote stays."""
    if isinstance(value, Mapping):
        kept = value.items() if id(value) not in padded else [item for item in value.items() if item[1] is not None]
        return {name: _without_padding(item, padded) for name, item in kept}
    return [_without_padding(item, padded) for item in value] if isinstance(value, list) else value
