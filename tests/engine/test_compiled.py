"""--torch_compile: layers compiled one by one compute the same, and once for rows of any length."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from shared.layouts import (
    ARCHITECTURES,
    assert_same,
    build,
    gradients,
    one_by_one,
    packed,
    padded,
    random_pairs,
    rows_of_many_sizes,
)
from shared.runs import read_metrics, read_record
from torch._dynamo.utils import counters

from utils.engine.compiled import CompiledLayers
from utils.engine.last_layer import leave_out_prompts
from utils.engine.scoring import score_tokens
from utils.engine.shared_prefix import shared_prefix_active

PLAINLY = {"gemma2", "gpt_oss", "deepseek_v3"}  # attend in plain products where attention is pair by pair
TRACED = {"backend": "aot_eager"}  # traced as for a compiler, its backward pass too, and computed by torch
CUT = {"backend": "eager"}  # cut into the same pieces, which are computed as they are: a third of the time


@pytest.fixture
def seen(monkeypatch):
    """What the compiler counts; it has nothing from before. FlexAttention may be traced without a GPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_, **__: None)
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def compile_layers(model, options=TRACED) -> CompiledLayers:
    left_out = leave_out_prompts(model)
    return CompiledLayers(model, {left_out.layer: left_out} if left_out else {}, False, options)


# For every day: none of it; windows and soft-capping; windows and sinks.
TRIED = [("llama", False), ("gemma2", True), ("gpt_oss", False)]
ALL = [(name, flex) for name in ARCHITECTURES for flex in (False, True)]


@pytest.mark.parametrize(
    ("name", "flex"), [pytest.param(*one, marks=[] if one in TRIED else pytest.mark.slow) for one in ALL]
)
def test_compiled_layers_compute_the_same(name, flex, seen):
    model, pairs = build(name), random_pairs()
    expected = one_by_one(model, pairs)
    expected_gradients = gradients(model, expected)
    compile_layers(model)
    with shared_prefix_active(model):
        scores = score_tokens(model, packed(pairs, flex=flex))
        found = [row[mask.bool()] for row, mask in zip(scores.log_probs, scores.mask, strict=True)]
        found_gradients = gradients(model, found)
    assert_same(expected, found, expected_gradients, found_gradients)
    assert seen["stats"]["unique_graphs"] >= 1
    whole = flex or name not in PLAINLY
    assert not seen["graph_break"] or not whole, dict(seen["graph_break"])


@pytest.mark.parametrize(
    ("name", "flex", "options"),
    [
        ("llama", False, TRACED),
        pytest.param("gemma3_text", True, TRACED, marks=pytest.mark.slow),
        ("gpt_oss", False, CUT),
        pytest.param("gpt_oss", False, TRACED, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", False, TRACED, marks=pytest.mark.slow),
    ],
)
def test_what_is_compiled_serves_layers_and_rows_of_any_length(name, flex, options, seen):
    whole = flex or name not in PLAINLY
    model = build(name, num_hidden_layers=5 if whole else 2)
    compile_layers(model, options)
    counts = []
    for pairs in rows_of_many_sizes():
        batch = packed(pairs, flex=flex)
        with shared_prefix_active(model):
            with torch.no_grad():
                score_tokens(model, batch)
            score_tokens(model, batch).log_probs.sum().backward()
        counts.append(seen["stats"]["unique_graphs"])
    assert len(set(counts[2:])) == 1
    if whole:
        assert counts[-1] == 4  # with gradient and without, the last layer and the others
        assert not seen["graph_break"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # whose layers get the cache by its name, or by its place
def test_padded_rows_and_generation_compute_the_models_own_code(name, seen):
    model, pairs = build(name), random_pairs()
    compile_layers(model, CUT)
    expected = score_tokens(model, padded(pairs)).log_probs
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert not seen["stats"]
    layers = CompiledLayers(model, {}, True, CUT)  # of a run that computes padded rows
    assert torch.allclose(score_tokens(model, padded(pairs)).log_probs, expected, atol=5e-6)
    graphs = seen["stats"]["unique_graphs"]
    assert graphs >= 1
    with layers.plain():
        score_tokens(model, padded(random_pairs(seed=1)[:2])).log_probs.sum().backward()
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert seen["stats"]["unique_graphs"] == graphs


RUNS = {
    "lora, checkpointing": ["--use_lora", "--gradient_checkpointing"],
    "lora, by a compiler": ["--use_lora"],
    "another reference": ["--gradient_checkpointing", "--ref_model_name_or_path", "OTHER"],
    "padded": ["--use_lora", "--engine", "padded"],
    "4 bits": ["--use_lora", "--use_4bit"],
    "dora": ["--use_lora", "--use_dora"],
    "sft": [],
    "sft, by a compiler": [],
}
SLOW = (
    "sft, by a compiler",
    "lora, checkpointing",
    "lora, by a compiler",
    "another reference",
    "padded",
    "4 bits",
    "dora",
)


@pytest.fixture
def run(run_script, tiny_model, other_model, pairs_file, tmp_path, seen):
    """Runs the script for a few steps, and gives what it says; the folder is named in its place."""

    def run(verb: str, name: str, *flags) -> tuple[int, str, str]:
        flags = [other_model if flag == "OTHER" else flag for flag in flags]
        return run_script(
            *(verb, "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / name),
            *("--max_steps", 5, "--learning_rate", 5e-3, "--logging_steps", 1, "--max_samples", 60, *flags),
        )

    return run


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) if way in SLOW else way for way in RUNS])
def test_a_compiled_run_trains_alike(way, run, tmp_path, seen, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "False")  # as accelerate launch sets it
    verb = "sft" if way.startswith("sft") else "train"
    code, out, err = run(verb, "eager", *RUNS[way])
    assert code == 0, out + err
    # A compiler takes its time, and what it is given is the same.
    backend = "inductor" if "compiler" in way else "eager" if way == "sft" else "aot_eager"
    code, out, err = run(verb, "compiled", "--torch_compile", "--torch_compile_backend", backend, *RUNS[way])
    assert code == 0, out + err
    assert "compiling the layers" in out
    for one, other in zip(read_metrics(tmp_path / "eager"), read_metrics(tmp_path / "compiled"), strict=True):
        assert all(other[name] == pytest.approx(value, abs=2e-5) for name, value in one.items() if "loss" in name)
    engines = [read_record(tmp_path / name)["engine"] for name in ("eager", "compiled")]
    assert [engine.pop("compiled_layers") for engine in engines] == [0, 2]
    assert [engine.pop("compiled_in_pieces") for engine in engines] == [False, bool(seen["graph_break"])]
    assert engines[0] == engines[1], "nothing else of the engine is given up"
    assert 0 < seen["stats"]["unique_graphs"] <= (60 if way == "dora" else 16)
    assert not seen["graph_break"] or way == "dora"
    assert ("layers compiled" in out) is (verb == "train")


@pytest.mark.slow
def test_policy_and_reference_round_alike(run, tmp_path):
    """In 16 bits, by the compiler: before anything is learnt they are the same model, to the last bit."""
    code, out, err = run("train", "run", "--use_lora", "--torch_compile", "--dtype", "bfloat16")
    assert code == 0, out + err
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_layers_that_compute_something_else_end_the_run(run, monkeypatch):
    monkeypatch.setattr(
        "utils.engine.compiled.torch.compile", lambda forward, **_: lambda *a, **o: forward(*a, **o) * 2
    )
    code, out, err = run("train", "run", "--use_lora", "--torch_compile")
    assert code == 2, out + err
    assert "--torch_compile" in err
    assert "from those of the model's own code" in err
    assert "Traceback" not in out + err


def test_layers_that_cannot_be_compiled_end_the_run(run, monkeypatch):
    def refuse(graph, inputs):
        raise RuntimeError("no compiler found")

    by_refusing = functools.partial(compile_by, refuse, torch.compile)
    monkeypatch.setattr("utils.engine.compiled.torch.compile", by_refusing)
    code, out, err = run("train", "run", "--use_lora", "--torch_compile")
    assert code == 2, out + err
    assert "no compiler found" in err
    assert "Traceback" not in out + err


def compile_by(chosen, compiling, forward, **options):
    """torch.compile by another backend."""
    return compiling(forward, **{**options, "backend": chosen})


def test_deepspeed_is_refused(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    code, out, err = run("train", "run", "--use_lora", "--torch_compile")
    assert code == 2, out + err
    assert "--torch_compile: DeepSpeed" in err


@pytest.mark.parametrize(("flag", "value"), [("backend", "nobody"), ("backend", "ipex"), ("mode", "nothing")])
def test_a_backend_or_mode_that_is_not_there_is_named(flag, value, run):
    code, out, err = run("train", "run", "--use_lora", f"--torch_compile_{flag}", value)
    assert code == 2, out + err
    assert "--torch_compile" in err
    assert value in err.lower()
    assert "Traceback" not in out + err
