"""The output head in chunks: the same scores and gradients as from all logits at once."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from shared.layouts import ARCHITECTURES, build, padded, random_pairs

from utils.engine import head as head_module
from utils.engine.head import MARK, KeptLogits
from utils.engine.proving import Trial, let_head_score_in_chunks
from utils.engine.scoring import output_head, score_tokens


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(head_module.CHUNK, "cpu", 0)
    monkeypatch.setattr(head_module, "SMALLEST_CHUNK", 7)


def prove(model, dtype=None):
    if dtype is None:
        return let_head_score_in_chunks(model, padded(random_pairs(3)), Trial(contextlib.nullcontext))
    return let_head_score_in_chunks(model, padded(random_pairs(3)), Trial(lambda: torch.autocast("cpu", dtype), 2**-8))


def scores_and_gradients(model, **asked):
    scores = score_tokens(model, padded(random_pairs()), **asked)
    weights = torch.randn(scores.log_probs.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (scores.log_probs * weights).sum().backward()
    return scores, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_and_gradients_are_those_of_all_logits(name, frozen):
    sizes = {"cohere": {"logit_scale": 0.3}, "granite": {"logits_scaling": 4.0}}.get(name, {})
    sizes |= {"final_logit_softcapping": 1.5} if name == "gemma2" else {}
    model = build(name, **sizes)
    for parameter in output_head(model).parameters():
        parameter.requires_grad_(not frozen)
    asked = {"with_right": True, "with_squares": True}
    expected, expected_gradients = scores_and_gradients(model, **asked)
    assert prove(model)
    found, gradients = scores_and_gradients(model, **asked)
    for part in ("log_probs", "right", "log_sum_sq_probs"):
        assert torch.allclose(getattr(found, part), getattr(expected, part), atol=2e-6), part
    assert set(gradients) == set(expected_gradients)
    norm = torch.stack([value.norm() for value in expected_gradients.values()]).norm()
    difference = torch.stack([(gradients[name] - value).norm() for name, value in expected_gradients.items()]).norm()
    assert difference / norm < 1e-5


def test_a_token_that_cannot_come_adds_nothing_to_a_divergence():
    """Models rule tokens out by logits of minus infinity; 0 log 0 is 0."""
    even, uneven = (torch.tensor([[0.0, math.log(odds), -math.inf]]) for odds in (1, 3))
    found = KeptLogits(even).divergence_from(KeptLogits(uneven))
    assert found.tolist() == pytest.approx([0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)])


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_under_autocast_it_rounds_as_the_model_does(frozen):
    """In bfloat16 each of the two is off from float32 by about as much."""
    model = build("llama")
    output_head(model).weight.requires_grad_(not frozen)
    exact = scores_and_gradients(model)
    found = []
    for mark in (False, True):
        assert not mark or prove(model, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(scores_and_gradients(model))

    def gradient_error(gradients):
        differences = torch.stack([(gradients[n] - g).norm() for n, g in exact[1].items()]).norm()
        return differences / torch.stack([g.norm() for g in exact[1].values()]).norm()

    plain, chunked = found
    errors = [(scores.log_probs - exact[0].log_probs).abs().mean() for scores, _ in found]
    assert errors[1] < 1.2 * errors[0]
    assert gradient_error(chunked[1]) < 1.2 * gradient_error(plain[1])


def test_logits_that_the_config_does_not_explain_stay_with_the_model():
    model = build("llama")
    model.register_forward_hook(
        lambda module, inputs, output: output.__setitem__("logits", output.logits * 2) or output
    )
    assert not prove(model)
    assert not hasattr(output_head(model), MARK)


def test_a_model_that_reads_its_logits_by_id_stays_with_its_own_code():
    model = build("llama")
    model.register_forward_hook(lambda module, inputs, output: output.logits[:, :, 5] and None)
    assert not prove(model)
    assert not hasattr(output_head(model), MARK)


def test_a_wrong_gradient_of_the_head_is_found_out(monkeypatch):
    right = head_module._one_hot_minus_
    monkeypatch.setattr(head_module, "_one_hot_minus_", lambda *arguments: right(*arguments).mul_(1.01))
    assert not prove(build("llama"))


def test_a_head_with_more_than_a_matrix_stays_with_the_model():
    model = build("llama")

    class Head(torch.nn.Linear):
        pass

    model.lm_head = Head(32, 97, bias=False)
    assert not prove(model)


def test_the_matrix_of_all_logits_is_never_made():
    """The largest tensor of forward and backward passes is a chunk, or the head itself."""
    model = build("llama", vocab_size=4000)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, torch.Tensor):
                    self.size = max(self.size, value.numel())
            return result

    assert prove(model)
    with Largest() as largest:
        scores_and_gradients(model)
    completion_tokens = int(padded(random_pairs())["completion_mask"][:, 1:].sum())
    assert largest.size == 4000 * 32 < 4000 * completion_tokens
