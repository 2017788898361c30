"""The command `swag-lora reproduce`: a kill at any point, and what is refused before training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from encoder_models import COLORS, save_colors, save_questions, save_tiny_bert, write_lines
from experiment_runs import predictions, same_predictions, table_without_seconds

from swag_lora.cli import main
from swag_lora.experiment import run

QUICK = (
    "--seeds 0,1 --epochs 3 --start 0.7 --collections 3 --anneal-epochs 2 --rank 3 --lr 0.03 --batch-size 8 "
    "--samples 8 --max-length 16"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    save_tiny_bert(home / "bert")
    save_colors(home / "colors")
    save_questions(home / "questions")
    return home


def command(home, output, *options, data="colors"):
    asked = ["reproduce", home / "bert", "--data", home / data, "--output", output, *QUICK.split(), "--no-figures"]
    return [str(one) for one in (*asked, *options)]


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert ended(command(home, folder)).returncode == 0
    return folder


def started(arguments, **output):
    """The command in a process of its own, as the killed ones: this one's `torch.empty` is not torch's."""
    search = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-m", "swag_lora.cli", *arguments],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        **output,
    )


def ended(arguments):
    """The process at its end, with what it said."""
    process = started(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def killed(arguments, appears):
    """Run the command, and kill it when the file appears."""
    process = started(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not appears.exists():
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and appears.exists()


def test_killed_twice_and_started_again(home, finished, tmp_path):
    """In the SWAG phase of the second fit, and among the predictions."""
    folder = tmp_path / "run"
    killed(command(home, folder), folder / "seed-1" / "unfinished" / "map.safetensors")
    assert not (folder / "seed-1" / "swag_posterior.safetensors").exists()
    done = [folder / "seed-0" / "swag_posterior.safetensors"]
    killed_at = {path: path.stat().st_mtime_ns for path in done}
    killed(command(home, folder), folder / "predictions" / "temperature" / "seed-0.safetensors")
    assert not (folder / "results.json").exists()
    for pattern in ("seed-*/swag_posterior.safetensors", "seed-*/selection.json", "predictions/*/seed-?.safetensors"):
        killed_at |= {path: killed_at.get(path, path.stat().st_mtime_ns) for path in folder.glob(pattern)}
    assert 2 + 2 + 5 <= len(killed_at) < 22
    told = ended(command(home, folder)).stderr
    assert {path: path.stat().st_mtime_ns for path in killed_at} == killed_at
    same_predictions(finished, folder)
    assert table_without_seconds(finished) == table_without_seconds(folder)
    assert "[1/22] fit of seed 0, done before" in told and "[22/22] MultiSWAG, all seeds\n" in told


def test_the_results_go_where_asked(home, finished, tmp_path, capsys):
    again = shutil.copytree(finished, tmp_path / "run")
    assert main(command(home, again, "--json", "-")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((again / "results.json").read_text())
    assert "ECE-15" in err and "MultiSWAG" in err
    assert predictions(again).keys() == predictions(finished).keys()


def refused(capsys, *arguments):
    """The one line that the command answers with."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert err.endswith("\n") and err.count("\n") == 1 and "error: " in err, err
    return err


@pytest.fixture
def untrained(home, tmp_path, capsys, monkeypatch):
    """Refused before any folder is made, also by a dry run."""

    def nothing_trained(*args, **kwargs):
        raise AssertionError("training has begun")

    monkeypatch.setattr(run, "fit", nothing_trained)

    def check(*options, data="colors"):
        line = refused(capsys, *command(home, tmp_path / "out", *options, data=data))
        assert not (tmp_path / "out").exists()
        assert refused(capsys, *command(home, tmp_path / "out", *options, "--dry-run", data=data)) == line
        return line

    return check


TEXTS = [{"text": "the sea is red", "label": 0}, {"text": "the hat is blue", "label": 2}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"label": 1}, 'no column "text"'),
        ({"text": "the sky"}, 'no column "label"'),
        ({"text": "the sky", "label": 3}, "unknown label 3"),
        ({"text": "the sky", "label": "pink"}, "unknown label 'pink'"),
        ("{oops", "not JSON"),
    ],
)
@pytest.mark.parametrize("where", ["ood", "val"])
def test_a_bad_line_of_texts(tmp_path, untrained, row, reason, where):
    if where == "ood":
        path = tmp_path / "shift" / "test.jsonl"
        write_lines(path, [*TEXTS, row])
        options = {"data": "colors"}, ["--ood", path.parent]
    else:
        path = save_colors(tmp_path / "colors") / "val.jsonl"
        write_lines(path, [*TEXTS, row])
        options = {"data": path.parent}, []
    line = untrained(*options[1], **options[0])
    assert f"{path}:3: " in line and reason in line


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "which ?", "choices": ["sea", "sky"]}, 'no column "answer"'),
        ({"question": "which ?", "answer": 0}, 'no column "choices"'),
        ({"question": "which ?", "choices": ["sea", "sky"], "answer": 2}, "unknown answer 2; it must be in 0..1"),
        ({"question": "which ?", "choices": ["sea", "sky"], "answer": "C"}, "unknown answer 'C'"),
    ],
)
def test_a_bad_line_of_questions(tmp_path, untrained, row, reason):
    path = tmp_path / "shift.jsonl"
    write_lines(path, [{"question": "what ?", "choices": ["sea", "sky"], "answer": 1}, row])
    line = untrained("--ood", path, data="questions")
    assert f"{path}:2: " in line and reason in line


def test_other_classes_out_of_distribution(tmp_path, untrained, home, capsys):
    save_colors(tmp_path / "shift")
    (tmp_path / "shift" / "labels.json").write_text('["red", "green", "pink"]')
    line = untrained("--ood", tmp_path / "shift")
    assert f"--ood-unlabelled {tmp_path / 'shift'}" in line and "class 2 is 'pink' against 'blue'" in line
    (tmp_path / "shift" / "labels.json").write_text(json.dumps([*COLORS, "pink"]))
    assert "4 classes against 3" in untrained("--ood", tmp_path / "shift")
    (tmp_path / "shift" / "labels.json").unlink()
    write_lines(tmp_path / "shift" / "test.jsonl", [{"text": "red", "label": "red"}, {"text": "pink", "label": "pink"}])
    line = untrained("--ood", tmp_path / "shift")
    assert "test.jsonl:2: unknown label 'pink'" in line and f"--ood-unlabelled {tmp_path / 'shift'}" in line
    assert main(command(home, tmp_path / "out", "--ood-unlabelled", tmp_path / "shift", "--dry-run")) == 0


def test_questions_for_a_classifier_and_the_other_way_round(home, untrained):
    assert "questions is multiple choice" in untrained("--ood", home / "questions")
    assert "questions is multiple choice" in untrained("--ood-unlabelled", home / "questions")
    assert "colors is text classification" in untrained("--ood", home / "colors", data="questions")
    assert "classification" in untrained("--task", "scores")


def test_no_validation_data(home, tmp_path, untrained, capsys):
    save_colors(tmp_path / "bare", {"train": 16, "test": 8})
    bare = {"data": tmp_path / "bare"}
    for options, asked in (
        ([], "--scale auto"),
        (["--scale", "0.5", "--rank", "auto"], "--rank auto"),
        (["--scale", "0.5", "--methods", "swag,map-best"], "map-best"),
        (["--scale", "0.5", "--methods", "temperature"], "temperature"),
        (["--scale", "0.5", "--methods", "ensemble-best,swa"], "ensemble-best"),
    ):
        line = untrained(*options, **bare)
        assert asked in line and "no val split" in line and "--val-fraction" in line
    capsys.readouterr()
    assert main(command(home, tmp_path / "out", "--scale", "0.5", "--dry-run", **bare)) == 0
    assert "MAP, last, seed 0" in (told := capsys.readouterr().out) and "best" not in told and "temp" not in told
    assert main(command(home, tmp_path / "out", "--val-fraction", "0.4", "--dry-run", **bare)) == 0
    assert "best" in capsys.readouterr().out


def test_missing_and_empty_splits(tmp_path, untrained):
    save_colors(tmp_path / "a", {"train": 8, "val": 4})
    assert "no test split" in untrained(data=tmp_path / "a")
    save_colors(tmp_path / "b", {"val": 8, "test": 4})
    assert "no train split" in untrained(data=tmp_path / "b")
    save_colors(tmp_path / "c", {"train": 8, "val": 0, "test": 4})
    assert "the val split is empty" in untrained(data=tmp_path / "c")
    assert "no folder" in untrained("--ood", tmp_path / "nowhere")
    assert "no folder" in untrained(data=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--methods swag,sgld", "'sgld'"),
        ("--samples 7", "got 7"),
        ("--samples 1", "at least 2"),
        ("--seeds 0,0", "different"),
        ("--seeds 0,-1", "--seeds"),
        ("--seeds 0,4294967296", "2^32"),
        ("--collections 3 --anneal-epochs 4", "--anneal-epochs"),
        ("--seeds ,", "--seeds"),
        ("--limit foo=3", "'foo'"),
        ("--limit train=none", "--limit"),
        ("--limit train=0", "--limit"),
        ("--scale -1", "--scale"),
        ("--rank 1", "--rank"),
        ("--collections 1", "--collections"),
        ("--lora-dropout 0", "MC dropout"),
        ("--template nowhere.txt", "nowhere.txt"),
        ("--train-head", "train_head"),
        ("--recipe best", "--recipe"),
    ],
)
def test_bad_options(untrained, options, named):
    assert named in untrained(*options.split())


def test_a_template_with_an_unknown_field(tmp_path, untrained):
    template = tmp_path / "prompt.txt"
    template.write_text("the text is\n{text} or {txt}\n")
    line = untrained("--template", template)
    assert f"{template}:2: unknown field {{txt}}" in line and "{text}" in line


def test_no_model(home, tmp_path, capsys):
    line = refused(capsys, "reproduce", tmp_path, "--data", home / "colors", "--output", tmp_path / "out")
    assert "cannot load the model" in line and not (tmp_path / "out").exists()


def test_an_output_that_is_taken(home, finished, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for options in ([], ["--dry-run"]):
        assert "holds no run" in refused(capsys, *command(home, tmp_path / "mine", *options))
        line = refused(capsys, *command(home, finished, "--samples", "4", *options))
        assert "(samples)" in line and str(finished) in line
        assert "--output" in refused(capsys, *command(home, tmp_path / "no" / "where", *options))
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
