"""How a batch goes through a model: what a `Predictor` has to know of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .sample_axis import leading


class Forward:
    """A batch is the model's keyword arguments, an example a row of them, and the prediction in the output's logits."""

    def size(self, inputs: dict[str, Any]) -> int:
        """Examples in the batch."""
        return len(leading((), inputs))

    def select(self, inputs: dict[str, Any], examples: slice | Tensor) -> dict[str, Any]:
        """Some examples of the batch, by a slice or by their indices."""
        size = self.size(inputs)

        def cut(value: Any) -> Any:
            return value[examples] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size else value

        return {name: tree_map(cut, value) for name, value in inputs.items()}

    def logits(self, sampled: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Class logits [S, B, ..., C] of a `SampledModel`."""
        logits = getattr(sampled(**inputs), "logits", None)
        if logits is None:
            raise TypeError("the model returned no logits: predictions need one with a prediction head")
        return logits
