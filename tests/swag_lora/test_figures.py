"""What the figures of a run contain, and that nothing in them lies on something else."""

import itertools
import json
import math

import pytest
import torch
from run_folders import SCALES, prediction_path, write_run
from safetensors import safe_open

from swag_lora import metrics
from swag_lora.experiment import curves, figures, report, style
from swag_lora.experiment.methods import TITLES
from swag_lora.experiment.results import summarise
from swag_lora.experiment.stored import Run

pytest.importorskip("matplotlib")

LONG = "massive multitask language understanding/professional medicine, validation part, a name too long for a line"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), test=150, ood=((LONG, 60, False), ("oos", 50, False)), samples=8)


@pytest.fixture(scope="module")
def results(run):
    return summarise(run)


@pytest.fixture(scope="module")
def splits(run, results):
    return figures._splits_of(Run.open(run), results)


@pytest.fixture(autouse=True)
def sizes():
    with style.context():
        yield


def labels_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def check_layout(figure):
    """The legend lies on the page and on no axes; the axes' labels lie on no other axes."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    page, legend = figure.bbox, figure.legends[0].get_window_extent(renderer)
    boxes = [axis.get_tightbbox(renderer) for axis in figure.axes]
    for box in [legend, *boxes]:
        assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1 and box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1
    for one, other in itertools.combinations([legend, *boxes], 2):
        assert not one.overlaps(other)
    for axis in figure.axes:
        ticks = [t.get_window_extent(renderer) for t in axis.get_xticklabels() if t.get_text() and t.get_visible()]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(ticks))


def test_looks_differ_without_colours():
    looks = [style.look(method) for method in TITLES]
    assert len({look["marker"] for look in looks}) == len(TITLES)
    assert len({(look["marker"], str(look["linestyle"])) for look in looks}) == len(TITLES)
    assert len({str(style.look(method)["linestyle"]) for method in curves.BESIDE}) == len(curves.BESIDE)
    assert "marker" not in style.look("swa", markers=False)


def test_reliability(run, results, splits):
    figure = figures.reliability(splits, results)
    check_layout(figure)
    assert len(figure.axes) == 2 * len(style.MAIN)
    titles = [axis.get_title().split("\n")[0] for axis in figure.axes if axis.get_title()]
    assert titles == [
        TITLES[method] for method in ("map-last", "map-best", "swag", "mc-dropout", "ensemble", "multiswag")
    ]
    assert labels_of(figure) == ["accuracy", "gap to confidence", "accuracy = confidence"]

    upper = next(axis for axis in figure.axes if axis.get_title().startswith("SWAG\n"))
    lower = figure.axes[figure.axes.index(upper) + 3]
    ece = results["methods"]["swag"]["summary"]["test"]["ece"]["mean"]
    assert upper.get_title().endswith(f"ECE-15 {ece:.3f}")
    found = []
    for seed in (0, 1):
        with safe_open(prediction_path(run, "swag", seed), "pt") as file:
            found.append((file.get_tensor("test/log_probs").double(), file.get_tensor("test/labels")))
    top, predicted = torch.cat([p for p, _ in found]).max(1)
    right, confidence = predicted == torch.cat([y for _, y in found]), top.exp()
    bars, gaps = upper.containers
    assert all(patch.get_hatch() for patch in gaps) and not any(patch.get_hatch() for patch in bars)
    for (
        patch,
        gap,
    ) in zip(bars, gaps, strict=True):
        inside = (confidence > patch.get_x()) & (confidence <= patch.get_x() + patch.get_width() + 1e-9)
        accuracy, mean = float(right[inside].double().mean()), float(confidence[inside].mean())
        assert patch.get_height() == pytest.approx(accuracy)
        ends = gap.get_y(), gap.get_y() + gap.get_height()
        assert ends == pytest.approx((min(accuracy, mean), max(accuracy, mean)))
    counts = [patch.get_height() for patch in lower.containers[0]]
    assert len(counts) == 15 and sum(counts) == pytest.approx(150)  # a seed's examples, not all seeds'
    assert lower.get_ylim()[1] >= max(counts)
    assert upper.get_xlim() == upper.get_ylim() == (0, 1)
    assert {axis.get_xlabel() for axis in figure.axes} == {"", "confidence"}
    assert {axis.get_ylabel() for axis in figure.axes} == {"", "accuracy", "examples"}


def test_entropy(run, results, splits):
    figure = figures.entropy(splits, LONG)
    check_layout(figure)
    assert [axis.get_title() for axis in figure.axes] == [TITLES[method] for method in style.MAIN]
    assert figure.axes[0].get_ylabel() == "examples, % per bin"
    assert figure.axes[-1].get_xlabel() == "predictive entropy, nats"
    assert [" ".join(text.split()) for text in labels_of(figure)] == ["test", f"out of distribution: {LONG}"]
    with safe_open(prediction_path(run, "ensemble", None), "pt") as file:
        wanted = [file.get_tensor(f"{name}/entropy") for name in ("test", LONG)]
    place = list(style.MAIN).index("ensemble")
    drawn = figure.axes[place].patches
    assert len({str(patch.get_linestyle()) for patch in drawn}) == 2 and not any(patch.get_fill() for patch in drawn)
    for patch, entropy in zip(drawn, wanted, strict=True):
        values, edges, _ = patch.get_data()
        assert edges[0] == 0 and edges[-1] == pytest.approx(math.log(4)) and sum(values) == pytest.approx(100)
        inside = (entropy >= edges[3]) & (entropy < edges[4])
        assert values[3] == pytest.approx(100 * float(inside.double().mean()))
    assert {axis.get_ylim() for axis in figure.axes} == {figure.axes[0].get_ylim()}


def test_risk_coverage(run, results, splits):
    figure = figures.risk_coverage(splits, results)
    check_layout(figure)
    (axis,) = figure.axes
    assert axis.get_xlabel() == "coverage: most confident test examples, %"
    assert axis.get_ylabel() == "errors among them, %"
    aurc = results["methods"]["swag"]["summary"]["test"]["aurc"]["mean"]
    assert f"SWAG (AURC {aurc:.3f})" in labels_of(figure)
    line = axis.lines[style.MAIN.index("swag")]
    risks = []
    for seed in (0, 1):
        with safe_open(prediction_path(run, "swag", seed), "pt") as file:
            risks.append(metrics.risk_coverage(file.get_tensor("test/log_probs"), file.get_tensor("test/labels")))
    coverage, risk = (list(map(float, of)) for of in line.get_data())
    assert coverage[-1] == pytest.approx(100) and coverage[0] == pytest.approx(100 * 4 / 150)
    assert risk == pytest.approx((100 * (risks[0] + risks[1])[3:] / 2).tolist())


def test_against_samples(results):
    figure = curves.against_samples(results)
    check_layout(figure)
    assert [axis.get_ylabel() for axis in figure.axes] == ["test NLL, nats", "test ECE-15", "test accuracy"]
    assert {axis.get_xlabel() for axis in figure.axes} == {"samples averaged, K"}
    shown = ["map-last", "map-best", "swa", "swag-diagonal", "swag", "mc-dropout", "multiswag"]
    assert labels_of(figure) == [TITLES[method] for method in shown]
    drawn = dict(zip(shown[3:], figure.axes[0].containers, strict=True))
    seeds = results["methods"]["swag"]["seeds"].values()
    samples, nll = drawn["swag"].lines[0].get_data()
    assert list(samples) == [2, 4, 8]
    assert list(nll) == pytest.approx([sum(s["curve"]["nll"][i] for s in seeds) / 2 for i in range(3)])
    assert list(drawn["multiswag"].lines[0].get_xdata()) == [2, 4, 8, 16]
    assert drawn["swag"].has_yerr and not drawn["multiswag"].has_yerr
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["2", "4", "8", "16"]
    level = figure.axes[2].lines[0].get_ydata()[0]
    assert level == results["methods"]["map-last"]["summary"]["test"]["accuracy"]["mean"]


def test_a_method_has_one_look_in_all_figures(results, splits):
    points, sampled = ["map-last", "map-best", "swa"], ["swag-diagonal", "swag", "mc-dropout", "multiswag"]
    for figure, shown in [
        (curves.against_samples(results), points + sampled),
        (figures.risk_coverage(splits, results), style.MAIN),
    ]:
        lines = [line for line in figure.axes[0].lines if line.get_linestyle() != "None"]  # not the caps of error bars
        for method, line in zip(shown, lines, strict=True):
            look = style.look(method)
            dashes = look["linestyle"] if isinstance(look["linestyle"], str) else "--"
            assert (line.get_color(), line.get_linestyle()) == (look["color"], dashes)
            level = len(shown) == 7 and method in points
            assert line.get_marker() == ("None" if level else look["marker"])


def test_against_scale(results):
    figure = curves.against_scale(results)
    check_layout(figure)
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "validation NLL, nats",
        "validation ECE-15",
        "validation accuracy",
    ]
    assert labels_of(figure) == ["seed 0", "seed 1", "chosen"]
    for axis, key in zip(figure.axes, ("nll", "ece", "accuracy"), strict=True):
        lines = axis.lines
        marks = [line for line in lines if line.get_linestyle() == "None"]
        seeds = [line for line in lines if line.get_linestyle() != "None"]
        assert len({(line.get_marker(), line.get_linestyle()) for line in seeds}) == 2
        for seed, line, mark in zip("01", seeds, marks, strict=True):
            chosen = results["selection"][seed]
            assert list(line.get_xdata()) == SCALES and list(line.get_ydata()) == chosen[key]
            at = SCALES.index(chosen["scale"])
            assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (chosen["scale"], chosen[key][at])


def test_many_scales_with_zero_and_many_seeds(tmp_path):
    scales = (0.0, 0.25, 0.5, 0.707, 1.0, 1.41, 2.0, 2.8, 4.0, 5.6, 8.0, 11.3, 16.0, 32.0, 64.0, 128.0)
    seeds = tuple(range(8))
    results = summarise(write_run(tmp_path, ("swag",), seeds, test=20, ood=(), samples=2, scales=scales))
    figure = curves.against_scale(results)
    check_layout(figure)
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks[0] == "0" and len(ticks) <= 8
    assert figure.axes[0].lines[0].get_xdata()[0] == 0.125
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() != "None"]
    assert len({(line.get_marker(), line.get_linestyle(), line.get_color()) for line in lines}) == 8
    assert curves.against_samples(results) is None


@pytest.mark.parametrize(
    "methods", [("map-last",), ("map-last", "swag"), ("map-last", "map-best", "swag", "mc-dropout")]
)
def test_other_shapes(tmp_path, methods):
    run = write_run(tmp_path, methods, (0,), num_classes=2, test=40, ood=(("a$b$c", 30, False),))
    results = summarise(run)
    splits = figures._splits_of(Run.open(run), results)
    for figure, panels in [
        (figures.reliability(splits, results), 2 * len(methods)),
        (figures.entropy(splits, "a$b$c"), len(methods)),
        (figures.risk_coverage(splits, results), 1),
    ]:
        assert len(figure.axes) == panels
        check_layout(figure)


def test_report_writes_the_figures(tmp_path):
    ood = (("shift/one", 20, True), ("shift one", 20, True))
    run = write_run(tmp_path, ("map-last", "swag"), (0,), test=30, ood=ood)
    report.write(run)
    names = {"reliability", "risk-coverage", "samples", "scale", "entropy-shift-one", "entropy-shift-one-1"}
    assert {path.name for path in (run / "figures").iterdir()} == {f"{name}.png" for name in names}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (run / "figures").iterdir())
    assert json.loads((run / "results.json").read_text())["seeds"] == [0]


def test_runs_without_what_a_figure_shows(tmp_path):
    run = write_run(tmp_path, ("swa",), (0,), test=30, ood=())
    (run / "seed-0" / "selection.json").unlink()
    results = summarise(run)
    assert figures.draw(Run.open(run), results, run / "figures") == []
