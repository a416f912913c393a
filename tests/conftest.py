"""Fixtures for all rooms: a tiny model with its tokenizer, pairs it can learn, the script in this process."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
from shared.endpoint import KEY, Endpoint
from shared.hub import TOKEN, Hub
from shared.models import save_tiny_model
from shared.pairs import make_pairs, write_lines

# Two threads that wait for one another are slower than one on models this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
    os.environ.pop(name, None)

gc.set_threshold(50_000, 50, 100)  # a run leaves little, and what the libraries hold takes long to look through


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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What the hub is sent: path, body, and the status that the run in tmp_path/run had by then."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.received, server.run = [], tmp_path / "run"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server.received
    server.shutdown()
    server.server_close()
