"""FlexAttention over the packed row: its rules, and that it is compiled a few times for all rows and layers.

On a CPU it has no compiled backward pass; there it is traced, as for a GPU, and computed the plain way.
"""

from __future__ import annotations

import contextlib
import functools
import random

import pytest
import torch
from shared.layouts import ARCHITECTURES, build, gradients, one_by_one, packed, random_pairs, rows_of_many_sizes
from shared.runs import read_metrics, read_record
from torch._dynamo.utils import counters

from utils.engine import flex
from utils.engine.flex import BLOCK, make_block_mask
from utils.engine.kernel_proof import attention_calls, find_fault_of_kernel
from utils.engine.proving import Trial
from utils.engine.scoring import score_tokens
from utils.engine.shared_prefix import shared_prefix_active
from utils.engine.tables import send
from utils.training.layout import LayoutChoice

CPU = torch.device("cpu")
TRIALS = {
    torch.float32: Trial(contextlib.nullcontext),
    torch.bfloat16: Trial(functools.partial(torch.autocast, "cpu", torch.bfloat16), 2.0**-8),
}


def sees(lengths, window) -> torch.Tensor:
    """Which token of a row sees which, one by one."""
    tokens = []  # pair, part, position
    for pair, (prompt, chosen, rejected) in enumerate(lengths):
        tokens += [(pair, 0, i) for i in range(prompt)]
        tokens += [(pair, part, prompt + i) for part, size in ((1, chosen), (2, rejected)) for i in range(size)]
    rule = [
        [
            pair == other and seen in (0, part) and 0 <= position - before < (window or 10**6)
            for other, seen, before in tokens
        ]
        for pair, part, position in tokens
    ]
    return torch.tensor(rule)


@pytest.mark.parametrize("window", [None, 1, 50, 300])
def test_the_mask_holds_what_tokens_see_and_its_blocks_little_else(window):
    draw = random.Random(1)
    lengths = tuple(tuple(draw.randint(1, 120) for _ in range(3)) for _ in range(6))
    filling = flex.filling_of(sum(map(sum, lengths)))
    mask, expected = make_block_mask(lengths, filling, window, CPU), sees(lengths, window)
    index = torch.arange(sum(map(sum, lengths)) + filling)
    by_rule = mask.mask_mod(0, 0, index[:, None], index[None, :])
    assert torch.equal(by_rule[: len(expected), : len(expected)], expected)
    filled = by_rule[len(expected) :]
    assert torch.equal(filled, torch.eye(len(index), dtype=torch.bool)[len(expected) :])  # each sees itself
    blocks = len(index) // BLOCK
    held = by_rule.view(blocks, BLOCK, blocks, BLOCK).any(dim=3).any(dim=1)
    named = mask.to_dense()[0, 0].bool()
    assert not (held & ~named).any()
    # A block of queries reads from the first key that one of them sees on.
    first = held.int().argmax(dim=1)
    assert torch.equal(
        named, torch.stack([(torch.arange(blocks) >= f) & (torch.arange(blocks) <= i) for i, f in enumerate(first)])
    )


def test_rows_have_whole_blocks_and_never_one():
    for tokens in (3, 100, 127, 128, 129, 256, 300, 1000):
        filled = tokens + flex.filling_of(tokens)
        assert filled % BLOCK == 0
        assert filled >= 2 * BLOCK
        assert filled - tokens < max(BLOCK, 2 * BLOCK - tokens + 1)
        assert tokens + flex.fewest_filling(tokens) > BLOCK
    assert packed(random_pairs(), flex=True)["input_ids"].shape == (1, 2 * BLOCK)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_log_probs_by_flex_attention_are_the_same(name):
    model, pairs = build(name), random_pairs()
    with shared_prefix_active(model):
        scores = score_tokens(model, packed(pairs, flex=True))
    for one, row, mask in zip(one_by_one(model, pairs), scores.log_probs, scores.mask, strict=True):
        assert torch.allclose(one, row[mask.bool()], atol=5e-6)


@pytest.fixture
def backward_too(monkeypatch):
    """FlexAttention computed the plain way gives gradients on a CPU as well; torch refuses those for its kernels."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_, **__: None)


@pytest.fixture
def traced(monkeypatch, backward_too):
    """FlexAttention as it is compiled for a GPU, as far as that goes here: traced, its backward pass too."""
    torch._dynamo.reset()
    counters.clear()
    kernel = flex.compile_kernel(backend="aot_eager")
    monkeypatch.setattr(flex, "_kernel", lambda _compiled: kernel)
    yield counters
    torch._dynamo.reset()


# Windows beside full attention, soft-capping, sinks, and what of the two is in a model; for every day each once.
DAILY = [
    ("llama", torch.float32),
    ("gemma2", torch.bfloat16),
    ("gemma3_text", torch.float32),
    ("gpt_oss", torch.bfloat16),
]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=[] if (name, precision) in DAILY else pytest.mark.slow)
        for name in ("llama", "gemma2", "gemma3_text", "gpt_oss")
        for precision in (torch.float32, torch.bfloat16)
    ],
)
def test_a_few_kernels_serve_all_rows_and_layers(name, precision, traced):
    model = build(name)
    for pairs in rows_of_many_sizes():
        batch = packed(pairs, flex=True)
        with shared_prefix_active(model), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            with torch.no_grad():
                score_tokens(model, batch)
            score_tokens(model, batch).log_probs.sum().backward()
    assert 1 <= traced["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_gradients_of_the_traced_kernel_are_those_of_one_text_at_a_time(name, traced):
    model, pairs = build(name), random_pairs()
    expected = gradients(model, one_by_one(model, pairs))
    with shared_prefix_active(model):
        scores = score_tokens(model, packed(pairs, flex=True))
        found = gradients(model, [row[mask.bool()] for row, mask in zip(scores.log_probs, scores.mask, strict=True)])
    norm = sum(g.double().pow(2).sum() for g in expected.values()).sqrt()
    assert sum((g - found[n]).double().pow(2).sum() for n, g in expected.items()).sqrt() / norm < 1e-5
    assert traced["stats"]["unique_graphs"] >= 1


def test_where_torch_would_give_up_compiling_it_says_so(traced):
    """Instead of computing in memory that grows with the square of the tokens, without a word."""
    model, batch = build("llama"), packed(random_pairs(), flex=True)
    with shared_prefix_active(model):
        score_tokens(model, batch).log_probs.sum().backward()
        with (
            torch._dynamo.config.patch(recompile_limit=1),
            torch.no_grad(),
            pytest.raises(Exception, match="fullgraph"),
        ):
            score_tokens(model, batch)


# What is not the kernel's own: grouped heads, heads of two widths, windows beside full attention, soft-capping, sinks.
NAMES = {"llama": 1, "deepseek_v3": 1, "gemma2": 2, "gemma3_text": 1, "gpt_oss": 2}  # and the calls that differ


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_attention_alone_is_proven(name, precision, backward_too):
    trial = TRIALS[precision]
    batch = packed(random_pairs())
    calls = attention_calls(build(name), batch, trial)
    assert len(calls) == NAMES[name]  # each different one once
    assert find_fault_of_kernel(calls, batch["layout"].lengths, CPU, trial) is None


FAULTS = {
    "a rejected completion sees the chosen one": ("own", lambda own: torch.zeros_like(own)),
    "a prompt's end is not seen": ("end", lambda end: end - 1),
    "a token too many is seen": ("first", lambda first: (first - 1).clamp(min=0)),
}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_computes_something_else_is_found_out(fault, precision, backward_too, monkeypatch):
    bounds, (name, change) = flex.bounds, FAULTS[fault]

    def wrong(*arguments):
        found = dict(zip(("first", "end", "own"), bounds(*arguments), strict=True))
        found[name] = change(torch.from_numpy(found[name])).numpy()
        return tuple(found.values())

    trial, batch = TRIALS[precision], packed(random_pairs())
    calls = attention_calls(build("llama"), batch, trial)
    monkeypatch.setattr(flex, "bounds", wrong)
    said = find_fault_of_kernel(calls, batch["layout"].lengths, CPU, trial)
    assert said.startswith("its attention differs by")


@pytest.mark.parametrize("broken", [False, True])
def test_models_that_come_to_the_device_later_attend_by_flex_there(
    broken, backward_too, run_script, tiny_model, pairs_file, tmp_path, monkeypatch
):
    """As those that are sharded. The device is played by the CPU, where the kernel is computed the plain way."""
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 3, "--logging_steps", 1)
    assert run_script(*flags, "--output_dir", tmp_path / "one")[0] == 0
    attended = []

    def attend(*arguments, **options):
        attended.append(arguments)
        if broken:
            raise RuntimeError("no kernel for heads of this width")
        return attend_over_row(*arguments, **options)

    attend_over_row = flex.attend_over_row
    monkeypatch.setattr("utils.engine.shared_prefix.attend_over_row", attend)
    monkeypatch.setattr(LayoutChoice, "device_to_come", lambda _: CPU)
    code, out, err = run_script(*flags, "--output_dir", tmp_path / "other")
    assert code == 0, err
    engine = read_record(tmp_path / "other")["engine"]
    assert engine["shared_prefix"] is True
    assert (engine["pair_by_pair"] is not None) is broken
    assert ("no kernel for heads of this width" in out) is broken
    assert len(attended) == 1 if broken else len(attended) > 20
    for one, other in zip(*(read_metrics(tmp_path / name) for name in ("one", "other")), strict=True):
        assert all(other[name] == pytest.approx(value, abs=1e-5) for name, value in one.items() if "loss" in name)


def test_tables_arrive_as_they_were_sent():
    tensors = [torch.arange(5), torch.arange(21).view(3, 7), torch.arange(0)]
    for device in ("cpu", "meta"):
        for sent, tensor in zip(send(tensors, torch.device(device)), tensors, strict=True):
            assert (sent.shape, sent.dtype, sent.device.type) == (tensor.shape, tensor.dtype, device)
            assert device == "meta" or torch.equal(sent, tensor)
