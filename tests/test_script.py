"""The script as a person meets it: exit codes, messages, stopping and going on."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from shared.forked import Forked
from shared.models import save_tiny_tokenizer
from shared.pairs import make_pairs, write_lines
from shared.runs import ROOT, read_metrics, read_record, start_script

QUICK = ["--per_device_train_batch_size", 4, "--logging_steps", 1, "--learning_rate", 5e-3]


@pytest.fixture
def refused(run_script, tmp_path):
    """Runs the script, which must refuse: one line per fault, exit code 2, nothing written. Returns the lines."""

    def run(*arguments) -> list[str]:
        output = tmp_path / "output"
        code, out, err = run_script(*arguments, "--output_dir", output)
        assert code == 2, out + err
        assert "Traceback" not in err
        assert not output.exists(), "a refused run leaves no folder"
        lines = err.strip().splitlines()
        assert all(line.startswith("error: ") for line in lines), err
        return [line.removeprefix("error: ") for line in lines]

    return run


def test_help_and_a_typo_answer_in_a_process_of_their_own():
    shown = subprocess.run(
        [sys.executable, "advanced_dpo_script.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0
    assert "--use_lora" in shown.stdout
    typo = subprocess.run(
        [sys.executable, "advanced_dpo_script.py", "--use_lorra"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert typo.returncode == 2
    assert "--use_lora" in typo.stderr
    assert "Traceback" not in typo.stderr


def test_it_finds_its_own_files_where_python_does_not_look_beside_a_script(tmp_path):
    """As PYTHONSAFEPATH asks for too."""
    (tmp_path / "utils.py").write_text("raise SystemExit('of another')")
    command = [sys.executable, "-I", ROOT / "advanced_dpo_script.py", "status", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_a_python_without_the_packages_is_told_what_to_run():
    """`-S -E` leaves the site packages out, as the system's Python does after `make demo`."""
    words = ["--model_name_or_path", "gpt2", "--dataset_name", "org/pairs", "--output_dir", "never"]
    command = [sys.executable, "-S", "-E", "advanced_dpo_script.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: the package \w+ is not installed for \S*python", line)
    assert "pip install -r requirements.txt" in line or ".venv" in line


def test_faults_of_model_data_and_folder_are_reported_together(refused, tmp_path):
    lines = refused("--model_name_or_path", "./missing-model", "--ref_model_name_or_path", "./missing-reference",
                    "--dataset_name", "./missing.jsonl")  # fmt: skip
    assert len(lines) == 3
    assert lines[0].startswith("--model_name_or_path")
    assert any(line.startswith("--ref_model_name_or_path") for line in lines)
    assert any("missing.jsonl" in line for line in lines)


def test_bad_rows_are_named_by_line_and_can_be_skipped(refused, run_script, tiny_model, tmp_path):
    pairs = make_pairs(30)
    pairs[2]["chosen"] = pairs[2]["rejected"]
    pairs[4]["rejected"] = "  "
    pairs[5]["prompt"] = None
    pairs[7]["chosen"] = 12
    data = write_lines(tmp_path / "pairs.jsonl", pairs)
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", data)
    lines = refused(*flags)
    assert len(lines) == 4
    for number in (3, 5, 6, 8):
        assert sum(f"pairs.jsonl line {number})" in line for line in lines) == 1
    assert all("--on_bad_rows skip" in line for line in lines)
    code, _, err = run_script(*flags, *QUICK, "--max_steps", 1, "--on_bad_rows", "skip", "--output_dir", tmp_path / "o")
    assert code == 0, err
    data = read_record(tmp_path / "o")["data"]
    assert data["train_pairs"] + data["held_out_pairs"] == 26
    assert sum(data["dropped"].values()) == 4
    assert len(data["dropped"]) == 4


def test_rows_that_must_not_be_cut_are_named_by_line(refused, tiny_model, tmp_path):
    pairs = make_pairs(6)
    pairs[1]["prompt"] = pairs[4]["prompt"] = "word " * 80
    data = write_lines(tmp_path / "pairs.jsonl", pairs)
    (fault,) = refused("--model_name_or_path", tiny_model, "--dataset_name", data, "--max_length", 64,
                       "--truncation", "error", "--validation_split", "none")  # fmt: skip
    assert "--max_length 64 is too short for 2 of 6 rows (pairs.jsonl line 2, 5)" in fault


def test_a_template_that_leaves_out_the_tools_is_refused(refused, tiny_model, tmp_path):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    rows = [
        {"prompt": [{"role": "user", "content": pair["prompt"]}], "tools": tools}
        | {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
        for pair in make_pairs(6)
    ]
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    (fault,) = refused("--model_name_or_path", tiny_model, "--dataset_name", data, "--max_length", 120)
    assert "the chat template (the tokenizer has none) leaves out the tools" in fault
    template = "{{ tools }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (fault,) = refused("--model_name_or_path", tiny_model, "--dataset_name", data, "--max_length", 1000,
                       "--chat_template", template)  # fmt: skip
    assert "--max_length is 1000" in fault


def test_a_template_for_plain_texts_is_refused(refused, tiny_model, pairs_file):
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file)
    (fault,) = refused(*flags, "--chat_template", "{{ messages }}")
    assert "--chat_template: these rows are plain texts" in fault


def test_nothing_left_to_train_on_is_refused(refused, tiny_model, tmp_path):
    pairs = [pair | {"chosen": pair["rejected"]} for pair in make_pairs(5)]
    data = write_lines(tmp_path / "pairs.jsonl", pairs)
    assert refused("--model_name_or_path", tiny_model, "--dataset_name", data, "--on_bad_rows", "skip")


def test_settings_that_do_not_fit_the_model(refused, tiny_model, other_model, pairs_file, tmp_path):
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file)
    (line,) = refused(*flags, "--max_length", 4096)
    assert "128" in line
    (line,) = refused(*flags, "--use_lora", "--lora_target_modules", "q_proj,c_attn")
    assert "c_attn" in line
    assert "q_proj" in line.split("has")[-1]
    line, of_held_out = refused(*flags, "--max_length", 8, "--truncation", "error")
    assert "for 55 of 55 rows" in line
    assert "for 5 of 5 rows" in of_held_out
    (line,) = refused(*flags, "--chat_template", "{{ messages | no_such_filter }}")
    assert "--chat_template" in line
    foreign = tmp_path / "foreign"
    shutil.copytree(other_model, foreign)
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    (line,) = refused(*flags, "--ref_model_name_or_path", foreign)
    assert "tokenizer" in line


def test_flags_that_contradict_the_adapter_being_continued(refused, run_script, tiny_model, pairs_file, tmp_path):
    data = ("--dataset_name", pairs_file)
    adapter = tmp_path / "adapter"
    code, _, err = run_script("--model_name_or_path", tiny_model, *data, "--output_dir", adapter, "--use_lora",
                              "--lora_r", 4, *QUICK, "--max_steps", 1)  # fmt: skip
    assert code == 0, err
    other = ("--lora_r", 8, "--lora_alpha", 4, "--use_rslora", "--use_dora", "--lora_target_modules", "q_proj")
    lines = refused("--model_name_or_path", adapter, *data, "--use_lora", *other)
    assert [line.split()[0].strip("-:") for line in lines] == [name.strip("-") for name in other if "--" in str(name)]
    assert "r 4" in " ".join(lines) or "has 4" in " ".join(lines)
    shutil.move(tiny_model / "config.json", tmp_path / "aside.json")
    try:
        (line,) = refused("--model_name_or_path", adapter, *data)
    finally:
        shutil.move(tmp_path / "aside.json", tiny_model / "config.json")
    assert str(tiny_model) in line


def test_a_model_folder_without_weights_or_tokenizer(refused, tiny_model, pairs_file, tmp_path):
    for missing, word in (("model.safetensors", "weights"), ("tokenizer", "tokenizer")):
        folder = tmp_path / missing
        shutil.copytree(tiny_model, folder)
        for path in folder.iterdir():
            if path.name.startswith(missing):
                path.unlink()
        (line,) = refused("--model_name_or_path", folder, "--dataset_name", pairs_file)
        assert word in line


def test_a_tokenizer_without_end_token_is_refused(refused, tiny_model, pairs_file, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (line,) = refused("--model_name_or_path", folder, "--dataset_name", pairs_file)
    assert "eos_token" in line


def test_damaged_weights_are_one_line(refused, tiny_model, pairs_file, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    (line,) = refused("--model_name_or_path", folder, "--dataset_name", pairs_file)
    assert "--model_name_or_path" in line


def test_a_hub_name_without_network_is_one_line(refused, pairs_file):
    (line,) = refused("--model_name_or_path", "nobody/no-such-model", "--dataset_name", pairs_file)
    assert "nobody/no-such-model" in line


def test_a_hub_adapter_at_a_revision_is_continued(run_script, tiny_model, pairs_file, tmp_path):
    """From the hub's local cache, laid out as its client does."""
    flags = ["--dataset_name", pairs_file, "--max_steps", 1]
    adapter = tmp_path / "adapter"
    assert run_script("sft", "--model_name_or_path", tiny_model, *flags, "--use_lora", "--output_dir", adapter)[0] == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/base"}))
    for name, ref, folder in (("base", "main", tiny_model), ("adapter", "v2", adapter)):
        repository = tmp_path / "cache" / f"models--someone--{name}"
        shutil.copytree(folder, repository / "snapshots" / ("c0ffee" * 6 + "c0ff"))
        (repository / "refs").mkdir()
        (repository / "refs" / ref).write_text("c0ffee" * 6 + "c0ff")
        absent = repository / ".no_exist" / ("c0ffee" * 6 + "c0ff")  # what the hub said it has not
        absent.mkdir(parents=True)
        for file in ("config.json", "adapter_config.json", "chat_template.jinja", "special_tokens_map.json"):
            if not (folder / file).exists():
                (absent / file).touch()
    process = start_script(
        "sft", "--model_name_or_path", "someone/adapter", "--model_revision", "v2", "--use_4bit", *flags,
        "--output_dir", tmp_path / "run", HF_HUB_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "someone/base"


def test_4_bit_without_its_library_says_what_to_install(refused, tiny_model, pairs_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (line,) = refused("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--use_lora", "--use_4bit")
    assert "--use_4bit" in line
    assert "pip install bitsandbytes" in line


def test_a_folder_with_another_run_is_kept(run_script, tiny_model, pairs_file, tmp_path):
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / "o", *QUICK)
    code, _, err = run_script(*flags, "--max_steps", 2)
    assert code == 0, err
    record = (tmp_path / "o" / "run.json").read_text()
    resumed = ("--resume_from_checkpoint", "auto", "--beta", 0.5)
    for more, named in (((), str(tmp_path / "o")), (resumed, "checkpoint-2 is of a run that differs")):
        code, _, err = run_script(*flags, "--max_steps", 2, *more)
        assert code == 2
        assert named in err
        assert (tmp_path / "o" / "run.json").read_text() == record
    assert "--beta" in err
    (tmp_path / "o" / "notes.txt").write_text("mine")
    code, _, err = run_script(*flags, "--max_steps", 3, "--overwrite_output_dir")
    assert code == 0, err
    assert read_record(tmp_path / "o")["steps"] == 3
    assert not (tmp_path / "o" / "checkpoint-2").exists()
    assert (tmp_path / "o" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "kind",
    [[], ["--use_lora", "--lora_dropout", 0.2], ["--use_lora", "--use_4bit"]],
    ids=["full", "lora", "lora on 4 bits"],
)
def test_resume_equals_the_uninterrupted_run(run_script, tiny_model, pairs_file, tmp_path, kind):
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, *kind, "--max_steps", 20,
             "--per_device_train_batch_size", 4, "--learning_rate", 5e-3, "--save_steps", 8, "--eval_steps", 5,
             "--logging_steps", 3]  # fmt: skip
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run_script(*flags, "--output_dir", whole)[0] == 0
    shutil.copytree(whole, part)
    # As a run that was killed after its first checkpoint left it, with a line of metrics it was just writing.
    for name in ("checkpoint-16", "checkpoint-20"):
        shutil.rmtree(part / name)
    (part / "checkpoint-16").mkdir()
    (part / "checkpoint-16" / "model.safetensors").write_bytes(b"half")
    for path in [*part.glob("*.safetensors"), part / "held_out_pairs.jsonl"]:
        path.unlink()
    record = read_record(part)
    (part / "run.json").write_text(json.dumps(record | {"status": "running"}))
    with open(part / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "lo')
    code, out, err = run_script(*flags, "--output_dir", part, "--resume_from_checkpoint", "auto")
    assert code == 0, err
    assert "checkpoint-8" in out
    name = "adapter_model.safetensors" if kind else "model.safetensors"
    a, b = load_file(whole / name), load_file(part / name)
    assert all(torch.equal(a[key], b[key]) for key in a), "bit for bit"
    assert read_metrics(whole) == read_metrics(part)
    whole_metrics, part_metrics = read_record(whole)["metrics"], read_record(part)["metrics"]
    assert whole_metrics == part_metrics
    assert (whole / "held_out_pairs.jsonl").read_text() == (part / "held_out_pairs.jsonl").read_text()


def test_resuming_after_the_last_step_trains_no_further(run_script, tiny_model, pairs_file, tmp_path):
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / "o", *QUICK,
             "--max_steps", 4, "--save_steps", 2)  # fmt: skip
    assert run_script(*flags)[0] == 0
    weights, metrics = load_file(tmp_path / "o" / "model.safetensors"), read_record(tmp_path / "o")["metrics"]
    (tmp_path / "o" / "model.safetensors").unlink()
    code, _, err = run_script(*flags, "--resume_from_checkpoint", "auto")
    assert code == 0, err
    again = load_file(tmp_path / "o" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert read_record(tmp_path / "o")["metrics"] == metrics


def test_ctrl_c_saves_and_says_how_to_go_on(tiny_model, pairs_file, tmp_path, run_script):
    output = tmp_path / "run"
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", output, *QUICK,
             "--num_train_epochs", 400]  # fmt: skip
    process = Forked(*flags)
    for line in process.stdout:
        if line.strip().startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate()
    assert process.returncode == 130, out + err
    assert "--resume_from_checkpoint auto" in out
    assert "Traceback" not in err
    record = read_record(output)
    assert record["status"] == "interrupted"
    assert list(output.glob("checkpoint-*"))
    step = record["step"]
    command = [*flags[:-1], 400, "--resume_from_checkpoint", "auto", "--max_steps", step + 2]
    code, _, err = run_script(*command)
    assert code == 2, "the schedule is part of what a run is"
    assert "--max_steps" in err


def test_data_and_model_paths_with_spaces_and_a_trailing_slash(run_script, tiny_model, tmp_path):
    folder = tmp_path / "my data"
    folder.mkdir()
    model = folder / "a model"
    shutil.copytree(tiny_model, model)
    write_lines(folder / "train.jsonl", make_pairs(20))
    code, _, err = run_script("--model_name_or_path", f"{model}/", "--dataset_name", f"{folder}/train.jsonl", *QUICK,
                              "--max_steps", 1, "--use_lora", "--output_dir", f"{tmp_path}/out put/")  # fmt: skip
    assert code == 0, err
    config = json.loads((tmp_path / "out put" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)


def test_a_conversation_with_a_tokenizer_without_template(run_script, tiny_model, tmp_path):
    from transformers import AutoTokenizer

    rows = [
        {
            "chosen": [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["chosen"]}],
            "rejected": [
                {"role": "user", "content": pair["prompt"]},
                {"role": "assistant", "content": pair["rejected"]},
            ],
        }
        for pair in make_pairs(20)
    ]
    data = write_lines(tmp_path / "chat.jsonl", rows)
    code, out, err = run_script("--model_name_or_path", tiny_model, "--dataset_name", data, *QUICK, "--max_steps", 1,
                                "--output_dir", tmp_path / "o")  # fmt: skip
    assert code == 0, err
    assert "the tokenizer has none" in out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "o")
    shown = tokenizer.apply_chat_template(rows[0]["chosen"][:1], tokenize=False, add_generation_prompt=True)
    assert shown == f"<s>User: {rows[0]['chosen'][0]['content']}\n\nAssistant:"
    assert save_tiny_tokenizer(tmp_path / "again") == len(tokenizer), "no token was added"


def test_weights_that_the_files_lack_are_not_made_up(refused, tiny_model, pairs_file, tmp_path):
    from transformers import LlamaModel

    folder = tmp_path / "headless"
    shutil.copytree(tiny_model, folder)
    LlamaModel.from_pretrained(tiny_model).save_pretrained(folder)
    (line,) = refused("--model_name_or_path", folder, "--dataset_name", pairs_file)
    assert "lm_head.weight" in line


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(refused, tiny_model, pairs_file, tmp_path):
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    (line,) = refused("--model_name_or_path", folder, "--dataset_name", pairs_file)
    assert str(len(tokenizer)) in line


def test_a_run_never_writes_over_what_it_reads(run_script, tiny_model, pairs_file, tmp_path):
    flags = ("--dataset_name", pairs_file, *QUICK, "--max_steps", 2, "--save_steps", 1)
    first = tmp_path / "first"
    assert run_script("--model_name_or_path", tiny_model, *flags, "--output_dir", first)[0] == 0
    before = sorted(first.rglob("*"))
    code, _, err = run_script("--model_name_or_path", first / "checkpoint-1", *flags, "--output_dir", first,
                              "--overwrite_output_dir")  # fmt: skip
    assert code == 2
    assert "--model_name_or_path" in err
    assert sorted(first.rglob("*")) == before
    code, _, err = run_script("--model_name_or_path", tiny_model, *flags, "--output_dir", tmp_path / "second",
                              "--resume_from_checkpoint", first / "checkpoint-1")  # fmt: skip
    assert code == 2
    assert "not a checkpoint of the run" in err


def test_training_that_comes_apart_stops_and_says_so(run_script, tiny_model, pairs_file, tmp_path):
    output = tmp_path / "run"
    code, _, err = run_script("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", output,
                              "--learning_rate", 1e30, "--max_steps", 6, "--logging_steps", 1)  # fmt: skip
    assert code == 2
    assert "--learning_rate" in err
    record = read_record(output)
    assert record["status"] == "failed"
    assert record["warnings"]
    assert not (output / "model.safetensors").exists()
    assert all(line for line in read_metrics(output)), "every line is JSON"


def test_a_first_line_that_is_null(refused, tiny_model, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("null\n" + "".join(json.dumps(pair) + "\n" for pair in make_pairs(5)))
    (line,) = refused("--model_name_or_path", tiny_model, "--dataset_name", data)
    assert "line 1" in line


def test_a_precomputed_reference_leaves_memory(run_script, tiny_model, pairs_file, tmp_path, monkeypatch):
    import gc
    import weakref

    from utils.models import reference as own
    from utils.training.trainer import PreferenceTrainer

    references, alive = [], []
    load, train = own.read_frozen, PreferenceTrainer.train

    def load_and_remember(*arguments):
        model = load(*arguments)
        references.append(weakref.ref(model))
        return model

    def look_and_train(self, *arguments, **options):
        gc.collect()
        alive.extend(reference() is not None for reference in references)
        return train(self, *arguments, **options)

    monkeypatch.setattr(own, "read_frozen", load_and_remember)
    monkeypatch.setattr(PreferenceTrainer, "train", look_and_train)
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, *QUICK, "--max_steps", 1)
    code, _, err = run_script(*flags, "--precompute_ref_log_probs", "--output_dir", tmp_path / "run")
    assert code == 0, err
    assert alive == [False]
