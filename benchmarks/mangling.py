"""The cases of benchmarks/fuzz.py: valid commands with their own copies of what they read, then changed by chance.

What is drawn depends on the seed and the number of a case alone, so that any case can be made again.
"""

from __future__ import annotations

import gzip
import json
import pickle
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BOMBS = ("pytorch_model.bin", "adapter_model.bin", "model.pt", "optimizer.pt", "rng_state.pth", "scheduler.pt")
BOMBS += ("training_args.bin", "optimizer.bin", "random_states_0.pkl", "scaler.pt", "data.pkl", "spiece.model")

ODD_TEXTS = [
    *("", " ", "none", "null", "nan", "inf", "-1", "0", "1e308", "1" * 400, "true", "auto", "x" * 20_000, "\x00", "\n"),
    *(
        "../../outside",
        "/etc/passwd",
        "/proc/self/environ",
        "~no-such-user/x",
        "~",
        "..",
        ".",
        "a/../../b",
        "file:///etc/passwd",
    ),
    *("\x1b[2J\x1b]0;owned\x07", "\x9b31m", "a\rb", "\u202etxt.exe", "\ud800", "\ufeff", "<script>alert(1)</script>"),
    *("$(touch owned)", "; touch owned", "`touch owned`", "' or 1", '"', "%s%n", "{0.__class__}", "C:\\x", "--beta"),
    *("http://user:pw@localhost:1/v1", "https://localhost:1", "org/name", "org/name--module.Class", "evil.Evil"),
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, 3.7, 10**30, 2**31, 2**63, -(2**63), 1e308, [], {}, [[]], [None], [1, "x"]),
    *({"a": {"b": []}}, {"__class__": "x"}, [{}], "gelu", "silu", "llama", "gpt2", "LORA", "CAUSAL_LM", "float16"),
]
HOSTILE_KEYS: dict[str, list[Any]] = {
    "auto_map": [
        {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        {"AutoConfig": "org/name--evil.Evil"},
        "evil.Evil",
    ],
    "auto_mapping": [{"base_model_class": "Evil", "parent_library": "evil"}],
    "custom_generate": ["evil", "./evil.py"],
    "model_type": ["llama", "evil", "gpt2", "t5", "bert", "mamba", "", 5, None],
    "architectures": [["Evil"], ["T5ForConditionalGeneration"], [], "LlamaForCausalLM", [5]],
    "quantization_config": [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "torchao", "quant_type": "int8_weight_only"},
        {"quant_method": "fp8"},
        {"quant_method": "evil"},
        "evil",
    ],
    "attn_implementation": ["org/kernel", "flash_attention_2", "eager", "evil"],
    "_attn_implementation": ["org/kernel:function", "flash_attention_2"],
    "tokenizer_class": ["Evil", "PreTrainedTokenizer", "LlamaTokenizer", "BertTokenizer", 5],
    "name_or_path": ["../../outside", "org/name"],
    "_name_or_path": ["../../outside"],
    "vocab_file": ["../../outside/vocab.json", "/etc/passwd"],
    "tokenizer_file": ["/etc/passwd"],
    "chat_template": ["{{ ''.__class__ }}", "{% for i in range(10**12) %}x{% endfor %}", 5, [], "{{ messages"],
    "base_model_name_or_path": ["../../outside", "/etc", "org/name", 5, None, "", "~"],
    "modules_to_save": [["lm_head"], ["../../x"], "lm_head", 5],
    "peft_type": ["LOHA", "PROMPT_TUNING", "EVIL", "IA3", "VBLORA", None],
    "init_lora_weights": ["pissa", "corda", "eva", "loftq", "olora", "evil", False],
    "corda_config": [{"cache_file": "../../outside/x.bin", "covariance_file": "../../outside/y.bin"}],
    "eva_config": [{"rho": 2.0}],
    "loftq_config": [{"loftq_bits": 4}],
    "target_modules": ["(a+)+$", "all-linear", [], ["nope"], ".*", "["],
    "rank_pattern": [{"(a+)+$": 4}, {"x": "y"}, 5],
    "trainable_token_indices": [[0, 10**9], {"embed_tokens": [1]}, "x"],
    "megatron_config": [{"x": 1}],
    "megatron_core": ["evil"],
    "layer_replication": [[[0, 10**9]], [[0, 2], [1, 2]]],
    "weight_map": [{"model.embed_tokens.weight": "../../outside.safetensors"}, {}, "x", {"x": "/etc/passwd"}],
    "stop_strings": [["x"]],
    "hidden_size": [0, 10**9, -1, 3.5],
    "num_hidden_layers": [0, 10**6, "2"],
    "vocab_size": [0, 10**9],
    "rope_scaling": [{"rope_type": "evil"}, {"type": "linear", "factor": 0}],
    "dtype": ["float16", "evil", "float64"],
}


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return open, (self.path, "w")


@dataclass
class Case:
    """One command, the folder it is run in, what may be written, and what was changed."""

    folder: Path
    argv: list[str]
    written: list[Path] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    stdin: bytes = b""


def make_seeds(seeds: Path) -> int:
    """What is mangled later: models, an adapter, runs, data of every kind, configs."""
    from shared.models import save_tiny_model, save_tiny_reward_model
    from shared.pairs import make_pairs, write_lines

    import advanced_dpo_script

    seeds.mkdir()
    model = save_tiny_model(seeds / "model", seed=1, num_hidden_layers=1)
    save_tiny_reward_model(seeds / "reward")
    pairs = write_lines(seeds / "pairs.jsonl", make_pairs(24))
    import datasets

    rows = datasets.Dataset.from_list(make_pairs(24))
    rows.save_to_disk(seeds / "saved")
    rows.to_csv(str(seeds / "pairs.csv"))
    rows.to_parquet(str(seeds / "pairs.parquet"))
    (seeds / "pairs.jsonl.gz").write_bytes(gzip.compress(pairs.read_bytes()))
    turns = [
        {
            "chosen": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["rejected"]}],
        }
        for row in make_pairs(24)
    ]
    write_lines(seeds / "messages.jsonl", turns)
    (seeds / "folder").mkdir()
    shutil.copy(pairs, seeds / "folder" / "train.jsonl")
    (seeds / "folder" / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: train.jsonl\n---\n")
    data = ["--dataset_name", str(pairs), "--per_device_train_batch_size", "4", "--max_steps", "2", "--save_steps", "1"]
    for run, more in (("run", ["--use_lora", "--lora_r", "4"]), ("full", [])):
        argv = ["train", "--model_name_or_path", str(model), *data, "--output_dir", str(seeds / run), *more]
        code = advanced_dpo_script.main([*argv, "--logging_steps", "1"])
        if code:
            return code
    shutil.copytree(seeds / "run", seeds / "stopped")
    shutil.rmtree(seeds / "stopped" / "checkpoint-2")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (seeds / "stopped" / name).unlink()
    record = json.loads((seeds / "stopped" / "run.json").read_text())
    (seeds / "stopped" / "run.json").write_text(json.dumps(record | {"status": "interrupted"}, indent=2))
    adapter = seeds / "adapter"
    adapter.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(seeds / "run" / name, adapter)
    return 0


def build_case(number: int, seed: int, folder: Path, seeds: Path) -> Case:
    """The case of this number: a valid command with its own copies of what it reads, then some changes."""
    draw = random.Random(f"{seed}:{number}")
    kind = draw.choice(list(KINDS))
    folder.mkdir(parents=True)
    case = KINDS[kind](draw, folder, seeds)
    case.changes.insert(0, kind)
    return case


def take(case_folder: Path, seeds: Path, *names: str) -> None:
    """Copies of seeds, with the paths that their records hold set to where they are now."""
    for name in names:
        source, place = seeds / name, case_folder / name
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            shutil.copy(source, place)
        for path in place.rglob("*.json") if place.is_dir() else ():
            text = path.read_text(encoding="utf-8")
            if str(seeds) in text:
                path.write_text(text.replace(str(seeds), str(case_folder)), encoding="utf-8")


def training(folder: Path, draw: random.Random, model: str = "model", data: str = "pairs.jsonl") -> Case:
    verb = draw.choice(["train", "train", "train", "sft"])
    argv = [verb, "--model_name_or_path", str(folder / model), "--dataset_name", str(folder / data)]
    argv += ["--output_dir", str(folder / "out"), "--max_steps", "1", "--per_device_train_batch_size", "2"]
    if draw.random() < 0.5:
        argv += ["--use_lora", "--lora_r", "2"]
    if draw.random() < 0.3:
        argv += ["--validation_split", "none"]
    return Case(folder, argv, [folder / "out"])


def flags_case(draw: random.Random, folder: Path, seeds: Path) -> Case:
    take(folder, seeds, "model", "pairs.jsonl")
    verb = draw.choice(
        ["train", "train", "train", "sft", "data", "plan", "chat", "evaluate", "compare", "init", "merge"]
    )
    case = training(folder, draw) if verb in ("train", "sft") else other_verb(verb, folder, seeds, draw)
    case.argv += [word for _ in range(draw.choice([1, 1, 1, 2, 3])) for word in odd_flag(case.argv[0], draw, folder)]
    if draw.random() < 0.15:
        del case.argv[draw.randrange(len(case.argv))]
    if draw.random() < 0.1:
        case.argv.insert(draw.randrange(len(case.argv) + 1), draw.choice(ODD_TEXTS))
    return case


# Flags that name a place to write, take the network or minutes, or start other programs by their purpose.
LEFT_OUT = re.compile(
    "output_dir|output_file|report_file|json_file|^report$|logging_dir|config$|max_steps|num_train_epochs|torch_compile"
    "|use_wandb|report_to|dataset_adapter|scorer|judge$|vote_port|overwrite|trust_remote_code|dataset_num_proc"
    "|dataloader_num_workers|use_vllm|push_to_hub$|trackio|project|^liger_kernel_config$"
)
MANY_WORDS = [
    "auto",
    "steps",
    "epoch",
    "no",
    "cosine_with_min_lr",
    "galore_adamw",
    "adafactor",
    "nope",
    "offload",
    "all",
]


def odd_flag(verb: str, draw: random.Random, folder: Path) -> list[str]:
    """A flag of the verb with a value that may fit, or not."""
    from utils.arguments.parsing import known_flags

    flags = {name: flag for name, flag in known_flags(verb).items() if not LEFT_OUT.search(name)}
    if draw.random() < 0.03:
        return [draw.choice(["--nope", "--", "-x", "--bëta", "--max-step", "--=", "--beta=", "--verb=train"])]
    flag = flags[draw.choice(sorted(flags))]
    kind = draw.random()
    if kind < 0.1:
        return [f"--{flag.name}"]
    if kind < 0.3:
        return [f"--{flag.name}", draw.choice([*ODD_TEXTS, *MANY_WORDS]).replace("\x00", "\\0")]
    if flag.choices and kind < 0.9:
        return [f"--{flag.name}", draw.choice(flag.choices)]
    values = {
        "bool": ["true", "false"],
        "int": ["0", "1", "2", "3", "7", "100", "-1", str(2**31), str(2**40), "4294967297"],
        "float": ["0", "0.5", "1", "1e-9", "3.5", "-1", "1e30"],
        "dict": ['{"a": 1}', "{}", '{"min_lr": 0.1}', '{"use_reentrant": true}', '{"a": [1, {"b": null}]}'],
    }
    words = [value for scalar in flag.kind.scalars for value in values.get(scalar, MANY_WORDS)]
    return [f"--{flag.name}", draw.choice(words or MANY_WORDS)]


def config_case(draw: random.Random, folder: Path, seeds: Path) -> Case:
    take(folder, seeds, "model", "pairs.jsonl")
    settings: dict[str, Any] = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / "out"),
        "max_steps": 1,
        "beta": 0.1,
        "use_lora": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "optim_args": None,
        "lr_scheduler_kwargs": {"a": {"b": 1}},
    }
    for key in ("optim_args", "lr_scheduler_kwargs"):
        if draw.random() < 0.8:
            del settings[key]
    changes = []
    for _ in range(draw.choice([0, 1, 2])):
        key = draw.choice([key for key in settings if key not in ("output_dir", "max_steps")])
        settings[key] = odd_value(draw)
        changes.append(f"{key}: {settings[key]!r:.60}")
    if draw.random() < 0.5:
        import yaml

        path = folder / "config.yaml"
        text = yaml.safe_dump(settings, allow_unicode=True)
        if draw.random() < 0.5:
            text += draw.choice(YAML_TRAPS)
            changes.append("a trap of YAML")
    else:
        path = folder / "config.json"
        text = json.dumps(settings)
        if draw.random() < 0.3:
            text = draw.choice(JSON_TRAPS)
            changes.append("a trap of JSON")
    content = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.3:
        content = changed_bytes(content, draw)
        changes.append("bytes")
    path.write_bytes(content)
    return Case(folder, ["train", "--config", str(path)], [folder / "out"], changes)


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML_TRAPS = [
    LAUGHS,
    "lr_scheduler_kwargs:\n" + "".join(f"  {line}\n" for line in LAUGHS.splitlines()),
    "lr_scheduler_kwargs: &x {a: *x}\n",
    "lora_target_modules: &x [*x]\n",
    "lr_scheduler_kwargs: " + "{a: " * 2000 + "1" + "}" * 2000 + "\n",
    "lora_target_modules: " + "[" * 3000 + "]" * 3000 + "\n",
    "beta: !!python/object/apply:os.system ['touch owned']\n",
    "lr_scheduler_kwargs: !!python/object/apply:os.system ['touch owned']\n",
    "learning_rate: " + "9" * 10_000 + "\n",
    "seed: 0x" + "f" * 5000 + "\n",
    "lr_scheduler_kwargs: {a: " + "1" * 6000 + "}\n",
    "beta: 0.1\nbeta: 0.2\n",
    "<<: {beta: 1}\n",
    "? [a, b]\n: c\n",
    "lr_scheduler_kwargs: {<<: [{a: 1}, {b: 2}]}\n",
    "lr_scheduler_kwargs: {a: 2001-01-01, b: !!binary aGVsbG8=, c: !!set {x, y}}\n",
    "%YAML 9.9\n---\nbeta: 1\n",
    "--- 1\n--- 2\n",
    "x: \x1b[2J\n",
]
JSON_TRAPS = [
    *("", "[]", "null", "1", '"x"', "{", "[" * 100_000, '{"a":' * 50_000, '{"beta": 1' + "0" * 6000 + "}", "\ufeff{}"),
    *('{"beta": 0.1, "beta": 0.2}', '{"beta": NaN}', '{"beta": 1e999}', '{"\\u001b[2J": 1}', '{"beta": "\\ud800"}'),
]


def data_case(draw: random.Random, folder: Path, seeds: Path) -> Case:
    name = draw.choice(
        ["pairs.jsonl", "pairs.csv", "pairs.parquet", "pairs.jsonl.gz", "messages.jsonl", "saved", "folder"]
    )
    take(folder, seeds, name, "model")
    changes = []
    if (folder / name).is_dir():
        changes = mangle_folder(folder / name, draw, draw.choice([1, 1, 2]))
    elif name.endswith("jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for _ in range(draw.choice([1, 2])):
            position = draw.randrange(len(rows))
            rows[position] = changed_value(rows[position], draw)
        if draw.random() < 0.2:  # a column whose name is hostile
            name_of_column = draw.choice(ODD_TEXTS)
            rows = [row | {name_of_column: "x"} if isinstance(row, dict) else row for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        changes = ["rows"]
    else:
        (folder / name).write_bytes(changed_bytes((folder / name).read_bytes(), draw))
        changes = ["bytes"]
    if draw.random() < 0.5:
        case = training(folder, draw, data=name)
    else:
        case = other_verb("data", folder, seeds, draw)
        case.argv[case.argv.index("--dataset_name") + 1] = str(folder / name)
    if draw.random() < 0.4:
        case.argv += ["--on_bad_rows", "skip"] if case.argv[0] != "data" else []
    case.changes = changes
    return case


def model_case(draw: random.Random, folder: Path, seeds: Path) -> Case:
    take(folder, seeds, "model", "pairs.jsonl", "messages.jsonl")
    changes = mangle_folder(folder / "model", draw, draw.choice([1, 1, 1, 2, 3]))
    verb = draw.choice(["train", "train", "train", "chat", "chat", "data", "plan", "evaluate", "compare"])
    if verb == "train":
        case = training(folder, draw, data=draw.choice(["pairs.jsonl", "messages.jsonl"]))
    else:
        case = other_verb(verb, folder, seeds, draw)
        if verb == "data":
            case.argv += ["--model_name_or_path", str(folder / "model")]
    case.changes = changes
    return case


def reward_case(draw: random.Random, folder: Path, seeds: Path) -> Case:
    take(folder, seeds, "model", "reward", "pairs.jsonl")
    changes = mangle_folder(folder / "reward", draw, draw.choice([1, 2]))
    if draw.random() < 0.5:
        case = other_verb("compare", folder, seeds, draw)
        case.argv += ["--judge", str(folder / "reward")]
    else:
        out = folder / "out"
        few = folder / "few.jsonl"
        few.write_text("".join((folder / "pairs.jsonl").read_text().splitlines(keepends=True)[:2]))
        argv = ["data", "--generate", "--dataset_name", str(few)]
        argv += ["--model_name_or_path", str(folder / "model"), "--output_file", str(out / "made.jsonl")]
        argv += ["--scorer", str(folder / "reward"), "--num_generations", "2", "--max_new_tokens", "4"]
        case = Case(folder, argv, [out])
    case.changes = changes
    return case


def adapter_case(draw: random.Random, folder: Path, seeds: Path) -> Case:
    take(folder, seeds, "model", "adapter", "pairs.jsonl")
    changes = mangle_folder(folder / "adapter", draw, draw.choice([1, 1, 2]))
    verb = draw.choice(["train", "train", "chat", "merge", "evaluate"])
    if verb == "train":
        case = training(folder, draw, model="adapter")
        if draw.random() < 0.5:
            case.argv[2] = str(folder / "model")
            case.argv += ["--adapter_name_or_path", str(folder / "adapter")]
        case.argv = [word for word in case.argv if word not in ("--use_lora", "--lora_r")]
        case.argv = [
            word for place, word in enumerate(case.argv) if word != "2" or case.argv[place - 1].startswith("--")
        ]
    else:
        case = other_verb(verb, folder, seeds, draw, model="adapter")
    case.changes = changes
    return case


def template_case(draw: random.Random, folder: Path, seeds: Path) -> Case:
    take(folder, seeds, "model", "messages.jsonl")
    template = draw.choice(TEMPLATES)
    changes = [repr(template[:60])]
    if draw.random() < 0.3:
        template = changed_bytes(template.encode(), draw).decode("utf-8", "replace")
        changes.append("changed")
    case = (
        training(folder, draw, data="messages.jsonl")
        if draw.random() < 0.6
        else other_verb("chat", folder, seeds, draw)
    )
    if draw.random() < 0.5:
        (folder / "model" / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        (folder / "template.jinja").write_text(template, encoding="utf-8")
        case.argv += ["--chat_template", str(folder / "template.jinja")]
    case.changes = changes
    return case


PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
TEMPLATES = [
    PLAIN,
    "{{ ''.__class__.__mro__[1].__subclasses__() }}" + PLAIN,
    "{{ messages.__class__ }}" + PLAIN,
    "{{ cycler.__init__.__globals__.os.system('touch owned') }}" + PLAIN,
    "{{ self._TemplateReference__context }}" + PLAIN,
    "{{ lipsum.__globals__['os'].popen('id').read() }}" + PLAIN,
    "{{ raise_exception('no: \x1b[2J') }}",
    "{% for i in range(10**12) %}x{% endfor %}" + PLAIN,
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + PLAIN,
    "{{ 'x' * 10**10 }}" + PLAIN,
    "{{ ['x'] * 10**10 }}" + PLAIN,
    "{{ 10 ** (10 ** 8) }}" + PLAIN,
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}" + PLAIN,
    "{% include '/etc/passwd' %}" + PLAIN,
    "{% import '/etc/passwd' as x %}" + PLAIN,
    "{% extends '../../outside' %}" + PLAIN,
    "{% for m in messages %}{% set _ = messages.append(m) %}{% endfor %}" + PLAIN,
    "{{ messages[0].update({'content': 'x'}) }}" + PLAIN,
    "{{ '%s'|format(messages) }}{{ '{0.__class__}'.format(messages) }}" + PLAIN,
    "{{ strftime_now('%Y' * 100000) }}" + PLAIN,
    "{{ messages|tojson }}" * 50,
    "{{ undefined.thing }}" + PLAIN,
    "{{ 1/0 }}",
    "",
    "{{ messages[0]['content'] }}\x1b[2J",
    "{% generation %}" + PLAIN,
    "{% break %}" + PLAIN,
    "{{ '(a+)+' }}" * 20_000,
    "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
]


def run_case(draw: random.Random, folder: Path, seeds: Path) -> Case:
    name = draw.choice(["run", "run", "full"])
    take(folder, seeds, "model", name, "pairs.jsonl")
    changes = mangle_folder(folder / name, draw, draw.choice([1, 1, 2, 3]), deep=draw.random() < 0.4)
    verb = draw.choice(["status", "status", "evaluate", "compare", "chat", "merge", "train"])
    if verb == "train":
        case = training(folder, draw, model=name)
        case.argv = [word for word in case.argv if word not in ("--use_lora", "--lora_r")]
        case.argv = [
            word for place, word in enumerate(case.argv) if word != "2" or case.argv[place - 1].startswith("--")
        ]
    else:
        case = other_verb(verb, folder, seeds, draw, model=name)
    case.changes = changes
    return case


def resume_case(draw: random.Random, folder: Path, seeds: Path) -> Case:
    take(folder, seeds, "model", "stopped", "pairs.jsonl")
    run = folder / "stopped"
    where = run / "checkpoint-1" if draw.random() < 0.7 else run
    changes = mangle_folder(where, draw, draw.choice([0, 1, 1, 2]))
    argv = ["train", "--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "pairs.jsonl")]
    argv += [
        "--per_device_train_batch_size",
        "4",
        "--max_steps",
        "2",
        "--save_steps",
        "1",
        "--use_lora",
        "--lora_r",
        "4",
    ]
    how = draw.choice(["auto", "auto", "auto", str(run / "checkpoint-1"), str(folder / "model"), "/etc"])
    argv += ["--output_dir", str(run), "--resume_from_checkpoint", how, "--logging_steps", "1"]
    if draw.random() < 0.2:
        argv = [*argv[:-4], "--overwrite_output_dir"]
    return Case(folder, argv, [run], changes)


def other_verb(verb: str, folder: Path, seeds: Path, draw: random.Random, model: str = "model") -> Case:
    """A valid command of a verb that does not train."""
    out, place = folder / "out", str(folder / model)
    pairs = str(folder / "pairs.jsonl") if (folder / "pairs.jsonl").is_file() else str(folder / "messages.jsonl")
    few = ["--max_new_tokens", "4", "--temperature", "0"]
    match verb:
        case "data":
            argv = ["data", "--dataset_name", pairs]
            if draw.random() < 0.7:
                argv += ["--report_file", str(out / "page.html"), "--json_file", str(out / "found.json")]
                argv += ["--output_file", str(out / draw.choice(["clean.jsonl", "clean.parquet"]))]
        case "plan":
            argv = ["plan", "--model_name_or_path", place, "--gpu", "RTX 4090", "--json_file", str(out / "plan.json")]
        case "chat":
            argv = ["chat", "--model_name_or_path", place, "--prompt", "On day 1", *few]
        case "evaluate":
            argv = ["evaluate", "--model_name_or_path", place, "--output_dir", str(out), "--bootstrap_samples", "100"]
            argv += ["--max_samples", "4", "--dataset_name", pairs]
            argv += ["--ref_model_name_or_path", str(folder / "model")] if model == "model" else []
        case "compare":
            argv = ["compare", "--model_name_or_path", place, "--prompts", pairs, "--output_dir", str(out), *few]
            argv += ["--num_prompts", "2", "--baseline", str(folder / "model")]
        case "merge":
            argv = ["merge", "--model_name_or_path", place, "--output_dir", str(out), "--max_samples", "4"]
            argv += ["--dataset_name", pairs] if draw.random() < 0.5 else []
        case "status":
            argv = ["status", str(folder)]
            argv += draw.choice([[], ["--json"], ["--report", str(out / "page.html")]])
        case "init":
            argv = ["init", "--situation", "cpu_trial", "--output_file", str(out / "config.yaml")]
    return Case(folder, argv, [out])


KINDS: dict[str, Callable[[random.Random, Path, Path], Case]] = {
    "flags": flags_case,
    "flags again": flags_case,
    "config": config_case,
    "data": data_case,
    "model": model_case,
    "model again": model_case,
    "reward model": reward_case,
    "adapter": adapter_case,
    "template": template_case,
    "run": run_case,
    "resume": resume_case,
}


def mangle_folder(folder: Path, draw: random.Random, count: int, deep: bool = True) -> list[str]:
    """Changes some files of a folder; what was changed, in words."""
    changes = []
    for _ in range(count):
        files = sorted(path for path in (folder.rglob("*") if deep else folder.glob("*")) if path.is_file())
        kind = draw.random()
        texts = [path for path in files if path.suffix in (".json", ".jsonl")]
        if kind < 0.6 and texts:
            path = draw.choice(texts)
            change = mangle_json(path, draw)
        elif kind < 0.75 and files:
            path = draw.choice(files)
            path.write_bytes(changed_bytes(path.read_bytes(), draw))
            change = "bytes"
        elif kind < 0.9 or not files:
            path, change = (
                folder / draw.choice([*BOMBS, "evil.py", "chat_template.jinja", "additional_chat_templates"]),
                "new",
            )
            add_hostile(path, folder, draw)
        else:
            path = draw.choice(files)
            change = draw.choice(["removed", "a folder", "a link out", "a link to nothing"])
            path.unlink()
            if change == "a folder":
                path.mkdir()
            elif change.startswith("a link"):
                path.symlink_to("/etc/passwd" if change == "a link out" else folder / "nothing")
        changes.append(f"{path.relative_to(folder)}: {change}")
    return changes


def add_hostile(path: Path, folder: Path, draw: random.Random) -> None:
    """A pickle that makes a file, a module that does, a template that tries to; it may replace the weights."""
    owned = folder.parent / "owned"
    if path.name == "additional_chat_templates":
        path.mkdir(exist_ok=True)
        (path / "tool_use.jinja").write_text(draw.choice(TEMPLATES))
    elif path.suffix == ".py":
        path.write_text(f"open({str(owned)!r}, 'w')\nclass Evil: pass\n")
        for config in folder.glob("*config.json"):
            content = json.loads(config.read_text())
            if not isinstance(content, dict):  # an earlier change
                continue
            key = "auto_mapping" if config.name.startswith("adapter") else "auto_map"
            config.write_text(json.dumps(content | {key: HOSTILE_KEYS[key][0], "tokenizer_class": "Evil"}))
    elif path.suffix == ".jinja":
        path.write_text(draw.choice(TEMPLATES))
    else:
        path.write_bytes(pickle.dumps(Bomb(owned)))
        if draw.random() < 0.5:
            for weights in folder.glob("*.safetensors"):
                weights.unlink()


def mangle_json(path: Path, draw: random.Random) -> str:
    """One value of the file replaced, removed, moved, or a hostile key added; bytes where it is no JSON any more."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else []
        place = draw.randrange(len(lines)) if lines else 0
        content = json.loads(lines[place] if lines else path.read_text(encoding="utf-8"))
    except ValueError:
        path.write_bytes(changed_bytes(path.read_bytes(), draw))
        return "bytes"
    if isinstance(content, dict) and draw.random() < 0.45:
        known = [key for key in HOSTILE_KEYS if key in content]
        key = draw.choice(known) if known and draw.random() < 0.5 else draw.choice(list(HOSTILE_KEYS))
        content[key] = draw.choice(HOSTILE_KEYS[key])
        change = f"{key} = {content[key]!r:.60}"
    else:
        former = json.dumps(content)
        content = changed_value(content, draw)
        change = f"value ({len(former)} to {len(json.dumps(content))} characters)"
    text = json.dumps(content, indent=None if lines else 2)
    if lines:
        text = "\n".join([*lines[:place], text, *lines[place + 1 :]]) + "\n"
    path.write_text(text, encoding="utf-8")
    return change


def odd_value(draw: random.Random) -> Any:
    return draw.choice([draw.choice(ODD_TEXTS), draw.choice(ODD_VALUES)])


def changed_value(value: Any, draw: random.Random) -> Any:
    """The value with one thing in it changed, somewhere."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return odd_value(draw)
    if isinstance(value, list):
        rest, place = list(value), draw.randrange(len(value))
        if draw.random() < 0.2:
            del rest[place]
        else:
            rest[place] = changed_value(rest[place], draw)
        return rest
    rest, key = dict(value), draw.choice(list(value))
    action = draw.random()
    if action < 0.2:
        del rest[key]
    elif action < 0.3:
        rest[draw.choice(ODD_TEXTS)] = rest.pop(key)
    else:
        rest[key] = changed_value(rest[key], draw)
    return rest


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    match draw.randrange(6):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + draw.randbytes(4) + content[place + 4 :]
        case 2:
            return content[:place] + draw.choice(ODD_TEXTS).encode("utf-8", "surrogatepass") + content[place:]
        case 3:
            return b""
        case 4:
            return draw.randbytes(64)
        case _:
            return content[:place] + content[place + draw.randrange(1, 40) :]
