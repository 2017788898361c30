"""What a recipe says, what the options make of it, and what reaches the optimizer and the posterior."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from swag_lora import SwagPosterior, cli, data, recipe_arguments, training
from swag_lora.evaluator import Evaluator
from swag_lora.fit import fit
from swag_lora.recipe import PRESETS, Recipe


def parsed(*options):
    """The recipe of the command line."""
    return recipe_arguments.recipe(
        cli._parser().parse_args(["reproduce", "m", "--data", "d", "--output", "o", *options])
    )


def test_the_published_recipe():
    """Of the configuration of Onal et al. (2024): SWAG from the best epoch on validation data after 8 of 15."""
    recipe = PRESETS["swag-lora"]
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.swag_lr) == (15, 32, 1e-4, 1e-5)
    assert (recipe.anneal_epochs, recipe.anneal, recipe.rank, recipe.restart_best) == (5, "linear", 5, True)
    assert (recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout) == (8, 16, 0.1)
    assert recipe.branch(validated=True) == (8, True) and recipe.branch(validated=False) == (8, False)
    assert recipe.every is None and 8 + recipe.collections == 15
    assert (recipe.max_grad_norm, PRESETS["default"].max_grad_norm) == (0, 1)
    lora = recipe.lora()
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 16, 0.1)
    assert training.WARMUP == 0.06
    assert parsed() == recipe and parsed("--recipe", "default") == PRESETS["default"] == Recipe()


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ("--epochs 4 --start 0.5 --no-restart-best", {"epochs": 4, "start": 0.5, "restart_best": False}),
        ("--collections 12 --every 3 --rank 9", {"collections": 12, "every": 3, "rank": 9}),
        ("--rank auto", {"rank": 5}),
        ("--lr 0.02", {"lr": 0.02, "swag_lr": 0.002}),
        ("--lr 0.02 --swag-lr 0.005", {"lr": 0.02, "swag_lr": 0.005}),
        ("--swag-lr 0.005", {"lr": 1e-4, "swag_lr": 0.005}),
        ("--lora-rank 4", {"lora_rank": 4, "lora_alpha": 8}),
        ("--lora-rank 4 --lora-alpha 5 --lora-dropout 0", {"lora_rank": 4, "lora_alpha": 5, "lora_dropout": 0.0}),
        ("--anneal-epochs 0 --batch-size 7 --threads 2", {"anneal_epochs": 0, "batch_size": 7, "threads": 2}),
        ("--max-grad-norm 0.5", {"max_grad_norm": 0.5}),
        ("--target-modules query,value", {"target_modules": ("query", "value")}),
    ],
)
def test_options_override_the_preset(options, changed):
    published, found = PRESETS["swag-lora"], parsed(*options.split())
    for name in vars(published):
        assert getattr(found, name) == pytest.approx(changed.get(name, getattr(published, name))), name


@pytest.fixture(scope="module")
def few(home):
    """Three steps of training an epoch."""
    return data.load(home / "colors").subset({"train": 24, "val": 8})


@pytest.fixture
def steps(monkeypatch):
    """The rate and the largest weight decay at each step of the optimizer."""
    seen, step = [], torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        (rate,) = {float(group["lr"]) for group in self.param_groups}
        seen.append((rate, max(group["weight_decay"] for group in self.param_groups)))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    return seen


def schedule(lr, total, warmup):
    """Up from zero, then down to it."""
    return [lr * k / warmup if k < warmup else lr * (total - k) / (total - warmup) for k in range(total)]


@pytest.mark.parametrize("anneal_epochs", [2, 0])
def test_rates_that_reach_the_optimizer(home, tmp_path, few, steps, anneal_epochs):
    recipe = Recipe(
        epochs=12, start=0.5, collections=3, rank=3, lr=0.01, swag_lr=0.001, anneal_epochs=anneal_epochs, batch_size=8
    )
    fit(tmp_path, home / "bert", few, recipe, 16)
    rates = [rate for rate, _ in steps]
    assert {decay for _, decay in steps} == {0.0} and len(rates) == 36 + 9
    expected = schedule(0.01, 36, 2)
    assert rates[:36] == pytest.approx(expected, abs=1e-9)
    begin = expected[18]
    tail = [begin + k / 6 * (0.001 - begin) for k in range(6)] + [0.001] * 3 if anneal_epochs else [0.001] * 9
    assert rates[36:] == pytest.approx(tail, abs=1e-9)
    assert recipe.rate(18, 3) == pytest.approx(begin) and [recipe.rate(k, 3) for k in range(36)] == pytest.approx(
        expected
    )


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_gradients_that_reach_the_optimizer(home, tmp_path, few, monkeypatch, limit):
    norms, step = [], torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    fit(tmp_path, home / "bert", few, Recipe(epochs=2, collections=2, rank=2, max_grad_norm=limit, batch_size=8), 16)
    if limit == 0.01:
        assert norms == pytest.approx([limit] * len(norms), rel=1e-3)
    else:
        assert min(norms) > 0.02


def test_annealing_that_the_collections_cut_short(home, tmp_path, few):
    recipe = Recipe(epochs=2, collections=3, rank=2, anneal_epochs=2, every=1, batch_size=8)
    with pytest.raises(
        ValueError, match="3 collections end after 3 steps, the rate is annealed over 6: .*anneal-epochs"
    ):
        fit(tmp_path / "run", home / "bert", few, recipe, 16)
    assert not (tmp_path / "run").exists()
    replace(recipe, every=2).check(24)
    replace(recipe, every=None, anneal_epochs=3).check(24)
    with pytest.raises(ValueError, match="end after 9 steps"):
        replace(recipe, every=None, anneal_epochs=4).check(17)


@pytest.mark.parametrize(("every", "expected"), [(None, [3, 6, 9]), (2, [2, 4, 6])])
def test_collections_lie_an_epoch_or_every_so_many_steps_apart(
    home, tmp_path, few, steps, monkeypatch, every, expected
):
    collected, collect = [], SwagPosterior.collect

    def record(self, *args, **kwargs):
        collected.append(len(steps))
        return collect(self, *args, **kwargs)

    monkeypatch.setattr(SwagPosterior, "collect", record)
    fit(tmp_path, home / "bert", few, Recipe(epochs=2, start=0.5, collections=3, rank=2, every=every, batch_size=8), 16)
    assert [step - 6 for step in collected] == expected and len(steps) == 6 + expected[-1]


@pytest.mark.parametrize(
    ("start", "restart_best", "branch", "epoch"),
    [(0.75, True, 1, 2), (0.75, False, 2, 3), (0.25, True, 0, 1), (1.0, True, 3, 4), (None, False, 3, 4)],
)
def test_swag_restarts_from(home, tmp_path, few, monkeypatch, start, restart_best, branch, epoch):
    """Validation NLL as told here, and steps of SWAG too small to change a weight."""
    told, seen, point = iter([3.0, 1.0, 2.0, 0.5]), [], Evaluator.point

    def record(self, *args, **kwargs):
        seen.append({name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad})
        return point(self, *args, **kwargs)

    monkeypatch.setattr(Evaluator, "point", record)
    monkeypatch.setattr(training, "nll", lambda *args: next(told))
    recipe = Recipe(
        epochs=4, start=start, restart_best=restart_best, collections=2, rank=2, lr=0.02, swag_lr=1e-30, batch_size=8
    )
    history = fit(tmp_path, home / "bert", few, recipe, 16, scale=0.5)
    assert history["validation_nll"] == [3, 1, 2, 0.5] and history["branch_epoch"] == epoch and len(seen) == 4

    def is_at(folder, place):
        saved = load_file(folder / "adapter_model.safetensors")
        found = {name.replace(".default", "").replace(".modules_to_save", ""): v for name, v in seen[place].items()}
        assert found.keys() == saved.keys()
        return all(torch.allclose(found[name], saved[name], rtol=0, atol=1e-7) for name in saved)

    for part, place in (("", branch), ("map", 3), ("map-best", 3)):
        assert [is_at(tmp_path / part, i) for i in range(4)] == [i == place for i in range(4)], part
    assert json.loads((tmp_path / "fit.json").read_text())["recipe"]["start"] == start
    assert next(told, None) is None and not list(itertools.islice(tmp_path.glob("unfinished/*"), 1))
