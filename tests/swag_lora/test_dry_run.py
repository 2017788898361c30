"""What a dry run says, against real steps and passes, and that it leaves nothing."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from encoder_models import save_questions, save_tiny_bert, save_tiny_gpt2, write_lines
from experiment_runs import QUICK, settings_of
from posterior_models import step
from torch.nn.functional import cross_entropy

from swag_lora import SampledModel, SwagPosterior, memory
from swag_lora.checkpoint import POSTERIOR_NAME
from swag_lora.evaluator import Evaluator, Sampling
from swag_lora.experiment import dry_run
from swag_lora.experiment.run import claim, prepare
from swag_lora.mixture import Mixture
from swag_lora.scale import SAMPLES


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    home = tmp_path_factory.mktemp("questions")
    save_tiny_bert(home / "bert")
    save_tiny_gpt2(home / "gpt2")
    save_questions(home / "questions")
    return home


@pytest.fixture(scope="module")
def long(questions):
    """Tasks out of distribution whose texts are longer than those of any other split."""
    text, choice = " ".join(["the sea is red or"] * 4), "the hat or the leaf"
    write_lines(questions / "long-colors" / "test.jsonl", [{"text": text, "label": "red"}] * 9)
    rows = [{"question": "which is red ?", "choices": [choice] * 4, "answer": 0}] * 9
    write_lines(questions / "long-questions" / "test.jsonl", rows)
    return {data: str(questions / f"long-{data}") for data in ("colors", "questions")}


def needs(settings):
    sources, task, _ = prepare(settings)
    return dry_run.needs(settings, sources, task, dry_run.lengths(sources, task))


def of_a_pass(found):
    (title,) = (name for name in found if name.startswith("activations of a pass of"))
    return int(re.search(r"\d+", title)[0]), found[title]


def mixture(model):
    """Of the posteriors of two seeds."""
    members = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        members.append(SwagPosterior(model, rank=3))
        for _ in range(3):
            step(model)
            members[-1].collect()
    return Mixture(members)


def peak_of_predictions(settings):
    """Bytes of tensors that the largest of a real mixture's predictions has alive at once, and the samples of its passes."""
    sources, task, _ = prepare(settings)
    tokenizer = task.tokenizer()
    model = task.peft_model(tokenizer, settings.recipe.lora()).eval()
    evaluator = Evaluator(task, model, tokenizer, settings.batch_size)
    posterior = mixture(model)
    peaks, samples = [], set()
    for examples in sources.splits().values():
        encoded, sampling = evaluator.encode(examples), Sampling(settings.samples * len(settings.seeds))
        samples.add(evaluator.samples_per_pass(encoded, sampling))
        with memory.PeakBytes() as made:
            evaluator.sampled(posterior, encoded, sampling)
        peaks.append(made.peak)
    return max(peaks), samples


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
def test_bytes_are_those_of_a_real_step_and_a_real_pass(home, questions, long, model, data, kind):
    where = home if data == "colors" else questions
    settings = settings_of(
        home,
        QUICK,
        model=str(where / model),
        data=str(where / data),
        ood=(long[data],),
        kind=kind,
        max_length=32,
        batch_size=8,
    )
    sources, task, _ = prepare(settings)
    found = needs(settings)
    tokenizer = task.tokenizer()
    real = task.peft_model(tokenizer, settings.recipe.lora()).train()
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found["trained weights"] == 4 * trained
    held = mixture(real).members[0].state_dict().values()
    assert found["posterior of a seed"] == pytest.approx(sum(t.nbytes for t in held), rel=1e-4)
    assert found["base model"] == pytest.approx(
        sum(p.nbytes for p in real.parameters() if not p.requires_grad), rel=0.05
    )

    batch = longest(task, tokenizer, sources.inside.split("train"), settings.recipe.batch_size)
    with memory.PeakBytes() as step:
        cross_entropy(task.logits(real, batch).float(), batch["labels"]).backward()
    assert found["activations of a training step"] == pytest.approx(step.peak, rel=0.03)

    samples, activations = of_a_pass(found)
    largest, at_once = peak_of_predictions(settings)
    assert samples in at_once
    predicted = [example for examples in sources.splits().values() for example in examples]
    batch = longest(task, tokenizer, predicted, settings.batch_size)
    real.eval()
    with memory.PeakBytes() as point, torch.no_grad():
        task.logits(real, batch)
    assert activations == pytest.approx(samples * point.peak, rel=0.06)
    weights = {n: p.detach().expand(samples, *p.shape) for n, p in real.named_parameters() if p.requires_grad}
    with memory.PeakBytes() as sampled, torch.no_grad():
        task.logits(SampledModel(real, weights), batch)
    assert 0.9 * sampled.peak < activations < 1.25 * sampled.peak, "rows that samples share count each time"

    held = found["base model"] + 2 * found["posterior of a seed"]
    assert found["training, all of it"] > found["activations of a training step"] + found["base model"] + 24 * trained
    assert 0.95 * largest < found["prediction, all of it"] - held < 1.5 * largest


def test_more_of_everything_needs_more(home):
    usual, large = needs(settings_of(home, QUICK)), needs(settings_of(home, QUICK, batch_size=16))
    one_seed = needs(settings_of(home, QUICK, seeds=(0,)))
    (most, usual_pass), (_, large_pass) = of_a_pass(usual), of_a_pass(large)
    assert most == 16, "two seeds of eight samples go together"
    assert large_pass == 16 * usual_pass // 24
    assert one_seed["on the disk"] * 2 == usual["on the disk"]
    assert usual["prediction, all of it"] > one_seed["prediction, all of it"]


def test_samples_that_are_kept_count(home, monkeypatch):
    """As a `Predictor` keeps them: all of two seeds, where they are little."""
    settings = settings_of(home, QUICK, samples=256, scale=1.0)
    found = needs(settings)
    size, (samples, activations) = found["posterior of a seed"] // (2 + QUICK.rank), of_a_pass(found)
    largest, at_once = peak_of_predictions(settings)
    assert samples in at_once and samples < 512
    assert found["samples of the weights"] == (512 + samples) * size
    assert 0.95 * largest < found["samples of the weights"] + activations < 1.5 * largest
    monkeypatch.setattr(memory, "available", lambda device: 4 * 512 * size)
    assert needs(settings)["samples of the weights"] == 2 * samples * size
    assert peak_of_predictions(settings)[0] < largest - 256 * size
    few = needs(replace(settings, samples=2, seeds=(0,), scale="auto"))
    assert few["samples of the weights"] == (2 * SAMPLES + of_a_pass(few)[0]) * size, "of the choice of the scale"


def test_passes_are_those_of_the_device_of_the_run(home, monkeypatch):
    settings = settings_of(home, QUICK, samples=256)
    monkeypatch.setattr(dry_run, "_peak", lambda *args: 1)
    monkeypatch.setattr(memory, "available", lambda device: 1 << 30)
    for there, samples in ((False, 72), (True, 512)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert of_a_pass(needs(settings))[0] == samples


def test_longer_texts_of_any_split_need_more(home, questions, tmp_path, long):
    longer = questions / "long-colors" / "test.jsonl"

    def bytes_of(data, **changes):
        found = needs(settings_of(home, QUICK, data=str(data), max_length=32, batch_size=64, scale=1.0, **changes))
        training = found["training, all of it"] - found["activations of a training step"]
        return found["activations of a training step"], training, of_a_pass(found)[1]

    def with_longer(split):
        shutil.copytree(home / "colors", tmp_path / split)
        shutil.copy(longer, tmp_path / split / f"{split}.jsonl")
        return bytes_of(tmp_path / split)

    step, rest, predicted = bytes_of(home / "colors")
    of_train, of_test, of_val = (with_longer(split) for split in ("train", "test", "val"))
    outside = bytes_of(home / "colors", ood=(str(longer),))
    assert of_train[0] > 2 * step and of_train[1:] == (rest, predicted)
    assert outside[2] > predicted and outside[:2] == (step, rest)
    assert of_test[2] > predicted and of_test[:2] == (step, rest)
    assert of_val == (step, rest, predicted), "of nine examples, and one sample of each"
    write_lines(tmp_path / "val" / "train.jsonl", [{"text": "red", "label": 0}])
    assert bytes_of(tmp_path / "val")[1] > rest, "the epochs' pass over val is larger than a step of one short text"


def test_what_is_cut_is_told(home, questions, tmp_path, long, capsys):
    def told(length, **changes):
        dry_run.show(tmp_path / "run", settings_of(home, QUICK, max_length=length, **changes))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("cut at")]

    assert told(7) == []
    assert told(6, ood=(long["colors"],)) == ["cut at 6 tokens, the end is lost: 8 of 8 oos_test, 9 of 9 long-colors"]
    asked = {"data": str(questions / "questions"), "batch_size": 8, "ood": (long["questions"],)}
    assert told(9, model=str(questions / "bert"), **asked) == [
        "cut at 9 tokens, the end is lost: 9 of 9 long-questions"
    ], "an example with a choice that is cut counts once"
    assert told(31, model=str(questions / "gpt2"), **asked) == [
        "cut at 31 tokens, the beginning is lost: 9 of 9 long-questions"
    ]


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
