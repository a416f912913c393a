"""The notebook of examples/: its cells run in order, as they are typed."""

from __future__ import annotations

import json
import re
import shlex

from shared.runs import ROOT, read_record

NOTEBOOK = json.loads((ROOT / "examples" / "colab.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
COMMAND = re.compile(r"^!python advanced_dpo_script\.py (.*)$", re.MULTILINE)


def test_it_holds_no_outputs_and_public_commands_alone():
    for cell in CELLS:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        source = "".join(cell["source"])
        assert source.count("!") == len(COMMAND.findall(source))
        for module in re.findall(r"^\s*(?:from|import) (\w+)", source, flags=re.MULTILINE):
            assert module in ("advanced_dpo", "transformers")
    installing = [cell for cell in CELLS if "install" in cell["metadata"].get("tags", ())]
    assert ["".join(cell["source"]) for cell in installing] == ["%pip install --quiet ."]


def test_its_cells_run(run_script, tmp_path, monkeypatch, capsys):
    """`!python advanced_dpo_script.py ...` runs in this process, which has the libraries already."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shown: list[str] = []

    def run_command(line: str) -> None:
        code, out, err = run_script(*shlex.split(line))
        assert code in (0, 3 if line.startswith("data") else 0), out + err
        shown.append(out)

    names = {"run_command": run_command}
    for cell in CELLS:
        if "install" not in cell["metadata"].get("tags", ()):
            # {NAME} in a command is a name of the notebook
            source = COMMAND.sub(lambda match: f"run_command(f{match[1]!r})", "".join(cell["source"]))
            exec(source, names)
            shown.append(capsys.readouterr().out)
    assert read_record(tmp_path / "runs" / "notebook")["status"] == "finished"
    metrics = names["run"].metrics
    assert metrics["held_out"]["accuracy"] > metrics["held_out_before"]["accuracy"]
    for path in ("runs/findings.html", "runs/notebook/report.html", "runs/merged/model.safetensors"):
        assert (tmp_path / path).is_file(), path
    for words in ("accuracy", "the model wins", "I read The Winter Promise"):
        assert any(words in text for text in shown), words
