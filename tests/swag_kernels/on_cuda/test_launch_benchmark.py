"""The rows of `make gpu` about launches: every op's launch is found, and can be made again."""

import torch

import gpu_launch


def test_launch_rows(device, monkeypatch):
    monkeypatch.setitem(gpu_launch.LORA_SIZES, "tiny", [(4, 40), (40, 4)] * 2)
    with torch.no_grad():
        rows = list(gpu_launch.launch_rows(device, "tiny", samples=2, width=64))
    assert [row.case.split(":")[0] for row in rows] == ["collect_", "draw", "sampled_lora", "bayes_average_"]
    assert [row.baseline for row in rows] == ["10 µs", "5 µs", "5 µs", "5 µs"]
    assert all(0 < row.low <= row.ratio <= row.high for row in rows)


def test_recorded_launches(device):
    x, A, B, base = gpu_launch.lora_inputs(device, 2, 1, 64, 64, 8)
    y = base.clone()
    launches = gpu_launch.recorded_launches(lambda: gpu_launch.sampled_lora(x, A, B, 0.5, y))
    once = y.clone()
    for launch in launches:
        launch()
    assert len(launches) == 1 and not torch.equal(once, base) and not torch.equal(y, once)
    assert gpu_launch.cuda._launch.__name__ == "_launch"
