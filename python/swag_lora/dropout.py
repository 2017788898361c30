"""MC dropout as samples of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from swag_kernels.reference import philox

from .drawing import named_samples
from .layout import Layout, find_parameter
from .weights import SampledWeights

_STREAM = 3  # of the random counter: of the masks


class DropoutPosterior:
    """MC dropout (Gal & Ghahramani 2016, arXiv 1506.02142) of a model's LoRA layers, as samples of lora_A.

    LoRA dropout multiplies the input of A by a mask and 1/(1 - p), which is the same as doing so to the columns of A:

        A_s = A diag(m_s) / (1 - p),    m_s ∈ {0, 1}^in,   P(m_si = 1) = 1 - p

    Each layer has its own mask. A sample is one mask for all tokens and examples: a draw from the distribution over
    weights that the paper's section 3 integrates over. torch's dropout, left on at test time, instead draws a mask for
    every token of every example: each such pass mixes many of these weights. The model's other dropout stays off.

    Sample k is a function of (posterior, seed, k). Feature i of layer t, counting layers with dropout, is kept if word
    ``i mod 4`` of Philox4x32-10 at the counter ``(i div 4, k, t, 3)`` under the key ``seed`` is below ``round((1 - p) 2³²)``.

    Args:
        model: a PEFT model with LoRA. What is not random (lora_B, the head) is as it is in the model when predicting.
        p: the probability of dropping a feature, for every layer; None takes each LoRA layer's own, and leaves out
            layers without.
        state: parameter name -> tensor, values in place of the model's own, which are the default. Those other than lora_A
            are in the samples too, the same in each.

    Raises:
        ValueError: no LoRA, no dropout, p outside (0, 1), or a state that does not fit the model.
        TypeError: LoRA with dropout on a layer that is not linear.
    """

    def __init__(self, model: nn.Module, p: float | None = None, state: Mapping[str, Tensor] | None = None) -> None:
        if p is not None and not 0 < p < 1:
            raise ValueError(f"p is a probability of dropping a feature, above 0 and below 1, got {p}")
        self.rates = _rates(model, p)
        given = {} if state is None else state
        parameters = {n: t for n, t in model.named_parameters() if n in self.rates or n in given}
        self.layout = Layout.of(parameters)
        base = {name: given.get(name, parameter).detach() for name, parameter in parameters.items()}
        if difference := self.layout.difference(Layout.of({**base, **given})):
            raise ValueError(f"the state does not fit the model: {difference}")
        self._base = torch.zeros(self.layout.size, device=next(iter(parameters.values())).device)
        for name, view in self.layout.views(self._base).items():
            view.copy_(base[name])

    def draw(
        self,
        num_samples: int,
        seed: int = 0,
        first: int = 0,
        scale: float = 1.0,
        method: str = "iid",
    ) -> SampledWeights:
        """Samples ``first … first + num_samples - 1`` of ``seed``, in the dtype these parameters share in the model.

        Args:
            scale: without meaning here: p alone says how far samples are from the mean.
            method: "iid"; a mask has no mirror image.

        Raises:
            ValueError: another method, or a number out of range.
        """
        num_samples, seed, first = named_samples(num_samples, seed, first)
        if method != "iid":
            raise ValueError(f"dropout masks have no mirror images: method must be 'iid', got {method!r}")
        buffer = self._base.to(self.layout.common_dtype).repeat(num_samples, 1)
        base, views = self.layout.views(self._base), self.layout.views(buffer)
        samples = torch.arange(first, first + num_samples, device=buffer.device)
        for index, (name, p) in enumerate(self.rates.items()):
            mask = _kept(samples, base[name].shape[1], p, seed, index)  # [S, in]
            views[name].copy_(base[name] * (mask / (1 - p)).unsqueeze(1))
        return SampledWeights(self.layout, buffer, seed=seed, first=first, method=method)

    def __repr__(self) -> str:
        rates = sorted(set(self.rates.values()))
        return f"DropoutPosterior(layers={len(self.rates)}, p={', '.join(f'{p:g}' for p in rates)})"


def _kept(samples: Tensor, features: int, p: float, seed: int, layer: int) -> Tensor:
    """Which features the samples keep, float32 ``[S, features]`` of 0 and 1."""
    sample, quad = torch.meshgrid(samples, torch.arange(-(-features // 4), device=samples.device), indexing="ij")
    counter = (quad, sample, torch.full_like(quad, layer), torch.full_like(quad, _STREAM))
    words = philox(torch.stack([word.flatten() for word in counter]), seed)  # [4, S * quads]
    return (words.T.reshape(len(samples), -1)[:, :features] < round((1 - p) * 2**32)).float()


def _rates(model: nn.Module, p: float | None) -> dict[str, float]:
    """The dropout probability of each lora_A that has one, by parameter name."""
    layers = {
        f"{name}.lora_A.{adapter}.weight": p if p is not None else getattr(module.lora_dropout[adapter], "p", 0.0)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for adapter in module.active_adapters
        if adapter in module.lora_A
    }
    if not layers:
        raise ValueError("the model has no LoRA layer with an active adapter, so there is no dropout to sample")
    rates = {name: rate for name, rate in layers.items() if rate}
    if not rates:
        raise ValueError(
            "the model has no LoRA dropout: train it with LoraConfig(lora_dropout=0.1), or name a probability with p="
        )
    for name, rate in rates.items():
        if rate >= 1:
            raise ValueError(f"{name} has a dropout probability of {rate}, which leaves nothing: give p=")
        if (A := find_parameter(model, name)) is None or A.dim() != 2:
            raise TypeError(f"{name} is no matrix: dropout is sampled for LoRA on linear layers")
    return rates
