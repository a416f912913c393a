"""Tiny random models with a tokenizer, made on the spot."""

from __future__ import annotations

from pathlib import Path

from shared.pairs import make_pairs


def save_tiny_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer that begins texts with `<s>`; returns its size."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [" ".join(pair.values()) for pair in make_pairs(200)]
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"])
    backend = bpe._tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_tiny_model(folder: Path, seed: int, **changes) -> Path:
    """A random Llama of a few thousand parameters with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = save_tiny_tokenizer(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape["max_position_embeddings"] = 128
    config = LlamaConfig(
        vocab_size=size,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **(shape | changes),
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_tiny_reward_model(folder: Path):
    """A random model that scores a text with one number, and its tokenizer; returns the model."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    size = save_tiny_tokenizer(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=size, num_labels=1, pad_token_id=2, **shape))
    model.save_pretrained(folder)
    return model
