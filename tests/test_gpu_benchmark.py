"""The rows of `make gpu`, tried on the CPU at tiny sizes: their checks pass and their numbers are numbers."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig

pytest.importorskip("triton")

import gpu
import gpu_lora
import gpu_model
import gpu_timing
from gpu_model import decode_rows, evaluation_rows, fine_tune, model_rows
from harness import Row
from swag_lora import Predictor, SampledModel

CPU = torch.device("cpu")
TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=500,
    max_position_embeddings=64,
)


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setattr(gpu_model, "copy_bandwidth", lambda device: gpu_timing.copy_bandwidth(device, 1 << 16))


def assert_numbers(rows):
    for row in rows:
        assert all(math.isfinite(v) and v > 0 for v in (row.ours, row.theirs, row.ratio, row.low, row.high))


def test_rows_of_a_model():
    rows = list(model_rows(CPU, TINY, "tiny", decode_samples=4, eval_samples=2, length=9, rounds=4))
    loops = ["published loop (resample on the host, K forwards)", "loop over the same kept weights"]
    decode = [
        "one plain LoRA step",
        "a plain step for each sample",
        "weights, samples and cache once at the speed of a copy",
    ]
    assert [row.baseline for row in rows] == [*decode, *loops, *loops]
    assert_numbers(rows)
    assert [row.target for row in rows] == [1 / 1.3, None, None, 30.0, None, 8.0, None]
    assert "batch 16" in rows[-1].case and "S=4" in rows[0].case


def test_a_model_is_built_with_its_own_rotary_frequencies():
    model, _ = fine_tune(TINY, CPU, rank=2)
    inverse = model.get_base_model().model.rotary_emb.inv_freq
    torch.testing.assert_close(inverse, 1e4 ** (-torch.arange(0, 16, 2) / 16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and inverse.dtype == torch.float32


@pytest.mark.parametrize("wrong", ["SampledModel", "Predictor"])
def test_other_samples_are_caught(monkeypatch, wrong):
    """The checks before the times fail where what runs is not what was drawn."""
    model, posterior = fine_tune(TINY, CPU, rank=2)
    others = {
        "SampledModel": lambda model, weights: SampledModel(model, posterior.draw(2, seed=7)),
        "Predictor": lambda *args: Predictor(*args, seed=7),
    }
    monkeypatch.setattr(gpu_model, wrong, others[wrong])
    with pytest.raises(AssertionError, match="off by"):
        if wrong == "SampledModel":
            decode_rows(model, posterior, "tiny", samples=2, length=9)
        else:
            evaluation_rows(model, posterior, "tiny", samples=2, batch_size=2, length=9, target=None)


def test_rows_of_the_ops(monkeypatch):
    monkeypatch.setitem(gpu.LORA_SIZES, "tiny", [(4, 40), (40, 4)] * 2)
    monkeypatch.setattr(gpu, "SAMPLES", 4)
    monkeypatch.setattr(gpu_lora, "DTYPE", torch.float16)  # Triton's interpreter computes bfloat16 wrongly
    monkeypatch.setattr(gpu_timing, "OTHERS", {"cpu": ("reference",)})
    with torch.no_grad():
        for rows, number in (
            (gpu.collect_rows(CPU, "tiny"), 7),
            (gpu.draw_rows(CPU, "tiny"), 10),
            (gpu_lora.extra_rows(CPU, samples=2, rows=40, width=64), 15),
            (gpu_lora.plain_launch_rows(CPU, samples=2, width=16), 2),
            (gpu.average_rows(CPU, batch=2, classes=50), 6),
            (gpu_lora.lora_case(CPU, "decode", 2, 3, 32, 48, 4), 2),
        ):
            rows = list(rows)
            assert len(rows) == number
            assert_numbers(rows)


def test_a_table_is_written_whatever_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "machine", lambda: "a machine, torch 0")
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda device: 3e12)
    monkeypatch.setattr(gpu, "matmul_rate", lambda device: 7e14)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU 80GB")

    def broken(device):
        yield Row("a case", "another", 2.0, 3e-4, 1.5, 1.4, 1.6, 1.2)
        raise AssertionError("off by 1")

    def sound(device):
        return [Row("a slow case", "its limit", 0.02, 0.01, 0.5, 0.4, 0.6)]

    rows, failed = gpu.run([broken, sound], CPU)
    assert len(rows) == 2 and failed == ["broken"]
    file = tmp_path / "results" / "some-gpu-80gb"
    result = json.loads(file.with_suffix(".json").read_text())
    assert result["limits"]["copy_bytes_per_s"] == 3e12 and result["rows"][0]["verdict"] == "≥ 1.2: reached"
    table = file.with_suffix(".md").read_text()
    assert "| a case | another | 2 s | 300 µs | 1.50 (1.40 – 1.60) | ≥ 1.2: reached |" in table
    assert "| a slow case | its limit | 20 ms | 10 ms | 0.50 (0.40 – 0.60) |  |" in table
    assert "copy 3.00 TB/s" in table and "a machine, torch 0" in table
