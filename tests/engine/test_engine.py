"""The shared-prefix engine: the same numbers and gradients as one text at a time, or it does not train."""

from __future__ import annotations

import contextlib

import pytest
import torch
from safetensors.torch import load_file
from shared.layouts import (
    ARCHITECTURES,
    EXPERTS,
    TINY,
    assert_same,
    build,
    gradients,
    one_by_one,
    packed,
    padded,
    random_pairs,
)
from shared.pairs import make_pairs, write_lines
from shared.runs import read_record
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from utils.engine import cpu_attention, proving, shared_prefix
from utils.engine.completions import sum_log_probs
from utils.engine.last_layer import leave_out_prompts
from utils.engine.proving import Trial, find_gradient_mismatch, find_mismatch
from utils.engine.scoring import score_tokens
from utils.engine.shared_prefix import pack_pairs, shared_prefix_active
from utils.models.loading import turn_off_dropout
from utils.training.trainer import PreferenceTrainer


@pytest.mark.parametrize(
    ("checkpointing", "filled"), [(False, 1), (True, 1), (False, 32)], ids=["", "checkpointing", "filled up"]
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_and_gradients_are_those_of_one_text_at_a_time(name, checkpointing, filled):
    model, pairs = build(name), random_pairs()
    expected = one_by_one(model, pairs)
    expected_gradients = gradients(model, expected)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
        turn_off_dropout(model)
    leave_out_prompts(model)
    with shared_prefix_active(model):
        scores = score_tokens(model, packed(pairs, multiple=filled, keeps=checkpointing))
        found = [row[mask.bool()] for row, mask in zip(scores.log_probs, scores.mask, strict=True)]
        found_gradients = gradients(model, found)
    assert_same(expected, found, expected_gradients, found_gradients)
    assert set(found_gradients) == set(expected_gradients)


def test_checkpointing_leaves_out_the_layer_that_the_backward_pass_needs_first(
    run_script, tiny_model, pairs_file, tmp_path, monkeypatch
):
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    calls: list[int] = []

    def counted(self, x):
        if torch.is_grad_enabled():
            calls.append(id(self))
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    code, _, err = run_script(
        "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--use_lora", "--gradient_checkpointing",
        "--max_steps", 3, "--validation_split", "none", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    times = sorted(calls.count(layer) for layer in set(calls))
    assert times[1] - times[0] == 3  # of the two layers, the first is computed again in each of the three steps


class AttentionCalls(TorchDispatchMode):
    """How often the fused kernel is called forward."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.count += operation.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("changed", [False, True], ids=["", "written over"])
def test_what_is_attended_to_is_not_computed_again(changed):
    model, pairs = build("llama"), random_pairs()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch, calls = packed(pairs, keeps=True), AttentionCalls()
    model.train()
    expected = gradients(model, list(one_by_one(model, pairs)))
    with shared_prefix_active(model), calls:
        with torch.no_grad():
            score_tokens(model, batch)  # as the reference: nothing is kept of it
        assert not any(kept.take() or kept._found for kept in batch["layout"].kept.values())
        before = calls.count
        scores = score_tokens(model, batch)
        in_forward = calls.count - before
        if changed:
            for kept in batch["layout"].kept.values():
                kept._found[0].zero_()
        found = gradients(model, [row[mask.bool()] for row, mask in zip(scores.log_probs, scores.mask, strict=True)])
    assert in_forward == len(pairs) * model.config.num_hidden_layers
    assert calls.count - before == in_forward * (2 if changed else 1)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-4 * value.abs().max()), name


def test_what_is_attended_to_is_given_back_after_a_micro_batch(
    run_script, tiny_model, pairs_file, tmp_path, monkeypatch
):
    left, kept = [], []
    compute = PreferenceTrainer.compute_part

    def compute_part(self, model, part, *arguments):
        loss = compute(self, model, part, *arguments)
        left.append(dict(part["layout"].kept))
        return loss

    put = cpu_attention.Kept.put
    monkeypatch.setattr(cpu_attention.Kept, "put", lambda self, *values: (kept.append(1), put(self, *values)))
    monkeypatch.setattr(PreferenceTrainer, "compute_part", compute_part)
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 2)
    code, _, err = run_script(*flags, "--gradient_checkpointing", "--output_dir", tmp_path / "run")
    assert code == 0, err
    assert left
    assert not any(left)
    assert kept


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_long_pairs_are_attended_to_text_by_text(name, monkeypatch):
    test_log_probs_and_gradients_are_those_of_one_text_at_a_time(name, False, 1)
    monkeypatch.setattr("utils.engine.cpu_attention.SHORT", 12)  # of the four pairs some are longer
    monkeypatch.setattr("utils.engine.cpu_attention.BLOCK", 4)  # of queries, under a window of 7
    test_log_probs_and_gradients_are_those_of_one_text_at_a_time(name, False, 1)
    monkeypatch.setattr("utils.engine.cpu_attention.takes", lambda *_: False)  # where there is no such kernel
    test_log_probs_and_gradients_are_those_of_one_text_at_a_time(name, False, 32)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"])
def test_long_texts_without_a_kernel_are_attended_to_in_blocks(name, monkeypatch):
    monkeypatch.setattr("utils.engine.cpu_attention.takes", lambda *_: False)
    monkeypatch.setattr("utils.engine.shared_prefix.LARGEST_MASK", 40)
    test_log_probs_and_gradients_are_those_of_one_text_at_a_time(name, False, 1)


@pytest.mark.parametrize("name", ["opt", "gpt2", "gemma2"])
def test_no_dropout_is_left_on(name):
    model, pairs = build(name, attention_dropout=0.5), random_pairs()
    turn_off_dropout(model)
    model.train()
    first, second = (torch.cat(one_by_one(model, pairs)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, torch.cat(one_by_one(model.eval(), pairs)))


def test_the_layout_by_hand():
    row, layout = pack_pairs([([1, 2], [3], [4, 5]), ([6], [7, 8], [9])])
    assert row.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert layout.position_ids().tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 1]]
    # chosen: 3 after 2; 7 after 6, 8 after 7. rejected: 4 after 2, 5 after 4; 9 after 6
    assert row[0, layout.predictors()].tolist() == [2, 6, 7, 2, 4, 6]
    assert row[0, layout.targets()].tolist() == [3, 7, 8, 4, 5, 9]
    tables = layout.tables(torch.device("cpu"))
    assert tables.lengths.tolist() == [1, 2, 2, 1]
    # in a matrix of [3, .], [7, 8], [4, 5], [9, .]
    assert tables.places.tolist() == [0, 2, 3, 4, 5, 6]
    assert row[0, tables.targets[tables.ends]].tolist() == [3, 8, 5, 9]
    assert (layout.tokens, layout.tokens_padded) == (9, 16)


def test_tokens_beyond_the_pairs_shorter_response_count_ld_alpha():
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]])  # chosen, chosen, rejected, rejected
    log_probs = -torch.tensor([[0, 1, 2, 4], [0, 0, 8, 0], [0, 16, 32, 0], [0, 0, 64, 128]])
    assert sum_log_probs(log_probs, mask, None).tolist() == [-7, -8, -48, -192]
    assert sum_log_probs(log_probs, mask, 1.0).tolist() == [-7, -8, -48, -192]
    assert sum_log_probs(log_probs, mask, 0.25).tolist() == [-1 - 2 - 4 / 4, -8, -48, -64 - 128 / 4]
    assert sum_log_probs(log_probs, mask, 0.0).tolist() == [-3, -8, -48, -64]


def test_both_layouts_give_the_same_scores():
    model, pairs = build("llama"), random_pairs()
    plain = score_tokens(model, padded(pairs), with_right=True, with_squares=True)
    with shared_prefix_active(model):
        shared = score_tokens(model, packed(pairs), with_right=True, with_squares=True)
    for name in ("log_probs", "right", "log_sum_sq_probs"):
        one, other = (getattr(scores, name)[scores.mask.bool()] for scores in (plain, shared))
        assert torch.allclose(one, other, atol=5e-6), name
    assert torch.equal(plain.last_ids, shared.last_ids)


@pytest.mark.parametrize("name", ["falcon", "bloom", "gptj", "mpt", "stablelm"])
def test_a_model_with_attention_of_its_own_is_found_out(name):
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4} if name == "gptj" else {}
    model, pairs = build(name, **shape), random_pairs()
    assert find_mismatch(model, packed(pairs), padded(pairs), Trial(contextlib.nullcontext)) is not None


def break_positions(monkeypatch):
    original = shared_prefix.PairLayout.position_ids
    monkeypatch.setattr(shared_prefix.PairLayout, "position_ids", lambda self: original(self).sort().values)


def break_mask(monkeypatch):
    """The rejected completion sees the chosen one."""

    def leak(module, query, key, value, attention_mask, scaling=None, **_):
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return attended.transpose(1, 2), None

    monkeypatch.setitem(shared_prefix.AttentionInterface._global_mapping, shared_prefix.NAME, leak)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_wrong_backward_pass_is_found_out(dtype, monkeypatch):
    """Scores are right, gradients are not: of keys and values none comes back."""
    model, pairs = build("llama"), random_pairs()
    trial = Trial(contextlib.nullcontext) if dtype is None else Trial(lambda: torch.autocast("cpu", dtype), 2**-8)
    proofs = (packed(pairs), padded(pairs), trial)
    assert find_gradient_mismatch(model, *proofs) is None
    assert all(parameter.grad is None for parameter in model.parameters())
    right = shared_prefix.shared_prefix_attention

    def wrong(module, query, key, value, *arguments, **options):
        return right(module, query, key.detach(), value.detach(), *arguments, **options)

    monkeypatch.setitem(shared_prefix.AttentionInterface._global_mapping, shared_prefix.NAME, wrong)
    assert find_mismatch(model, *proofs) is None
    assert "its gradient differs" in find_gradient_mismatch(model, *proofs)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_proof_of_gradients_recomputes_what_training_recomputes(name):
    """What a run with checkpointing has room for is enough. OPT's layers draw dropout themselves: they evaluate."""
    model, pairs = build(name), random_pairs()
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    layer = model.get_decoder().layers[0]
    times = []
    layer.self_attn.register_forward_hook(lambda *_: times.append(1))
    assert find_gradient_mismatch(model, packed(pairs), padded(pairs), Trial(contextlib.nullcontext)) is None
    assert len(times) == (4 if name == "llama" else 2)  # two layouts
    assert all(module.training for module in model.modules())


def test_of_large_gradients_the_proof_keeps_samples():
    model, pairs = build("llama", vocab_size=4000), random_pairs()
    samples = proving._gradient(model, padded(pairs))
    largest = max(parameter.numel() for parameter in model.parameters())
    assert all(value.numel() <= proving.SAMPLE < largest for value in samples.values())
    assert all(value.untyped_storage().nbytes() == 4 * value.numel() for value in samples.values())
    assert set(samples) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_16_bits_right_layouts_pass_and_wrong_ones_do_not(name, dtype, monkeypatch):
    """Random models hardly use their context: what a wrong layout does to them is as little as it gets."""
    model, pairs = build(name), random_pairs()
    trial = Trial(lambda: torch.autocast("cpu", dtype), {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype])
    proofs = (packed(pairs), padded(pairs), trial)
    assert find_mismatch(model, *proofs) is None
    if name in ("llama", "gemma2", "gpt2"):
        assert find_gradient_mismatch(model, *proofs) is None
    for break_it in (break_positions, break_mask):
        with monkeypatch.context() as patch:
            break_it(patch)
            assert "where rounding makes" in find_mismatch(model, packed(pairs), padded(pairs), trial)


def test_a_single_wrong_token_is_found_out():
    model = build("llama")
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(200, generator=draw)
    trial = Trial(contextlib.nullcontext, 2**-8)

    def again() -> torch.Tensor:
        return one + 0.01 * torch.randn(200, generator=draw)

    other = again()
    assert trial.disagree(model, one, other, again) is None
    other[17] += 0.5
    assert "differ by up to 0.5" in trial.disagree(model, one, other, again)


@pytest.mark.parametrize(
    ("break_it", "dtype"),
    [
        (break_positions, "float32"),
        (break_mask, "bfloat16"),
        pytest.param(break_positions, "bfloat16", marks=pytest.mark.slow),
        pytest.param(break_mask, "float32", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_engine_never_trains(break_it, dtype, monkeypatch, run_script, tiny_model, pairs_file, tmp_path):
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 2, "--dtype", dtype)
    break_it(monkeypatch)
    code, out, err = run_script(*flags, "--output_dir", tmp_path / "auto")
    assert code == 0, err
    engine = read_record(tmp_path / "auto")["engine"]
    assert "differ" in engine["shared_prefix"]
    assert "padded batches" in out
    code, _, err = run_script(*flags, "--output_dir", tmp_path / "forced", "--engine", "shared_prefix")
    assert code == 2
    assert "--engine shared_prefix" in err
    monkeypatch.undo()
    assert run_script(*flags, "--output_dir", tmp_path / "plain", "--engine", "padded")[0] == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("auto", "plain"))
    assert all(torch.equal(a[name], b[name]) for name in a)


TRAINING = {
    "full": [],
    "lora": ["--use_lora"],
    "lora 4-bit": ["--use_lora", "--use_4bit"],
    "checkpointing": ["--use_lora", "--gradient_checkpointing"],
    "precomputed reference": ["--precompute_ref_log_probs"],
    "several losses": ["--loss_type", "ipo", "sft", "--loss_weights", 1, 0.5],
    "ld_alpha": ["--ld_alpha", 0.5],
    "wpo": ["--use_weighting"],
    "f-divergence": ["--f_divergence_type", "js_divergence"],
}


@pytest.mark.parametrize("way", TRAINING)
def test_training_gives_the_same_model_in_both_layouts(way, run_script, tiny_model, pairs_file, tmp_path):
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 3, *TRAINING[way],
             "--learning_rate", 1e-3, "--per_device_train_batch_size", 4, "--optim", "sgd")  # fmt: skip
    weights, metrics = [], []
    for engine in ("shared_prefix", "padded"):
        code, _, err = run_script(*flags, "--engine", engine, "--output_dir", tmp_path / engine)
        assert code == 0, err
        (artefact,) = (tmp_path / engine).glob("*.safetensors")
        weights.append(load_file(artefact))
        record = read_record(tmp_path / engine)
        metrics.append(record["metrics"])
        assert (record["engine"]["shared_prefix"] is True) == (engine == "shared_prefix")
        assert record["engine"]["tokens_padded_equivalent"] >= record["engine"]["tokens_computed"]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0])
    for part in metrics[0]:
        assert metrics[0][part] == pytest.approx(metrics[1][part], abs=1e-4)


def test_a_mixture_of_experts_trains_with_its_auxiliary_loss(run_script, tiny_model, tmp_path):
    import shutil

    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path / "moe"
    shutil.copytree(tiny_model, folder)
    vocabulary = AutoConfig.from_pretrained(tiny_model).vocab_size
    torch.manual_seed(0)
    config = MixtralConfig(
        **(TINY | {"vocab_size": vocabulary, "num_local_experts": 4, **EXPERTS}), output_router_logits=True
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(20))
    code, _, err = run_script("--model_name_or_path", folder, "--dataset_name", data, "--max_steps", 2,
                              "--router_aux_loss_coef", 0.1, "--output_dir", tmp_path / "run")  # fmt: skip
    assert code == 0, err
    assert read_record(tmp_path / "run")["engine"]["shared_prefix"] is True
