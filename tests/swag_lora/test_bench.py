import csv
import json
import sys

import pytest
import torch
from encoder_models import save_tiny_gpt2
from transformers import BertConfig, LlamaConfig

from swag_lora import bench_baselines, memory
from swag_lora.bench import Calm, Sweep
from swag_lora.bench_baselines import AdapterNames, TooSlow, Vmap, prebuilt
from swag_lora.bench_case import Adapted, Case
from swag_lora.bench_error import error_curve
from swag_lora.bench_limits import Limits
from swag_lora.bench_plan import Pace, Settings
from swag_lora.bench_report import COLUMNS, Row, csv_text
from swag_lora.bench_strategies import FAMILIES, OnePass, strategies
from swag_lora.cli import main
from swag_lora.shapes import SHAPES, LinearSizes, Shape
from swag_lora.twin import twin_of

# torch lists the functions that a default device governs when it meets the first one: before `poisoned` replaces some.
with torch.device("meta"):
    torch.empty(0)

CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
TINY |= {"initializer_range": 0.2}
ENCODER = Shape("tiny encoder", BertConfig(vocab_size=50, num_hidden_layers=4, num_labels=8, **TINY))
DECODER = Shape("tiny decoder", LlamaConfig(vocab_size=50, num_hidden_layers=4, num_key_value_heads=2, **TINY))


def is_timed(row):
    return row.status == "measured" and row.seconds > 0


def adapted(shape, layers=4):
    return Adapted.of(shape, shape.build(torch.float32, CPU, 0), 4, None, layers)


def settings(shape=ENCODER, **changes):
    given = {"samples": (1, 4), "batches": (2,), "lengths": (5,), "seconds": 0.01} | changes
    return Settings(shape, **given)


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch):
    monkeypatch.setattr(Limits, "measure", classmethod(lambda cls, device, dtype: cls(1e11, 1e10)))


@pytest.fixture
def bench(home, capsys):
    """The command on the tiny encoder: its exit status, what it printed, and its errors."""

    def run(*options, model=home / "bert"):
        capsys.readouterr()
        fast = ["--batch", "2", "--seq", "5", "--seconds-per-case", "0.01"]
        chosen = [] if "--shape" in options else ["--model", str(model)]
        try:
            status = main(["bench", *chosen, *fast, *map(str, options)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("shape", [ENCODER, DECODER], ids=["encoder", "decoder"])
@pytest.mark.parametrize("samples", [1, 5, 6])
def test_every_strategy_averages_the_same_samples(shape, samples, monkeypatch):
    monkeypatch.setattr("swag_lora.plan._TOKENS", {"cpu": 4 * 15})  # so that passes are cut
    base = shape.build(torch.float32, CPU, 0)
    models = {late: Adapted.of(shape, base, 4, None, layers) for late, layers in ((False, 4), (True, 1))}
    inputs = shape.batch(base, 3, 5, CPU, 0)
    cases = {late: Case(model, inputs, samples, 0) for late, model in models.items()}
    exact = {}
    for late, case in cases.items():
        logits = []
        for index in range(samples):
            weights = case.weights.sample(index)
            output = torch.func.functional_call(case.adapted.model, weights, kwargs=dict(inputs))
            logits.append(output.logits.flatten(0, -2).double())
        exact[late] = torch.stack(logits).softmax(-1).mean(0).log()
    assert (exact[False] - exact[True]).abs().max() > 1e-2
    ways = strategies(FAMILIES, CPU, torch.float32)
    names = [way.name for way in ways]
    assert names[:5] == ["published loop", "prebuilt loop", "PEFT adapter_names", "vmap", "one pass, cpu"]
    assert names[-3:] == ["one pass, reference", "late axis", "late axis, from start"]
    for way in ways:
        output = way.prepare(cases[way.late], float("inf"))().flatten(0, -2)
        assert output.shape == exact[way.late].shape and output.isfinite().all()
        if not way.draws_own:
            torch.testing.assert_close(output.double(), exact[way.late], rtol=1e-4, atol=1e-5, msg=way.name)


def test_the_late_axis_begins_late():
    model = adapted(ENCODER, 1)
    case = Case(model, ENCODER.batch(model.model, 2, 5, CPU, 0), 8, 0)
    rows = {}
    attend = torch.nn.functional.scaled_dot_product_attention
    for from_start in (False, True):
        run = OnePass("late axis", late=True, from_start=from_start).prepare(case, float("inf"))
        seen = rows.setdefault(from_start, [])

        def counting(query, *args, seen=seen, **kwargs):
            seen.append(len(query))
            return attend(query, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
            run()
    assert rows == {False: [2, 2, 2, 16], True: [16] * 4}


def test_adapters_are_loaded_as_samples_grow_and_not_past_the_deadline():
    model = adapted(ENCODER)
    inputs = ENCODER.batch(model.model, 1, 5, CPU, 0)
    way = AdapterNames()
    way.prepare(Case(model, inputs, 2, 0), float("inf"))
    with pytest.raises(TooSlow, match="loaded 2 adapters of 4"):
        way.prepare(Case(model, inputs, 4, 0), 0.0)
    case = Case(model, inputs, 4, 1)
    expected = prebuilt().prepare(case, float("inf"))()
    torch.testing.assert_close(way.prepare(case, float("inf"))(), expected, rtol=1e-4, atol=1e-5)
    assert list(model.model.peft_config) == ["default"]


def test_sweep_measures_checks_and_compares():
    sweep = Sweep(settings())
    assert [len(rows) for rows in sweep.cases()] == [8, 8]
    assert [(row.samples, row.batch, row.seq) for row in sweep.rows[::8]] == [(1, 2, 5), (4, 2, 5)]
    for row in sweep.rows:
        assert is_timed(row), row
        assert row.seconds_low <= row.seconds <= row.seconds_high and row.rounds >= 3
        assert row.examples_per_second == pytest.approx(2 / row.seconds)
        assert row.of_limit == pytest.approx(row.limit_seconds / row.seconds)
        assert row.checked_samples == (0 if row.strategy == "published loop" else row.samples)
        assert (row.error is None) == (row.strategy == "published loop") and (row.error or 0) < 1e-4
        late = row.strategy == "late axis"
        assert (row.x_start is not None) == late
        assert (row.x_published is None) == ("late" in row.strategy or row.strategy == "published loop")
        assert (row.x_prebuilt is None) == ("late" in row.strategy or row.strategy == "prebuilt loop")
    loops = {row.strategy: row for row in sweep.rows[8:]}
    ratio = loops["prebuilt loop"].x_published * loops["published loop"].x_prebuilt
    assert ratio == pytest.approx(1, rel=0.5)


def test_a_row_says_how_many_times_as_fast():
    row = Row("m", 1, "float32", "cpu", "vmap", 4, 3, 1, "here", limit_seconds=0.5)
    row.timed([1.0, 2.0, 4.0], {"x_published": [2.0, 8.0, 40.0]})
    assert (row.seconds, row.rounds, row.examples_per_second, row.of_limit) == (2.0, 3, 1.5, 0.25)
    assert (row.seconds_low, row.seconds_high) == (pytest.approx(1.4), pytest.approx(3.2))
    assert row.x_published == 4.0 and row.x_prebuilt is None
    assert (row.x_published_low, row.x_published_high) == (pytest.approx(2.8), pytest.approx(7.6))


def test_a_wrong_strategy_is_not_timed(monkeypatch):
    def wrong(self, case, deadline):
        return prebuilt().prepare(case.few(case.samples - 1), deadline)

    monkeypatch.setattr(Vmap, "prepare", wrong)
    sweep = Sweep(settings(samples=(16,), families=("prebuilt", "vmap")))
    loop, vmap = next(sweep.cases())
    assert is_timed(loop) and loop.x_prebuilt is None
    assert vmap.status == "wrong" and vmap.reason.startswith("off by 0.") and vmap.seconds is None


def test_many_samples_are_compared_by_the_first_few(monkeypatch):
    monkeypatch.setattr(Sweep, "_spread", lambda self, *given: Calm(spread=0.05, seconds=0.1))
    sweep = Sweep(settings(samples=(16,), families=("vmap", "one-pass"), limit=1.0))
    rows = next(sweep.cases())
    assert all(is_timed(row) and row.checked_samples == 4 and row.error < 1e-3 for row in rows)


def test_what_takes_too_long_or_too_much_is_skipped_with_the_reason(monkeypatch):
    sweep = Sweep(settings(samples=(1, 4096), families=("published",), limit=5.0))
    first, second = sweep.cases()
    assert all(map(is_timed, first))
    assert second[0].status == "skipped" and second[0].seconds is None
    assert second[0].reason.startswith("est. ") and second[0].reason.endswith(" s > 5 s")

    sweep = Sweep(settings(samples=(4,), families=("prebuilt", "adapter-names")))
    monkeypatch.setattr(memory, "available", lambda device: 40_000)
    loop, adapters = next(sweep.cases())
    needed = 4 * sweep.adapted[False].sample_bytes
    assert loop.status == adapters.status == "skipped"
    assert loop.reason.startswith("needs ") and loop.reason.endswith("is free") and needed > 40_000


def test_what_a_strategy_cannot_do_is_a_reason(monkeypatch):
    def impossible(*args, **kwargs):
        raise RuntimeError("vmap: no batching rule\nfor this")

    monkeypatch.setattr(bench_baselines, "vmap", impossible)
    (row,) = next(Sweep(settings(samples=(2,), families=("vmap",))).cases())
    assert (row.status, row.reason) == ("skipped", "not possible: vmap: no batching rule for this")


def test_pace_grows_with_samples_and_tokens():
    pace = Pace()
    assert pace.estimate("vmap", (1, 1, 1)) is None
    pace.record("vmap", (2, 1, 32), 1.0, 2.0)
    pace.record("vmap", (4, 1, 32), 2.0, 3.0)
    assert pace.estimate("vmap", (8, 1, 32)) == (4.0, 6.0)
    assert pace.estimate("vmap", (2, 4, 64)) == (1.0, 12.0)
    pace.record("vmap", (2, 4, 64), 1.0, 10.0)
    assert pace.estimate("vmap", (4, 4, 64)) == (2.0, 20.0)
    assert pace.estimate("published loop", (4, 4, 64)) is None


def test_limit_counts_the_layers_after_the_axis_once_a_sample():
    linear = 4 * 32 * 32 + 2 * 32 * 64
    head = 32 * 32 + 32 * 8
    for layers in (4, 1):
        model = adapted(ENCODER, layers)
        assert model.sizes == LinearSizes(4, linear, head)
        case = Case(model, ENCODER.batch(model.model, 2, 5, CPU, 0), 10, 0)
        operations = 2 * (10 * linear * ((4 - layers) + 10 * layers) + 10 * 2 * head)
        assert Limits(1e3, 1e30).floor(case) == (pytest.approx(operations / 1e3), "matmul")
        moved = 4 * (4 * linear + head + 10 * model.posterior.layout.size)
        assert Limits(1e30, 1e3).floor(case) == (pytest.approx(moved / 1e3), "copy")


def test_error_falls_with_samples():
    model = adapted(DECODER)
    inputs = DECODER.batch(model.model.get_base_model(), 2, 5, CPU, 0)
    points = error_curve(model, inputs, (1, 2, 16), 0, float("inf"))
    assert [(p.samples, p.groups, p.reference) for p in points] == [(1, 64, 256), (2, 32, 256), (16, 4, 256)]
    single = [prebuilt().prepare(Case(model, inputs, 1, seed), float("inf"))().exp() for seed in range(64)]
    spread = torch.stack(single).std(0).square().mean().sqrt().item()
    assert points[0].iid == pytest.approx(spread, rel=0.3)
    assert points[2].iid == pytest.approx(spread / 4, rel=0.5)
    assert points[0].antithetic is None
    assert points[1].antithetic < 0.75 * points[1].iid and points[2].antithetic < 0.75 * points[2].iid
    assert error_curve(model, inputs, (1, 2, 16), 0, float("inf")) == points
    assert error_curve(model, inputs, (1,), 0, 1e-9) == []


def test_shapes_have_the_sizes_of_their_models():
    millions = {"minilm": 22.7, "bert-base": 109.5, "roberta-base": 124.7, "gpt2": 124.4}
    millions |= {"roberta-large": 355.4, "llama-2-7b": 6738.4, "llama-3-8b": 8030.3}
    for name, expected in millions.items():
        shape = Shape.named(name)
        assert shape.parameters(shape.layers) / 1e6 == pytest.approx(expected, abs=0.06)
        assert shape.is_decoder == (name == "gpt2" or name.startswith("llama"))
    assert Shape.named("roberta-base").positions == 512 and Shape.named("llama-2-7b", 3).layers == 3
    assert SHAPES.keys() > millions.keys()


def test_memory_is_asked_before_building(monkeypatch):
    one, two = (Shape.named("minilm", n).parameters(n) for n in (1, 2))
    monkeypatch.setattr(memory, "available", lambda device: 4 * (one + 2 * (two - one)) + 100)
    assert Shape.named("minilm", 3).check_memory(torch.float32, CPU) == 4 * (one + 2 * (two - one))
    with pytest.raises(ValueError, match=r"minilm with 4 layers needs .* is free on cpu: --layers 3 fits"):
        Shape.named("minilm", 4).check_memory(torch.float32, CPU)
    with pytest.raises(ValueError, match="--layers 2 fits"):
        Shape.named("minilm").check_memory(torch.float32, CPU, extra=200)
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(ValueError, match="not even one layer fits"):
        Shape.named("minilm").check_memory(torch.float32, CPU)


def test_a_shared_tree_costs_no_tensors():
    model = ENCODER.build(torch.float32, CPU, 0)
    copy = twin_of(model)
    assert all(a is b for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert not {id(module) for module in model.modules()} & {id(module) for module in copy.modules()}


def test_command_writes_table_csv_json_and_figure(bench, tmp_path):
    table, figure = tmp_path / "out.csv", tmp_path / "out.png"
    options = ["--samples", "1,2", "--strategies", "prebuilt,one-pass", "--csv", table]
    status, out, err = bench(*options, "--figure", figure)
    assert status == 0, err
    assert "K=2, batch 2 × 5" in out and "one pass, cpu" in out and "torch " in out and "GFLOP/s" in out
    assert "RMS error" in out
    assert out.splitlines()[1].split() == ["ms", "ex.", "/", "s", "×", "(20–80", "%)", "against", "limit"]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert [(row["samples"], row["strategy"]) for row in rows] == [
        (k, name) for k in "12" for name in ("prebuilt loop", "one pass, cpu", "one pass, reference")
    ]
    assert all(float(row["seconds"]) > 0 and row["layers"] == "2" and float(row["error_iid"]) > 0 for row in rows)
    assert rows[0]["error_antithetic"] == "" and float(rows[3]["error_antithetic"]) > 0
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.png"]

    status, out, _ = bench("--samples", "2", "--strategies", "prebuilt", "--json", "-")
    result = json.loads(out)
    assert status == 0 and result["rows"][0]["strategy"] == "prebuilt loop" and result["errors"][0]["samples"] == 2


def test_command_on_a_decoder_with_fewer_layers(bench, tmp_path):
    save_tiny_gpt2(tmp_path / "gpt2")
    options = ["--samples", "2", "--layers", "1", "--json", "-", "--target-modules", "c_attn"]
    status, out, err = bench(*options, model=tmp_path / "gpt2")
    assert status == 0, err
    rows = json.loads(out)["rows"]
    assert all(row["status"] == "measured" and row["layers"] == 1 for row in rows) and len(rows) == 8


def test_interrupted_sweep_keeps_what_it_has(bench, tmp_path, monkeypatch):
    run = Sweep._case

    def interrupted(self, samples, inputs, calm):
        if samples == 4:
            assert (tmp_path / "out.csv").read_text().count("\n") == 3
            raise KeyboardInterrupt
        return run(self, samples, inputs, calm)

    monkeypatch.setattr(Sweep, "_case", interrupted)
    options = ["--samples", "1,2,4", "--strategies", "prebuilt", "--csv", tmp_path / "out.csv"]
    status, out, err = bench(*options)
    assert status == 130 and "interrupted" in err
    assert "K=1, batch 2" in out and "K=2, batch 2" in out and "K=4" not in out


@pytest.mark.parametrize(
    "options, message",
    [
        (("--shape", "bert-huge"), "known are minilm, bert-base,"),
        (("--samples", "0"), "--samples: must be at least 1, got 0"),
        (("--samples", "2,x"), "whole numbers"),
        (("--shape", "minilm", "--layers", "7"), "minilm has 6 layers, 7 were asked for (--layers)"),
        (("--seq", "33"), "takes at most 32 tokens, 33 were asked for (--seq)"),
        (("--shape", "roberta-base", "--seq", "513"), "takes at most 512 tokens"),
        (("--strategies", "guess"), "known are published, prebuilt, adapter-names, vmap, one-pass, late-axis"),
        (("--target-modules", "nothing"), "no LoRA on"),
        (("--seconds-per-case", "0"), "above 0"),
        (("--csv", "/no/such/folder/out.csv"), "for --csv"),
        (("--figure", "/no/such/folder/out.png"), "for --figure"),
        (("--figure", "out.txt"), "must end in .png, .pdf, .svg"),
    ],
)
def test_bad_input_is_one_line(bench, options, message):
    status, out, err = bench(*options)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert "error: " in err and message in err


def test_a_model_that_does_not_fit_is_one_line(bench, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 2 << 30)
    status, _, err = bench("--shape", "llama-2-7b", "--dtype", "bfloat16")
    assert status == 2 and err.count("\n") == 1
    assert "llama-2-7b with 32 layers needs 12.6 GiB for its bfloat16 weights" in err and "--layers 1 fits" in err


def test_a_figure_without_matplotlib_is_refused_before_anything_is_measured(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(Shape, "of_folder", lambda *a: pytest.fail("measured first"))
    status, _, err = bench("--figure", tmp_path / "out.png")
    assert status == 2 and "pip install 'swag-kernels[plots]'" in err and err.count("\n") == 1


def test_csv_has_one_line_a_row():
    row = Row("m", 1, "float32", "cpu", "late axis, from start", 1, 1, 1, 'a "b", c', status="skipped", reason="a, b")
    header, line, *rest = csv.reader(csv_text([row]).splitlines())
    assert header == list(COLUMNS) and rest == []
    assert dict(zip(header, line, strict=True))["reason"] == "a, b" and line[-1] == 'a "b", c' and line.count("") == 23
