"""A CUDA graph of collect, draw, sampled forward and average, replayed after the weights moved."""

import pytest
import torch
from gpu_device import trusted

from swag_kernels import AverageState, arena_size, bayes_average_, collect_, draw, sampled_lora, segment_table

SAMPLES, RANK, FEATURES, CLASSES = 4, 4, 64, 70


class Pipeline:
    """All that the graph reads and writes, so that nothing moves between replays."""

    def __init__(self, device):
        torch.manual_seed(0)
        self.params = [
            torch.randn(16, FEATURES, device=device),
            torch.randn(CLASSES, 16, device=device, dtype=torch.bfloat16),
        ]
        self.layout = segment_table([p.numel() for p in self.params])
        size = arena_size(self.layout)
        self.mean, self.m2 = torch.zeros(2, size, device=device)
        self.deviations = torch.zeros(RANK, size, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.x, self.base = torch.randn(1, 5, FEATURES, device=device), torch.randn(1, 5, CLASSES, device=device)
        self.state = AverageState(5, CLASSES, device=device)

    def step(self):
        collect_(self.params, self.mean, self.m2, self.deviations, self.count, self.layout)
        weights = draw(
            self.mean, (self.m2 / self.count).sqrt(), self.deviations, SAMPLES, seed=3, first_sample=0, diag_scale=1.0,
            low_rank_scale=0.5, antithetic=False, layout=self.layout, dtype=torch.float32,
        )  # fmt: skip
        A, B = (
            weights[:, offset : offset + p.numel()].view(SAMPLES, *p.shape)
            for p, (offset, _, _) in zip(self.params, self.layout.tolist(), strict=True)
        )
        bayes_average_(self.state, sampled_lora(self.x, A, B, 0.1, self.base))

    def move(self):
        for param in self.params:
            param.mul_(1.01).add_(0.01)

    def results(self):
        kept = self.mean, self.m2, self.deviations, self.count, *vars(self.state).values()
        return [t.clone() for t in kept if isinstance(t, torch.Tensor)]


@pytest.mark.gpu
def test_replays(device):
    eager, graphed = Pipeline(device), Pipeline(device)
    graph = torch.cuda.CUDAGraph()
    for pipeline in (eager, graphed):
        for _ in range(3):
            pipeline.step()
            pipeline.move()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        graphed.step()
    for _ in range(RANK + 2):
        eager.step()
        graph.replay()
        for pipeline in (eager, graphed):
            pipeline.move()
    torch.cuda.synchronize()
    for ours, theirs in zip(graphed.results(), eager.results(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_pipeline(device):
    """The same steps without a graph."""
    pipeline = Pipeline(device)
    pipeline.params[1] = pipeline.params[1].to(trusted(device, torch.bfloat16))
    for _ in range(3):
        pipeline.step()
        pipeline.move()
    assert pipeline.count == 3 and pipeline.state.num_samples == 3 * SAMPLES
    assert torch.allclose(pipeline.state.probs().sum(-1).cpu(), torch.ones(5), atol=1e-5)
