import itertools
import pkgutil
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from swag_lora import data, training
from swag_lora.fit import fit
from swag_lora.recipe import Recipe

STANDING = {"epochs": 12, "collections": 2, "rank": 2, "lr": 0.03, "swag_lr": 1e-30, "batch_size": 8}


def adapters_equal(first, second):
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("start", "point"), [(None, "map-best"), (1.0, "map")])
def test_swag_goes_on_from(home, tmp_path, start, point):
    """With steps too small to change a weight, the mean of the collections is where they began."""
    history = fit(tmp_path, home / "bert", data.load(home / "colors"), Recipe(start=start, **STANDING))
    seen = history["validation_nll"]
    assert min(seen) < seen[-1], "the last epoch is the best: the two starts are one"
    assert adapters_equal(tmp_path, tmp_path / point)
    assert not adapters_equal(tmp_path / "map", tmp_path / "map-best")


@pytest.mark.parametrize(
    ("start", "restart_best", "validated", "leaves"),
    [
        (None, False, True, (15, True)),
        (None, False, False, (5, False)),
        (0.5, False, True, (8, False)),
        (0.5, True, True, (8, True)),
        (0.5, True, False, (8, False)),
        (1e-9, False, False, (1, False)),
    ],
)
def test_the_epoch_that_swag_leaves(start, restart_best, validated, leaves):
    assert Recipe(epochs=15, start=start, restart_best=restart_best).branch(validated) == leaves


def test_batches_are_of_examples_of_similar_length(home, tmp_path, monkeypatch):
    """Padded to the longest of its batch, an epoch of examples in random order has far more tokens."""
    words = ["red", "blue", "round", "small"]
    generator = random.Random(0)
    lengths = [generator.choice([2, 4, 12, 28]) for _ in range(256)]
    examples = [data.Example(" ".join(generator.choices(words, k=length)), int(length > 10)) for length in lengths]
    dataset = data.Dataset("lengths", {"train": examples}, ("short", "long"))
    sizes = []
    compute_loss = training.TaskTrainer.compute_loss

    def seen(self, model, inputs, *args, **kwargs):
        sizes.append((len(inputs["labels"]), inputs["input_ids"].numel(), int(inputs["attention_mask"].sum())))
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(training.TaskTrainer, "compute_loss", seen)
    fit(tmp_path, home / "bert", dataset, Recipe(epochs=2, start=0.5, collections=2, rank=2, batch_size=8), scale=0.5)
    assert len(sizes) == 32 * (2 + 2) and {count for count, _, _ in sizes} == {8}
    padded, used = (sum(column) for column in list(zip(*sizes, strict=True))[1:])
    assert padded < 1.25 * used


RESUMED = Recipe(epochs=3, start=2 / 3, collections=3, rank=3, lr=0.03, swag_lr=0.01, batch_size=8)


def everything(folder):
    """Every tensor and every figure that a fit leaves."""
    tensors = {
        str(path.relative_to(folder)): {name: value.tolist() for name, value in load_file(path).items()}
        for path in sorted(folder.rglob("*.safetensors"))
    }
    return tensors, (folder / "fit.json").read_text(), (folder / "task.json").read_text()


@pytest.fixture(scope="module")
def uninterrupted(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit(folder, home / "bert", data.load(home / "colors"), RESUMED)
    return everything(folder)


class Killed(BaseException):
    """What nothing in the library catches, as nothing catches a kill."""


def dying(function, calls):
    counter = itertools.count(1)

    def call(*args, **kwargs):
        if next(counter) == calls:
            raise Killed
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("place", "calls"),
    [
        ("swag_lora.training.cross_entropy", 1),
        ("swag_lora.training.cross_entropy", "second epoch"),
        ("swag_lora.training.cross_entropy", "second SWAG epoch"),
        ("swag_lora.training.save_file", 2),
        ("swag_lora.training.write_text", 5),
        ("swag_lora.fit.save_file", 1),
        ("swag_lora.trainer.checkpoint.write", 2),
        ("swag_lora.fit.choose_scale", 1),
        ("swag_lora.fit.write_text", 2),
    ],
)
def test_a_killed_fit_goes_on_to_the_same_bits(home, tmp_path, monkeypatch, uninterrupted, place, calls):
    colors = data.load(home / "colors")
    steps = -(-len(colors.splits["train"]) // RESUMED.batch_size)
    calls = {"second epoch": steps + 2, "second SWAG epoch": 4 * steps + 2}.get(calls, calls)
    with monkeypatch.context() as patch:
        module, name = place.rsplit(".", 1)
        owner = pkgutil.resolve_name(module)
        patch.setattr(owner, name, dying(getattr(owner, name), calls))
        with pytest.raises(Killed):
            fit(tmp_path, home / "bert", colors, RESUMED)
    assert not (tmp_path / "swag_posterior.safetensors").exists()
    torch.manual_seed(7)
    steps_taken = itertools.count()
    monkeypatch.setattr(training.TaskTrainer, "compute_loss", counted(training.TaskTrainer.compute_loss, steps_taken))
    fit(tmp_path, home / "bert", colors, RESUMED)
    assert everything(tmp_path) == uninterrupted
    assert not (tmp_path / "unfinished").exists()
    at_first = calls == 1 and place.endswith("cross_entropy")
    assert (next(steps_taken) < 6 * steps) != at_first, "it began anew"


def counted(method, counter):
    def call(*args, **kwargs):
        next(counter)
        return method(*args, **kwargs)

    return call


def test_a_killed_fit_of_other_arguments_is_not_gone_on_with(home, tmp_path, monkeypatch, uninterrupted):
    colors = data.load(home / "colors")
    with monkeypatch.context() as patch:
        patch.setattr("swag_lora.fit.choose_scale", dying(None, 1))
        with pytest.raises(Killed):
            fit(tmp_path, home / "bert", colors, replace(RESUMED, lr=0.02))
    fit(tmp_path, home / "bert", colors, RESUMED)
    assert everything(tmp_path) == uninterrupted
