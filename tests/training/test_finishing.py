"""The end of a run: what is said of what it leaves."""

from __future__ import annotations


def test_a_full_model_is_no_adapter_whatever_else_lies_in_its_folder(run_script, tiny_model, pairs_file, tmp_path):
    folder = tmp_path / "run"
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", folder)
    quick = ("--max_steps", 1, "--validation_split", "none", "--overwrite_output_dir")
    assert run_script(*flags, *quick)[0] == 0
    (folder / "about_adapters.txt").write_text("mine")
    code, out, err = run_script(*flags, *quick)
    assert code == 0, out + err
    assert f"model, tokenizer and record (run.json): {folder}" in out
    code, out, err = run_script(*flags, *quick, "--use_lora")
    assert code == 0, out + err
    assert f"adapter, tokenizer and record (run.json): {folder}" in out
