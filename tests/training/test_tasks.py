"""A micro-batch's share of the loss, by the tasks themselves: what each item and the load-balancing loss weigh."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from shared.layouts import build, random_pairs

from utils.engine.completions import CompletionScorer
from utils.objectives.objective import Objective
from utils.objectives.pairs import Divergence
from utils.training.batches import PairCollator
from utils.training.pair_scoring import PairTask
from utils.training.sft import CompletionCollator, CompletionTask, _score_batch
from utils.training.tally import StepTally

CPU = torch.device("cpu")
MODEL = "mixtral"


def task_of_pairs(collator: PairCollator) -> PairTask:
    """Against a reference that gives every completion a log-prob of -10."""
    parameters = {"beta": 0.1, "label_smoothing": 0.0, "divergence": Divergence()}
    reference = SimpleNamespace(score=lambda inputs: torch.full((len(random_pairs()) * 2,), -10.0))
    objective, scorer = Objective(("sigmoid",), (1.0,), parameters), CompletionScorer({2}, None, weighs=False)
    return PairTask(None, StepTally("pairs", CPU), collator, objective, scorer, reference)


def completions() -> list[dict[str, list[int]]]:
    return [{"prompt_ids": pair["prompt_ids"], "completion_ids": pair["chosen_ids"]} for pair in random_pairs()]


@pytest.mark.parametrize("kind", ["pairs", "sft"])
def test_the_load_balancing_loss_weighs_as_much_as_the_items_of_its_micro_batch(kind):
    model = build(MODEL)
    if kind == "pairs":
        collator = PairCollator(pad_token_id=0)
        task, batch, items = task_of_pairs(collator), collator.whole(random_pairs()), len(random_pairs())
    else:
        collator = CompletionCollator(0)
        task = CompletionTask(None, StepTally("tokens", CPU), collator, dft=False)
        batch, items = collator(completions()), sum(len(row["completion_ids"]) for row in completions())
    assert int(task.count_items(batch)) == items
    share, names = torch.tensor(1 / 50), ("input_ids", "attention_mask")
    without = task.loss(model, dict(batch), share, None)
    balance = model(**{name: batch[name] for name in names}, output_router_logits=True).aux_loss
    found = task.loss(model, dict(batch), share, 0.3) - without
    assert found.item() == pytest.approx(0.3 * balance.item() * items / 50, rel=1e-4)
    assert task.loss(model, dict(batch), 2 * share, None).item() == pytest.approx(2 * without.item(), rel=1e-6)


def test_a_token_that_nothing_stands_before_is_not_learnt_nor_counted():
    model, collator, tally = build("llama"), CompletionCollator(0), StepTally("tokens", CPU)
    batch = collator([{"prompt_ids": [], "completion_ids": [5, 6, 7]}, {"prompt_ids": [8], "completion_ids": [9, 10]}])
    task = CompletionTask(None, tally, collator, dft=False)
    assert int(task.count_items(batch)) == 2 + 2
    task.loss(model, dict(batch), torch.tensor(1.0), None)
    assert tally.sums["tokens"] == 4
    mask = batch["labels"] != -100
    rows = _score_batch(model, {**batch, "completion_mask": mask.long()})
    assert [row["tokens"] for row in rows] == [2, 2]
