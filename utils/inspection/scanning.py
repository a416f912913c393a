"""One pass over the pairs: what each is like, as numbers, so that every check afterwards is arithmetic on columns.

A pair takes about 460 bytes, whatever the length of its texts. The pass runs in several processes for many rows.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..data.call_faults import CALL_FAULTS, calls_undeclared, find_call_faults, lists_tools_twice, measure_reasoning
from ..data.calls import said_by
from ..data.files import quiet
from ..data.splitting import prompt_key
from ..data.turns import Value, flatten
from .languages import number_language
from .similarity import HASHES, sign_texts
from .texts import FORMS, STAINS, first_words, has_answer, nearly_equal, repeats_prompt

FEW_ROWS = 20_000  # below this a second process costs more than it saves
BATCH = 1000
SIDES = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Scan:
    """What each pair is like, one array per property, all of the same length and in the order of the pairs.

    `rows` are indices in the source. Keys are hashes of 64 bits: equal keys mean equal texts. `forms` holds one bit
    per entry of FORMS, `stains` one per entry of STAINS, `languages` indices in LANGUAGES. `starts` are the first
    words of a side.
    """

    rows: np.ndarray
    prompt_keys: np.ndarray  # the prompt, whatever its case and spacing
    pair_keys: np.ndarray  # prompt, chosen and rejected, whatever their spacing
    sides_keys: np.ndarray  # the same for both orders of chosen and rejected
    characters: dict[str, np.ndarray]
    words: dict[str, np.ndarray]
    forms: dict[str, np.ndarray]
    stains: np.ndarray
    languages: dict[str, np.ndarray]
    turns: np.ndarray
    nearly_equal: np.ndarray
    repeats_prompt: np.ndarray  # a reply begins with the prompt
    answered_prompt: np.ndarray  # the prompt ends with an answer
    call_faults: np.ndarray  # a bit for each of CALL_FAULTS, then one for each that is in the rejected reply alone
    reasoning: dict[str, np.ndarray]  # characters of it in each reply
    calls_without_tools: np.ndarray
    tools_twice: np.ndarray
    starts: dict[str, pa.ChunkedArray]
    pair_signatures: np.ndarray  # (pairs, HASHES)
    prompt_signatures: np.ndarray  # (pairs, HASHES)

    def __len__(self) -> int:
        return len(self.rows)


def choose_processes(count: int) -> int | None:
    """How many processes share the work on `count` rows; None for this one alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if count >= FEW_ROWS and cores > 1 else None


def scan_pairs(pairs: datasets.Dataset) -> Scan:
    """One pass over converted pairs without faults (`prompt`, `chosen`, `rejected`, `row`)."""
    columns = pairs.select_columns([name for name in (*SIDES, "row", "tools") if name in pairs.column_names])
    if len(columns) == 0:
        return _read_scan(_scan_batch({name: [] for name in (*SIDES, "row")}))
    with tempfile.TemporaryDirectory() as folder, quiet(columns.data.nbytes):
        scanned = columns.map(
            _scan_batch,
            batched=True,
            batch_size=BATCH,
            remove_columns=columns.column_names,
            num_proc=choose_processes(len(columns)),
            cache_file_name=str(Path(folder) / "scan.arrow"),
            load_from_cache_file=False,
            desc="Checking the pairs",
        )
        return _read_scan(scanned.with_format("arrow")[:])


def _scan_batch(batch: dict[str, list[Any]]) -> pa.Table:
    prompts: Sequence[Value] = batch["prompt"]
    texts = {side: [flatten(value) for value in batch[side]] for side in SIDES}
    # Who says what is part of a prompt; of a reply, all is said by the assistant.
    keys = {side: hash_texts([" ".join(text.split()) for text in texts[side]]) for side in ("chosen", "rejected")}
    whole = hash_texts([_with_roles(prompt) for prompt in prompts])
    low, high = (choose(keys["chosen"], keys["rejected"]) for choose in (np.minimum, np.maximum))
    columns = {
        "row": np.array(batch["row"], dtype=np.int64),
        "prompt_key": hash_texts([prompt_key(prompt) for prompt in prompts]),
        "pair_key": _join_keys(whole, keys["chosen"], keys["rejected"]),
        "sides_key": _join_keys(whole, low, high),
        "stains": np.bitwise_or.reduce([_bits(list(STAINS.values()), texts[side]) for side in SIDES]),
        "turns": np.array([1 if isinstance(prompt, str) else len(prompt) for prompt in prompts], dtype=np.int32),
        "nearly_equal": np.fromiter(map(nearly_equal, texts["chosen"], texts["rejected"]), dtype=bool),
        "repeats_prompt": np.fromiter(map(repeats_prompt, prompts, texts["chosen"], texts["rejected"]), dtype=bool),
        "answered_prompt": np.fromiter(map(has_answer, prompts, texts["chosen"]), dtype=bool),
        "pair_signature": _as_binary(
            sign_texts([" \0 ".join(parts) for parts in zip(*(texts[side] for side in SIDES), strict=True)])
        ),
        "prompt_signature": _as_binary(sign_texts(texts["prompt"])),
    }
    columns |= _look_at_calls(batch)
    for side in SIDES:
        columns[f"{side}_characters"] = np.fromiter(map(len, texts[side]), dtype=np.int64)
        columns[f"{side}_words"] = np.fromiter((len(text.split()) for text in texts[side]), dtype=np.int64)
    for side in ("prompt", "chosen"):
        columns[f"{side}_language"] = np.fromiter(map(number_language, texts[side]), dtype=np.uint8)
    for side in ("chosen", "rejected"):
        columns[f"{side}_forms"] = _bits([test for _, test in FORMS.values()], texts[side])
        columns[f"{side}_start"] = pa.array([first_words(text) for text in texts[side]], type=pa.string())
    return pa.table(columns)


def _look_at_calls(batch: dict[str, list[Any]]) -> dict[str, np.ndarray]:
    tools = batch.get("tools") or [None] * len(batch["row"])
    rows = list(zip(*(batch[side] for side in SIDES), tools, strict=True))
    return {
        "call_faults": np.array([_number_faults(*row) for row in rows], dtype=np.uint16),
        **{
            f"{side}_reasoning": np.fromiter(map(measure_reasoning, batch[side]), dtype=np.int64)
            for side in ("chosen", "rejected")
        },
        "calls_without_tools": np.array(
            [calls_undeclared(prompt, chosen, own) for prompt, chosen, _, own in rows], bool
        ),
        "tools_twice": np.array([lists_tools_twice(prompt, own) for prompt, _, _, own in rows], bool),
    }


def _number_faults(prompt: Value, chosen: Value, rejected: Value, tools: str | None) -> int:
    of_prompt, of_chosen = find_call_faults(prompt, chosen, tools)
    concerned = of_prompt | of_chosen
    of_rejected = find_call_faults(prompt, rejected, tools)[1] - concerned
    bits = [name in found for found in (concerned, of_rejected) for name in CALL_FAULTS]
    return sum(1 << place for place, bit in enumerate(bits) if bit)


def _with_roles(prompt: Value) -> str:
    turns = [("", prompt)] if isinstance(prompt, str) else [(turn["role"], said_by(turn)) for turn in prompt]
    return "\0".join(f"{role} {' '.join(content.split())}" for role, content in turns)


def hash_texts(texts: Sequence[str]) -> np.ndarray:
    digests = (blake2b(text.encode("utf-8", "replace"), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _join_keys(*keys: np.ndarray) -> np.ndarray:
    joined = np.zeros(len(keys[0]), dtype=np.uint64)
    for key in keys:
        joined = (joined ^ key) * np.uint64(0x9E3779B97F4A7C15)
        joined ^= joined >> np.uint64(32)
    return joined


def _bits(tests: Sequence[Callable[[str], bool]], texts: Sequence[str]) -> np.ndarray:
    bits = np.zeros(len(texts), dtype=np.uint16)
    for position, test in enumerate(tests):
        bits |= np.fromiter(map(test, texts), dtype=bool).astype(np.uint16) << np.uint16(position)
    return bits


def _as_binary(signatures: np.ndarray) -> pa.Array:
    return pa.array([row.tobytes() for row in signatures], type=pa.binary())


def _read_scan(table: pa.Table) -> Scan:
    def column(name: str) -> np.ndarray:
        return table[name].to_numpy()

    def signatures(name: str) -> np.ndarray:
        content = b"".join(row for chunk in table[name].chunks for row in chunk.to_pylist())
        return np.frombuffer(content, dtype=np.uint16).reshape(-1, HASHES)

    return Scan(
        rows=column("row"),
        prompt_keys=column("prompt_key"),
        pair_keys=column("pair_key"),
        sides_keys=column("sides_key"),
        characters={side: column(f"{side}_characters") for side in SIDES},
        words={side: column(f"{side}_words") for side in SIDES},
        forms={side: column(f"{side}_forms") for side in ("chosen", "rejected")},
        stains=column("stains"),
        languages={side: column(f"{side}_language") for side in ("prompt", "chosen")},
        turns=column("turns"),
        nearly_equal=column("nearly_equal"),
        repeats_prompt=column("repeats_prompt"),
        answered_prompt=column("answered_prompt"),
        call_faults=column("call_faults"),
        reasoning={side: column(f"{side}_reasoning") for side in ("chosen", "rejected")},
        calls_without_tools=column("calls_without_tools"),
        tools_twice=column("tools_twice"),
        starts={side: table[f"{side}_start"] for side in ("chosen", "rejected")},
        pair_signatures=signatures("pair_signature"),
        prompt_signatures=signatures("prompt_signature"),
    )
