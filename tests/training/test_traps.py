"""Where preference training goes quietly wrong: each trap with this project (must hold) and with stock TRL (must fail).

The side of stock TRL is an expected failure, and a strict one: where TRL fixes a fault, its test says so by passing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from shared.pairs import make_pairs, write_lines
from shared.runs import read_metrics, read_record
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer
from trl import DPOConfig, DPOTrainer

STOCK = pytest.param("stock", marks=pytest.mark.xfail(strict=True, raises=(AssertionError, KeyError, ValueError)))
both = pytest.mark.parametrize("who", ["ours", STOCK])
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = CHATML.replace("<|assistant|>{% endif %}", "<|assistant|><think></think>{% endif %}")


@pytest.fixture
def ours(run_script, tiny_model, tmp_path):
    """Trains with the script and returns the run folder."""

    def run(rows: list[dict], *flags, folder="run", model=tiny_model, verb="train", **options) -> Path:
        data = write_lines(tmp_path / f"{folder}.jsonl", rows)
        named = [part for name, value in options.items() for part in (f"--{name}", value)]
        code, out, err = run_script(
            verb,
            "--model_name_or_path",
            model,
            "--dataset_name",
            data,
            "--output_dir",
            tmp_path / folder,
            *named,
            *flags,
        )
        assert code == 0, out + err
        return tmp_path / folder

    return run


@pytest.fixture
def stock(tiny_model, tmp_path):
    """A trainer of stock TRL on the same model; `model` and `ref_model` are folders or models."""

    def make(rows: list[dict], model=tiny_model, ref_model=None, tokenizer=None, peft_config=None, **options):
        path = options.pop("output_dir", tmp_path / "stock")
        args = DPOConfig(output_dir=str(path), use_cpu=True, bf16=False, report_to="none", **options)
        load = AutoModelForCausalLM.from_pretrained
        data = tmp_path / "stock.jsonl"
        if not data.exists():
            write_lines(data, rows)
        rows = datasets.load_dataset("json", data_files=str(data), split="train")
        return DPOTrainer(
            model=load(model) if isinstance(model, Path) else model,
            ref_model=load(ref_model) if isinstance(ref_model, Path) else ref_model,
            args=args,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer or AutoTokenizer.from_pretrained(tiny_model),
            peft_config=peft_config,
        )

    return make


@pytest.fixture
def tokenizer_with(tiny_model, tmp_path):
    """The tiny model in a folder whose tokenizer has the given chat template."""

    def make(template: str) -> Path:
        folder = tmp_path / "templated"
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = template
        AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def still(**more) -> dict:
    """Options under which training changes nothing, so that what is measured is the start."""
    return {"learning_rate": 1e-12, "max_steps": 1, "per_device_train_batch_size": 4} | more


def pair_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "held_out_pairs.jsonl").read_text().splitlines()]


def tokenized(who, ours, stock, rows, model, monkeypatch, **options) -> list[tuple[list[int], list[int]]]:
    """Prompt and chosen ids of every row as the side would train on them."""
    if who == "stock":
        prepared = stock(rows, model=model, tokenizer=AutoTokenizer.from_pretrained(model), **options).train_dataset
    else:
        found = {}
        monkeypatch.setattr("utils.training.stages.describe_data", lambda run: found.update(rows=run.rows.train))
        ours(rows, "--dry_run", model=model, validation_split="none", **still(), **options)
        prepared = found["rows"]
    return [(row["prompt_ids"], row["chosen_ids"]) for row in prepared]


@both
def test_label_smoothing_smooths_the_sigmoid_loss(who, ours, stock, other_model):
    """1. (1 - e) * -log s(m) + e * -log s(-m), at margins that are not zero."""
    pairs, losses = make_pairs(12), {}
    for smoothing in (0.0, 0.3):
        if who == "stock":
            trainer = stock(pairs, ref_model=other_model, label_smoothing=smoothing, beta=5.0)
            losses[smoothing] = trainer.evaluate()["eval_loss"]
        else:
            folder = ours(pairs, *(["--label_smoothing", smoothing] if smoothing else []), folder=f"run{smoothing}",
                          ref_model_name_or_path=other_model, beta=5.0, **still())  # fmt: skip
            losses[smoothing] = read_record(folder)["metrics"]["held_out"]["loss"]
            margins = [row["margin"] for row in pair_rows(folder)]
            typed_out = [
                (1 - smoothing) * math.log1p(math.exp(-m)) + smoothing * math.log1p(math.exp(m)) for m in margins
            ]
            assert losses[smoothing] == pytest.approx(sum(typed_out) / len(typed_out), rel=1e-4)
    assert abs(losses[0.0] - losses[0.3]) > 1e-3


@both
def test_small_steps_move_adapter_weights_on_4_bits(who, ours, stock, tiny_model):
    """2. In bfloat16 a small step is lost in rounding."""
    options = {"learning_rate": 5e-6, "lr_scheduler_type": "constant", "max_steps": 4, "save_steps": 1}
    options |= {"per_device_train_batch_size": 4, "save_strategy": "steps"}
    if who == "stock":
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=bits)
        trainer = stock(make_pairs(20), model=model, peft_config=LoraConfig(target_modules="all-linear"), **options)
        folder = Path(trainer.args.output_dir)
        trainer.train()
    else:
        folder = ours(make_pairs(20), "--use_lora", "--use_4bit", **options)
    first, last = (load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 4))
    moved = [(first[name] != last[name]).float().mean().item() for name in first]
    assert min(moved) > 0.99


@both
def test_a_cached_reference_is_not_stale(who, ours, stock):
    """3. ld_alpha changes the reference's sums of pairs of unequal length."""
    pairs, sums = make_pairs(12), []
    for number, alpha in enumerate((1.0, 0.2)):
        if who == "stock":
            rows = stock(pairs, precompute_ref_log_probs=True, ld_alpha=alpha, max_length=None).train_dataset
            sums.append([sum(rows["ref_chosen_logps"]), sum(rows["ref_rejected_logps"])])
        else:
            folder = ours(pairs, folder=f"run{number}", precompute_ref_log_probs=True, ld_alpha=alpha,
                          validation_split=0.5, **still())  # fmt: skip
            rows = pair_rows(folder)
            sums.append([sum(row[f"ref_{side}_logps"] for row in rows) for side in ("chosen", "rejected")])
    assert sums[0] != pytest.approx(sums[1], rel=1e-3)


@both
def test_no_pair_vanishes_because_its_prompt_is_long(who, ours, stock, tiny_model, monkeypatch):
    """4. The prompt is shortened, the completion stays, and the count is told."""
    rows = make_pairs(10)
    rows[3]["prompt"] *= 10
    found = tokenized(who, ours, stock, rows, tiny_model, monkeypatch, max_length=48)
    assert len(found) == 10


@both
def test_truncation_does_not_teach_a_completion_without_its_end(who, ours, stock, tiny_model, monkeypatch):
    """4. A completion that fits in half of max_length keeps its end-of-text token, whatever the prompt's length."""
    rows, tokenizer = make_pairs(10), AutoTokenizer.from_pretrained(tiny_model)
    longest = max(len(tokenizer(row["prompt"] + row["chosen"])["input_ids"]) for row in rows)
    found = tokenized(who, ours, stock, rows, tiny_model, monkeypatch, max_length=longest)  # without its end
    if who == "stock":  # it cuts in its collator
        found = [(prompt, (prompt + chosen)[:longest][len(prompt) :]) for prompt, chosen in found]
    end = tokenizer.eos_token_id
    assert all(chosen[-1] == end for _, chosen in found)


@both
def test_metrics_do_not_depend_on_the_batch(who, ours, stock, other_model):
    """5. A mean of batch means is none of pairs."""
    pairs, margins = make_pairs(7), []
    for size in (1, 2, 7):
        if who == "stock":
            trainer = stock(pairs, ref_model=other_model, per_device_eval_batch_size=size)
            margins.append(trainer.evaluate()["eval_rewards/margins"])
        else:
            flags = {"ref_model_name_or_path": other_model, "per_device_eval_batch_size": size}
            folder = ours(pairs, folder=f"run{size}", validation_split=0.5, **flags, **still())
            margins.append(read_record(folder)["metrics"]["held_out"]["margin"])
    assert margins[1:] == pytest.approx(margins[:1] * 2, abs=1e-4)


@both
def test_a_ragged_accumulation_weighs_every_pair_alike(who, ours, stock, other_model):
    """6. Seven pairs as 2 + 2 + 2 + 1 give the gradient of seven at once."""
    pairs, norms = make_pairs(7), []
    for batch, accumulation in ((7, 1), (2, 4)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        options |= {"learning_rate": 1e-12, "logging_steps": 1}
        if who == "stock":
            trainer = stock(pairs, ref_model=other_model, beta=5.0, **options)
            trainer.train()
            lines = trainer.state.log_history
        else:
            options |= {"ref_model_name_or_path": other_model, "validation_split": "none", "beta": 5.0}
            lines = read_metrics(ours(pairs, folder=f"run{batch}", **options))
        norms.append(next(line["grad_norm"] for line in lines if "grad_norm" in line))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@both
def test_a_prompt_that_carries_bos_text_has_one_bos(who, ours, stock, tiny_model, monkeypatch):
    """7. As prompts that were rendered before are."""
    rows = [{**pair, "prompt": "<s>" + pair["prompt"]} for pair in make_pairs(6)]
    found = tokenized(who, ours, stock, rows, tiny_model, monkeypatch)
    begin = AutoTokenizer.from_pretrained(tiny_model).bos_token_id
    assert all(prompt.count(begin) == 1 for prompt, _ in found)


def conversations(count: int) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": pair["prompt"]}],
            "chosen": [{"role": "assistant", "content": pair["chosen"].strip()}],
            "rejected": [{"role": "assistant", "content": pair["rejected"].strip()}],
        }
        for pair in make_pairs(count)
    ]


@both
def test_a_template_without_end_token_is_taught_to_end(who, ours, stock, tokenizer_with, monkeypatch):
    """8. Else the model never learns to stop."""
    model = tokenizer_with(CHATML)
    found = tokenized(who, ours, stock, conversations(6), model, monkeypatch)
    end = AutoTokenizer.from_pretrained(model).eos_token_id
    assert all(chosen.count(end) == 1 and chosen[-1] == end for _, chosen in found)


@both
def test_what_is_trained_begins_as_what_is_generated_from(who, ours, stock, tokenizer_with, monkeypatch):
    """9. A generation prompt with an empty think block that the whole conversation lacks."""
    model, rows = tokenizer_with(THINKING), conversations(6)
    found = tokenized(who, ours, stock, rows, model, monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row, (prompt, chosen) in zip(rows, found, strict=True):
        asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        assert prompt == asked
        assert tokenizer.decode(prompt).endswith("<think></think>")
        assert tokenizer.decode(chosen, skip_special_tokens=True).strip() == row["chosen"][0]["content"]


@both
def test_an_adapter_trained_after_sft_can_be_used(who, ours, stock, run_script, tiny_model, tmp_path):
    """10. What it stands on must be what it names: loaded as anyone would, it gives the log-probs of its trainer."""
    pairs = make_pairs(20)
    data = write_lines(tmp_path / "sft.jsonl", pairs)
    sft = tmp_path / "sft"
    quick = ("--learning_rate", 5e-2, "--max_steps", 8, "--per_device_train_batch_size", 4)
    assert run_script("sft", "--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir", sft,
                      "--use_lora", *quick)[0] == 0  # fmt: skip
    if who == "stock":
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), sft).merge_and_unload()
        trainer = stock(pairs, model=merged, peft_config=LoraConfig(target_modules="all-linear"), **still())
        trainer.train()
        folder = tmp_path / "saved"
        trainer.save_model(str(folder))
        expected = trainer.model
    else:
        folder = ours(pairs, folder="dpo", model=sft, **still(learning_rate=1e-3))
        rows = {row["row"]: row["chosen_logps"] for row in pair_rows(folder)}
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for number, pair in enumerate(pairs):
        start = len(tokenizer(pair["prompt"])["input_ids"])
        ids = torch.tensor([[*tokenizer(pair["prompt"] + pair["chosen"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            found, *others = (
                model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :].sum().item()
                for model in ((loaded, expected.eval()) if who == "stock" else (loaded,))
            )
        if who == "stock":
            assert found == pytest.approx(others[0], abs=1e-3)
        elif number in rows:
            assert found == pytest.approx(rows[number], abs=2e-4)


@both
def test_a_continued_adapter_leaves_no_stray_one_beside_it(who, ours, stock, tiny_model, tmp_path):
    """11. The frozen copy that serves as reference is not part of the result."""
    first = ours(make_pairs(12), "--use_lora", folder="first", **still())
    if who == "stock":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), first, is_trainable=True)
        trainer = stock(make_pairs(12), model=model, **still())
        trainer.train()
        folder = tmp_path / "saved"
        trainer.save_model(str(folder))
    else:
        folder = ours(make_pairs(12), folder="second", model=first, **still())
    assert [path.name for path in folder.rglob("adapter_model.safetensors") if "checkpoint" not in str(path)] == [
        "adapter_model.safetensors"
    ]
    assert not (folder / "ref").exists()


@both
def test_rows_that_teach_nothing_are_not_trained_on(who, ours, stock):
    """12. Identical and empty completions."""
    rows = make_pairs(12)
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[5]["chosen"] = rows[5]["rejected"] = ""
    if who == "stock":
        kept = len(stock(rows, **still()).train_dataset)
    else:
        data = read_record(ours(rows, on_bad_rows="skip", **still()))["data"]
        kept = data["train_pairs"] + data["held_out_pairs"]
        assert sum(data["dropped"].values()) == 2
    assert kept == 10


@both
def test_batches_of_similar_length(who, ours, stock):
    """13. Asked for by name, without preparing anything."""
    wish = {"train_sampling_strategy": "group_by_length"}
    if who == "stock":
        stock(make_pairs(12), **wish, **still()).train()
    else:
        ours(make_pairs(12), **wish, **still())


@both
def test_a_cpu_needs_no_flag_of_its_own(who, ours, tmp_path):
    """14. The defaults work where there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if who == "stock":
        DPOConfig(output_dir=str(tmp_path / "stock"))
    else:
        ours(make_pairs(12), **still())


@both
def test_padding_is_not_computed(who, ours, stock):
    """14. Asked for or not, no position is padding: as many tokens go through the model as the pairs have."""
    pairs = make_pairs(8)
    if who == "stock":
        trainer = stock(pairs, padding_free=True, **still(per_device_train_batch_size=8))
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["attention_mask"].all()
    else:
        folder = ours(pairs, validation_split="none", **still(per_device_train_batch_size=8))
        engine = read_record(folder)["engine"]
        assert engine["shared_prefix"] is True
        assert engine["tokens_computed"] < engine["tokens_padded_equivalent"]


class HeadRows(TorchDispatchMode):
    """Counts the positions for which logits over `vocabulary` tokens are computed."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.count = vocabulary, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        products = (torch.ops.aten.mm, torch.ops.aten.addmm)
        if function.overloadpacket in products and self.vocabulary in result.shape:  # either may come first
            self.count += result.numel() // self.vocabulary
        return result


@both
def test_the_head_sees_completions_alone(who, ours, stock, tiny_model, monkeypatch):
    """15. On a CPU too: neither prompts nor padding are put to the output head, of policy and reference."""
    pairs, tokenizer = make_pairs(6), AutoTokenizer.from_pretrained(tiny_model)
    needed = sum(len(tokenizer(pair[side])["input_ids"]) for pair in pairs for side in ("chosen", "rejected"))
    rows, plain = HeadRows(AutoModelForCausalLM.from_pretrained(tiny_model).config.vocab_size), Trainer.training_step

    def counted(*arguments, **options):
        with rows:
            return plain(*arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", counted)
    if who == "stock":
        options = still(per_device_train_batch_size=6, gradient_checkpointing=False)
        stock(pairs, peft_config=LoraConfig(target_modules="all-linear"), **options).train()
    else:
        ours(pairs, "--use_lora", validation_split="none", **still(per_device_train_batch_size=6))
    assert rows.count >= 2 * needed
    assert rows.count == 2 * needed


# What stock TRL does right has to stay right.


@pytest.mark.parametrize("loss", [["sigmoid"], ["ipo"], ["apo_zero", "hinge"]], ids=" and ".join)
def test_a_run_is_that_of_stock_trl_where_that_is_right(ours, stock, other_model, loss):
    """Whole batches, the same pairs in the same order: the losses and gradients of every step, to rounding."""
    pairs = make_pairs(24)
    options = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "max_steps": 6, "logging_steps": 1}
    options |= {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer = stock(pairs, ref_model=other_model, loss_type=loss, max_length=128, **options)
    trainer.train()
    expected = [line for line in trainer.state.log_history if "grad_norm" in line]
    folder = ours(pairs, "--loss_type", *loss, ref_model_name_or_path=other_model, validation_split="none", **options)
    lines = [line for line in read_metrics(folder) if "grad_norm" in line]
    assert len(lines) == len(expected) == 6
    for line, theirs in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(theirs["loss"], abs=2e-4)
        assert line["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert line["margin"] == pytest.approx(theirs["rewards/margins"], abs=2e-4)


def test_log_probs_are_summed_in_float32_in_16_bits_too(ours, tmp_path):
    """Between 256 and 512 bfloat16 knows only every second whole number."""
    pairs = [{**pair, "chosen": pair["chosen"] * 9, "rejected": pair["rejected"] * 9} for pair in make_pairs(20)]
    rows = pair_rows(ours(pairs, dtype="bfloat16", validation_split=0.5, max_length=128, **still()))
    sums = [row[name] for row in rows for name in ("chosen_logps", "ref_rejected_logps") if row[name] < -256]
    assert len(sums) > 4
    assert any(value % 2 for value in sums)
    assert any(value % 1 for value in sums)


def test_dropout_is_off_at_the_start_unless_it_is_asked_for(ours):
    """Step 0 is ln 2 exactly with a dropout on the adapter too: policy and reference are the same there."""
    folder = ours(make_pairs(12), "--use_lora", lora_dropout=0.5, logging_steps=1, **still())
    assert read_record(folder)["metrics"]["held_out_before"]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert next(line["loss"] for line in read_metrics(folder) if "loss" in line) == pytest.approx(math.log(2), abs=1e-6)


def test_the_end_is_taught_once_where_it_is_also_the_padding(ours, tiny_model, tmp_path, monkeypatch):
    folder = tmp_path / "padless"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = tokenized("ours", ours, None, make_pairs(6), folder, monkeypatch)
    assert all(
        chosen.count(tokenizer.eos_token_id) == 1 and chosen[-1] == tokenizer.eos_token_id for _, chosen in found
    )
    rows = pair_rows(ours(make_pairs(12), model=folder, engine="padded", validation_split=0.5, **still()))
    lengths = [len(tokenizer(make_pairs(12)[row["row"]]["chosen"])["input_ids"]) for row in rows]
    assert [row["chosen_tokens"] for row in rows] == lengths  # minus BOS, plus the end


@pytest.mark.parametrize(
    "flags",
    [["--use_lora"], ["--use_lora", "--use_4bit"], ["--precompute_ref_log_probs", "false"], ["--use_4bit"]],
    ids=["lora", "lora on 4 bits", "full", "full, reference in 4 bits"],
)
def test_the_reference_is_the_same_before_and_after(ours, flags, tiny_model):
    """Its log-probs, pair by pair, are those of a run that changed nothing; its files are the same bytes."""
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    quick = {"validation_split": 0.5, "per_device_train_batch_size": 4, "max_steps": 6}
    untouched = pair_rows(ours(make_pairs(20), *flags, folder="untouched", learning_rate=1e-12, **quick))
    trained = pair_rows(ours(make_pairs(20), *flags, folder="trained", learning_rate=1e-2, **quick))
    for before, after in zip(untouched, trained, strict=True):
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            assert after[name] == before[name]
    moved = [
        abs(after["chosen_logps"] - before["chosen_logps"]) for before, after in zip(untouched, trained, strict=True)
    ]
    assert max(moved) > 1e-2
    assert files == {path.name: path.read_bytes() for path in tiny_model.iterdir()}


def test_merging_leaves_the_reference_and_gives_the_log_probs_of_the_run(ours, tiny_model):
    """By plain PEFT: adapter switched off, on, merged, and switched out again, all from one folder on the disk."""
    quick = {"validation_split": 0.5, "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2}
    folder = ours(make_pairs(20), "--use_lora", **quick)
    tokenizer, pairs = AutoTokenizer.from_pretrained(tiny_model), make_pairs(20)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder).eval()

    def log_prob(prompt: str, completion: str) -> float:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([[*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            return model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :].sum().item()

    def assert_all_are(name: str) -> None:
        for row in pair_rows(folder):
            pair = pairs[row["row"]]
            assert log_prob(pair["prompt"], pair["chosen"]) == pytest.approx(row[name], abs=2e-4)

    with model.disable_adapter():
        assert_all_are("ref_chosen_logps")
    assert_all_are("chosen_logps")
    model.merge_adapter()
    assert_all_are("chosen_logps")
    model.unmerge_adapter()
    with model.disable_adapter():
        assert_all_are("ref_chosen_logps")
    model = model.merge_and_unload()
    assert_all_are("chosen_logps")


@pytest.mark.parametrize("flags", [["--use_lora"], []], ids=["adapter", "full"])
def test_starting_from_a_checkpoint_is_not_resuming_and_is_said(ours, run_script, flags, tmp_path):
    """11. The reference would silently be the half-trained policy."""
    first = ours(make_pairs(20), *flags, folder="first", max_steps=4, save_steps=2, per_device_train_batch_size=4)
    command = ("--model_name_or_path", first / "checkpoint-2", "--dataset_name", tmp_path / "first.jsonl",
               "--output_dir", tmp_path / "second", "--max_steps", 1)  # fmt: skip
    code, out, err = run_script(*command)
    assert code == 0, err
    said = f"warning: {first / 'checkpoint-2'} is step 2 of a preference run, and this is a new run"
    assert said in out
    assert f"--output_dir {first} --resume_from_checkpoint auto" in out
    assert any(warning in said for warning in [w[:60] for w in read_record(tmp_path / "second")["warnings"]])
    # The end of a run is what the next one starts from, and a checkpoint of sft is a start like any other.
    for start in (first, ours(make_pairs(20), folder="sft", max_steps=2, save_steps=2, verb="sft") / "checkpoint-2"):
        code, out, err = run_script("--model_name_or_path", start, *command[2:], "--overwrite_output_dir")
        assert code == 0, err
        assert "preference run" not in out
