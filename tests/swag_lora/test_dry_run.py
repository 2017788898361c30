"""What a dry run says, against real steps and passes, and that it leaves nothing."""

import re
from dataclasses import replace

import pytest
import torch
from encoder_models import save_questions, save_tiny_bert, save_tiny_gpt2
from experiment_runs import QUICK, settings_of
from torch.nn.functional import cross_entropy

from swag_lora import SampledModel, memory
from swag_lora.checkpoint import POSTERIOR_NAME
from swag_lora.experiment import dry_run
from swag_lora.experiment.run import claim, prepare


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    home = tmp_path_factory.mktemp("questions")
    save_tiny_bert(home / "bert")
    save_tiny_gpt2(home / "gpt2")
    save_questions(home / "questions")
    return home


def longest(task, tokenizer, examples, size):
    encoded = sorted(task.encode(tokenizer, examples), key=lambda example: -example["length"])
    return task.collate(tokenizer, encoded[:size])


@pytest.mark.parametrize(
    ("model", "data", "kind"),
    [
        ("bert", "colors", None),
        ("bert", "questions", None),
        ("gpt2", "questions", None),
        ("gpt2", "questions", "scores"),
    ],
)
def test_bytes_are_those_of_a_real_step_and_a_real_pass(home, questions, model, data, kind):
    where = home if data == "colors" else questions
    settings = settings_of(
        home, QUICK, model=str(where / model), data=str(where / data), kind=kind, max_length=32, batch_size=8
    )
    sources, task, _ = prepare(settings)
    found = dry_run.needs(settings, sources, task)
    tokenizer = task.tokenizer()
    real = task.peft_model(tokenizer, settings.recipe.lora()).train()
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found["trained weights"] == 4 * trained
    assert found["posterior of a seed"] == (2 + settings.recipe.rank) * trained * 4
    assert found["base model"] == pytest.approx(
        sum(p.nbytes for p in real.parameters() if not p.requires_grad), rel=0.05
    )

    train, test = sources.inside.split("train"), sources.inside.split("test")
    batch = longest(task, tokenizer, [*train, *test], settings.recipe.batch_size)
    with memory.PeakBytes() as step:
        cross_entropy(task.logits(real, batch).float(), batch["labels"]).backward()
    assert found["activations of a training step"] == pytest.approx(step.peak, rel=0.03)

    (title,) = (name for name in found if name.startswith("activations of a pass of"))
    samples = int(re.search(r"\d+", title)[0])
    assert samples == 16, "two seeds of eight samples go together"
    batch = longest(task, tokenizer, test, settings.batch_size)
    real.eval()
    with memory.PeakBytes() as point, torch.no_grad():
        task.logits(real, batch)
    assert found[title] == pytest.approx(samples * point.peak, rel=0.06)
    weights = {n: p.detach().expand(samples, *p.shape) for n, p in real.named_parameters() if p.requires_grad}
    with memory.PeakBytes() as sampled, torch.no_grad():
        task.logits(SampledModel(real, weights), batch)
    assert 0.9 * sampled.peak < found[title] < 1.25 * sampled.peak, "rows that samples share count each time"

    assert (
        found["training, all of it"] > found["activations of a training step"] + found["base model"] + 6 * 4 * trained
    )
    assert found["prediction, all of it"] > found[title] + found["base model"] + 2 * found["posterior of a seed"]


def test_more_of_everything_needs_more(home):
    def needs(**changes):
        settings = settings_of(home, QUICK, **changes)
        sources, task, _ = prepare(settings)
        return dry_run.needs(settings, sources, task)

    usual, large = needs(), needs(batch_size=16)
    one_seed = needs(seeds=(0,))
    assert large["activations of a pass of 16 samples"] == 16 * usual["activations of a pass of 16 samples"] // 24
    assert one_seed["on the disk"] * 2 == usual["on the disk"]
    assert usual["prediction, all of it"] > one_seed["prediction, all of it"]


def test_nothing_is_written_and_what_is_done_is_marked(home, tmp_path, capsys):
    settings, folder = settings_of(home, QUICK, methods=("map-last", "swag", "multiswag")), tmp_path / "run"
    dry_run.show(folder, settings)
    assert not folder.exists()
    lines = capsys.readouterr().out.splitlines()
    stages = [line.strip() for line in lines if re.match(r" +\d+ ", line)]
    assert stages == [
        "1 fit of seed 0, 2 epochs of 6 steps, then 18 steps",
        "2 fit of seed 1, 2 epochs of 6 steps, then 18 steps",
        "3 scale for seed 0",
        "4 scale for seed 1",
        "5 MAP, last, seed 0",
        "6 MAP, last, seed 1",
        "7 SWAG, seed 0",
        "8 SWAG, seed 1",
        "9 MultiSWAG, all seeds",
    ]
    assert "48 training and 24 validation examples; predicts test (24), oos_test (8)" in lines[1]
    assert any(re.fullmatch(r"posterior of a seed +\d.* KiB", line) for line in lines)

    sources, task, methods = prepare(settings)
    claim(folder, settings, sources, task, methods)
    (folder / "seed-1").mkdir()
    (folder / "seed-1" / POSTERIOR_NAME).touch()
    (folder / "predictions" / "swag").mkdir(parents=True)
    (folder / "predictions" / "swag" / "seed-0.safetensors").touch()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    dry_run.show(folder, settings)
    out = capsys.readouterr().out.splitlines()
    done = [line.split(", done")[0].strip() for line in out if line.endswith(", done")]
    assert done == [stages[1], stages[6]]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_every_so_many_steps(home, tmp_path, capsys):
    dry_run.show(tmp_path / "run", settings_of(home, replace(QUICK, every=2), methods=("swag",)))
    assert "1 fit of seed 0, 2 epochs of 6 steps, then 6 steps" in capsys.readouterr().out
