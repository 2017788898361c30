"""A whole model on a GPU: one decode step of S samples, and evaluation with K samples, in one pass each.

The model has Llama-2-7B's shape and random weights, which take as long as trained ones. Its adapters are bfloat16 like
itself: PEFT's own default, float32 adapters, makes the plain step slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache
from transformers.utils import logging

from gpu_timing import alternate, copy_bandwidth, wall
from harness import Row, assert_as_accurate, compare, limit
from swag_lora import Predictor, SampledModel, SwagPosterior
from swag_lora.loop import Loop

LLAMA_2_7B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
    max_position_embeddings=4096,
)
LEAST_MEMORY = 60 << 30  # the float32 copy that tells what is right takes 27 GB beside the model's 13.5

logging.set_verbosity_error()


def model_rows(
    device: torch.device,
    config: LlamaConfig = LLAMA_2_7B,
    name: str = "Llama-2-7B r=8 q,v",
    decode_samples: int = 32,
    eval_samples: int = 16,
    length: int = 128,
    rounds: int = 15,
) -> Iterator[Row]:
    model, posterior = fine_tune(config, device)
    yield from decode_rows(model, posterior, f"decode step, {name}, B=1", decode_samples, length, rounds)
    for batch, target in ((1, 30.0), (16, 8.0)):
        case = f"evaluation, {name}, K={eval_samples}, batch {batch} × {length} tokens"
        yield from evaluation_rows(model, posterior, case, eval_samples, batch, length, target)


@torch.no_grad()
def fine_tune(config: LlamaConfig, device: torch.device, rank: int = 20) -> tuple[PeftModel, SwagPosterior]:
    """A model with LoRA, and a posterior from `rank` steps of a random walk of its adapters."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).eval()
    random = [p for p in model.parameters() if p.requires_grad]
    for p in random:
        p.normal_(std=0.05)
    posterior = SwagPosterior(model, rank=rank)
    for _ in range(rank):
        for p in random:
            p.add_(torch.randn_like(p), alpha=0.02)
        posterior.collect()
    return model, posterior


class Decoding:
    """A model and its cache. A step appends one token; the logits are of the token after it."""

    def __init__(self, model: nn.Module, config: LlamaConfig, context: Tensor, capacity: int) -> None:
        self.model, self.context, self.token = model, context, context[:, -1:].clone()
        self.cache = StaticCache(config=config, max_cache_len=capacity)

    def prefill(self) -> None:
        """Fill the cache with the context, from its start; the tensors stay where they are."""
        self.cache.reset()
        self.model(input_ids=self.context, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def step(self) -> Tensor:
        return self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits

    @property
    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`step` as the replay of a CUDA graph, whose result is the same tensor every time; on the CPU `step` itself."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@torch.no_grad()
def decode_rows(
    model: PeftModel, posterior: SwagPosterior, case: str, samples: int, length: int, rounds: int = 15, warmup: int = 3
) -> list[Row]:
    """S lanes with a cache of S rows against the plain model with a cache of one, after a context of `length` tokens."""
    device, config = posterior.device, model.get_base_model().config
    context = torch.randint(config.vocab_size, (1, length), device=device)
    capacity = -(-(length + warmup + rounds + 4) // 16) * 16  # every call appends; the attention wants multiples
    weights = posterior.draw(samples)
    lanes = (0, samples - 1)

    exact = []
    with in_float32(model):
        for lane in lanes:
            set_sample(model, weights, lane)
            decoding = Decoding(model, config, context, capacity)
            decoding.prefill()
            exact.append(decoding.step())

    plain, ours = (Decoding(m, config, context, capacity) for m in (model, SampledModel(model, weights).eval()))
    for decoding in (plain, ours):
        decoding.prefill()
    plain_step, our_step = captured(plain.step, device), captured(ours.step, device)
    ours.prefill()
    together = our_step().clone()
    for lane, truth in zip(lanes, exact, strict=True):
        set_sample(model, weights, lane)
        plain.prefill()
        assert_as_accurate(together[lane], plain_step(), truth, f"lane {lane}")

    functions = {"S lanes": our_step, "one plain LoRA step": plain_step}
    seconds = alternate(functions, device, rounds, warmup)
    assert int(ours.cache.get_seq_length()) <= capacity
    seconds["a plain step for each sample"] = [samples * s for s in seconds["one plain LoRA step"]]
    case = f"{case}, S={samples}, context {length}, {'CUDA graphs' if device.type == 'cuda' else 'no graph'}"
    rows = compare(case, seconds, "S lanes", {"one plain LoRA step": 1 / 1.3})
    fixed = sum(p.nbytes for name, p in model.named_parameters() if name not in weights and "embed_tokens" not in name)
    floor = (fixed + weights.buffer.nbytes + ours.cache_bytes) / copy_bandwidth(device)
    rows.append(limit(case, "weights, samples and cache once at the speed of a copy", seconds["S lanes"], floor))
    return rows


class LastPosition:
    """What an evaluation of multiple choice reads: the logits that follow the last token."""

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return model(**batch).logits


@torch.no_grad()
def evaluation_rows(
    model: PeftModel,
    posterior: SwagPosterior,
    case: str,
    samples: int,
    batch_size: int,
    length: int,
    target: float | None,
    rounds: int = 4,
) -> list[Row]:
    """One pass of weights that were drawn once, against drawing on the host for every batch and sample, K forwards."""
    ids = torch.randint(model.get_base_model().config.vocab_size, (batch_size, length), device=posterior.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1, "use_cache": False}
    few = batch | {name: batch[name][:2] for name in ("input_ids", "attention_mask")}
    weights = posterior.draw(samples)
    loop = Loop(LastPosition(), model, posterior, scale=0.5)
    predictor = Predictor(model, posterior, samples)

    with in_float32(model):
        exact = loop.kept(few, weights, antithetic=True).log_probs
    kept = loop.kept(few, weights, antithetic=True).log_probs
    assert_as_accurate(predictor(few).log_probs, kept, exact, "one pass")

    functions = {
        "one pass": lambda: predictor(batch),
        "published loop (resample on the host, K forwards)": lambda: loop.resampled(batch, samples),
        "loop over the same kept weights": lambda: loop.kept(batch, weights, antithetic=True),
    }
    for warm_up in ("one pass", "loop over the same kept weights"):  # the published loop takes seconds, and no notice
        functions[warm_up]()
    seconds = wall(functions, posterior.device, rounds, warmup=0)
    return compare(case, seconds, "one pass", {"published loop (resample on the host, K forwards)": target})


def set_sample(model: nn.Module, weights: Mapping[str, Tensor], index: int) -> None:
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name][index])


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """The parameters, not the buffers, in float32, which holds a bfloat16 exactly; then as they were."""
    dtypes = [p.dtype for p in model.parameters()]
    for p in model.parameters():
        p.data = p.data.float()
    try:
        yield
    finally:
        for p, dtype in zip(model.parameters(), dtypes, strict=True):
            p.data = p.data.to(dtype)
