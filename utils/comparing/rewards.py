"""The implicit reward of a run: beta times how much likelier its policy makes a response than its reference does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..data.template_kwargs import as_options
from ..engine.scoring import score_tokens
from ..errors import UserError
from ..models.side_by_side import Contender
from ..responses.generation import Continuation
from .questions import Questions
from .sides import Reader

TOKENS_PER_BATCH = 8192  # of padded rows; only those of responses are put to the output head

Ids = tuple[list[int], list[int]]  # of a prompt and of the response to it


def encode_responses(
    reader: Reader, writer: Reader, questions: Questions, written: Sequence[Continuation]
) -> tuple[list[Ids], int]:
    """Prompts and responses as the token ids of `reader`, each response with its end where it has one; and how many
    responses its chat template does not render whole.

    Responses of a `writer` with the same tokenizer keep the ids that were written; others are encoded as text.

    Raises:
        UserError: the chat template refuses a prompt together with its response.
    """
    encoder, prompts, options = reader.encoder, questions.prompts, as_options(questions.told)
    if writer.tokenizer is reader.tokenizer:
        own = [row.ids if row.end is None else [*row.ids, row.end] for row in written]
        return list(zip(encoder.encode_prompts(prompts, **options), own, strict=True)), 0
    answers = [
        row.text if isinstance(prompt, str) else [{"role": "assistant", "content": row.text}]
        for prompt, row in zip(prompts, written, strict=True)
    ]
    rendered = encoder.render_rows(prompts, {"response": answers}, **options)
    refused = next((row.fault for row in rendered if row.refused), None)
    if refused is not None:
        raise UserError(refused)
    prompt_ids, ended = encoder.encode_rendered(prompts, rendered)
    own = [ids if row.ended else ids[:-1] for row, ids in zip(written, ended, strict=True)]
    return list(zip(prompt_ids, own, strict=True)), sum(row.fault is not None for row in rendered)


def implicit_rewards(
    policy: Contender, reference: Contender, rows: Sequence[Ids], beta: float, pad_id: int
) -> list[float]:
    """beta (log pi(y|x) - log pi_ref(y|x)) of each row, in the order given; log-probs are summed over the response.

    Equal rows are computed once: a model's numbers depend in their last bits on what else is in the batch, which would
    make one of two equal responses the better one.
    """
    different = {repr(row): row for row in rows}
    scores = [_sum_log_probs(contender, list(different.values()), pad_id) for contender in (policy, reference)]
    rewards = {name: beta * (own - other) for name, own, other in zip(different, *scores, strict=True)}
    return [rewards[repr(row)] for row in rows]


def _sum_log_probs(contender: Contender, rows: Sequence[Ids], pad_id: int) -> list[float]:
    """The log-prob of each response, in nats; 0 for one without a token."""
    sums = [0.0] * len(rows)
    with torch.no_grad(), contender.active() as model:
        for places in _batches(rows):
            batch = _pad([rows[place] for place in places], pad_id, model.device)
            for place, value in zip(places, score_tokens(model, batch).log_probs.sum(dim=1).tolist(), strict=True):
                sums[place] = value
    return sums


def _batches(rows: Sequence[Ids]) -> Iterator[list[int]]:
    """Places of rows of similar length, as many as TOKENS_PER_BATCH allows; those without a response are left out."""
    sizes = {place: len(prompt) + len(response) for place, (prompt, response) in enumerate(rows) if response}
    batch: list[int] = []
    for place in sorted(sizes, key=sizes.__getitem__):
        if batch and sizes[place] * (len(batch) + 1) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _pad(rows: Sequence[Ids], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids, attended, answers = [], [], []
    for prompt, response in rows:
        rest = width - len(prompt) - len(response)
        ids.append(prompt + response + [pad_id] * rest)
        attended.append([1] * (width - rest) + [0] * rest)
        answers.append([0] * len(prompt) + [1] * len(response) + [0] * rest)
    batch = {"input_ids": ids, "attention_mask": attended, "completion_mask": answers}
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}
