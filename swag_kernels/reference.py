"""The specification: each op in plain torch, exact in float64.

Every other back end is tested against these functions. They run anywhere torch runs, in the accumulation type of their
inputs: float64 if an input is float64, else float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def philox(counter: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011) of counters ``[4, n]`` under the 64-bit key ``seed``: words ``[4, n]``, int64 below 2³²."""
    c0, c1, c2, c3 = counter.to(torch.int64)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3))


def normal(words: Tensor) -> Tensor:
    """Four standard normals from each column of words ``[4, n]`` by Box–Muller: float64 ``[n, 4]``.

    ``u = min((float32(x) + 0.5)·2⁻³², 1 − 2⁻²⁴)`` in float32, then ``√(−2 ln u₀)·(cos 2πu₁, sin 2πu₁)`` for the word
    pairs (0, 1) and (2, 3).
    """
    uniform = ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).to(torch.float64)
    radius = (-2 * uniform[0::2].log()).sqrt()
    angle = 2 * math.pi * uniform[1::2]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1).flatten(0, 1).T


def collect_(
    params: list[Tensor], mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor, layout: Tensor
) -> None:
    seen = int(count)
    slot = deviations[seen % len(deviations)] if deviations is not None else None
    for param, (offset, numel, _) in zip(params, layout.tolist(), strict=True):
        segment = slice(offset, offset + numel)
        theta = param.detach().reshape(-1).to(mean.dtype)
        delta = theta - mean[segment]
        mean[segment] += delta / (seen + 1)
        m2[segment] += delta * (theta - mean[segment])
        if slot is not None:
            slot[segment] = theta - mean[segment]
    count += 1


def draw(
    mean: Tensor,
    std: Tensor,
    deviations: Tensor | None,
    num_samples: int,
    *,
    seed: int,
    first_sample: int,
    diag_scale: float,
    low_rank_scale: float,
    antithetic: bool,
    layout: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    quads = torch.zeros(mean.numel() // 4, dtype=torch.int64)
    tensors = torch.zeros_like(quads)
    held = torch.zeros(mean.numel(), dtype=torch.bool)
    for index, (offset, numel, first) in enumerate(layout.tolist()):
        end = -(-(offset + numel) // 4)
        quads[offset // 4 : end] = torch.arange(first // 4, first // 4 + end - offset // 4)
        tensors[offset // 4 : end] = index
        held[offset : offset + numel] = True
    quads, tensors, held = quads.to(mean.device), tensors.to(mean.device), held.to(mean.device)

    out = torch.empty(num_samples, mean.numel(), dtype=dtype, device=mean.device)
    for row in range(num_samples):
        sample = first_sample + row
        sign = -1 if antithetic and sample % 2 else 1
        word = sample // 2 if antithetic else sample
        counter = torch.stack((quads, torch.full_like(quads, word), tensors, torch.zeros_like(quads)))
        eps = normal(philox(counter, seed)).reshape(-1).to(mean.dtype)
        noise = diag_scale * std * eps
        if deviations is not None and len(deviations):
            j = torch.arange(-(-len(deviations) // 4), device=mean.device)
            counter = torch.stack((j, torch.full_like(j, word), torch.zeros_like(j), torch.ones_like(j)))
            z = normal(philox(counter, seed)).reshape(-1)[: len(deviations)].to(mean.dtype)
            noise += low_rank_scale * (z @ deviations)
        out[row] = torch.where(held, mean + sign * noise, 0)
    return out


def sampled_lora(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> Tensor:
    dtype = _accumulation_dtype(x, base)
    x, A, B = x.to(dtype), A.to(dtype), B.to(dtype)
    return (base.to(dtype) + scaling * ((x @ A.mT) @ B.mT)).to(base.dtype)


def sampled_lora_(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> None:
    base.copy_(sampled_lora(x, A, B, scaling, base))


def sampled_lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return sampled_lora(x, A, B, scaling, linear(x, weight, bias))


def sampled_lora_backward(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulation_dtype(grad, x)
    grad, x_, A_, B_ = grad.to(dtype), x.to(dtype), A.to(dtype), B.to(dtype)
    d_hidden = scaling * (grad @ B_)  # [S, M, r]
    dx = (d_hidden @ A_).sum_to_size(x.shape)
    dA = d_hidden.mT @ x_
    dB = scaling * (grad.mT @ (x_ @ A_.mT))
    return dx.to(x.dtype), dA.to(A.dtype), dB.to(B.dtype)


def bayes_average_(
    log_sum: Tensor, m2: Tensor, votes: Tensor, entropy: Tensor, count: Tensor, logits: Tensor, group: int
) -> None:
    seen, samples = int(count), len(logits)
    if not samples:
        return
    log_probs = logits.to(log_sum.dtype).log_softmax(-1)
    probs = log_probs.exp()

    old, new = seen // group, samples // group
    draws = probs.unflatten(0, (new, group)).mean(1)  # [draws, B, C]
    delta = draws.mean(0) - log_sum.exp() / max(seen, 1)
    m2 += (draws - draws.mean(0)).square().sum(0) + delta.square() * (old * new / (old + new))

    log_sum.copy_(torch.logaddexp(log_sum, log_probs.logsumexp(0)))
    votes += torch.zeros_like(probs).scatter_(-1, log_probs.argmax(-1, keepdim=True), 1).sum(0)
    entropy += (torch.special.entr(probs).sum(-1) - entropy).sum(0) / (seen + samples)
    count += samples
