"""What the tests share: a tiny model and tokenizer made on the spot, pairs it can learn, and the script itself."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("DPO_REAL_DATA", ROOT.parent / "shared" / "data"))

# Two threads that wait for one another are slower than one on models this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
    os.environ.pop(name, None)

KEY = "sk-a-key-that-must-not-be-written"

PLACES = ["cafe", "hotel", "museum", "garden", "station", "library", "market", "harbour"]
GOOD = ["lovely", "bright", "friendly", "quiet", "warm"]
BAD = ["awful", "gloomy", "rude", "noisy", "cold"]


def make_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs with distinct prompts, completions of unequal lengths, and a preference that a model can learn."""
    draw = random.Random(seed)
    pairs = []
    for index in range(count):
        good, bad = (" ".join(draw.choices(words, k=draw.randint(1, 5))) for words in (GOOD, BAD))
        prompt = f"On day {index} we went to the {draw.choice(PLACES)} and it was"
        pairs.append({"prompt": prompt, "chosen": f" {good}.", "rejected": f" {bad}."})
    return pairs


def write_lines(path: Path, rows: list[dict]) -> Path:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_tiny_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer that begins texts with `<s>`; returns its size."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [" ".join(pair.values()) for pair in make_pairs(200)]
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"])
    backend = bpe._tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_tiny_model(folder: Path, seed: int, **changes) -> Path:
    """A random Llama of a few thousand parameters with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = save_tiny_tokenizer(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape["max_position_embeddings"] = 128
    config = LlamaConfig(
        vocab_size=size,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **(shape | changes),
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_tiny_reward_model(folder: Path):
    """A random model that scores a text with one number, and its tokenizer; returns the model."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    size = save_tiny_tokenizer(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=size, num_labels=1, pad_token_id=2, **shape))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A model folder as any on the hub."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Path:
    """Another model with the same tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=2)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> Path:
    """Sixty good pairs."""
    return write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_pairs(60))


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """What a shell starts in the background may be deaf to Ctrl-C, and would hand that on to all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory):
    """Keeps what the tests read out of the person's own cache."""
    import datasets

    former = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)
    yield
    datasets.config.HF_DATASETS_CACHE = former


@pytest.fixture(autouse=True)
def float32_unless_asked():
    """Numbers compared to many digits, also where the processor has bfloat16 and the script would choose it."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo its changes
        patch.setattr("utils.runtime.cpu_computes_bfloat16_fast", lambda: False)
        yield


@pytest.fixture(autouse=True)
def environment_kept():
    """What a library puts into the environment (accelerate does, for FSDP) must not reach the next test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def model_without_a_tilde(tiny_model, tmp_path_factory):
    """A model that has no number for one token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "holed"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    (token,) = AutoTokenizer.from_pretrained(tiny_model)("~", add_special_tokens=False).input_ids
    model.model.embed_tokens.weight.data[token] = torch.nan
    model.save_pretrained(folder)
    return folder, token


@pytest.fixture
def run_script(capsys):
    """Runs the script in this process: returns the exit code, what it printed, and what it complained of."""
    import advanced_dpo_script

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        code = advanced_dpo_script.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


class Endpoint(BaseHTTPRequestHandler):
    """Prefers the longer response, and when they are of one length whichever stands first; fails when told to."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((self.path, self.headers.get("Authorization"), body))
        if server.failures:
            code, headers = server.failures.pop(0)
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(f"no: {self.headers.get('Authorization')}".encode())
            return
        text = body["messages"][0]["content"]
        one, other = re.search(r"\[Response A\]\n(.*)\n\n\[Response B\]\n(.*)\n\nAnswer", text, re.DOTALL).groups()
        content = server.answer or ("A" if len(one) >= len(other) else "B")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": content}}]}).encode())

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Authorization"), None))
        self.send_error(404)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.seen, server.failures, server.answer = [], [], None
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield server
    server.shutdown()
    server.server_close()


def start_script(*arguments, **environment) -> subprocess.Popen:
    """Starts the script as a person does, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "advanced_dpo_script.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_record(folder: Path) -> dict:
    """The run.json of a run."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without what the clock and the machine decide."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = {"tokens_per_second", "peak_memory_bytes"}
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]
