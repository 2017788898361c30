"""Where the rows of a generation end, which tells chosen tokens from padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, StoppingCriteria, StoppingCriteriaList, StopStringCriteria


class RowEnds(StoppingCriteria):
    """Which rows have ended after each step, and the caller's own criteria, which would not stand being asked twice.

    Those of transformers stay where they are and are asked again, as they look at the tokens alone.
    """

    def __init__(self, config: GenerationConfig, arguments: dict[str, Any]) -> None:
        given = list(arguments.get("stopping_criteria") or ())
        self.stateless = [c for c in given if type(c).__module__.startswith("transformers.")]
        self._own = [c for c in given if c not in self.stateless]
        self._asked = list(self.stateless)
        if config.stop_strings is not None and arguments.get("tokenizer") is not None:
            self._asked.append(StopStringCriteria(arguments["tokenizer"], config.stop_strings))
        if config.eos_token_id is not None:
            self._asked.append(EosTokenCriteria(config.eos_token_id))
        ends = [c.eos_token_id for c in (*given, *self._asked) if hasattr(c, "eos_token_id")]
        self._pads = bool(ends)
        if any(hasattr(c, "eos_token_id") for c in self._own):
            self.eos_token_id = ends[0]  # by it `generate` knows that ended rows are to be padded
        self._done: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        stop = StoppingCriteriaList(self._own)(input_ids, scores, **kwargs)
        self._done.append(stop | StoppingCriteriaList(self._asked)(input_ids, scores, **kwargs))
        return stop

    def mask(self) -> Tensor:
        """``[B, N]``, False where a row had ended before."""
        done = torch.stack(self._done, dim=1)
        ended = done.cumsum(1) - done.long() > 0
        return ~ended if self._pads else torch.ones_like(done)
