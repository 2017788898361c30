"""What a run's predictions come to: the numbers, the tables, and what is wrong with a folder."""

import json
import math
import shutil
import statistics
import sys

import pytest
import torch
from run_folders import POINTS, prediction_path, write_run
from safetensors import safe_open
from safetensors.torch import save_file

from swag_lora import metrics
from swag_lora.experiment import report, table
from swag_lora.experiment.methods import POOLED, TITLES
from swag_lora.experiment.results import mean_and_error, summarise

SMALL = {"methods": ("map-last", "swag", "ensemble"), "test": 40, "ood": (("shift", 30, True), ("oos", 20, False))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), seeds=(0, 1, 5))


@pytest.fixture(scope="module")
def results(run):
    return summarise(run)


@pytest.fixture
def small(tmp_path):
    return write_run(tmp_path / "small", **SMALL)


def load(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["json"])  # noqa: SIM118


def change(path, tensors=None, **told):
    old, old_told = load(path)
    save_file({**old, **(tensors or {})}, path, metadata={"json": json.dumps({**old_told, **told})})


@pytest.mark.parametrize("method", ["map-last", "swag", "multiswag"])
def test_metrics_of_each_file(run, results, method):
    seeds = results["methods"][method]["seeds"]
    assert list(seeds) == (["all"] if method in POOLED else ["0", "1", "5"])
    for seed, values in seeds.items():
        tensors, told = load(prediction_path(run, method, None if seed == "all" else seed))
        for split in ("test", "shifted"):
            pair = tensors[f"{split}/log_probs"], tensors[f"{split}/labels"]
            found = values["splits"][split]
            for name in ("accuracy", "nll", "ece", "brier", "mcc", "aurc"):
                assert found[name] == getattr(metrics, name)(*pair)
            assert found["ece_20"] == metrics.ece(*pair, 20)
            assert found["seconds_per_1000"] == pytest.approx(1000 * told["seconds"][split] / len(pair[1]))
        for split in ("shifted", "out-of-scope"):
            for score in ("entropy", "mutual_information"):
                pair = tensors[f"test/{score}"], tensors[f"{split}/{score}"]
                for area in ("ood_auroc", "ood_aupr"):
                    found = values["splits"][split].get(f"{area}_{score}")
                    wanted = getattr(metrics, area)(*pair)
                    assert found == (None if score != "entropy" and method in POINTS else wanted)
        assert method == "map-last" or values["splits"]["test"]["ece_20"] != values["splits"]["test"]["ece"]
        assert "accuracy" not in values["splits"]["out-of-scope"]
        assert not any(key.startswith("ood") for key in values["splits"]["test"])
        for key in ("samples", "members", "passes", "seconds", "scale", "rank", "temperature", "curve"):
            assert values[key] == told[key]


def test_mutual_information_only_of_several_samples(results):
    for method, values in results["methods"].items():
        has = "ood_auroc_mutual_information" in values["summary"]["out-of-scope"]
        assert has == (method not in POINTS), method


def test_mean_and_standard_error_over_seeds(results):
    for method, values in results["methods"].items():
        for split, of_split in values["summary"].items():
            for name, summary in of_split.items():
                each = [seed["splits"][split][name] for seed in values["seeds"].values()]
                assert summary["values"] == each
                assert summary["mean"] == pytest.approx(statistics.fmean(each), rel=1e-12)
                if method in POOLED:
                    assert summary["std_error"] is None
                else:
                    assert summary["std_error"] == pytest.approx(statistics.stdev(each) / math.sqrt(3), rel=1e-9)


def test_one_seed_and_infinite_values_have_no_error(tmp_path):
    results = summarise(write_run(tmp_path, seeds=(3,), **SMALL))
    assert results["methods"]["swag"]["summary"]["test"]["nll"]["std_error"] is None
    text = table.markdown(results)
    assert "±" not in text and "One seed (3): no standard errors." in text
    assert mean_and_error([1.0, math.inf]) == (math.inf, None)
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)


def test_what_was_chosen_is_kept(run, results):
    assert results["selection"] == {s: json.loads((run / f"seed-{s}/selection.json").read_text()) for s in "015"}
    assert results["missing"] == [] and results["seeds"] == [0, 1, 5]


def test_missing_predictions_are_all_named(small):
    prediction_path(small, "swag", 1).unlink()
    prediction_path(small, "ensemble", None).unlink()
    with pytest.raises(FileNotFoundError, match=r"swag/seed-1.safetensors, predictions/ensemble/all.safetensors"):
        summarise(small)
    partial = summarise(small, partial=True)
    assert list(partial["methods"]) == ["map-last", "swag"]
    assert list(partial["methods"]["swag"]["seeds"]) == ["0"]
    assert partial["methods"]["swag"]["summary"]["test"]["nll"]["std_error"] is None
    assert "NOT FINISHED, without predictions/swag/seed-1.safetensors" in table.markdown(partial)
    shutil.rmtree(small / "predictions")
    with pytest.raises(FileNotFoundError, match="no predictions yet"):
        summarise(small, partial=True)


def damage(path, how):
    tensors, _ = load(path)
    log_probs = tensors["test/log_probs"]
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "header":
        path.write_bytes(b"\xff" * 50)
    elif how == "tensor":
        tensors.pop("oos/entropy")
        save_file(tensors, path, metadata={"json": "{}"})
    elif how == "metadata":
        save_file(tensors, path)
    elif how == "told":
        save_file(tensors, path, metadata={"json": json.dumps({"method": "swag", "seed": 1})})
    elif how == "seed":
        change(path, seed=0)
    elif how == "method":
        change(path, method="swa")
    elif how == "rows":
        change(path, {name: t[:-1] for name, t in tensors.items() if name.startswith("test/")})
    elif how == "labels":
        change(path, {"test/labels": torch.full_like(tensors["test/labels"], -1)})
    elif how == "nan":
        log_probs[7, 1] = math.nan
        change(path, {"test/log_probs": log_probs})
    elif how == "unnormalized":
        change(path, {"test/log_probs": log_probs + 1})
    elif how == "seconds":
        change(path, seconds={"test": 1.0})


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", "damaged"),
        ("header", "damaged"),
        ("tensor", "oos/entropy"),
        ("metadata", "damaged"),
        ("told", "no samples, members"),
        ("seed", "are of method swag, seed 0"),
        ("method", "are of method swa, seed 1"),
        ("rows", "of 39 examples, the run has 40"),
        ("labels", r"labels for test in .* not all in \[0, 4\)"),
        ("nan", "NaN, first at example 7"),
        ("unnormalized", "damaged: the probabilities of example 0 sum to 2.718"),
        ("seconds", "seconds of shift"),
    ],
)
def test_damaged_predictions_are_named(small, how, says):
    path = prediction_path(small, "swag", 1)
    damage(path, how)
    with pytest.raises(ValueError, match=says) as error:
        summarise(small)
    assert str(path) in str(error.value)


def test_predictions_for_other_examples_are_refused(small):
    path = prediction_path(small, "swag", 1)
    tensors, told = load(path)
    change(path, examples={**told["examples"], "oos": "another"})
    with pytest.raises(ValueError, match=r"swag/seed-1.* and .*map-last/seed-0.* different examples of oos"):
        summarise(small)
    change(path, {"test/labels": tensors["test/labels"].flip(0)}, examples=told["examples"])
    with pytest.raises(ValueError, match="different examples of test"):
        summarise(small)


def test_folders_that_are_no_runs(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="no experiment.json"):
        summarise(tmp_path)
    path = small / "experiment.json"
    good = json.loads(path.read_text())
    for change_to, says in [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"seeds": []}, "lacks seeds"),
        ({"methods": ["swag", "laplace"]}, "unknown methods: laplace"),
        ({"data": {"splits": {}}}, "size of the test split"),
    ]:
        path.write_text(json.dumps({**good, **change_to}))
        with pytest.raises(ValueError, match=says):
            summarise(small)
    path.write_text("{")
    with pytest.raises(ValueError, match="experiment.json is damaged"):
        summarise(small)
    path.write_text(json.dumps(good))
    (small / "seed-0" / "selection.json").write_text("[1]")
    with pytest.raises(ValueError, match="selection.json is damaged"):
        summarise(small)


def cells_of(text, heading):
    """The rows of the table under a heading, as lists of cells."""
    lines = text.split(f"## {heading}")[1].split("## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]


def test_markdown(results):
    text = table.markdown(results)
    rows = cells_of(text, "Test, 120 examples")
    assert rows[0] == ["", "accuracy", "NLL", "ECE-15", "ECE-20", "Brier", "MCC", "s / 1000", "passes"]
    assert [row[0] for row in rows[2:]] == list(TITLES.values())
    nll = results["methods"]["swag"]["summary"]["test"]["nll"]
    swag = next(row for row in rows if row[0] == "SWAG")
    assert swag[2].replace("*", "") == f"{nll['mean']:.3f} ± {nll['std_error']:.3f}"
    assert swag[-1] == "4" and next(row for row in rows if row[0] == "MultiSWAG")[-1] == "12"

    shifted = cells_of(text, "Out of distribution: shifted, 60 examples")
    unlabelled = cells_of(text, "Out of distribution: out-of-scope, 50 examples")
    areas = ["AUROC, entropy", "AUPR, entropy", "AUROC, MI", "AUPR, MI", "s / 1000", "passes"]
    assert unlabelled[0] == ["", *areas] and shifted[0][-6:] == areas and "MCC" in shifted[0]
    assert unlabelled[2][3] == "" and unlabelled[7][3] != ""
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({len(line) for line in block.splitlines()}) == 1
    assert "over 3 seeds (0, 1, 5)" in text
    assert "3 × 4 = 12 (MultiSWAG)" in text and "2, 3, 7 (SWAG, diagonal · SWAG)" in text
    assert "Temperature: 1.8 (MAP, last, temperature)" in text
    assert "Trained and predicted in bfloat16 on cpu, torch 2.13.0." in text


def with_means(results, metric, means):
    """The same results with other means of one test metric."""
    results = json.loads(json.dumps(results))
    for method, mean in means.items():
        results["methods"][method]["summary"]["test"][metric]["mean"] = mean
    return results


def test_the_best_is_bold_with_its_ties(small):
    results = summarise(small)
    place = {"accuracy": 1, "nll": 2}
    for metric, means, bold in [
        ("accuracy", (0.5, 0.8, 0.7), {"SWAG"}),
        ("nll", (0.5, 0.8, 0.7), {"MAP, last"}),
        ("accuracy", (0.8004, 0.8, 0.7), {"SWAG", "MAP, last"}),
        ("nll", (0.5006, 0.5, 0.7), {"SWAG"}),
        ("nll", (math.inf, 0.5, 0.7), {"SWAG"}),
    ]:
        changed = with_means(results, metric, dict(zip(SMALL["methods"], means, strict=True)))
        rows = cells_of(table.markdown(changed), "Test, 40 examples")[2:]
        assert {row[0] for row in rows if row[place[metric]].startswith("**")} == bold
        assert not any("**" in row[-1] + row[-2] for row in rows)


def test_report_writes_files_that_give_the_same_table_again(small, monkeypatch):
    said = []
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = report.write(small, say=said.append)
    assert said == ["no figures without matplotlib: pip install 'swag-kernels[plots]', then start the run again"]
    assert not (small / "figures").exists()
    kept = json.loads((small / "results.json").read_text())
    assert kept == json.loads(json.dumps(results))
    assert (small / "table.md").read_text() == table.markdown(results) == table.markdown(kept)
    with pytest.raises(ImportError, match=r"swag-kernels\[plots\]"):
        report.write(small, draw=True)
    report.write(small, draw=False, say=said.append)
    assert len(said) == 1


def test_terminal_tables(results):
    tables = table.terminal(results)
    assert [str(t.title) for t in tables] == [
        "Test, 120 examples",
        "Out of distribution: shifted, 60 examples",
        "Out of distribution: out-of-scope, 50 examples",
    ]
    assert tables[0].row_count == len(TITLES)
