"""A low-rank update by the vendor's matrix products, where those win over kernels of one's own."""

from __future__ import annotations

import torch
from torch import Tensor


def update(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor, y: Tensor) -> None:
    """``y_s = base_s + scaling · (x_s A_sᵀ) B_sᵀ`` into y, which may be the base."""
    hidden = torch.bmm(x.expand(len(A), *x.shape[1:]), A.mT)
    if base.dtype == x.dtype:
        torch.baddbmm(base.expand_as(y), hidden, B.mT, alpha=scaling, out=y)
    else:
        y.copy_(torch.add(base, torch.bmm(hidden, B.mT), alpha=scaling))
