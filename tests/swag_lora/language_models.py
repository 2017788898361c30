"""Tiny causal language models with LoRA, given samples of their weights, and the plain loop over them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tiny_models import samples, scramble
from torch import Tensor, nn

from swag_lora.weights import SampledWeights

VOCAB, HIDDEN, LENGTH = 53, 12, 6
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
_OPT: dict[str, Any] = {
    "word_embed_proj_dim": HIDDEN,
    "ffn_dim": 20,
    "hidden_size": HIDDEN,
    "activation_function": "gelu",
}
_GEMMA3: dict[str, Any] = {
    "final_logit_softcapping": 1.5,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}

BUILD = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_LLAMA | _OPT)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_LLAMA | _GEMMA3)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**_LLAMA, logit_scale=3.0)),
}
TARGETS = {"gpt2": ["c_attn"]}


def lora(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """A scrambled model of float64 weights in evaluation mode, so that a comparison shows more than rounding."""
    targets = {"target_modules": TARGETS.get(name, ["q_proj", "v_proj"]), "r": 2, "task_type": "CAUSAL_LM"}
    return scramble(get_peft_model(BUILD[name](), LoraConfig(**targets | options))).to(dtype).eval()


class Given:
    """A posterior whose sample k is row k of given weights; it keeps what it was asked for."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.asked: list[tuple[int, int, str]] = []
        self._drawn: dict[tuple[int, int], SampledWeights] = {}

    def draw(self, num_samples: int, *, seed: int, first: int, scale: float, method: str) -> SampledWeights:
        self.asked.append((first, num_samples, method))
        if (first, num_samples) not in self._drawn:
            part = {name: tensor[first : first + num_samples] for name, tensor in self.weights.items()}
            self._drawn[first, num_samples] = SampledWeights.from_mapping(part)
        return self._drawn[first, num_samples]


def given(model: nn.Module, num_samples: int) -> Given:
    return Given(samples(model, num_samples))


def prompts(padding: str) -> dict[str, Tensor]:
    """Three rows of 6, 4 and 5 tokens, padded to 6."""
    ids, mask = torch.randint(2, VOCAB, (3, LENGTH)), torch.ones(3, LENGTH, dtype=torch.int64)
    for row, pad in ((1, 2), (2, 1)):
        mask[row, slice(-pad, None) if padding == "right" else slice(pad)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


@torch.no_grad()
def loop(model: nn.Module, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Probabilities ``[S, T, C]`` after each token of one row without padding: plain forwards, one sample at a time."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    probs = []
    for s in range(len(next(iter(weights.values())))):
        for name, tensor in weights.items():
            parameters[name].copy_(tensor[s])
        probs.append(model(input_ids=ids[None]).logits[0].double().softmax(-1))
    return torch.stack(probs)


def entropy(probs: Tensor) -> Tensor:
    return -torch.xlogy(probs, probs).sum(-1)


def frozen(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a call might leave changed."""
    core = model.get_base_model()
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "own": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "modes": [module.training for module in model.modules()],
        "config": core.config.to_dict(),
        "generation": core.generation_config.to_dict(),
    }


def assert_frozen(model: nn.Module, before: dict[str, Any]) -> None:
    after = frozen(model)
    states = after.pop("state"), before.pop("state")
    assert after == before
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
