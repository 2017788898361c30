"""The algorithm of the published SWAG code, written from its description: the baseline of the demo and the benchmarks.

Per-tensor buffers; moments ``E[θ]`` and ``E[θ²]``; deviations grown by ``cat`` and cut at the oldest row; one sample at a
time from flattened copies on the host (Maddox et al. 2019, Algorithm 1; Onal et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PublishedSwag:
    def __init__(self, params: Sequence[Tensor], max_columns: int, var_clamp: float = 1e-30) -> None:
        self.n_models = torch.zeros(1, dtype=torch.long)
        self.max_columns = max_columns
        self.var_clamp = var_clamp
        self.mean = [torch.zeros_like(p) for p in params]
        self.sq_mean = [torch.zeros_like(p) for p in params]
        self.cov_mat_sqrt = [p.new_empty(0, p.numel()) for p in params]

    @torch.no_grad()
    def collect(self, params: Sequence[Tensor]) -> None:
        n = self.n_models
        for i, param in enumerate(params):
            mean = self.mean[i] * n.item() / (n.item() + 1.0) + param / (n.item() + 1.0)
            sq_mean = self.sq_mean[i] * n.item() / (n.item() + 1.0) + param**2 / (n.item() + 1.0)
            deviation = (param - mean).view(1, -1)
            columns = torch.cat((self.cov_mat_sqrt[i], deviation), dim=0)
            if n.item() + 1 > self.max_columns:
                columns = columns[1:]
            self.mean[i], self.sq_mean[i], self.cov_mat_sqrt[i] = mean, sq_mean, columns
        self.n_models.add_(1)

    @torch.no_grad()
    def sample_fullrank(self, scale: float = 1.0) -> list[Tensor]:
        mean = torch.cat([t.cpu().view(-1) for t in self.mean])
        sq_mean = torch.cat([t.cpu().view(-1) for t in self.sq_mean])
        columns = torch.cat([t.cpu() for t in self.cov_mat_sqrt], dim=1)
        var = torch.clamp(sq_mean - mean**2, self.var_clamp)
        noise = var.sqrt() * torch.randn_like(var)
        noise += columns.t().matmul(torch.randn(columns.size(0))) / (self.max_columns - 1) ** 0.5
        flat = mean + scale**0.5 * noise
        return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in self.mean]), self.mean, strict=True)]
