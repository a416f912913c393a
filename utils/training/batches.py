"""Pairs of token ids -> batches, in the shared-prefix layout or as padded rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from utils.models.shared_prefix import pack_pairs

PAIR_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class PairCollator(DataCollatorForPreference):
    """A batch of pairs, chosen completions first: TRL's padded rows, or the shared-prefix layout when `packs`."""

    packs = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        pairs = [{name: example[name] for name in PAIR_IDS} for example in examples]
        batch = self.packed(pairs) if self.packs else super().torch_call(pairs)
        for name in REFERENCE_COLUMNS:
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        return batch

    def packed(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """The pairs in one row of tokens."""
        row, layout = pack_pairs([tuple(pair[name] for name in PAIR_IDS) for pair in pairs])
        return {"input_ids": row, "layout": layout}


def count_pairs(batch: Mapping[str, Any]) -> int:
    """The pairs of a batch, in either layout."""
    return len(batch["layout"].lengths) if "layout" in batch else len(batch["input_ids"]) // 2
