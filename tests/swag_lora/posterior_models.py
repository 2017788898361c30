"""Small models to collect from, shared by the tests of the posteriors."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification


def tiny_base(layers: int = 2, hidden: int = 16) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=20,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def tiny_peft(layers: int = 2, rank: int = 2, adapter: str = "default", hidden: int = 16, **config) -> PeftModel:
    config = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], **config}
    return get_peft_model(tiny_base(layers, hidden), LoraConfig(r=rank, **config), adapter_name=adapter)


class TwoTensors(nn.Module):
    """Nine weights in two tensors, few enough for a full covariance matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, x):
        return self.linear(x)


@torch.no_grad()
def step(model: nn.Module, size: float = 0.1) -> None:
    """Move every trainable parameter at random, as an optimizer would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * size)


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
