"""The pairs as a tokenizer sees them: lengths, what a limit cuts, what padding would cost, and whether it is sound."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import AutoConfig, AutoTokenizer

from ..data.encoding import PromptEncoder
from ..data.files import quiet
from ..data.layouts import KWARGS
from ..data.rendering import Rendered
from ..data.tokenizing import find_texts, fit_lengths
from ..data.turns import flatten
from ..errors import UserError, in_one_line
from ..models.loading import choose_max_length, longest_context
from ..models.sources import read_end_ids
from ..models.templates import choose_template
from ..models.untrusted import check_folder
from ..settings.training import Settings
from .findings import NOTE, PROBLEM, Finding, find_pairs
from .scanning import SIDES, choose_processes
from .statistics import summarize_sides
from .subject import Subject

BATCH_PAIRS = 8  # per batch, where padding is compared
TRIED_PAIRS = 200  # that are turned into tokens and back
REFUSED = -1
COUNTED = ("prompt", "chosen", "rejected", "unknown", "equal", "equal_when_cut")


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of each side before any cut, per pair (REFUSED: the chat template does not render it), and flags."""

    lengths: dict[str, np.ndarray]
    unknown: np.ndarray  # tokens that stand for what the vocabulary lacks
    equal: np.ndarray  # bool: both sides are the same tokens
    equal_when_cut: np.ndarray  # bool: they are once they are cut
    lost: dict[str, np.ndarray]  # what the chat template does to replies that it does not render whole -> pairs
    notes: dict[str, np.ndarray]  # what else is to be said of how it renders pairs -> pairs


def load_encoder(subject: Subject, settings: Settings) -> tuple[PromptEncoder, str | None, int]:
    """The tokenizer as training uses it, its chat template as a phrase, and the limit of tokens.

    A folder or hub repository with a tokenizer is enough; a model's config, where there is one, bounds the limit.

    Raises:
        UserError: it cannot be loaded, has no end-of-text token, or the limit is beyond the model's context.
    """
    name, revision = settings.model.model_name_or_path, settings.model.model_revision
    options = {"revision": revision, "trust_remote_code": settings.model.trust_remote_code}
    check_folder("--model_name_or_path", name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        raise UserError(
            f"--model_name_or_path {name}: no tokenizer can be loaded from it ({in_one_line(error)})"
        ) from None
    max_length = choose_max_length(settings.data.max_length, _context_length(name, options))
    encoder = PromptEncoder(tokenizer, read_end_ids(name, revision, tokenizer))
    transcript = subject.reading.is_transcript
    return encoder, choose_template(subject.pairs, transcript, tokenizer, settings.model), max_length


def _context_length(name: str, options: dict[str, Any]) -> int | None:
    try:
        return longest_context(AutoConfig.from_pretrained(name, **options).get_text_config())
    except Exception:
        return None  # a tokenizer without a model


def count_tokens(pairs: datasets.Dataset, encoder: PromptEncoder, max_length: int) -> TokenCounts:
    """Every pair's tokens, counted in batches; nothing but the counts is kept."""
    names = [name for name in ("prompt", "chosen", "rejected", "tools", KWARGS) if name in pairs.column_names]
    rows = pairs.select_columns(names)
    processes = choose_processes(len(rows))
    with tempfile.TemporaryDirectory() as folder, quiet(rows.data.nbytes), _one_thread_each(processes):
        counted = rows.map(
            _count_batch,
            batched=True,
            remove_columns=names,
            fn_kwargs={"encoder": encoder, "max_length": max_length},
            num_proc=processes,
            cache_file_name=str(Path(folder) / "tokens.arrow"),
            load_from_cache_file=False,
            desc="Counting tokens",
        )
        table = counted.with_format("arrow")[:]
        columns = {name: table[name].to_numpy() for name in COUNTED}
        texts = (find_texts(table[name]) for name in ("lost", "notes"))
    lengths = {side: columns[side] for side in ("prompt", "chosen", "rejected")}
    return TokenCounts(lengths, *(columns[name] for name in COUNTED[3:]), *texts)


@contextlib.contextmanager
def _one_thread_each(processes: int | None) -> Iterator[None]:
    """Forked processes have none of the tokenizer's threads and would wait for them for ever; each goes on alone."""
    former = os.environ.get("TOKENIZERS_PARALLELISM")
    if processes is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if former is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = former


def _count_batch(batch: dict[str, list[Any]], encoder: PromptEncoder, max_length: int) -> pa.Table:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    try:
        encoded = _encode(rows, encoder)
    except UserError:  # a row that the tokenizer refuses; the others are counted one by one
        encoded = [_encode_alone(row, encoder) for row in rows]
    unknown = encoder.tokenizer.unk_token_id
    unknown = None if unknown in (*encoder.end_ids, encoder.tokenizer.bos_token_id) else unknown
    sides = [pair.ids for pair in encoded]
    lost = ["" if pair.ids is None else pair.text.fault or "" for pair in encoded]
    equal = [ids is not None and ids[1] == ids[2] for ids in sides]
    return pa.table(
        {
            **{
                side: pa.array([len(ids[number]) if ids else REFUSED for ids in sides], type=pa.int64())
                for number, side in enumerate(("prompt", "chosen", "rejected"))
            },
            "unknown": pa.array([sum(part.count(unknown) for part in ids) if ids else 0 for ids in sides], pa.int64()),
            "equal": pa.array(equal, type=pa.bool_()),
            "equal_when_cut": pa.array([_equal_when_cut(ids, max_length) for ids in sides], type=pa.bool_()),
            "lost": pa.array(lost, pa.string()),
            "notes": pa.array(["\n".join(pair.text.notes) for pair in encoded], pa.string()),
        }
    )


@dataclass(frozen=True)
class Encoded:
    """A pair as text and as ids of prompt, chosen and rejected; no ids where template or tokenizer refuses it."""

    text: Rendered
    ids: tuple[list[int], list[int], list[int]] | None


def _encode(rows: Sequence[dict[str, Any]], encoder: PromptEncoder) -> list[Encoded]:
    prompts, tools = [row["prompt"] for row in rows], [row.get("tools") for row in rows]
    kwargs = [row.get(KWARGS) for row in rows]
    texts = encoder.render_rows(prompts, {side: [row[side] for row in rows] for side in SIDES[1:]}, tools, kwargs)
    ids = zip(*encoder.encode_rendered(prompts, texts), strict=True)
    return [Encoded(text, None if text.refused else own) for text, own in zip(texts, ids, strict=True)]


def _encode_alone(row: dict[str, Any], encoder: PromptEncoder) -> Encoded:
    try:
        return _encode([row], encoder)[0]
    except UserError as error:
        return Encoded(Rendered("", [], str(error), refused=True), None)


def _equal_when_cut(ids: tuple[list[int], list[int], list[int]] | None, max_length: int) -> bool:
    if ids is None or ids[1] == ids[2]:
        return False
    prompt, chosen, rejected = ids
    if len(prompt) + max(len(chosen), len(rejected)) <= max_length:
        return False
    _, (left, right) = fit_lengths(len(prompt), [len(chosen), len(rejected)], max_length)
    return chosen[:left] == rejected[:right]


def measure_tokens(counts: TokenCounts, max_length: int, seed: int) -> dict[str, Any]:
    """Lengths, what --max_length shortens and cuts, and the tokens that a step computes with and without padding."""
    lengths = {side: np.maximum(numbers, 0) for side, numbers in counts.lengths.items()}
    prompt, chosen, rejected = lengths.values()
    longest = prompt + np.maximum(chosen, rejected)
    kept_prompt = np.minimum(
        prompt, np.maximum.reduce([max_length - np.maximum(chosen, rejected), np.full_like(prompt, max_length // 4)])
    )
    kept_prompt = np.where(longest <= max_length, prompt, np.maximum(kept_prompt, 1))
    kept = [np.minimum(side, max_length - kept_prompt) for side in (chosen, rejected)]
    cut = (kept[0] < chosen) | (kept[1] < rejected)
    order = np.random.default_rng(seed).permutation(len(prompt))
    rows = np.maximum(*kept)[order] + kept_prompt[order]
    widest = np.maximum.reduceat(rows, np.arange(0, len(rows), BATCH_PAIRS)) if len(rows) else rows
    sizes = np.diff(np.append(np.arange(0, len(rows), BATCH_PAIRS), len(rows)))
    return {
        "lengths": summarize_sides(lengths),
        "total": int(prompt.sum() + chosen.sum() + rejected.sum()),
        "max_length": max_length,
        "longest_pair": int(longest.max()),
        "pairs_too_long": int((longest > max_length).sum()),
        "prompts_shortened": int(((kept_prompt < prompt) & ~cut).sum()),
        "responses_cut": int(cut.sum()),
        "padded_tokens": int((2 * widest * sizes).sum()),
        "shared_prefix_tokens": int((kept_prompt + kept[0] + kept[1]).sum()),
        "batch_pairs": BATCH_PAIRS,
    }


def check_tokens(
    subject: Subject, counts: TokenCounts, encoder: PromptEncoder, numbers: dict[str, Any]
) -> list[Finding]:
    """What the tokenizer or the limit of tokens does to pairs."""
    max_length = numbers["max_length"]
    longest = counts.lengths["prompt"] + np.maximum(counts.lengths["chosen"], counts.lengths["rejected"])
    too_long = np.flatnonzero(longest > max_length)
    return [
        *find_pairs(
            subject, "template_refuses", PROBLEM, "refused by the chat template",
            "Training would stop at them; fix their turns, or give another --chat_template.",
            np.flatnonzero(counts.lengths["prompt"] == REFUSED),
        ),
        *(
            finding
            for reason, pairs in counts.lost.items()
            for finding in find_pairs(
                subject, "template_loses", PROBLEM, reason,
                "Training refuses them: it would not train on what the rows say.", pairs,
            )
        ),
        *find_pairs(
            subject, "equal_as_tokens", PROBLEM, "both sides have the same tokens after chat template and tokenizer",
            "They teach nothing, and training refuses them.",
            np.flatnonzero(counts.equal),
        ),
        *find_pairs(
            subject, "equal_when_cut", PROBLEM, f"both sides are the same once truncated to {max_length:,} tokens",
            "They teach nothing; raise --max_length, or --remove too_long.",
            np.flatnonzero(counts.equal_when_cut),
        ),
        *find_pairs(
            subject, "too_long", NOTE,
            f"longer than {max_length:,} tokens: {numbers['prompts_shortened']:,} keep their responses whole, "
            f"{numbers['responses_cut']:,} have one cut",
            "Raise --max_length where memory allows, or --remove too_long.",
            too_long,
        ),
        *find_pairs(
            subject, "unknown_tokens", NOTE, "characters missing from the vocabulary",
            "The model sees the unknown token instead.",
            np.flatnonzero(counts.unknown),
        ),
        *(
            finding
            for note, pairs in counts.notes.items()
            for finding in find_pairs(subject, "template_changes", NOTE, note, "Training warns of it.", pairs)
        ),
        *_check_round_trip(subject, encoder),
    ]  # fmt: skip


def _check_round_trip(subject: Subject, encoder: PromptEncoder) -> list[Finding]:
    """A sample of pairs to tokens and back: one BOS at most, one end, and the text as it was."""
    sample = np.unique(np.linspace(0, len(subject.pairs) - 1, min(TRIED_PAIRS, len(subject.pairs))).astype(int))
    twice, no_end, changed = [], [], []
    bos = encoder.tokenizer.bos_token_id
    for pair in sample:
        row = subject.pairs[int(pair)]
        ids = _encode_alone(row, encoder).ids
        if ids is None:
            continue
        prompt, *replies = ids
        if bos is not None and prompt[:2] == [bos, bos]:
            twice.append(pair)
        if any(sum(token in encoder.end_ids for token in reply[-2:]) != 1 for reply in replies):
            no_end.append(pair)
        said = (flatten(row[side]) for side in ("prompt", "chosen", "rejected"))
        if not all(_holds(encoder.tokenizer.decode(part), text) for part, text in zip(ids, said, strict=True)):
            changed.append(pair)
    tried = f"of {len(sample):,} sampled pairs"
    return [
        *find_pairs(subject, "two_bos", PROBLEM, f"two BOS tokens at the beginning ({tried})",
                    "The chat template writes one and the tokenizer adds another.", np.array(twice, int)),
        *find_pairs(subject, "no_single_end", PROBLEM, f"not exactly one EOS token at the end ({tried})",
                    "The model could not learn to stop.", np.array(no_end, int)),
        *find_pairs(subject, "text_changed", NOTE, f"text changed by encoding and decoding ({tried})",
                    "The tokenizer or the chat template leaves out or changes characters.", np.array(changed, int)),
    ]  # fmt: skip


def _holds(decoded: str, text: str) -> bool:
    """Whether every line of a text is in what was decoded; spaces do not count, for tokenizers may join them."""
    squeezed = "".join(decoded.split())
    return all("".join(line.split()) in squeezed for line in text.splitlines())
