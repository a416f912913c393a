"""Files from strangers: nothing in them runs, is unpickled, reaches out of its folder, or steers the terminal."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import stat
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import datasets
import pytest
import torch
from safetensors.torch import load_file
from shared.forked import Forked
from shared.models import save_tiny_reward_model
from shared.pairs import make_pairs, write_lines

MARKUP = "<img src=x onerror=alert(1)><script>alert(1)</script>"
ESCAPE = "\x1b]0;owned\x07\x1b[2J"


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def owned(tmp_path) -> Path:
    """The file that appears when something was run; it must not be there at the end of a test."""
    path = tmp_path / "owned"
    yield path
    assert not path.exists()


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A model folder of the test's own."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def trained(tiny_model, pairs_file, tmp_path_factory) -> Path:
    """A LoRA run with a checkpoint of each of its two steps."""
    import advanced_dpo_script

    folder = tmp_path_factory.mktemp("runs") / "run"
    # As the tests themselves compute, who resume it.
    argv = [*training(tiny_model, pairs_file, folder), "--max_steps", "2", "--save_steps", "1", "--dtype", "float32"]
    assert advanced_dpo_script.main(argv) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def training(model: Path, data: Path, out: Path) -> list[str]:
    argv = ["train", "--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(out)]
    return [*argv, "--use_lora", "--lora_r", "2", "--per_device_train_batch_size", "2", "--max_length", "64"]


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def bomb(path: Path, owned: Path) -> Path:
    path.write_bytes(pickle.dumps(Bomb(owned)))
    return path


def refused(run_script, *argv) -> str:
    """The message of a call that must end with 2 and leave no traceback."""
    code, _, errors = run_script(*argv)
    assert code == 2, errors
    assert "Traceback" not in errors
    return errors


def commands(model: Path, other: Path, pairs: Path, out: Path) -> dict[str, list[str]]:
    """Verb (or flag) -> a command in which `model` is read; `other` is a good model."""
    few = ["--max_new_tokens", "2"]
    return {
        "train": training(model, pairs, out),
        "reference": [*training(other, pairs, out), "--ref_model_name_or_path", str(model)],
        "sft": ["sft", *training(model, pairs, out)[1:]],
        "evaluate": [
            "evaluate",
            "--model_name_or_path",
            str(model),
            "--dataset_name",
            str(pairs),
            "--output_dir",
            out,
            "--ref_model_name_or_path",
            str(other),
        ],
        "compare": [
            "compare",
            "--model_name_or_path",
            str(other),
            "--baseline",
            str(model),
            "--prompts",
            str(pairs),
            "--output_dir",
            str(out),
            *few,
        ],
        "chat": ["chat", "--model_name_or_path", str(model), "--prompt", "x", *few],
        "chat beside": [
            "chat",
            "--model_name_or_path",
            str(other),
            "--compare_with",
            str(model),
            "--prompt",
            "x",
            *few,
        ],
        "generate": [
            "data",
            "--generate",
            "--dataset_name",
            str(pairs),
            "--model_name_or_path",
            str(model),
            "--scorer",
            "scorer.py:f",
            "--output_file",
            str(out / "made.jsonl"),
            *few,
        ],
    }


READERS = ("train", "reference", "sft", "evaluate", "compare", "chat", "chat beside", "generate")


@pytest.mark.parametrize("reader", READERS)
def test_pickled_weights_are_refused_by_every_reader_of_a_model(
    reader, run_script, model, other_model, pairs_file, tmp_path, owned
):
    (model / "model.safetensors").unlink()
    bomb(model / "pytorch_model.bin", owned)
    (tmp_path / "scorer.py").write_text("def f(prompts, responses): return [0.0] * len(responses)\n")
    argv = [
        word.replace("scorer.py", str(tmp_path / "scorer.py")) if isinstance(word, str) else word
        for word in commands(model, other_model, pairs_file, tmp_path / "out")[reader]
    ]
    assert "only pickled weights (.bin), which can run code when they are loaded" in refused(run_script, *argv)


@pytest.mark.parametrize("verb", ["train", "evaluate", "merge", "chat"])
def test_a_pickled_adapter_is_refused(verb, run_script, trained, pairs_file, tmp_path, owned):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(trained / "adapter_config.json", adapter)
    bomb(adapter / "adapter_model.bin", owned)
    argv = commands(adapter, trained, pairs_file, tmp_path / "out").get(verb)
    argv = argv or ["merge", "--model_name_or_path", adapter, "--output_dir", tmp_path / "out"]
    argv = [word for word in argv if word not in ("--use_lora", "--lora_r")]
    argv = [word for place, word in enumerate(argv) if word != "2" or str(argv[place - 1]).startswith("--")]
    assert "only pickled weights (adapter_model.bin), which can run code" in refused(run_script, *argv)


def test_a_pickled_base_of_an_adapter_is_refused(run_script, trained, model, pairs_file, tmp_path, owned):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained / name, adapter)
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(model))
    (model / "model.safetensors").unlink()
    bomb(model / "pytorch_model.bin", owned)
    said = refused(run_script, "chat", "--model_name_or_path", adapter, "--prompt", "x")
    assert f"{model}: only pickled weights" in said


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../elsewhere.safetensors", "/tmp/elsewhere.safetensors"])
def test_an_index_names_only_safetensors_of_its_folder(name, run_script, model, tmp_path, owned):
    keys = list(load_file(model / "model.safetensors"))
    shutil.move(model / "model.safetensors", tmp_path / "elsewhere.safetensors")
    bomb(model / "pytorch_model.bin", owned)
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refused(run_script, "chat", "--model_name_or_path", model, "--prompt", "x")
    assert f"model.safetensors.index.json names {name}" in said


def test_a_reward_model_is_read_from_safetensors_alone(
    run_script, tiny_model, other_model, pairs_file, tmp_path, owned
):
    reward = tmp_path / "reward"
    save_tiny_reward_model(reward)
    weights = load_file(reward / "model.safetensors")
    (reward / "model.safetensors").unlink()
    torch.save(weights, reward / "pytorch_model.bin")  # harmless, and a pickle all the same
    argv = commands(tiny_model, other_model, pairs_file, tmp_path / "out")["compare"]
    said = refused(run_script, *argv, "--num_prompts", "2", "--judge", reward)
    assert "only pickled weights (.bin), which can run code when they are loaded" in said


def test_a_reward_model_is_tried_before_responses_are_written(run_script, tiny_model, pairs_file, tmp_path):
    reward, out = tmp_path / "reward", tmp_path / "out"
    save_tiny_reward_model(reward)
    edit(reward / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    argv = commands(tiny_model, tiny_model, pairs_file, out)["generate"]
    argv = [str(reward) if word == "scorer.py:f" else word for word in argv]
    assert f"--scorer {reward}: cannot score" in refused(run_script, *argv)
    assert not out.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"])
@pytest.mark.parametrize("wish", ["auto", "checkpoint-2"])
def test_a_checkpoint_with_pickles_is_not_resumed(name, wish, run_script, run, tiny_model, pairs_file, owned):
    bomb(run / "checkpoint-2" / name, owned)
    edit(run / "run.json", status="interrupted")
    argv = [*training(tiny_model, pairs_file, run), "--max_steps", "2", "--save_steps", "1"]
    where = wish if wish == "auto" else run / wish
    said = refused(run_script, *argv, "--resume_from_checkpoint", where)
    assert f"holds pickles ({name}), which can run code when they are loaded" in said


@pytest.mark.parametrize("name", ["rows.pkl", "rows.npy", "rows.pt"])
def test_pickled_data_are_refused(name, run_script, tmp_path, owned):
    folder = tmp_path / "data"
    folder.mkdir()
    bomb(folder / name, owned)
    (folder / "data.py").write_text(f"open({str(owned)!r}, 'w')\n")  # as loading scripts once were called
    assert "--dataset_name" in refused(run_script, "data", "--dataset_name", folder)
    assert "not a supported type of file" in refused(run_script, "data", "--dataset_name", folder / name)


def test_weights_of_other_shapes_than_the_config_says_are_called_so(run_script, model):
    edit(model / "config.json", vocab_size=500)
    said = refused(run_script, "chat", "--model_name_or_path", model, "--prompt", "x")
    assert f"--model_name_or_path {model}: lm_head.weight" in said
    assert "[500, 32] by its config.json" in said


EVIL = "open({owned!r}, 'w')\nclass Evil: pass\ndef generate(*_, **__): pass\n"


@pytest.mark.parametrize(
    "where",
    [
        "config.json",
        "custom_generate",
        pytest.param("tokenizer_config.json", marks=pytest.mark.slow),
        pytest.param("generation_config.json", marks=pytest.mark.slow),
    ],
)
def test_code_in_a_model_folder_does_not_run(where, run_script, model, pairs_file, tmp_path, owned):
    (model / "evil.py").write_text(EVIL.format(owned=str(owned)))
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(EVIL.format(owned=str(owned)))
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel")
    if where == "config.json":
        edit(model / where, auto_map=dict.fromkeys(names, "evil.Evil"), model_type="evil", architectures=["Evil"])
    elif where == "tokenizer_config.json":
        edit(model / where, auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil")
    elif where == "generation_config.json":
        edit(model / where, custom_generate="evil", auto_map={"AutoConfig": "evil.Evil"})
    readers = [
        [*training(model, pairs_file, tmp_path / "out"), "--max_steps", "1"],
        ["chat", "--model_name_or_path", str(model), "--prompt", "x", "--max_new_tokens", "2"],
        ["plan", "--model_name_or_path", str(model), "--gpu", "RTX 4090"],
        ["data", "--dataset_name", str(pairs_file), "--model_name_or_path", str(model)],
    ]
    for argv in readers if where != "custom_generate" else readers[1:2]:  # what generates alone could reach that
        code, _, errors = run_script(*argv)
        assert code in (0, 2, 3), errors
        assert "Traceback" not in errors
        if where == "config.json" and argv[0] in ("train", "chat"):
            assert "its own Python code, which is not run" in errors
            assert "--trust_remote_code" in errors
        assert not owned.exists(), argv[0]


def test_trusted_code_is_announced(run_script, tiny_model, pairs_file, tmp_path):
    for argv in (
        [*training(tiny_model, pairs_file, tmp_path / "out"), "--max_steps", "1"],
        ["chat", "--model_name_or_path", str(tiny_model), "--prompt", "x", "--max_new_tokens", "2"],
        ["plan", "--model_name_or_path", str(tiny_model), "--gpu", "RTX 4090"],
        ["data", "--dataset_name", str(pairs_file), "--model_name_or_path", str(tiny_model)],
        [
            "evaluate",
            "--model_name_or_path",
            str(tiny_model),
            "--ref_model_name_or_path",
            str(tiny_model),
            "--dataset_name",
            str(pairs_file),
            "--output_dir",
            str(tmp_path / "e"),
            "--max_samples",
            "2",
        ],
    ):
        code, printed, errors = run_script(*argv, "--trust_remote_code")
        assert code in (0, 3), errors
        assert "warning: --trust_remote_code runs Python code that comes with" in printed + errors, argv[0]
        code, printed, errors = run_script(*argv[:-1], "--nope")  # and not where it is not given
        assert "trust_remote_code" not in printed + errors


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("attn_implementation", "someone/kernel", "a kernel that would be downloaded and run"),
        ("_attn_implementation", {"": "someone/kernel"}, "a kernel that would be downloaded and run"),
    ],
)
def test_a_kernel_that_a_config_names_is_not_fetched(key, value, said, run_script, model):
    edit(model / "config.json", **{key: value})
    assert said in refused(run_script, "chat", "--model_name_or_path", model, "--prompt", "x")
    assert said in refused(run_script, "plan", "--model_name_or_path", model, "--gpu", "RTX 4090")


@pytest.mark.parametrize("count", [10_001, 10**400, 1e300])
def test_layers_that_no_model_has_are_not_built(count, run_script, model):
    edit(model / "config.json", num_hidden_layers=count)
    said = refused(run_script, "plan", "--model_name_or_path", model, "--gpu", "RTX 4090")
    assert "config.json: num_hidden_layers is 1" in said
    assert "more layers than any model has" in said


@pytest.mark.parametrize("share", [2**31, -0.1, float("nan")])
def test_a_share_of_what_is_dropped_is_no_more_than_all(share, run_script, model, pairs_file, tmp_path):
    edit(model / "config.json", attention_dropout=share)
    argv = training(model, pairs_file, tmp_path / "out")
    assert "config.json: attention_dropout is" in refused(run_script, "sft", *argv[1:])


def test_a_kernel_that_a_record_names_is_not_inherited(run_script, run):
    record = json.loads((run / "run.json").read_text())
    edit(run / "run.json", settings=record["settings"] | {"attn_implementation": "someone/kernel"})
    said = refused(run_script, "chat", "--model_name_or_path", run, "--prompt", "x")
    assert "run.json: attn_implementation is 'someone/kernel', a kernel that would be downloaded and run" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "planted"},
        {
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "x",
            "num_virtual_tokens": 2,
            "tokenizer_name_or_path": "planted",
            "tokenizer_kwargs": {"trust_remote_code": True},
        },
        {"peft_type": "XLORA", "adapters": {"0": "../elsewhere"}},
    ],
)
def test_an_adapter_imports_and_loads_nothing_else(changes, run_script, run, tmp_path, owned, monkeypatch):
    (tmp_path / "planted.py").write_text(f"open({str(owned)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(run / "adapter_config.json", **changes)
    for argv in (["chat", "--prompt", "x"], ["merge", "--output_dir", tmp_path / "out"]):
        assert "adapter_config.json" in refused(run_script, argv[0], "--model_name_or_path", run, *argv[1:])
    assert "planted" not in sys.modules


@pytest.mark.parametrize("tokens", [1e308, [2**63], [-1], "text"])
def test_an_adapter_is_activated_by_token_ids_alone(tokens, run_script, run):
    edit(run / "adapter_config.json", alora_invocation_tokens=tokens)
    said = refused(run_script, "chat", "--model_name_or_path", run, "--prompt", "x")
    assert "alora_invocation_tokens in its adapter_config.json" in said


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "x" * 20_000])
def test_a_path_that_cannot_be_is_refused(path, run_script, run, tiny_model, other_model, pairs_file, tmp_path):
    good = commands(tiny_model, other_model, pairs_file, tmp_path / "out")
    refused(run_script, *training(path, pairs_file, tmp_path / "out"))
    refused(run_script, *training(tiny_model, path, tmp_path / "out"))
    refused(run_script, *training(tiny_model, pairs_file, path))
    refused(run_script, *good["train"], "--resume_from_checkpoint", path)
    refused(run_script, *good["train"], "--adapter_name_or_path", path)
    refused(run_script, "train", "--config", path)
    refused(run_script, *good["compare"], "--prompts", path)
    refused(run_script, *good["compare"], "--output_dir", path)
    refused(run_script, *good["evaluate"], "--output_dir", path)
    refused(run_script, "merge", "--model_name_or_path", run, "--output_dir", path)
    refused(run_script, "data", "--dataset_name", pairs_file, "--report_file", path)
    refused(run_script, "status", path)
    refused(run_script, "init", "cpu_trial", "--output_file", path)


def test_chat_templates_are_not_saved_by_names_that_are_paths(run_script, model, pairs_file, tmp_path):
    templates = [{"name": "default", "template": "{{ messages }}"}, {"name": "../../evil", "template": "x"}]
    edit(model / "tokenizer_config.json", chat_template=templates)
    said = refused(run_script, *training(model, pairs_file, tmp_path / "out"))
    assert "'../../evil' is not a valid name for a chat template" in said


def test_a_record_does_not_name_code(run_script, run, tmp_path, owned):
    (tmp_path / "evil.py").write_text(f"open({str(owned)!r}, 'w')\ndef f(*_): return []\n")
    evil = f"{tmp_path / 'evil.py'}:f"
    record = json.loads((run / "run.json").read_text())
    changes = {"dataset_adapter": evil, "trust_remote_code": True, "judge": [evil], "scorer": evil}
    edit(run / "run.json", settings=record["settings"] | changes, arguments=["train", "--dataset_adapter", evil])
    for argv in (
        ["evaluate", "--output_dir", str(tmp_path / "e"), "--bootstrap_samples", "100"],
        ["compare", "--output_dir", str(tmp_path / "c"), "--num_prompts", "1", "--max_new_tokens", "2"],
        ["merge", "--output_dir", str(tmp_path / "m")],
        ["chat", "--prompt", "x", "--max_new_tokens", "2"],
    ):
        code, printed, errors = run_script(argv[0], "--model_name_or_path", str(run), *argv[1:])
        assert code in (0, 2), errors
        assert "Traceback" not in errors
        assert "--trust_remote_code runs" not in printed + errors


def test_a_record_with_odd_values_is_refused_in_words(run_script, run):
    record = json.loads((run / "run.json").read_text())
    edit(run / "run.json", settings=record["settings"] | {"dtype": "evil", "bnb_4bit_quant_type": ["x"]})
    said = refused(run_script, "chat", "--model_name_or_path", run, "--prompt", "x")
    assert "run.json: dtype is 'evil': must be one of auto, float32" in said
    assert "bnb_4bit_quant_type" in said


@pytest.mark.parametrize(
    "name", ["../secret.jsonl", "{outside}/secret.jsonl", "https://localhost:1/x.jsonl", "~/x.jsonl"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_data_folder_reads_nothing_outside_it(name, stream, run_script, tmp_path, tiny_model):
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(tmp_path / "secret.jsonl", make_pairs(10))
    name = name.format(outside=tmp_path)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {name}\n---\n")
    argv = training(tiny_model, folder, tmp_path / "out") if stream else ["data", "--dataset_name", folder]
    said = refused(run_script, *argv, *(["--streaming", "--max_steps", "1"] if stream else []))
    assert "only files within the folder are read" in said


def test_a_saved_data_set_reads_nothing_outside_it_and_no_broken_table(run_script, tmp_path):
    for name in ("one", "other"):
        datasets.Dataset.from_list(make_pairs(10)).save_to_disk(tmp_path / name)
    table = next((tmp_path / "one").glob("*.arrow"))
    former = (tmp_path / "one" / "state.json").read_text()
    edit(tmp_path / "one" / "state.json", _data_files=[{"filename": f"../other/{table.name}"}])
    said = refused(run_script, "data", "--dataset_name", tmp_path / "one")
    assert f"state.json names '../other/{table.name}'; only files within the folder are read" in said
    (tmp_path / "one" / "state.json").write_text(former)
    content = table.read_bytes()
    place = content.index(b"On day 0") - 12  # among the offsets, which the library believes
    table.write_bytes(content[:place] + b"\xff\xff\xff\x7f" + content[place + 4 :])
    assert "is not a complete Arrow table" in refused(run_script, "data", "--dataset_name", tmp_path / "one")


TURNS = [
    [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
    for row in make_pairs(8)
]
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + PLAIN,
        "{{ cycler.__init__.__globals__.os.system('touch ' + '" + "OWNED" + "') }}" + PLAIN,
        "{{ 'x' * 10**10 }}" + PLAIN,
        "{{ ['x'] * 10**10 }}" + PLAIN,
        "{% for i in range(10**12) %}x{% endfor %}" + PLAIN,
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}" + PLAIN,
        "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
        "{% break %}" + PLAIN,
        "{{ 'x' * 2000000 }}" + PLAIN,
        "{% for m in messages %}{% set _ = messages.append(m) %}{% endfor %}" + PLAIN,
    ],
)
def test_a_hostile_chat_template_is_refused(template, run_script, model, owned):
    (model / "chat_template.jinja").write_text(template.replace("OWNED", str(owned)))
    said = refused(run_script, "chat", "--model_name_or_path", model, "--prompt", "x")
    assert "the tokenizer's chat template" in said


@pytest.mark.parametrize("template", ["{{ 10 ** (10 ** 8) }}", "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2])
def test_a_chat_template_without_an_end_is_stopped(template, run_script, model, monkeypatch):
    monkeypatch.setattr("utils.models.templates.MOST_SECONDS", 0.3)
    (model / "chat_template.jinja").write_text(template + PLAIN)
    said = refused(run_script, "chat", "--model_name_or_path", model, "--prompt", "x")
    assert "takes more than 0.3 seconds for one short turn" in said


def test_nothing_that_is_printed_steers_the_terminal(run_script, model, tmp_path):
    rows = make_pairs(6)
    rows[1]["chosen"] = rows[1]["rejected"] = f" {ESCAPE}"
    rows[2] = {"prompt": "p", "chosen": 5, "rejected": ESCAPE}
    folder = tmp_path / f"run{ESCAPE.replace('/', '')}"
    folder.mkdir()
    data = write_lines(folder / f"pairs{ESCAPE}.jsonl", [row | {f"col{ESCAPE}": ESCAPE} for row in rows])
    (model / "chat_template.jinja").write_text("{{ raise_exception('" + ESCAPE + "') }}")
    for argv in (
        ["data", "--dataset_name", data],
        ["data", "--dataset_name", data, "--prompt_column", ESCAPE],
        training(model, data, folder / "out"),
        ["status", folder],
        ["chat", "--model_name_or_path", model, "--prompt", "x"],
        ["train", f"--{ESCAPE}", ESCAPE],
    ):
        code, printed, errors = run_script(*argv)
        assert code in (0, 2, 3), errors
        assert not {"\x1b", "\x07"} & set(printed + errors), argv
    assert "\\x1b" in printed + errors


class Tags(HTMLParser):
    """The tags of a page, the attributes by which a browser runs something, and where its links lead."""

    def __init__(self):
        super().__init__()
        self.tags, self.handlers, self.links = set(), set(), set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.handlers |= {name for name, _ in attrs if name.startswith("on")}
        self.links |= {value for name, value in attrs if name in ("href", "src", "action")}


def leads_to_a_file(page: Path, link: str) -> bool:
    """Whether a link leads to a part of the page, or to a file beside it."""
    return link.startswith("#") or (page.parent / unquote(link.partition("#")[0])).is_file()


def read_tags(page: Path) -> Tags:
    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    return tags


def test_no_name_or_text_becomes_markup_on_any_page(run_script, tiny_model, tmp_path):
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    model = Path(shutil.copytree(tiny_model, folder / "<script>m"))
    rows = [
        {"prompt": MARKUP + row["prompt"], "chosen": MARKUP + row["chosen"], "rejected": MARKUP + row["rejected"]}
        | {f"id{MARKUP}": MARKUP, "source": MARKUP}
        for row in make_pairs(24)
    ]
    data = write_lines(folder / "<b onclick=x>.jsonl", rows)
    run = folder / "<u>run"
    argv = [*training(model, data, run), "--max_steps", "1", "--wandb_run_name", MARKUP, "--use_wandb", "false"]
    argv = argv[:-4]
    argv[argv.index("--max_length") + 1] = "128"  # markup takes many tokens
    for call in (
        [*argv, "--sample_during_eval", "--num_eval_samples", "1", "--sample_max_new_tokens", "2"],
        ["data", "--dataset_name", data, "--report_file", folder / "data.html", "--group_by", "source"],
        ["evaluate", "--model_name_or_path", run, "--bootstrap_samples", "100"],
        ["compare", "--model_name_or_path", run, "--num_prompts", "1", "--max_new_tokens", "2"],
        ["status", folder, "--report", folder / "status.html"],
    ):
        code, printed, errors = run_script(*call)
        assert code in (0, 3), errors + printed
    pages = sorted(folder.rglob("*.html"))
    assert {page.name for page in pages} == {
        "report.html",
        "data.html",
        "evaluation.html",
        "comparison.html",
        "status.html",
    }
    for page in pages:
        found = read_tags(page)
        assert not found.handlers, page.name
        assert not found.tags & {"script", "img", "b", "u", "iframe", "object"}, page.name
        lost = [link for link in found.links if not leads_to_a_file(page, link)]
        assert not lost, page.name


def test_modes_follow_the_umask(run_script, tiny_model, pairs_file, tmp_path, request):
    out = tmp_path / "out"
    request.addfinalizer(functools.partial(os.umask, os.umask(0o077)))
    code, _, errors = run_script(*training(tiny_model, pairs_file, out), "--max_steps", "1", "--save_steps", "1")
    assert code == 0, errors
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}, modes
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}, modes


def test_files_are_as_open_as_the_umask_lets_them(trained):
    """The other end: nothing takes rights away that the mask gives."""
    mask = os.umask(0)
    os.umask(mask)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in trained.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_links_in_a_run_are_removed_as_links(run_script, run, tiny_model, pairs_file, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run / "checkpoint-1", elsewhere)
    (elsewhere / "evaluation.json").write_text(json.dumps({"verb": "evaluate"}))
    (run / "checkpoint-5").symlink_to(elsewhere)
    (run / "evaluation").symlink_to(elsewhere)
    before = sorted(path.name for path in elsewhere.iterdir())
    argv = [*training(tiny_model, pairs_file, run), "--max_steps", "2", "--save_steps", "1", "--save_total_limit", "1"]
    code, _, errors = run_script(*argv, "--overwrite_output_dir")
    assert code == 0, errors
    assert sorted(path.name for path in elsewhere.iterdir()) == before
    assert not (run / "checkpoint-5").exists()


def test_pruning_leaves_what_a_link_points_to(run_script, run, tiny_model, pairs_file, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run / "checkpoint-1", elsewhere)
    before = sorted(path.name for path in elsewhere.iterdir())
    shutil.rmtree(run / "checkpoint-1")
    shutil.rmtree(run / "checkpoint-2")
    (run / "checkpoint-1").symlink_to(elsewhere)
    edit(run / "run.json", status="interrupted")
    argv = [*training(tiny_model, pairs_file, run), "--max_steps", "2", "--save_steps", "1", "--save_total_limit", "1"]
    code, _, errors = run_script(*argv, "--resume_from_checkpoint", "auto")
    assert code in (0, 2), errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in elsewhere.iterdir()) == before


MARK = "kqzx7vplanted"  # what no text of the data has: the cache holds what other tests read
SECRETS = {
    name: f"{MARK}-{name.lower().replace('_', '-')}"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")
}


def test_no_key_of_the_environment_is_written_or_printed(
    run_script, endpoint, tiny_model, other_model, pairs_file, tmp_path, monkeypatch
):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{MARK}-proxy@127.0.0.1:1")
    out = tmp_path / "out"
    few = ["--max_new_tokens", "2"]
    judged = ["--judge", endpoint.url, "--judge_model", "m"]
    endpoint.failures = [(400, {})]
    calls = [
        [
            *training(tiny_model, pairs_file, out / "run"),
            "--max_steps",
            "1",
            "--use_wandb",
            "--report_to",
            "tensorboard",
        ],
        [
            *training(tiny_model, pairs_file, out / "bad"),
            "--max_steps",
            "3",
            "--learning_rate",
            "1e30",
            "--warmup_steps",
            "0",
        ],
        training("someone/nothing", pairs_file, out / "none"),
        [
            "compare",
            "--model_name_or_path",
            tiny_model,
            "--baseline",
            other_model,
            "--prompts",
            pairs_file,
            "--output_dir",
            out / "failed",
            "--num_prompts",
            "2",
            *few,
            *judged,
        ],
        [
            "compare",
            "--model_name_or_path",
            tiny_model,
            "--baseline",
            other_model,
            "--prompts",
            pairs_file,
            "--output_dir",
            out / "compared",
            "--num_prompts",
            "2",
            *few,
            *judged,
        ],
        [
            "data",
            "--generate",
            "--dataset_name",
            write_lines(tmp_path / "few.jsonl", make_pairs(2)),
            "--model_name_or_path",
            tiny_model,
            "--scorer",
            endpoint.url,
            "--judge_model",
            "m",
            "--output_file",
            out / "made.jsonl",
            *few,
            "--num_generations",
            "2",
        ],
        ["evaluate", "--model_name_or_path", out / "run", "--bootstrap_samples", "100"],
        ["status", out, "--json"],
        ["status", out, "--report", out / "status.html"],
    ]
    codes, texts = [], {}
    for call in calls:
        code, printed, errors = run_script(*call)
        codes.append(code)
        texts[f"console {len(codes)}"] = (printed + errors).encode()
    assert codes == [0, 2, 2, 2, 0, 0, 0, 0, 0], {name: text for name, text in texts.items() if "console" in name}
    assert any(authorization == f"Bearer {SECRETS['OPENAI_API_KEY']}" for _, authorization, _ in endpoint.seen)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    for folder in (out, cache):
        texts |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(texts) > 30
    for place, content in texts.items():
        assert MARK.encode() not in content, place


@pytest.mark.parametrize("flag", ["--judge", "--scorer"])
def test_a_password_in_an_address_is_refused_and_not_repeated(
    flag, run_script, tiny_model, other_model, pairs_file, tmp_path
):
    address = f"http://user:{MARK}-password@localhost:1/v1"
    if flag == "--judge":
        argv = commands(tiny_model, other_model, pairs_file, tmp_path / "out")["compare"]
    else:
        argv = commands(tiny_model, tiny_model, pairs_file, tmp_path / "out")["generate"]
        argv = argv[: argv.index("--scorer")] + argv[argv.index("--scorer") + 2 :]
    said = refused(run_script, *argv, flag, address, "--judge_model", "m")
    assert f"{flag}" in said
    assert "OPENAI_API_KEY" in said
    assert MARK not in said


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "lr_scheduler_kwargs:\n" + "".join(f"  {line}\n" for line in LAUGHS.splitlines()),
        "lr_scheduler_kwargs: &x {a: *x}\n",
        "lora_target_modules: &x [*x]\n",
        "lr_scheduler_kwargs: " + "{a: " * 2000 + "1" + "}" * 2000 + "\n",
        "beta: !!python/object/apply:os.system ['exit 1']\n",
        "seed: " + "9" * 10_000 + "\n",
        "learning_rate: 1e999\n",
        "beta: 0.1\nbeta: 0.2\n",
        'output_dir: "a\\0b"\n',
        "lr_scheduler_kwargs: {a: 2001-01-01}\n",
    ],
)
def test_traps_in_a_config_are_refused(text, run_script, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    refused(run_script, "train", "--config", path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, '{"seed": 1' + "0" * 6000 + "}", '{"a": 1, "a": 2}'])
def test_traps_in_a_json_config_are_refused(text, run_script, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    refused(run_script, "train", "--config", path)


@pytest.mark.parametrize("cases", [5, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_mangled_cases_end_well(cases, monkeypatch):
    """The short forms of benchmarks/fuzz.py, which see."""
    for name in [name for name in os.environ if name.startswith(("HF_", "WANDB_"))]:
        monkeypatch.delenv(name)
    done = Forked("--cases", cases, "--seed", 7, script="benchmarks/fuzz.py")
    out, err = done.communicate(1700)
    assert done.returncode == 0, out[-6000:] + err[-3000:]
    assert "0 failed" in out


def test_copied_commands_are_quoted(run_script, tiny_model, pairs_file, tmp_path):
    """A name with a shell's signs comes back from the printed command as it was."""
    import shlex

    out = tmp_path / "a $(touch owned); `b` 'c"
    code, _, errors = run_script(*training(tiny_model, pairs_file, out), "--max_steps", "1")
    assert code == 0, errors
    record = json.loads((out / "run.json").read_text())
    assert str(out) in shlex.split(record["command"])
