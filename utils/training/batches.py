"""Pairs of token ids -> batches, in the shared-prefix layout or as padded rows, by count or by tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ..data.lengths import count_row_tokens, read_numbers
from ..data.tokenizing import LENGTH
from ..engine.counted import has_uncounted, plain_ids, uncount
from ..engine.flex import fewest_filling, filling_of
from ..engine.shared_prefix import pack_pairs

PAIR_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
PARTS = "micro_batches"  # the key of a batch that is a list of smaller ones
UNCOUNTED = "uncounted"  # the key of a micro-batch that is computed in step with other processes, for nothing else
PROMPT_SIZES = "prompt_sizes"  # the key of a padded batch's tokens of each row's prompt
ROWS, TOKENS = "rows", "tokens"  # the keys of a batch's rows, by their `row`, and of its tokens, padding not counted


class PairCollator(DataCollatorForPreference):
    """A batch of pairs, chosen completions first: TRL's padded rows, or the shared-prefix layout when `packs`.

    With `max_tokens` a batch is a list of micro-batches, under the key `PARTS`, each of at most so many tokens.
    """

    packs = False
    flex = False  # whether packed rows are attended to with FlexAttention
    keeps = False  # whether layers that are computed again find what they attended to
    max_tokens: int | None = None
    filler: Sequence[dict[str, Any]] = ()  # a pair for a process that has none left in a step
    multiple = 1  # packed rows are filled up to a multiple of so many tokens, within `max_tokens`

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if not examples:
            return uncounted(self.whole(self.filler))
        if self.max_tokens is None:
            return self.whole(examples)
        sizes = list(map(self.tokens_of_example, examples))
        groups = fill_batches(sizes, self.max_tokens, padded=not self.packs)
        return {PARTS: [self.whole([examples[index] for index in group]) for group in groups]}

    def whole(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """All examples as one batch."""
        pairs = [{name: example[name] for name in PAIR_IDS} for example in examples]
        batch = self.packed(pairs) if self.packs else self.padded(pairs)
        batch[ROWS] = [example["row"] for example in examples if "row" in example]
        batch[TOKENS] = sum(len(ids) for pair in pairs for ids in pair.values())
        for name in REFERENCE_COLUMNS:
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        return batch

    def packed(self, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The pairs in one row of tokens."""
        ids = [tuple(pair[name] for name in PAIR_IDS) for pair in pairs]
        tokens = sum(len(part) for pair in ids for part in pair)
        filling = filling_of(tokens) if self.flex else -tokens % self.multiple
        if self.max_tokens is not None and tokens + filling > self.max_tokens:
            filling = fewest_filling(tokens) if self.flex else 0
        row, layout = pack_pairs(ids, self.flex, filling, self.keeps)
        return {"input_ids": row, "layout": layout}

    def padded(self, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A row for each completion."""
        plain = [{name: plain_ids(ids) for name, ids in pair.items()} for pair in pairs]
        batch = super().torch_call(plain)
        sides = [(pair["prompt_ids"], pair[name]) for name in PAIR_IDS[1:] for pair in pairs]
        for mask, (prompt, ids) in zip(batch["completion_mask"], sides, strict=True):
            if has_uncounted(ids):
                mask[len(prompt) : len(prompt) + len(ids)] = torch.tensor([int(token >= 0) for token in ids])
        batch[PROMPT_SIZES] = [len(prompt) for prompt, _ in sides]
        return batch

    def tokens_of_pair(self, prompt: int, chosen: int, rejected: int) -> int:
        """What one pair puts through the model in a batch of its own."""
        return prompt + chosen + rejected if self.packs else 2 * (prompt + max(chosen, rejected))

    def tokens_of_example(self, example: Mapping[str, Any]) -> int:
        """The same of a pair of token ids."""
        return self.tokens_of_pair(*(len(example[name]) for name in PAIR_IDS))

    def token_counts(self, dataset: Dataset) -> Sequence[int]:
        """`tokens_of_pair` of every pair of a data set, in 8 bytes each."""
        counts = count_row_tokens(dataset, PAIR_IDS) if self.packs else 2 * read_numbers(dataset, LENGTH)
        return array("q", counts.astype("int64").tobytes())


def fill_batches(sizes: Sequence[int], limit: int, padded: bool) -> list[list[int]]:
    """Indices of pairs in as few batches as a simple rule finds, none over `limit` tokens.

    The largest come first, each into the first batch that has room; a padded batch costs its largest pair times its
    pairs. A pair over the limit has a batch to itself.
    """
    batches: list[list[int]] = []
    costs: list[int] = []  # tokens so far; of a padded batch, the tokens of its largest pair
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        for number, batch in enumerate(batches):
            cost = costs[number] * (len(batch) + 1) if padded else costs[number] + sizes[index]
            if cost <= limit:
                batch.append(index)
                costs[number] = costs[number] if padded else cost
                break
        else:
            batches.append([index])
            costs.append(sizes[index])
    return batches


def consecutive_batches(sizes: Sequence[int], limit: int, most: int, padded: bool) -> list[list[int]]:
    """All indices, largest pairs first, cut into batches of at most `limit` tokens and `most` pairs.

    Pairs of similar length share a batch; time grows with the pairs alone. A pair over the limit stands alone.
    """
    batches: list[list[int]] = []
    tokens = largest = 0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        pairs = len(batches[-1]) + 1 if batches else 1
        cost = largest * pairs if padded else tokens + sizes[index]
        if not batches or cost > limit or pairs > most:
            batches.append([])
            tokens, largest = 0, sizes[index]
        batches[-1].append(index)
        tokens += sizes[index]
    return batches


def uncounted(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch, to be computed in step with the other processes and to count for nothing."""
    return {**batch, ROWS: [], TOKENS: 0, UNCOUNTED: True}


def parts_of(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The micro-batches of a batch: several under a limit of tokens, else itself."""
    return batch.get(PARTS, [batch])


def count_pairs(batch: Mapping[str, Any]) -> int:
    """The pairs of a batch that count, in either layout."""
    if UNCOUNTED in batch:
        return 0
    if PARTS in batch:
        return sum(map(count_pairs, batch[PARTS]))
    return len(batch["layout"].lengths) if "layout" in batch else len(batch["input_ids"]) // 2


def examples_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pairs that a batch was made of, in order: token ids, and what else it says of each."""
    if PARTS in batch:
        return [example for part in batch[PARTS] for example in examples_of(part)]
    examples: list[dict[str, Any]] = [dict(zip(PAIR_IDS, ids, strict=True)) for ids in _ids_of(batch)]
    for name, values in (("row", batch.get(ROWS) or []), *((name, batch.get(name, [])) for name in REFERENCE_COLUMNS)):
        for example, value in zip(examples, values, strict=False):
            example[name] = float(value) if name in REFERENCE_COLUMNS else value
    return examples


def _ids_of(batch: Mapping[str, Any]) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected of each pair."""
    if "layout" in batch:
        row = batch["input_ids"][0].tolist()
        for place in batch["layout"].uncounted:
            row[place] = uncount(row[place])
        for start, (prompt, chosen, rejected) in batch["layout"].spans():
            middle = start + prompt + chosen
            yield row[start : start + prompt], row[start + prompt : middle], row[middle : middle + rejected]
        return
    masks = (batch[name].bool() for name in ("attention_mask", "completion_mask"))
    rows = zip(batch["input_ids"], *masks, batch[PROMPT_SIZES], strict=True)
    texts = [_split_text(ids[seen].tolist(), counted[seen].tolist(), size) for ids, seen, counted, size in rows]
    for (prompt, chosen), (_, rejected) in zip(texts[: len(texts) // 2], texts[len(texts) // 2 :], strict=True):
        yield prompt, chosen, rejected


def _split_text(ids: list[int], counted: list[bool], prompt: int) -> tuple[list[int], list[int]]:
    """Prompt and completion, those of its tokens that do not count told apart."""
    pairs = zip(ids[prompt:], counted[prompt:], strict=True)
    return ids[:prompt], [token if counts else uncount(token) for token, counts in pairs]
