"""Which folder or hub name is the base, which the adapter; what is missing is told with the flag and what to do."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file
from shared.runs import ROOT

from utils.errors import UserError
from utils.models import sources
from utils.models.sources import ModelSource, find_model, find_policy, read_json_file
from utils.settings.training import ModelSettings

FLAG = "--model_name_or_path"


def make_model(folder: Path, weights: str | None = "model.safetensors", tokenizer: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if weights is not None and weights.endswith(".safetensors"):
        save_file({"weight": torch.zeros(1)}, folder / weights)
    elif weights is not None:
        (folder / weights).write_text("{}")
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    return folder


def make_adapter(folder: Path, base: object, weights: bool = True, tokenizer: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "revision": None}))
    if weights:
        save_file({"weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
    if tokenizer:
        (folder / "tokenizer_config.json").write_text("{}")
    return folder


def settings(model: object, **changes) -> ModelSettings:
    defaults = {name: field.default for name, field in ModelSettings.__dataclass_fields__.items()}
    return ModelSettings(**(defaults | {"model_name_or_path": str(model)} | changes))


def complaint(function, *arguments) -> str:
    """The one fault that the call is refused for."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert len(caught.value.faults) == 1
    assert "\n" not in caught.value.faults[0]
    return caught.value.faults[0]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """The hub's client is told to stay offline, with an empty cache, and nothing may open a connection."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def refuse(*arguments, **options):
        pytest.fail(f"a connection was opened: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_model_folder(weights, tmp_path):
    folder = str(make_model(tmp_path / "model", weights))
    assert find_model(FLAG, folder) == ModelSource(folder, None, None, folder)
    assert find_policy(settings(folder)) == ModelSource(folder, None, None, folder)


def test_folders_are_recorded_absolute(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "models" / "one")
    adapter = make_adapter(tmp_path / "adapter", "models/one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("models/one", "./models/one", "models/../models/one", "~/models/one"):
        assert find_model(FLAG, name).base == str(folder)
    assert find_model(FLAG, "adapter") == ModelSource(str(folder), str(adapter), None, str(folder))


def test_name_of_a_source_is_what_a_person_calls_it(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", str(base))
    assert find_model(FLAG, str(base)).name == str(base)
    assert find_model(FLAG, str(adapter)).name == str(adapter)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "~nobody-of-that-name/model", "..\\model"]
)
def test_missing_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = complaint(find_model, FLAG, name)
    assert said.startswith(f"{FLAG} ")
    assert said.endswith(": no such folder; check the path")


def test_file_in_place_of_a_folder(tmp_path):
    folder = make_model(tmp_path / "model")
    said = complaint(find_model, FLAG, str(folder / "model.safetensors"))
    assert said == (
        f"{FLAG} {folder / 'model.safetensors'}: a file; name the folder that holds config.json and the weights"
    )


def test_folder_without_config(tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "config.json").unlink()
    assert complaint(find_model, FLAG, str(folder)) == (
        f"{FLAG} {folder}: no config.json there, so it is not a model folder; name one that has it"
    )


def test_folder_without_weights(tmp_path):
    folder = make_model(tmp_path / "model", weights=None)
    assert complaint(find_model, FLAG, str(folder)) == (
        f"{FLAG} {folder}: no weights there (model.safetensors); save or copy them into it"
    )


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_alone_are_refused(file, tmp_path):
    folder = make_model(tmp_path / "model", weights=file)
    said = complaint(find_model, FLAG, str(folder))
    assert said.startswith(f"{FLAG} {folder}: only pickled weights (.bin)")
    assert "convert them to safetensors" in said


def test_pickled_weights_beside_safetensors_do_no_harm(tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "pytorch_model.bin").write_text("")
    assert find_model(FLAG, str(folder)).base == str(folder)


def test_folder_without_tokenizer(tmp_path):
    folder = make_model(tmp_path / "model", tokenizer=False)
    said = complaint(find_model, FLAG, str(folder))
    assert said.startswith(f"{FLAG} {folder}: no tokenizer there")
    assert "copy the base model's into it" in said


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"])
def test_every_kind_of_tokenizer_counts(file, tmp_path):
    folder = make_model(tmp_path / "model", tokenizer=False)
    (folder / file).write_text("{}")
    assert find_model(FLAG, str(folder)).tokenizer == str(folder)


def test_flag_in_the_message_is_the_one_that_was_used(tmp_path):
    assert complaint(find_model, "--ref_model_name_or_path", str(tmp_path / "x")).startswith("--ref_model_name_or_path")


def test_adapter_with_its_base(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", str(base))
    assert find_model(FLAG, str(adapter)) == ModelSource(str(base), str(adapter), None, str(base))


def test_adapter_with_a_tokenizer_of_its_own(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", str(base), tokenizer=True)
    assert find_model(FLAG, str(adapter)).tokenizer == str(adapter)
    # Also where the base has none.
    (base / "tokenizer.json").unlink()
    assert find_model(FLAG, str(adapter)).tokenizer == str(adapter)


def test_adapter_without_tokenizer_on_a_base_without_one(tmp_path):
    base = make_model(tmp_path / "base", tokenizer=False)
    adapter = make_adapter(tmp_path / "adapter", str(base))
    assert complaint(find_model, FLAG, str(adapter)).startswith(f"{FLAG} {base}: no tokenizer there")


def test_adapter_names_its_base_from_where_it_lies(tmp_path, monkeypatch):
    base = make_model(tmp_path / "run" / "base")
    adapter = make_adapter(tmp_path / "run" / "adapter", "../base")
    monkeypatch.chdir(tmp_path)
    assert find_model(FLAG, str(adapter)).base == str(base)


@pytest.mark.parametrize("base", ["/gone/base", "./gone", "../gone", "~/gone/base"])
def test_adapter_whose_base_is_gone(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = make_adapter(tmp_path / "adapter", base)
    said = complaint(find_model, FLAG, str(adapter))
    assert said.startswith(f"{FLAG} {adapter}: an adapter for {base}, which is no longer there")
    assert "move it back, or fix base_model_name_or_path" in said


@pytest.mark.parametrize("base", [None, "", 3])
def test_adapter_that_names_no_base(base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", base)
    said = complaint(find_model, FLAG, str(adapter))
    assert said == f"{FLAG} {adapter}: its adapter_config.json names no base model (base_model_name_or_path)"


def test_adapter_without_weights(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", str(base), weights=False)
    assert complaint(find_model, FLAG, str(adapter)) == (
        f"{FLAG} {adapter}: an adapter without weights (adapter_model.safetensors); save or copy them into it"
    )


def test_adapter_whose_base_has_no_weights(tmp_path):
    base = make_model(tmp_path / "base", weights=None)
    adapter = make_adapter(tmp_path / "adapter", str(base))
    assert complaint(find_model, FLAG, str(adapter)).startswith(
        f"{FLAG} {adapter}: its base model {base}: no weights there"
    )


def test_adapter_on_an_adapter_is_refused(tmp_path):
    base = make_model(tmp_path / "base")
    first = make_adapter(tmp_path / "first", str(base))
    second = make_adapter(tmp_path / "second", str(first))
    said = complaint(find_model, FLAG, str(second))
    assert said.startswith(f"{FLAG} {second}: an adapter for {first}, which is an adapter itself; merge that one first")
    said = complaint(find_policy, settings(first, adapter_name_or_path=str(first)))
    assert said == (
        f"--adapter_name_or_path {first}: {first} is an adapter already; "
        "name its base with --model_name_or_path, or leave one of the two out"
    )


def test_adapter_to_continue(tmp_path):
    base = make_model(tmp_path / "base")
    elsewhere = make_adapter(tmp_path / "elsewhere", "/gone/base")  # the base that is named counts
    assert find_policy(settings(base, adapter_name_or_path=str(elsewhere))) == ModelSource(
        str(base), str(elsewhere), None, str(base)
    )
    with_template = make_adapter(tmp_path / "tuned", str(base), tokenizer=True)
    source = find_policy(settings(base, adapter_name_or_path=str(with_template)))
    assert source.tokenizer == str(with_template)


def test_adapter_to_continue_that_is_none(tmp_path, monkeypatch):
    base, flag = make_model(tmp_path / "base"), "--adapter_name_or_path"
    monkeypatch.chdir(tmp_path)

    def said(adapter: object) -> str:
        return complaint(find_policy, settings(base, adapter_name_or_path=str(adapter)))

    assert said(tmp_path / "gone") == f"{flag} {tmp_path / 'gone'}: no such folder; check the path"
    file = base / "config.json"
    assert said(file) == f"{flag} {file}: a file; name the folder that holds adapter_config.json and the weights"
    assert said(base).startswith(f"{flag} {base}: no adapter_config.json there, so it is not an adapter; name a folder")
    bare = make_adapter(tmp_path / "bare", str(base), weights=False)
    assert said(bare).startswith(f"{flag} {bare}: an adapter without weights")
    assert said("someone/adapter").startswith(
        f"{flag} someone/adapter: no such folder here, not in the local hub cache"
    )


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_config_that_is_no_json_object(content, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content, encoding="latin-1")
    said = complaint(find_model, FLAG, str(tmp_path))
    assert said.startswith(str(tmp_path / "adapter_config.json"))
    assert "JSON" in said


def test_json_file_of_a_folder(tmp_path):
    (tmp_path / "some.json").write_text('{"a": 1}')
    assert read_json_file(str(tmp_path), "some.json", None) == {"a": 1}
    assert read_json_file(str(tmp_path), "other.json", None) is None


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "gpt2", "not a name!", "a/b/c"])
def test_hub_name_without_network(name):
    said = complaint(find_model, FLAG, name)
    assert said.startswith(f"{FLAG} {name}: no such folder")
    assert "\n" not in said
    assert "hub" in said


def test_adapter_of_a_hub_base_without_network(tmp_path):
    adapter = make_adapter(tmp_path / "adapter", "someone/base")
    said = complaint(find_model, FLAG, str(adapter))
    assert said.startswith(
        f"{FLAG} {adapter}: its base model someone/base: no such folder here, not in the local hub cache"
    )
    assert "name a local folder or connect" in said


def put_into_cache(cache: Path, name: str, files: dict[str, str]) -> None:
    """As the hub's client keeps a repository that it has downloaded."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "c0ffee" * 6 + "c0ff"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file, content in files.items():
        (snapshot / file).write_text(content)


def test_hub_names_in_the_local_cache_work_without_network(tmp_path):
    put_into_cache(tmp_path / "cache", "someone/base", {"config.json": "{}", "tokenizer.json": "{}"})
    assert find_model(FLAG, "someone/base") == ModelSource("someone/base", None, None, "someone/base")
    adapter_config = json.dumps({"base_model_name_or_path": "someone/base", "revision": "main"})
    put_into_cache(tmp_path / "cache", "someone/adapter", {"adapter_config.json": adapter_config})
    assert find_model(FLAG, "someone/adapter") == ModelSource("someone/base", "someone/adapter", "main", "someone/base")
    assert find_policy(settings("someone/base", adapter_name_or_path="someone/adapter")).adapter == "someone/adapter"
    (tmp_path / "cache" / "models--someone--adapter" / "refs" / "main").rename(
        tmp_path / "cache" / "models--someone--adapter" / "refs" / "v2"
    )
    assert find_model(FLAG, "someone/adapter", "v2").adapter_revision == "v2"


def test_offline_refusal_of_a_fresh_process_touches_no_network(tmp_path):
    """The whole way, with the environment variable that people set."""
    program = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('a connection was opened')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from utils.models.sources import find_model\n"
        "from utils.errors import UserError\n"
        "try: find_model('--model_name_or_path', 'someone/model')\n"
        "except UserError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--model_name_or_path someone/model: no such folder here, not in the local hub cache")


def hub_error(kind: str) -> Exception:
    cls = getattr(hub_errors, kind)
    error = cls.__new__(cls)  # the constructors want a response of the server
    error.args = ("the server's words",)
    return error


def chained(*links: Exception) -> Exception:
    """The first error, raised from the second, and so on, as `raise ... from` leaves them."""
    for error, reason in itertools.pairwise(links):
        error.__cause__ = reason
    return links[0]


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("GatedRepoError", "a gated model; accept its terms on its hub page, then log in with `hf auth login`"),
        (
            "RepositoryNotFoundError",
            "no such folder, and no such model on the hub (a private one needs `hf auth login`)",
        ),
        ("RevisionNotFoundError", "the hub has no such revision; see --model_revision"),
        ("RemoteEntryNotFoundError", "the hub repository has no config.json, so it is not a model; check the name"),
        ("EntryNotFoundError", "the hub repository has no config.json, so it is not a model; check the name"),
        ("HFValidationError", "no such folder, and not a possible hub name (owner/name)"),
        ("LocalEntryNotFoundError", "the hub cannot be reached; name a local folder or connect"),
        ("OfflineModeIsEnabled", "the hub cannot be reached; name a local folder or connect"),
    ],
)
def test_fault_of_the_hub_becomes_advice(kind, advice, monkeypatch):
    for links in ([hub_error(kind)], [OSError("a page of text"), hub_error(kind), ConnectionError("403")]):
        error = chained(*links)
        assert sources._hub_fault(error).endswith(advice)

    def fail(*arguments, **options):
        raise error  # the last of the two, as transformers raises it

    monkeypatch.setattr("transformers.utils.cached_file", fail)
    assert complaint(find_model, FLAG, "someone/model") == f"{FLAG} someone/model: {sources._hub_fault(error)}"


def test_fault_is_also_found_where_an_error_was_raised_while_another_was_handled():
    outer = OSError("a page of text")
    outer.__context__ = hub_error("GatedRepoError")
    assert sources._hub_fault(outer).startswith("a gated model")


def test_hub_repository_without_config(monkeypatch, tmp_path):
    """For a missing config.json transformers returns None, for another file it raises an error of its own."""
    monkeypatch.setattr("transformers.utils.cached_file", lambda *arguments, **options: None)
    said = complaint(find_model, FLAG, "someone/data")
    assert said == (f"{FLAG} someone/data: the hub repository has no config.json, so it is not a model; check the name")

    def fail(*arguments, **options):
        raise OSError("someone/data does not appear to have a file named adapter_config.json")

    monkeypatch.setattr("transformers.utils.cached_file", fail)
    base = make_model(tmp_path / "base")
    said = complaint(find_policy, settings(base, adapter_name_or_path="someone/data"))
    assert said == (
        "--adapter_name_or_path someone/data: the hub repository has no adapter_config.json, so it is not an adapter; "
        "check the name"
    )
