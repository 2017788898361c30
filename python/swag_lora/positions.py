"""How many tokens a model can read."""

from __future__ import annotations

from torch import nn

_TABLES = frozenset({"position_embeddings", "position_embedding", "embed_positions", "wpe"})


def capacity(model: nn.Module) -> int | None:
    """The most tokens for which its table of positions has rows; None where positions are computed, as rotary ones are."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            # RoBERTa counts from behind its padding index, OPT and BART from an offset.
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            rows.append(module.num_embeddings - skipped - int(getattr(module, "offset", 0)))
    return min(rows, default=None)
