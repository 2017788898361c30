"""Tables outlive everything else for the graphs that read them."""

import gc
import sys
from types import SimpleNamespace

import pytest
import torch

from swag_kernels import arena_size, collect_, draw, segment_table
from swag_kernels.triton import recollect, tables


def test_a_table_is_kept_once_and_only_for_graphs(monkeypatch):
    kept = {}
    monkeypatch.setattr(tables, "_captured", kept)
    a, b = (SimpleNamespace(is_cuda=True) for _ in range(2))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tables.keep_for_graph(a, b)
    assert not kept
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tables.keep_for_graph(torch.zeros(3))
    assert not kept
    for _ in range(3):
        tables.keep_for_graph(a, b)
    assert list(kept.values()) == [a, b]


def state_of(layout, device):
    mean, m2 = torch.zeros(2, arena_size(layout), device=device)
    return mean, m2, None, torch.zeros((), dtype=torch.int64, device=device)


def drawn(mean, layout):
    settings = {"seed": 3, "first_sample": 0, "diag_scale": 1.0, "low_rank_scale": 0.0, "antithetic": False}
    return draw(mean, torch.ones_like(mean), None, 2, **settings, layout=layout, dtype=torch.float32)


def test_every_launch_offers_its_tables(device, monkeypatch):
    offered = []
    for name in ("collect", "draw"):
        module = sys.modules[f"swag_kernels.triton.{name}"]
        monkeypatch.setattr(module, "keep_for_graph", lambda *kept: offered.append(len(kept)))
    layout = segment_table([1024, 3])
    params, state = [torch.randn(1024, device=device), torch.randn(3, device=device)], state_of(layout, device)
    collect_(params, *state, layout)
    assert recollect(params, *state, layout)
    drawn(state[0], layout)
    assert offered[:2] == [2, 2] and offered[-1] == 1


@pytest.mark.gpu
def test_a_graph_outlives_its_layout(device):
    params = [torch.randn(5000, device=device), torch.randn(700, device=device)]
    layout = segment_table([p.numel() for p in params])
    state = state_of(layout, device)
    collect_(params, *state, layout)
    expected = drawn(state[0], layout)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        collect_(params, *state, layout)
        weights = drawn(state[0], layout)
    blocks = len(state[0]) // 1024
    del layout
    gc.collect()
    garbage = [
        torch.full((blocks, n), -1, dtype=d, device=device) for n, d in ((2, torch.int64), (4, torch.int32)) * 50
    ]
    graph.replay()
    torch.cuda.synchronize()
    assert state[3] == 2 and len(garbage) == 100
    torch.testing.assert_close(weights, expected)
