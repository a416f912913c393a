"""Sampling continuations in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.data.tokenizing import PromptEncoder, Turns


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    text: str
    ids: list[int]  # without the end-of-text token
    ended: bool  # whether it stopped by itself


def sample_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Turns],
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> list[Continuation]:
    """One continuation per prompt, in order.

    The prompts are given to the model as in training. `temperature` 0 takes the likeliest token each time; otherwise
    the whole distribution is sampled, with a generator seeded by `seed`.
    """
    encoder = PromptEncoder(tokenizer)
    prompt_ids = encoder.encode_prompts(prompts)
    options = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    continuations: list[Continuation] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(prompt_ids), batch_size):
            batch = _pad(prompt_ids[start : start + batch_size], "left", tokenizer.pad_token_id, model.device)
            written = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=sorted(encoder.end_ids),
                top_k=0,
                top_p=1.0,
                **options,
            )
            new = written[:, batch["input_ids"].shape[1] :].tolist()
            continuations += [_read(ids, tokenizer, encoder.end_ids) for ids in new]
    return continuations


def _pad(rows: list[list[int]], side: str, pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The rows as one batch; generation wants the padding on the left, where the new tokens are not."""
    width = max(map(len, rows))
    sides = [([pad_id] * (width - len(row)), [0] * (width - len(row)), row) for row in rows]
    left = side == "left"
    ids = [padding + row if left else row + padding for padding, _, row in sides]
    mask = [zeros + [1] * len(row) if left else [1] * len(row) + zeros for _, zeros, row in sides]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _read(ids: list[int], tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]) -> Continuation:
    end = next((i for i, token in enumerate(ids) if token in end_ids), None)
    kept = ids if end is None else ids[:end]
    return Continuation(tokenizer.decode(kept, skip_special_tokens=True), kept, end is not None)


def kl_estimate(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Turns],
    continuations: Sequence[Continuation],
    batch_size: int = 64,
) -> float:
    """KL(policy || reference) per continuation, in nats, estimated on continuations that the policy wrote.

    Every token's full next-token distributions are compared, which has a far smaller variance than the sampled
    log-ratio and the same mean: E_y~pi [ sum_t KL(pi(.|y_<t) || pi_ref(.|y_<t)) ].
    """
    encoder = PromptEncoder(tokenizer)
    rows = [
        (prompt, [*written.ids, tokenizer.eos_token_id] if written.ended else written.ids)
        for prompt, written in zip(encoder.encode_prompts(prompts), continuations, strict=True)
    ]
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            texts = [prompt + written for prompt, written in part]
            batch = _pad(texts, "right", tokenizer.pad_token_id, policy.device)
            logs = [torch.log_softmax(model(**batch).logits.float(), dim=-1) for model in (policy, reference)]
            divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1)  # (continuations, tokens)
            for row, (prompt, written) in zip(divergence, part, strict=True):
                total += row[len(prompt) - 1 : len(prompt) + len(written) - 1].sum().item()
    return total / len(rows)
