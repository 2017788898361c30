"""Paired bootstrap against a slow one, its coverage on data with a known difference, and `swag-lora compare`."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from run_folders import prediction_path, write_run
from safetensors import safe_open
from safetensors.torch import save_file

from swag_lora import compare_cli, metrics
from swag_lora.experiment import bootstrap, compare
from swag_lora.experiment.results import summarise


def predictions(n=60, num_classes=3, seed=0, sharpness=1.5):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=torch.Generator().manual_seed(99))
    logits = torch.nn.functional.one_hot(labels, num_classes) + torch.randn(n, num_classes, generator=generator)
    return (sharpness * logits).log_softmax(1), labels


def resamples_by_hand(n, resamples, seed):
    """The indices of each resample, one resample at a time."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return [torch.from_numpy(generator.integers(n, size=n)) for _ in range(resamples)]


@pytest.mark.parametrize("entries", [2_000_000, 200])
def test_resampled_metrics_are_the_metrics_of_the_resampled_examples(monkeypatch, entries):
    monkeypatch.setattr(bootstrap, "_ENTRIES", entries)
    sets = [predictions(seed=seed, sharpness=1 + seed) for seed in range(3)]
    found = bootstrap.resampled([bootstrap.Scores.of(*pair) for pair in sets], 25, seed=4)
    for (log_probs, labels), values in zip(sets, found, strict=True):
        for i, rows in enumerate(resamples_by_hand(60, 25, 4)):
            for name in bootstrap.METRICS:
                wanted = getattr(metrics, name)(log_probs[rows], labels[rows])
                assert values[name][i] == pytest.approx(wanted, rel=1e-9, abs=1e-12), name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("compare") / "run", test=80, seeds=(0, 1, 2), ood=())


def stored(run, method, seed):
    with safe_open(prediction_path(run, method, seed), "pt") as file:
        return file.get_tensor("test/log_probs"), file.get_tensor("test/labels")


def interval_by_hand(run, method, reference, seeds, other_seeds, name, resamples, seed, over_seeds):
    """Each resample anew: its examples, its seeds, both methods' mean metric."""
    ours, theirs = ([stored(run, m, s) for s in of] for m, of in ((method, seeds), (reference, other_seeds)))
    picks = np.random.Generator(np.random.PCG64([seed, 1])).integers(len(seeds), size=(resamples, len(seeds)))
    differences = []
    for i, rows in enumerate(resamples_by_hand(80, resamples, seed)):
        values = [[getattr(metrics, name)(p[rows], y[rows]) for p, y in of] for of in (ours, theirs)]
        if over_seeds:
            values = [[of[pick] for pick in picks[i]] for of in values]
        differences.append(np.mean(values[0]) - np.mean(values[1]))
    differences = sorted(differences)
    ends = []
    for quantile in (0.025, 0.975):
        place = quantile * (resamples - 1)
        below = int(place)
        ends.append(differences[below] + (place - below) * (differences[below + 1] - differences[below]))
    return ends


@pytest.mark.parametrize("name", bootstrap.METRICS)
@pytest.mark.parametrize("method", ["swag", "multiswag"])
def test_intervals_against_a_slow_bootstrap(run, method, name):
    comparison = compare.compare([run], ["swag", "multiswag"], seed=7, resamples=101)
    row = next(row for row in comparison["rows"] if row["method"] == method)
    seeds = [0, 1, 2] if method == "swag" else [None]
    low, high = interval_by_hand(run, method, "map-last", seeds, [0, 1, 2], name, 101, 7, method == "swag")
    assert row["metrics"][name]["low"] == pytest.approx(low, abs=1e-9)
    assert row["metrics"][name]["high"] == pytest.approx(high, abs=1e-9)
    assert row["resampled"] == ("examples and seeds" if method == "swag" else "examples")


def test_values_and_differences_are_those_of_the_results(run):
    comparison = compare.compare([run], resamples=200)
    summary = {name: method["summary"]["test"] for name, method in summarise(run)["methods"].items()}
    assert [row["method"] for row in comparison["rows"]] == list(summary)
    for row in comparison["rows"]:
        for name, metric in row["metrics"].items():
            mean = summary[row["method"]][name]
            assert (metric["value"], metric["std_error"]) == (mean["mean"], mean["std_error"])
            if row["method"] == "map-last":
                assert "difference" not in metric and row["resampled"] is None
            else:
                assert metric["difference"] == pytest.approx(mean["mean"] - summary["map-last"][name]["mean"])
                assert metric["low"] <= metric["high"]


def test_coverage_of_a_known_difference():
    """95 % of the intervals must hold the truth: of 400, 366 to 394 (four standard deviations)."""
    rng = np.random.default_rng(0)
    # The right class of two gets 0.8 or, where the model errs, 0.2; B errs on 30 % and A on 20 %, correlated.
    n, held = 150, dict.fromkeys(("accuracy", "nll", "brier"), 0)
    truth = {
        "accuracy": 0.1,
        "nll": -0.1 * math.log(0.8 / 0.2),
        "brier": 0.1 * (2 * 0.2**2 - 2 * 0.8**2),
    }
    labels = torch.zeros(n, dtype=torch.long)
    for repetition in range(400):
        common = rng.random(n)
        own = np.where(rng.random(n) < 0.5, common, rng.random(n))
        sides = []
        for wrong in (own < 0.2, common < 0.3):
            p = torch.from_numpy(np.where(wrong, 0.2, 0.8))
            sides.append(bootstrap.Scores.of(torch.stack([p, 1 - p], 1).log(), labels))
        one, other = bootstrap.resampled(sides, 400, repetition)
        for name in held:
            low, high = bootstrap.interval(bootstrap.difference({"0": one}, {"0": other}, name, None))
            held[name] += low <= truth[name] <= high
    assert all(366 <= count <= 394 for count in held.values()), held


def test_seeds_widen_the_interval_where_they_differ():
    def constant(p):
        return {"accuracy": np.full(1000, p)}

    one, other = {"0": constant(0.8), "1": constant(0.6)}, {"1": constant(0.5), "0": constant(0.5)}
    picks = bootstrap.resampled_seeds(2, 1000, 0)
    assert bootstrap.interval(bootstrap.difference(one, other, "accuracy", None)) == pytest.approx((0.2, 0.2))
    assert bootstrap.interval(bootstrap.difference(one, other, "accuracy", picks)) == pytest.approx((0.1, 0.3))
    # Seeds are matched by name: a method against itself in another order differs nowhere.
    swapped = {"1": one["1"], "0": one["0"]}
    assert bootstrap.interval(bootstrap.difference(one, swapped, "accuracy", picks)) == (0, 0)


def test_several_runs(run, tmp_path):
    other = write_run(tmp_path / "other", test=80, seeds=(0, 1, 2), ood=(), noise_seed=1, methods=("swag", "map-last"))
    renamed = write_run(tmp_path / "again" / "run", test=80, seeds=(4,), ood=(), methods=("map-last", "swag"))
    comparison = compare.compare([run, other, renamed], reference="swag", resamples=200)
    names = [str(run), "other", str(renamed)]
    assert [(row["method"], row["run"]) for row in comparison["rows"]] == [
        (method, name) for method in ("map-last", "swag") for name in names
    ]
    assert comparison["reference"] == {"run": str(run), "method": "swag"} and comparison["examples"] == 80
    resampled = [row["resampled"] for row in comparison["rows"]]
    assert resampled == ["examples and seeds", "examples and seeds", "examples", None, "examples and seeds", "examples"]
    caption = compare.caption(comparison)
    assert f"its difference from SWAG of {run}" in caption and "95 %" in caption


def test_runs_on_other_examples_are_refused(run, tmp_path):
    other = write_run(tmp_path / "other", test=81, ood=(), methods=("map-last", "swag"))
    with pytest.raises(ValueError, match="different test examples") as error:
        compare.compare([run, other])
    assert str(run) in str(error.value) and str(other) in str(error.value)
    same = write_run(tmp_path / "same", test=80, ood=(), methods=("map-last",))
    assert len(compare.compare([run, same], resamples=100)["rows"]) == 2
    change(same, roll=1)
    with pytest.raises(ValueError, match="different test examples"):
        compare.compare([run, same])
    change(same, roll=-1, digest="hash of others")
    with pytest.raises(ValueError, match="different test examples"):
        compare.compare([run, same])


def change(run, roll, digest="hash of test 80"):
    """Roll the labels of "map-last", and tell another hash of the texts."""
    for seed in (0, 1):
        path = prediction_path(run, "map-last", seed)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = file.metadata()["json"]
        tensors["test/labels"] = tensors["test/labels"].roll(roll)
        save_file(tensors, path, metadata={"json": told.replace("hash of test 80", digest)})


def test_bad_input(run, tmp_path):
    points = write_run(tmp_path / "points", test=80, ood=(), methods=("map-last", "swa"))
    for arguments, says in [
        (([run], ["swag", "lora"]), "unknown method lora; there are map-last"),
        (([run], ["swag"], "laplace"), "unknown method laplace"),
        (([run, points], ["swag"]), "points has no swag; it has map-last, swa"),
        (([points], None, "swag"), "points has no swag"),
        (([points], ["map-last"]), "nothing to compare with map-last"),
        (([],), "no runs"),
    ]:
        with pytest.raises(ValueError, match=says):
            compare.compare(*arguments)
    with pytest.raises(ValueError, match="resamples must be at least 100"):
        compare.compare([run], resamples=10)
    prediction_path(points, "swa", 1).unlink()
    with pytest.raises(FileNotFoundError, match="swa/seed-1.safetensors missing"):
        compare.compare([points])
    assert len(compare.compare([run, points], ["map-last"], resamples=100)["rows"]) == 2


@pytest.mark.filterwarnings("error")
def test_an_infinite_likelihood_has_no_interval():
    labels = torch.tensor([0, 1, 0])
    certain = torch.tensor([[0.0, -math.inf]] * 3)
    half = torch.full((3, 2), 0.5).log()
    one, other = bootstrap.resampled([bootstrap.Scores.of(p, labels) for p in (certain, half)], 100, 0)
    assert bootstrap.interval(bootstrap.difference({"0": one}, {"0": other}, "nll", None)) is None
    assert bootstrap.interval(bootstrap.difference({"0": one}, {"0": other}, "brier", None)) is not None
    assert np.isfinite(other["nll"]).all()


def command(*arguments):
    parser = argparse.ArgumentParser()
    compare_cli.compare_arguments(parser)
    compare_cli.run_compare(parser.parse_args([str(a) for a in arguments]))


def test_command(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    target = tmp_path / "out.json"
    command(run, "--methods", "swag,ensemble-best", "--json", target)
    shown = capsys.readouterr().out
    kept = json.loads(target.read_text())
    assert [row["method"] for row in kept["rows"]] == ["map-last", "swag", "ensemble-best"]
    metric = kept["rows"][1]["metrics"]["nll"]
    assert f"{metric['low']:+.3f}, {metric['high']:+.3f}" in shown and f"{metric['difference']:+.3f}" in shown
    assert "80 test examples" in shown and "10,000 resamples" in shown and "…" not in shown
    command(run, "--methods", "swag,ensemble-best", "--json", "-")
    assert json.loads(capsys.readouterr().out) == kept
    command(run, "--methods", "swag,ensemble-best", "--json", target, "--seed", "1")
    changed = json.loads(target.read_text())["rows"][1]["metrics"]["nll"]
    assert changed["low"] != metric["low"] and changed["difference"] == metric["difference"]
    assert abs(changed["low"] - metric["low"]) < 0.2 * (metric["high"] - metric["low"])
    with pytest.raises(FileNotFoundError, match="for --json"):
        command(run, "--json", tmp_path / "no" / "out.json")


def test_intervals_that_leave_out_zero_are_bold():
    def bold(low, high):
        metric = {"value": 0.5, "difference": (low + high) / 2, "low": low, "high": high}
        row = {"run": "a", "title": "SWAG", "metrics": dict.fromkeys(bootstrap.METRICS, metric)}
        cell = next(iter(compare.table({"rows": [row]}).columns[1].cells))
        return any("bold" in str(span.style) for span in cell.spans)

    assert bold(0.1, 0.2) and bold(-0.2, -0.1) and not bold(-0.1, 0.2)
