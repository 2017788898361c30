"""Densities of the drop-in class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, Normal

JITTER = 1e-6
"""What the published densities add to each variance."""


class Densities:
    """Log-densities and log-determinants of the Gaussian with covariance ``diag(variance + 1e-6) + D^T D``.

    As published, the deviations D are not divided by ``R - 1`` here. The published code estimates these numbers by
    conjugate gradients; here they are exact, through the columns x columns capacitance matrix in float64.
    """

    if TYPE_CHECKING:
        params: list[tuple[torch.nn.Module, str]]

        def generate_mean_var_covar(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]: ...

    def compute_logprob(self, vec: Tensor | None = None, block: bool = False, diag: bool = False) -> Tensor:
        """Log-density of a weight vector, in nats.

        Args:
            vec: all random weights in order, ``[N]`` or ``[1, N]``; None takes those in the model.
            block: no covariance between tensors.
            diag: no deviations; each weight's density is ``Normal(mean, variance)``, that is with the variance for a
                standard deviation, as published.
        """
        means, variances, columns = self.generate_mean_var_covar()
        if vec is None:
            weights = [getattr(module, name) for module, name in self.params]
        else:
            sizes = [mean.numel() for mean in means]
            if vec.numel() != sum(sizes):
                raise ValueError(f"vec must hold {sum(sizes)} weights, got {vec.numel()}")
            parts = vec.reshape(-1).split(sizes)
            weights = [part.view(mean.shape) for part, mean in zip(parts, means, strict=True)]
        if diag:
            return self.diag_logll(weights, means, variances)
        if block:
            return self.block_logll(weights, means, variances, columns)
        return self.full_logll(weights, means, variances, columns)

    def compute_logdet(self, block: bool = False) -> Tensor:
        """Log-determinant of the covariance, with ``block`` without the covariance between tensors."""
        _, variances, columns = self.generate_mean_var_covar()
        if not block:
            return self.block_logdet(_flatten(variances), torch.cat(columns, dim=1))
        return torch.stack([self.block_logdet(v, c) for v, c in zip(variances, columns, strict=True)]).sum()

    def diag_logll(self, param_list: list[Tensor], mean_list: list[Tensor], var_list: list[Tensor]) -> Tensor:
        return Normal(_flatten(mean_list), _flatten(var_list)).log_prob(_flatten(param_list)).sum()

    def block_logll(
        self,
        param_list: list[Tensor],
        mean_list: list[Tensor],
        var_list: list[Tensor],
        cov_mat_root_list: list[Tensor],
    ) -> Tensor:
        blocks = zip(param_list, mean_list, var_list, cov_mat_root_list, strict=True)
        return torch.stack([self.compute_ll_for_block([p], [m], [v], c) for p, m, v, c in blocks]).sum()

    def full_logll(
        self,
        param_list: list[Tensor],
        mean_list: list[Tensor],
        var_list: list[Tensor],
        cov_mat_root_list: list[Tensor],
    ) -> Tensor:
        return self.compute_ll_for_block(param_list, mean_list, var_list, torch.cat(cov_mat_root_list, dim=1))

    def compute_ll_for_block(
        self, vec: list[Tensor], mean: list[Tensor], var: list[Tensor], cov_mat_root: Tensor
    ) -> Tensor:
        """Log-density of the tensors ``vec`` under their joint Gaussian; ``cov_mat_root`` is ``[columns, numel]``."""
        return _gaussian(_flatten(mean), _flatten(var), cov_mat_root).log_prob(_flatten(vec))

    def block_logdet(self, var: Tensor, cov_mat_root: Tensor) -> Tensor:
        """Log-determinant of ``diag(var + 1e-6) + cov_mat_root^T cov_mat_root``."""
        var = _flatten([var])
        zero = torch.zeros_like(var)
        # log N(0; 0, C) = -(numel log 2 pi + log det C) / 2
        norm = var.numel() * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64)).item()
        return -2 * _gaussian(zero, var, cov_mat_root).log_prob(zero) - norm


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1).double() for t in tensors])


def _gaussian(mean: Tensor, var: Tensor, root: Tensor) -> LowRankMultivariateNormal:
    if not len(root):
        root = root.new_zeros(1, root.shape[1])  # torch's distribution needs at least one column
    return LowRankMultivariateNormal(mean, root.double().mT, var + JITTER, validate_args=False)
