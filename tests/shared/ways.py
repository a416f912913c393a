"""Ways of training a small model, on paper and with numbers."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import LlamaConfig

from utils.planning.paper_model import Way, make_policy
from utils.settings.training import LoraSettings

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=500,
)
PAIRS = ((40, 20, 30), (25, 33, 8), (60, 5, 12))
FULL = Way(CONFIG, torch.float32, False, False, LoraSettings(), checkpointing=False, reference="ahead")
LORA = replace(FULL, use_lora=True, reference="policy")


def make_real(way: Way) -> torch.nn.Module:
    """The model of the way with numbers in it."""
    model = make_policy(way).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for name, buffer in model.named_buffers():
        if "inv_freq" in name:
            torch.nn.init.ones_(buffer)
    return model
