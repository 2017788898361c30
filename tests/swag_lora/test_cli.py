import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from encoder_models import save_colors, save_questions, save_tiny_bert, save_tiny_gpt2, write_lines
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from swag_lora.cli import main

FAST = ["--epochs", "12", "--collections", "3", "--rank", "3", "--batch-size", "8", "--lr", "0.03", "--threads", "1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, two data folders, and a posterior fitted to each."""
    home = tmp_path_factory.mktemp("cli")
    save_tiny_bert(home / "bert")
    save_colors(home / "colors")
    save_questions(home / "questions")
    for name in ("colors", "questions"):
        output = ["--data", str(home / name), "--output", str(home / f"{name}-fit")]
        assert main(["fit", str(home / "bert"), *output, *FAST]) == 0
    return home


def evaluate(home, capsys, name="colors", *options):
    capsys.readouterr()
    assert main(["evaluate", str(home / f"{name}-fit"), "--data", str(home / name), "--json", "-", *options]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    """The one line that the command answers with."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert "error: " in err and "Traceback" not in err
    return err


def test_fit_then_evaluate(home, capsys):
    result = evaluate(home, capsys, "colors", "--samples", "8")
    names = [row["name"] for row in result["rows"]]
    assert names == ["MAP, last epoch", "MAP, best epoch", "SWA (mean)", "SWAG, K=8"]
    assert [row["samples"] for row in result["rows"]] == [1, 1, 1, 8]
    assert result["examples"] == {"test": 24, "oos_test": 8} and result["method"] == "antithetic"
    for row in result["rows"]:
        assert {"accuracy", "nll", "ece", "brier", "ood_auroc_entropy"} <= row.keys()
        assert 0 <= row["accuracy"] <= 1 and row["nll"] > 0
    last, _, mean, swag = (row["nll"] for row in result["rows"])
    assert len({last, mean, swag}) == 3


def test_point_estimates_are_the_last_and_the_best_epoch(home, tmp_path, capsys):
    """Evaluated on the validation data, they have the validation NLL that the fit saw, there perhaps in bfloat16."""
    (tmp_path / "test.jsonl").write_text((home / "colors" / "val.jsonl").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(home / "colors-fit"), "--data", str(tmp_path), "--json", "-", "--samples", "2"]) == 0
    last, best, *_ = (row["nll"] for row in json.loads(capsys.readouterr().out)["rows"])
    seen = json.loads((home / "colors-fit" / "fit.json").read_text())["validation_nll"]
    assert last == pytest.approx(seen[-1], rel=2e-3) and best == pytest.approx(min(seen), rel=2e-3)
    assert min(seen) < 0.8 * seen[0] and seen[-1] > 1.01 * min(seen)


def test_the_table_goes_to_the_standard_output(home, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(home / "colors-fit"), "--data", str(home / "colors"), "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert "SWAG, K=2" in out and "ECE-15" in out and "OOD AUROC" in out


def test_evaluate_is_repeatable_and_takes_seed_scale_and_method(home, capsys):
    first = evaluate(home, capsys, "colors", "--samples", "4")
    assert evaluate(home, capsys, "colors", "--samples", "4") == first
    swag = [row["nll"] for row in first["rows"]][-1]
    changes = (["--seed", "1"], ["--scale", "9"], ["--method", "iid"])
    for change in changes:
        other = evaluate(home, capsys, "colors", "--samples", "4", *change)
        assert other["rows"][-1]["nll"] != swag and other["rows"][:3] == first["rows"][:3]
    mean = evaluate(home, capsys, "colors", "--samples", "4", "--scale", "0")["rows"]
    assert mean[-1]["nll"] == pytest.approx(mean[2]["nll"], rel=1e-5)


def test_batches_do_not_change_the_table(home, capsys):
    whole = evaluate(home, capsys, "colors", "--samples", "4")
    single = evaluate(home, capsys, "colors", "--samples", "4", "--batch-size", "1")
    for a, b in zip(whole["rows"], single["rows"], strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-4)


def test_fit_is_repeatable(home, tmp_path, capsys):
    output = ["--data", str(home / "colors"), "--output", str(tmp_path / "again")]
    assert main(["fit", str(home / "bert"), *output, *FAST]) == 0
    for file in ("swag_posterior.safetensors", "map/adapter_model.safetensors", "map-best/adapter_model.safetensors"):
        first, second = load_file(home / "colors-fit" / file), load_file(tmp_path / "again" / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "again" / "fit.json").read_text() == (home / "colors-fit" / "fit.json").read_text()


def test_the_folder_is_a_peft_adapter_at_the_mean(home):
    """It holds the pooler and head that the checkpoint lacks: whatever they were made as, it predicts the same."""
    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(home / "bert", num_labels=3)
        model = PeftModel.from_pretrained(base, str(home / "colors-fit")).eval()
        logits.append(model(input_ids=torch.tensor([[2, 5, 3]])).logits)
    assert torch.equal(*logits)


def test_multiple_choice(home, capsys):
    result = evaluate(home, capsys, "questions", "--samples", "4")
    assert [row["name"] for row in result["rows"]][-1] == "SWAG, K=4"
    assert all(0 <= row["accuracy"] <= 1 and row["nll"] < 20 for row in result["rows"])


def test_multiple_choice_on_a_model_without_a_head_for_it(home, tmp_path, capsys):
    save_tiny_gpt2(tmp_path / "gpt2")
    fit = ["--data", str(home / "questions"), "--output", str(tmp_path / "fit"), *FAST]
    assert main(["fit", str(tmp_path / "gpt2"), *fit]) == 0
    capsys.readouterr()
    options = ["--data", str(home / "questions"), "--samples", "4", "--json", "-"]
    assert main(["evaluate", str(tmp_path / "fit"), *options]) == 0
    whole = json.loads(capsys.readouterr().out)["rows"]
    assert main(["evaluate", str(tmp_path / "fit"), *options, "--batch-size", "1"]) == 0
    for row, single in zip(whole, json.loads(capsys.readouterr().out)["rows"], strict=True):
        assert row["nll"] == pytest.approx(single["nll"], rel=1e-4)


def test_fit_without_validation_split(home, tmp_path, capsys):
    save_colors(tmp_path / "data", {"train": 16, "test": 8})
    shutil.copytree(home / "colors-fit", tmp_path / "fit")
    options = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "fit"), "--train-examples", "8"]
    assert main(["fit", str(home / "bert"), *options, *FAST]) == 0
    history = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert history["scale"] == 0.5 and history["data"]["train"] == 8 and history["validation_nll"] == []
    assert not (tmp_path / "fit" / "map-best").exists()


def test_info(home, capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "reference" in out
    assert main(["info", str(home / "colors-fit")]) == 0
    out = capsys.readouterr().out
    assert "collections" in out and "3 classes" in out and "LoRA r=8" in out


@pytest.mark.parametrize(
    "option, text",
    [
        ("--samples", "0"),
        ("--samples", "two"),
        ("--scale", "-1"),
        ("--scale", "nan"),
        ("--method", "sobol"),
        ("--batch-size", "0"),
        ("--seed", "-1"),
    ],
)
def test_bad_option(home, capsys, option, text):
    line = refused(capsys, "evaluate", home / "colors-fit", "--data", home / "colors", option, text)
    assert option in line and text in line


def test_bad_fit_options(home, tmp_path, capsys):
    fit = ["fit", home / "bert", "--data", home / "colors", "--output", tmp_path / "out"]
    assert "--rank" in refused(capsys, *fit, "--rank", "1")
    assert "--start" in refused(capsys, *fit, "--start", "0")
    assert "no LoRA on" in refused(capsys, *fit, "--target-modules", "nothing_here")
    assert "has no sampled form" in refused(capsys, *fit, "--target-modules", "word_embeddings")
    assert [path.name for path in (tmp_path / "out" / "unfinished").iterdir()] == ["arguments.json"]
    assert not (tmp_path / "out" / "swag_posterior.safetensors").exists()


def test_missing_and_foreign_folders(home, tmp_path, capsys):
    colors = ["--data", home / "colors"]
    assert "no folder" in refused(capsys, "evaluate", tmp_path / "nowhere", *colors)
    assert "it is not a folder that" in refused(capsys, "evaluate", home / "bert", *colors)
    assert "no folder" in refused(capsys, "evaluate", home / "colors-fit", "--data", tmp_path / "nowhere")
    assert "no train split" in refused_fit(home, capsys, home / "colors-fit-only-val", tmp_path)
    assert "cannot load the model" in refused(capsys, "fit", tmp_path, *colors, "--output", tmp_path / "out")
    assert "holds no posterior" in refused(capsys, "info", home / "bert")
    assert "no folder" in refused(capsys, "info", tmp_path / "nowhere")


def refused_fit(home, capsys, folder, tmp_path):
    save_colors(folder, {"val": 3})
    return refused(capsys, "fit", home / "bert", "--data", folder, "--output", tmp_path / "out")


def test_a_posterior_that_is_gone_truncated_or_of_another_model(home, tmp_path, capsys):
    def damaged(name, damage):
        folder = tmp_path / name
        shutil.copytree(home / "colors-fit", folder)
        damage(folder)
        return refused(capsys, "evaluate", folder, "--data", home / "colors")

    posterior = "swag_posterior.safetensors"
    whole = (home / "colors-fit" / posterior).read_bytes()
    assert "no posterior" in damaged("gone", lambda folder: (folder / posterior).unlink())
    assert "truncated" in damaged("cut", lambda folder: (folder / posterior).write_bytes(whole[:-100]))
    assert "task.json" in damaged("task", lambda folder: (folder / "task.json").write_text("{}"))
    for number, part in enumerate(("", "map")):
        adapter = Path(part, "adapter_model.safetensors")
        cut = damaged(f"cut-{number}", lambda folder, adapter=adapter: os.truncate(folder / adapter, 100))
        assert "does not fit" in cut or "truncated" in cut
    assert "no adapter" in damaged("adapter", lambda folder: (folder / "adapter_config.json").unlink())
    other = shutil.copytree(home / "bert", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    line = refused(capsys, "evaluate", home / "colors-fit", "--data", home / "colors", "--model", other)
    assert "layer" in line


def test_bad_data_lines(home, tmp_path, capsys):
    def with_line(line):
        save_colors(tmp_path)
        write_lines(tmp_path / "test.jsonl", [{"text": "red", "label": 0}, line])
        return refused(capsys, "evaluate", home / "colors-fit", "--data", tmp_path)

    assert "test.jsonl:2: not JSON" in with_line("{oops")
    assert "test.jsonl:2: unknown label 'pink'" in with_line({"text": "sea", "label": "pink"})
    write_lines(tmp_path / "test.jsonl", [])
    assert "the test split is empty" in refused(capsys, "evaluate", home / "colors-fit", "--data", tmp_path)


def test_labels_that_do_not_match_the_model(home, tmp_path, capsys):
    save_colors(tmp_path)
    (tmp_path / "labels.json").write_text('["red", "green", "pink"]')
    line = refused(capsys, "evaluate", home / "colors-fit", "--data", tmp_path)
    assert "class 2 is 'pink' against 'blue'" in line
    line = refused(capsys, "evaluate", home / "colors-fit", "--data", home / "questions")
    assert "is multiple choice, the model is for text classification" in line
    torch.manual_seed(0)
    wide = AutoModelForSequenceClassification.from_pretrained(home / "bert", num_labels=7)
    shutil.copytree(home / "bert", tmp_path / "wide")
    wide.save_pretrained(tmp_path / "wide")
    line = refused(capsys, "fit", tmp_path / "wide", "--data", home / "colors", "--output", tmp_path / "out")
    assert "does not fit a task of 3 classes" in line


def test_a_budget_that_no_sample_fits(home, capsys):
    line = refused(capsys, "evaluate", home / "colors-fit", "--data", home / "colors", "--memory", "1KiB")
    assert "less than one draw needs" in line
    line = refused(capsys, "evaluate", home / "colors-fit", "--data", home / "colors", "--memory", "much")
    assert 'a text such as "4GiB"' in line


def test_more_samples_than_memory_holds(home, capsys):
    small = evaluate(home, capsys, "colors", "--samples", "64", "--memory", "2MiB")["rows"][-1]
    whole = evaluate(home, capsys, "colors", "--samples", "64")["rows"][-1]
    assert small["nll"] == pytest.approx(whole["nll"], rel=1e-5)


def test_until_sure(home, capsys):
    sure = evaluate(home, capsys, "colors", "--samples", "64", "--tolerance", "0.03")
    assert sure["tolerance"] == 0.03 and sure["rows"][-1]["name"] == "SWAG, K up to 64"
    assert 4 <= sure["rows"][-1]["samples_drawn"] < 64
    assert "tolerance" in refused(
        capsys, "evaluate", home / "colors-fit", "--data", home / "colors", "--tolerance", "0"
    )


def test_choices_are_examples_too(home, capsys):
    """Questions have two to four choices: an example that leaves takes all its rows with it."""
    sure = evaluate(home, capsys, "questions", "--samples", "64", "--tolerance", "0.02")["rows"][-1]
    whole = evaluate(home, capsys, "questions", "--samples", "64")["rows"][-1]
    assert sure["samples_drawn"] < 64 and abs(sure["nll"] - whole["nll"]) < 0.02


def test_rows_of_each_layer(home, capsys):
    evaluate(home, capsys, "colors", "--samples", "4")
    assert (
        main(["evaluate", *map(str, (home / "colors-fit", "--data", home / "colors", "--samples", 4, "--verbose"))])
        == 0
    )
    told = capsys.readouterr().err
    rows = {line.split()[0]: line.split()[1] for line in told.splitlines() if "encoder.layer" in line}
    assert list(rows) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert set(rows.values()) == {str(4 * (24 + 8))}, "4 samples of the test examples and those of oos_test"


def test_resume_goes_on_from_the_folder(home, capsys, tmp_path):
    expected = evaluate(home, capsys, "colors", "--samples", "8")
    begun = evaluate(home, capsys, "colors", "--samples", "8", "--resume", str(tmp_path / "state"))
    assert begun == expected
    files = {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()}
    assert set(files) == {"test.safetensors", "oos_test.safetensors"}
    assert evaluate(home, capsys, "colors", "--samples", "8", "--resume", str(tmp_path / "state")) == expected
    line = refused(
        capsys, "evaluate", home / "colors-fit", "--data", home / "colors", "--samples", "8", "--seed", "1",
        "--resume", tmp_path / "state",
    )  # fmt: skip
    assert "belongs to another posterior or to other arguments" in line


def test_odd_samples_are_no_pairs(home, capsys):
    options = ["--samples", "3", "--method", "antithetic"]
    assert "must be even" in refused(capsys, "evaluate", home / "colors-fit", "--data", home / "colors", *options)
    assert evaluate(home, capsys, "colors", "--samples", "3")["method"] == "iid"


def test_json_into_a_missing_folder_is_refused_before_the_work(home, tmp_path, capsys):
    target = tmp_path / "nowhere" / "result.json"
    line = refused(capsys, "evaluate", home / "colors-fit", "--data", home / "colors", "--json", target)
    assert "--json" in line


def test_no_command_and_unknown_command(capsys):
    assert "required" in refused(capsys)
    assert "fly" in refused(capsys, "fly")


def test_a_process_ends_with_one_line(tmp_path):
    """As a user sees it; ahead of it stands what quantisation libraries say when transformers imports them."""
    search = os.pathsep.join(path for path in sys.path if path)
    ended = subprocess.run(
        [sys.executable, "-m", "swag_lora.cli", "evaluate", str(tmp_path), "--data", str(Path(__file__).parent)],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and ended.stdout == ""
    *before, last = ended.stderr.splitlines()
    assert last.startswith("swag-lora: error: ")
    assert not any("swag" in line.replace(sys.prefix, "") or "Traceback" in line for line in before)
