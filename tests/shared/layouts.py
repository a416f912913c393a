"""Tiny models of every architecture, and the same pairs in each layout or one text at a time."""

from __future__ import annotations

import random

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from utils.training.batches import PairCollator

TINY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2}
# Sliding windows of 7 tokens are shorter than most of the texts below.
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, **EXPERTS},
    "mistral": {"sliding_window": 7},
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 7},
    "gemma3_text": {"head_dim": 8, "sliding_window": 7},
    "phi": {},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "olmo2": {},
    "granite": {},
    "cohere": {},
    "starcoder2": {},
    "smollm3": {},
    "glm4": {"head_dim": 8},
    "deepseek_v3": {
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "num_key_value_heads": 4, **EXPERTS,
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 7, **EXPERTS},
}  # fmt: skip
# prompt, chosen, rejected: ragged, one-token completions, a one-token prompt, completions longer than the prompt
LENGTHS = [(9, 5, 3), (1, 1, 8), (14, 1, 1), (3, 12, 20)]


def random_pairs(seed: int = 0) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [
        {n: [draw.randrange(3, 97) for _ in range(size)] for n, size in zip(names, sizes, strict=True)}
        for sizes in LENGTHS
    ]
    pairs[3]["rejected_ids"][:4] = pairs[3]["chosen_ids"][:4]  # the two begin alike
    return pairs


def build(name: str, **changes) -> torch.nn.Module:
    """A tiny random model whose every parameter matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **(TINY | ARCHITECTURES.get(name, {}) | changes))
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3 if parameter.dim() == 1 else 0.1)
    return model.eval()


def packed(pairs, flex=False, multiple=1, keeps=False):
    collator = PairCollator(pad_token_id=0)
    collator.flex, collator.multiple, collator.keeps = flex, multiple, keeps
    return collator.packed(pairs)


def padded(pairs):
    return PairCollator(pad_token_id=0)(pairs)


def one_by_one(model, pairs) -> list[torch.Tensor]:
    """Log-probs of every completion, chosen ones first, from a row of its own without padding."""
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            ids = torch.tensor([pair["prompt_ids"] + pair[side]])
            log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            found.append(log_probs.gather(1, ids[0, 1:, None])[len(pair["prompt_ids"]) - 1 :, 0])
    return found


def gradients(model, log_probs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of a sum in which every token has a weight of its own."""
    model.zero_grad()
    weights = torch.Generator().manual_seed(5)
    sum((values * torch.randn(len(values), generator=weights)).sum() for values in log_probs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(expected, found, expected_gradients, found_gradients) -> None:
    """Log-probs of each completion, and gradients by weight, are the same up to rounding in float32."""
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, atol=5e-6)
    norm = sum(g.double().pow(2).sum() for g in expected_gradients.values()).sqrt()
    difference = sum((g - found_gradients[n]).double().pow(2).sum() for n, g in expected_gradients.items()).sqrt()
    assert difference / norm < 1e-5


def rows_of_many_sizes() -> list:
    """Pairs in rows of 2 to 9 blocks, of 1 to 8 pairs."""
    draw = random.Random(2)
    batches = []
    for count in (1, 3, 1, 8, 2, 5, 8, 4):
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        batches.append(
            [{n: [draw.randrange(3, 97) for _ in range(draw.randint(1, 60))] for n in names} for _ in range(count)]
        )
    return batches
