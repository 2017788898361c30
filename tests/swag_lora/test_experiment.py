"""A run of the experiment: each method against a plain computation, and what a kill leaves."""

import itertools
import json
import math
import pkgutil
import shutil
from dataclasses import replace

import pytest
import torch
from encoder_models import COLORS, OBJECTS, save_questions, save_tiny_gpt2, write_lines
from experiment_runs import (
    LIVELY,
    QUICK,
    SAMPLES,
    Plain,
    averaged,
    predictions,
    rows_of,
    same_predictions,
    save_outside,
    settings_of,
    table_without_seconds,
)
from torch.nn.functional import nll_loss

from swag_lora import SwagPosterior, data, training
from swag_lora.evaluate import load_folder
from swag_lora.evaluator import Sampling
from swag_lora.experiment import run
from swag_lora.experiment.methods import POOLED, TITLES
from swag_lora.experiment.run import claim, prepare, reproduce
from swag_lora.metrics import accuracy, ece, nll
from swag_lora.mixture import member_seed

SEEDS = (0, 1)


@pytest.fixture(scope="module", autouse=True)
def in_float32():
    """Training and prediction, so that plain computations come to the same on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "native_bf16", lambda device: False)
        yield


@pytest.fixture(scope="module")
def asked(home):
    save_outside(home)
    shift, elsewhere = str(home / "shift" / "val.jsonl"), str(home / "elsewhere")
    return settings_of(home, ood=(shift,), ood_unlabelled=(elsewhere,))


@pytest.fixture(scope="module")
def finished(asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    reproduce(folder, asked, figures=False)
    return folder


@pytest.fixture(scope="module")
def texts(home):
    """The examples of each split, and their labels."""
    rows = {
        "test": rows_of(home / "colors" / "test.jsonl"),
        "oos_test": rows_of(home / "colors" / "oos_test.jsonl.gz"),
        "val": rows_of(home / "shift" / "val.jsonl"),
        "elsewhere": rows_of(home / "elsewhere" / "test.jsonl"),
    }
    labels = {"test": [row["label"] for row in rows["test"]], "val": [COLORS.index(r["label"]) for r in rows["val"]]}
    return rows, labels | {name: [-1] * len(rows[name]) for name in ("oos_test", "elsewhere")}


@pytest.fixture(scope="module")
def plain(home, finished, texts):
    """Of a folder of a seed, a `Plain` on all examples, split by split, or on the validation data."""
    rows = [row for split in texts[0].values() for row in split]
    val = rows_of(home / "colors" / "val.jsonl")

    def of(seed, part="", validation=False):
        return Plain(home / "bert", finished / f"seed-{seed}" / part, val if validation else rows)

    return of


def posterior(plain, finished, seed):
    return SwagPosterior.from_pretrained(plain.model, finished / f"seed-{seed}")


def selection(folder, seed):
    return json.loads((folder / f"seed-{seed}" / "selection.json").read_text())


def draws(plain, finished, seed, samples, diagonal=False, name=None):
    """Logits of the samples of a seed's posterior, whose noise has the seed `name`."""
    model, chosen = plain(seed), selection(finished, seed)
    scale = (chosen["diagonal"] if diagonal else chosen)["scale"]
    weights = posterior(model, finished, seed).draw(
        samples, seed=seed if name is None else name, scale=scale, covariance=not diagonal
    )
    return model.each(weights)


def plainly(plain, finished, method, seed):
    """Logits [S, n, C], and whether samples are pairs."""
    if method in ("map-last", "map-best"):
        return plain(seed, method.replace("map-last", "map")).logits()[None], False
    if method == "swa":
        return plain(seed).logits()[None], False
    if method in ("ensemble", "ensemble-best", "multiswa"):
        part = {"ensemble": "map", "ensemble-best": "map-best", "multiswa": ""}[method]
        return torch.stack([plain(one, part).logits() for one in SEEDS]), False
    if method == "mc-dropout":
        return plain(seed, "map").masked(SAMPLES, LIVELY.lora_dropout, seed), False
    if method == "multiswag":
        members = [draws(plain, finished, one, SAMPLES, name=member_seed(0, i)) for i, one in enumerate(SEEDS)]
        pairs = [logits.unflatten(0, (-1, 2)) for logits in members]
        return torch.stack(pairs, 1).flatten(0, 2), True
    return draws(plain, finished, seed, SAMPLES, diagonal=method == "swag-diagonal"), True


def close(found, expected, what):
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(), value, rtol=1e-3, atol=2e-5, equal_nan=True, msg=lambda m, n=name: f"{what}/{n}: {m}"
        )


@pytest.fixture(scope="module")
def stored(finished):
    return predictions(finished)


FILES = [(method, seed) for method in TITLES for seed in ((None,) if method in POOLED else SEEDS)]


@pytest.mark.parametrize(("method", "seed"), [file for file in FILES if file[0] != "temperature"])
def test_predictions_are_those_of_weights_set_by_hand(finished, plain, texts, stored, method, seed):
    rows, labels = texts
    tensors, told = stored[f"{method}/{'all' if seed is None else f'seed-{seed}'}"]
    logits, pairs = plainly(plain, finished, method, seed)
    splits = ["elsewhere", "oos_test", "shift-val", "test"]
    assert sorted(told["seconds"]) == sorted(told["examples"]) == sorted({n.split("/")[0] for n in tensors}) == splits
    start = 0
    for split, examples in rows.items():
        name = "shift-val" if split == "val" else split
        found = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        close(found, averaged(logits[:, start : start + len(examples)], pairs), f"{method}/{name}")
        assert found["labels"].tolist() == labels[split] and found["labels"].dtype == torch.int64
        start += len(examples)
    members = len(SEEDS) if method in POOLED else 1
    assert (told["method"], told["seed"], told["members"]) == (method, seed, members)
    assert told["samples"] == told["passes"] == len(logits)
    if len(logits) > members:
        assert tensors["test/mutual_information"].mean() > 1e-7
        counts = [2 * members, 4 * members, 8 * members]
        curve, truth = told["curve"], torch.tensor(labels["test"])
        assert curve["samples"] == counts
        for k, *values in zip(*(curve[key] for key in ("samples", "accuracy", "nll", "ece")), strict=True):
            log_probs = logits[:k, : len(truth)].softmax(-1).mean(0).log()
            assert values == pytest.approx([metric(log_probs, truth) for metric in (accuracy, nll, ece)], rel=1e-3)
    else:
        assert told["curve"] is None


def test_the_run_tells_methods_and_seeds_apart(stored):
    """Otherwise the comparisons with plain computations could not see which fit, scale or adapter was taken."""
    alike = {("map-best", "map-last"), ("swa", "swag-diagonal")}  # where the last epoch is the best, the variance small
    for (one, (first, _)), (other, (second, _)) in itertools.combinations(stored.items(), 2):
        (method, seed), (another, same) = one.split("/"), other.split("/")
        if seed != same or (method, another) not in alike:
            assert (first["test/log_probs"] - second["test/log_probs"]).abs().max() > 3e-4, (one, other)
    disagreement = stored["multiswag/all"][0]["test/disagreement"]
    assert disagreement.max() > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_temperature_is_the_best_on_validation_data(home, finished, plain, texts, stored, seed):
    def best(log_probs, labels):
        """Of a grid of 1 / 1000 in log T."""
        grid = torch.linspace(-math.log(20), math.log(20), 5992, dtype=torch.float64)
        scaled = (log_probs / grid.exp()[:, None, None]).log_softmax(-1)
        losses = [nll_loss(one, labels) for one in scaled]
        return grid[int(torch.stack(losses).argmin())].item()

    labels = torch.tensor([row["label"] for row in rows_of(home / "colors" / "val.jsonl")])
    tensors, told = stored[f"temperature/seed-{seed}"]
    expected = best(plain(seed, "map", validation=True).logits().log_softmax(-1), labels)
    assert math.log(told["temperature"]) == pytest.approx(expected, abs=2e-3)
    point = stored[f"map-last/seed-{seed}"][0]
    on_test = best(point["test/log_probs"].double(), torch.tensor(texts[1]["test"]))
    assert abs(on_test - expected) > 0.01, "test and validation data have one temperature: this shows nothing"
    for split in ("test", "oos_test", "shift-val", "elsewhere"):
        log_probs = (point[f"{split}/log_probs"].double() / told["temperature"]).log_softmax(-1)
        torch.testing.assert_close(tensors[f"{split}/log_probs"].double(), log_probs, rtol=1e-5, atol=1e-6)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        torch.testing.assert_close(tensors[f"{split}/entropy"].double(), entropy, rtol=1e-5, atol=1e-6)
        assert not tensors[f"{split}/mutual_information"].any()
    assert (told["samples"], told["curve"], told["scale"], told["rank"]) == (1, None, None, None)


@pytest.mark.parametrize("seed", SEEDS)
def test_best_epoch_is_the_best_on_validation_data(home, finished, plain, seed):
    labels = torch.tensor([row["label"] for row in rows_of(home / "colors" / "val.jsonl")])
    every = [json.loads((finished / f"seed-{s}" / "fit.json").read_text())["validation_nll"] for s in SEEDS]
    assert any(min(seen) < seen[-1] for seen in every), "the last epoch is always the best: nothing is compared"
    seen = every[SEEDS.index(seed)]
    for part, expected in (("map-best", min(seen)), ("map", seen[-1])):
        found = nll_loss(plain(seed, part, validation=True).logits().log_softmax(-1), labels).item()
        assert found == pytest.approx(expected, rel=2e-3)  # there perhaps in bfloat16


@pytest.mark.parametrize("seed", SEEDS)
def test_scale_is_the_best_of_the_curve_on_validation_data(home, finished, plain, stored, seed):
    labels = torch.tensor([row["label"] for row in rows_of(home / "colors" / "val.jsonl")])
    model, chosen = plain(seed, validation=True), selection(finished, seed)
    fitted = posterior(model, finished, seed)
    for curve, covariance in ((chosen, True), (chosen["diagonal"], False)):
        assert {0.5, 1, 2, 4, 8, 16, 32} <= set(curve["scales"])
        assert curve["scale"] == curve["scales"][curve["nll"].index(min(curve["nll"]))]
        for i in (0, 3, 6):
            weights = fitted.draw(SAMPLES, seed=seed, scale=curve["scales"][i], covariance=covariance)
            log_probs = model.each(weights).softmax(-1).mean(0).log()
            expected = [nll(log_probs, labels), accuracy(log_probs, labels)]
            assert [curve["nll"][i], curve["accuracy"][i]] == pytest.approx(expected, rel=1e-4)
    task = json.loads((finished / f"seed-{seed}" / "task.json").read_text())
    assert (task["scale"], task["seed"]) == (chosen["scale"], seed)
    swag, diagonal = (stored[f"{method}/seed-{seed}"][1] for method in ("swag", "swag-diagonal"))
    assert (swag["scale"], swag["rank"]) == (chosen["scale"], 3)
    assert (diagonal["scale"], diagonal["rank"]) == (chosen["diagonal"]["scale"], 0)


def test_the_seeds_chose_differently(finished):
    scales = [selection(finished, seed)["scale"] for seed in SEEDS]
    assert len(set(scales)) == 2 and 0.5 not in scales


def test_report_and_arguments(home, finished, asked):
    held = json.loads((finished / "experiment.json").read_text())
    assert held["format"] == 1 and held["methods"] == list(TITLES) and held["seeds"] == [0, 1]
    assert held["environment"]["arithmetic"] == "float32"  # so the fixture wants it
    assert held["data"]["splits"] == {"train": 48, "val": 24, "test": 24}
    assert [tuple(task.values()) for task in held["ood"]] == [
        ("oos_test", False, 8), ("shift-val", True, 8), ("elsewhere", False, 5)
    ]  # fmt: skip
    results = json.loads((finished / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    assert "MultiSWAG" in (finished / "table.md").read_text()


def fitted_anew(finished, settings, folder):
    """A run with other choices on the fits of `finished`, which do not depend on them."""
    sources, task, methods = prepare(settings)
    claim(folder, settings, sources, task, methods)
    for seed in settings.seeds:
        shutil.copytree(finished / f"seed-{seed}", folder / f"seed-{seed}")
        (folder / f"seed-{seed}" / "selection.json").unlink()
        (folder / f"seed-{seed}" / "unfinished" / "swag").mkdir(parents=True)  # of a kill just before it is removed
    return reproduce(folder, settings, figures=False)


def test_a_fixed_scale_gives_the_diagonal_twice_of_it(finished, asked, tmp_path, plain, texts):
    settings = replace(asked, scale=0.5, seeds=(1,), methods=("swag-diagonal", "swag"), ood=(), ood_unlabelled=())
    fitted_anew(finished, settings, tmp_path / "run")
    found = predictions(tmp_path / "run")
    assert [told["scale"] for _, told in found.values()] == [0.5, 1.0]
    assert not list((tmp_path / "run").rglob("unfinished"))
    model = plain(1)
    for method, scale in (("swag", 0.5), ("swag-diagonal", 1.0)):
        weights = posterior(model, finished, 1).draw(SAMPLES, seed=1, scale=scale, covariance=method == "swag")
        expected = averaged(model.each(weights)[:, :24], True)["log_probs"]
        close({"log_probs": found[f"{method}/seed-1"][0]["test/log_probs"]}, {"log_probs": expected}, method)
    assert json.loads((tmp_path / "run" / "seed-1" / "task.json").read_text())["scale"] == 0.5
    chosen = selection(tmp_path / "run", 1)
    assert chosen["scales"] == [] and chosen["scale"] == 0.5 and chosen["diagonal"] == {"scale": 1.0}


@pytest.mark.parametrize("scale", ["auto", 4.0])
def test_rank_is_chosen_on_validation_data(home, finished, asked, tmp_path, plain, scale):
    settings = replace(asked, choose_rank=True, scale=scale, seeds=(1,), methods=("swag",), ood=(), ood_unlabelled=())
    fitted_anew(finished, settings, tmp_path / "run")
    chosen = selection(tmp_path / "run", 1)
    assert set(chosen["ranks"]) == {"2", "3"}
    losses = {int(rank): min(curve["nll"]) for rank, curve in chosen["ranks"].items()}
    assert chosen["rank"] == min(losses, key=losses.get)
    curve = chosen["ranks"][str(chosen["rank"])]
    assert chosen["nll"] == curve["nll"]
    if scale == "auto":
        assert chosen["scale"] == curve["scales"][curve["nll"].index(min(curve["nll"]))]
    else:
        assert chosen["scale"] == scale and curve["scales"] == [scale]
    labels = torch.tensor([row["label"] for row in rows_of(home / "colors" / "val.jsonl")])
    model = plain(1, validation=True)
    for rank, loss in losses.items():
        at = chosen["ranks"][str(rank)]
        best = at["scales"][at["nll"].index(loss)]
        weights = posterior(model, finished, 1).truncated(rank).draw(SAMPLES, seed=1, scale=best)
        assert loss == pytest.approx(nll(model.each(weights).softmax(-1).mean(0).log(), labels), rel=1e-4)
    found = predictions(tmp_path / "run")["swag/seed-1"]
    assert (found[1]["scale"], found[1]["rank"]) == (chosen["scale"], chosen["rank"])
    folder = tmp_path / "run" / "seed-1"
    evaluator, truncated = load_folder(folder)
    assert evaluator.task.rank == chosen["rank"] == len(truncated.deviations)
    sampling = Sampling(SAMPLES, 1, evaluator.task.scale)
    test = evaluator.encode(data.load(home / "colors").split("test"))
    loaded = evaluator.sampled(truncated, test, sampling)
    close({"log_probs": found[0]["test/log_probs"]}, {"log_probs": loaded.log_probs.double()}, "the folder of the seed")


def test_the_rank_that_was_chosen_does_not_narrow_the_next_choice(home, finished, asked, tmp_path):
    settings = replace(asked, choose_rank=True, seeds=(1,), methods=("swag",), ood=(), ood_unlabelled=())
    fitted_anew(finished, settings, tmp_path / "run")
    first = selection(tmp_path / "run", 1)
    (tmp_path / "run" / "seed-1" / "selection.json").unlink()
    task = tmp_path / "run" / "seed-1" / "task.json"
    task.write_text(json.dumps(json.loads(task.read_text()) | {"rank": 2}))
    reproduce(tmp_path / "run", settings, figures=False)
    assert selection(tmp_path / "run", 1) == first and set(first["ranks"]) == {"2", "3"}


def test_a_run_does_not_go_on_in_other_arithmetic(quick, home, tmp_path, monkeypatch):
    folder = shutil.copytree(quick, tmp_path / "run")
    (folder / "predictions" / "swag" / "seed-1.safetensors").unlink()
    before = everything(folder)
    monkeypatch.setattr(training, "native_bf16", lambda device: True)
    with pytest.raises(ValueError, match="computed in float32, and here it would go on in bfloat16: .*--output"):
        reproduce(folder, settings_of(home, QUICK), figures=False)
    assert everything(folder) == before


def test_predictions_are_made_in_the_arithmetic_of_training(finished, asked, tmp_path, plain, stored, monkeypatch):
    monkeypatch.setattr(training, "native_bf16", lambda device: True)
    fitted_anew(finished, replace(asked, seeds=(1,), methods=("map-last",)), tmp_path / "run")
    found = predictions(tmp_path / "run")["map-last/seed-1"][0]["test/log_probs"]
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(1, "map").logits()[:24].log_softmax(-1)
    exact = stored["map-last/seed-1"][0]["test/log_probs"]
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    assert (found - exact).abs().max() > 1e-3


class Killed(BaseException):
    """What nothing in the library catches, as nothing catches a kill."""


def dying(function, calls):
    counter = itertools.count(1)

    def call(*args, **kwargs):
        if next(counter) == calls:
            raise Killed
        return function(*args, **kwargs)

    return call


STAGES = ("seed-*/swag_posterior.safetensors", "seed-*/selection.json", "predictions/*/*.safetensors")


def ended(folder):
    """The files by which stages are known to have ended, with what a rewrite would change."""
    paths = [path for pattern in STAGES for path in folder.glob(pattern) if ".partial" not in path.name]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture(scope="module")
def quick(home, tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    reproduce(folder, settings_of(home, QUICK), figures=False)
    return folder


INTERRUPTIONS = (
    ("swag_lora.experiment.run.write_text", 1, 0),
    ("swag_lora.training.cross_entropy", 8, 0),
    ("swag_lora.fit.save_file", 1, 0),
    ("swag_lora.trainer.checkpoint.write", 2, 0),
    ("swag_lora.fit.write_text", 2, 0),
    ("swag_lora.training.cross_entropy", 15, 1),
    ("swag_lora.experiment.workbench.choose_scale", 1, 2),
    ("swag_lora.experiment.workbench.write_text", 2, 3),
    ("swag_lora.experiment.predictions.save_file", 1, 4),
    ("swag_lora.files.os.replace", 3, 6),
    ("swag_lora.experiment.predictions.tempered", 1, 8),
    ("swag_lora.experiment.workbench.Mixture", 1, 21),
    ("swag_lora.experiment.report.tables.write_json", 1, 22),
)
"""What is interrupted at which call, one after the other, and how many stages have ended by then at the least."""


def test_interrupted_again_and_again_a_run_comes_to_the_same(home, quick, tmp_path, monkeypatch):
    settings, folder, before = settings_of(home, QUICK), tmp_path / "run", {}
    for place, calls, least in INTERRUPTIONS:
        with monkeypatch.context() as patch:
            owner, name = place.rsplit(".", 1)
            owner = pkgutil.resolve_name(owner)
            patch.setattr(owner, name, dying(getattr(owner, name), calls))
            try:
                reproduce(folder, settings, figures=False)
            except Killed:
                pass
            else:
                pytest.fail(f"{place} was not called {calls} times")
        after = ended(folder)
        assert len(after) >= least and after.items() >= before.items(), place
        before = after
        torch.manual_seed(len(after))
    reproduce(folder, settings, figures=False)
    assert ended(folder).items() >= before.items()
    same_predictions(quick, folder)
    assert table_without_seconds(quick) == table_without_seconds(folder)
    assert not list(folder.rglob("*.partial*"))


def test_a_finished_run_only_reports_again(home, quick, tmp_path, monkeypatch):
    folder = shutil.copytree(quick, tmp_path / "run")
    before = ended(folder)
    (folder / "table.md").unlink()
    monkeypatch.setattr(run, "fit", dying(None, 1))
    monkeypatch.setattr(run, "predict", dying(None, 1))
    reproduce(folder, settings_of(home, QUICK), figures=False)
    assert ended(folder) == before and table_without_seconds(folder) == table_without_seconds(quick)


def test_one_lost_stage_is_made_again(home, quick, tmp_path):
    folder = shutil.copytree(quick, tmp_path / "run")
    (folder / "predictions" / "swag" / "seed-1.safetensors").unlink()
    before = ended(folder)
    reproduce(folder, settings_of(home, QUICK), figures=False)
    assert ended(folder).items() > before.items()
    same_predictions(quick, folder)


def test_a_kill_before_the_first_file_is_whole(home, tmp_path):
    """Of a file under way a kill leaves its temporary name, and an error that the caller sees nothing."""
    settings = settings_of(home, QUICK)
    sources, task, methods = prepare(settings)
    (tmp_path / ".experiment.0123.partial.json").write_text('{"form')
    claim(tmp_path, settings, sources, task, methods)
    assert json.loads((tmp_path / "experiment.json").read_text())["format"] == 1


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"samples": 4}, "samples"),
        ({"seeds": (0, 1, 2)}, "seeds"),
        ({"recipe": replace(QUICK, lr=0.02)}, "recipe"),
        ({"scale": 0.5}, "scale"),
        ({"methods": ("map-last", "swag")}, "methods"),
        ({"limits": {"test": 20}}, "limits, data, fingerprints"),
        ({"max_length": 8}, "max_length"),
        ({"choose_rank": True}, "choose_rank"),
    ],
)
def test_other_arguments_in_a_run_s_folder(home, quick, changes, named):
    before = everything(quick)
    with pytest.raises(ValueError, match="other arguments or data") as refused:
        reproduce(quick, replace(settings_of(home, QUICK), **changes), figures=False)
    message = str(refused.value)
    assert str(quick) in message and "--output" in message
    told = set(message.partition("(")[2].partition(")")[0].split(", "))
    assert told == set(named.split(", "))
    assert everything(quick) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"limits": {"val": 0}}, "limit of val"),
        ({"limits": {"test": 0}}, "limit of test"),
        ({"methods": ()}, "no methods"),
        ({"scale": -1.0}, "got -1"),
        ({"scale": float("nan")}, "nan"),
        ({"scale": "Auto"}, "'Auto'"),
        ({"seeds": (0, 2**32)}, "4294967296"),
    ],
)
def test_settings_that_no_data_could_make_right(home, changes, named):
    with pytest.raises(ValueError, match=named):
        prepare(settings_of(home, **changes))


@pytest.mark.parametrize("split", ["train", "val", "test", "oos_test"])
def test_changed_data_in_a_run_s_folder(home, quick, tmp_path, split):
    """Not a number of theirs has changed: one word has."""
    colors = shutil.copytree(home / "colors", tmp_path / "colors")
    (path,) = colors.glob(f"{split}.*")
    rows = rows_of(path)
    write_lines(path, [rows[0] | {"text": "the sea is sky"}, *rows[1:]])
    run_folder = shutil.copytree(quick, tmp_path / "run")
    held = json.loads((run_folder / "experiment.json").read_text())
    held["data"]["name"] = str(colors)
    (run_folder / "experiment.json").write_text(json.dumps(held))
    before = everything(run_folder)
    with pytest.raises(ValueError, match=r"\((ood, )?fingerprints\)" if split != "oos_test" else "fingerprints"):
        reproduce(run_folder, replace(settings_of(home, QUICK), data=str(colors)), figures=False)
    assert everything(run_folder) == before


def test_a_changed_prompt_template_in_a_run_s_folder(home, tmp_path):
    template = tmp_path / "prompt.txt"
    template.write_text("the {text}")
    settings = settings_of(home, QUICK, template=str(template))
    sources, task, methods = prepare(settings)
    claim(tmp_path / "run", settings, sources, task, methods)
    claim(tmp_path / "run", settings, sources, task, methods)
    template.write_text("which {text}")
    with pytest.raises(ValueError, match=r"\(template\)"):
        reproduce(tmp_path / "run", settings, figures=False)


def test_a_folder_with_something_else_in_it(home, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no run"):
        reproduce(tmp_path, settings_of(home, QUICK), figures=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_decoder_that_answers_with_letters(tmp_path):
    """Through the whole protocol; out of distribution are questions of other numbers of choices."""
    save_tiny_gpt2(tmp_path / "gpt2")
    save_questions(tmp_path / "questions")
    rows = [{"question": "which is the sea ?", "choices": [*COLORS, "sea", o], "answer": "D"} for o in OBJECTS[:4]]
    rows += [{"question": f"which is {COLORS[0]} ?", "choices": ["red", "hat"], "answer": 0}]
    write_lines(tmp_path / "five.jsonl", rows)
    recipe = replace(QUICK, lr=0.1)
    settings = settings_of(
        tmp_path, recipe, model=str(tmp_path / "gpt2"), data=str(tmp_path / "questions"), seeds=(3,), samples=4,
        methods=("map-last", "swag"), ood=(str(tmp_path / "five.jsonl"),), max_length=32,
    )  # fmt: skip
    reproduce(tmp_path / "run", settings, figures=False)
    found = predictions(tmp_path / "run")
    assert set(found) == {"map-last/seed-3", "swag/seed-3"}
    for tensors, told in found.values():
        assert tensors["test/log_probs"].shape == (13, 5) and tensors["five/log_probs"].shape == (5, 5)
        assert tensors["five/labels"].tolist() == [3, 3, 3, 3, 0]
        probs = tensors["five/log_probs"].exp()
        torch.testing.assert_close(probs.sum(-1), torch.ones(5))
        assert (probs[:4] > 1e-4).all() and not probs[4, 2:].any()
        assert told["seed"] == 3
    first, second = (tensors["test/log_probs"] for tensors, _ in found.values())
    assert (first.exp() - second.exp()).abs().max() > 1e-4
    table = (tmp_path / "run" / "table.md").read_text()
    assert "five, 5 examples" in table and "SWAG" in table
