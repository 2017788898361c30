"""Text from the average of K samples in one decode, against K decodes one after the other."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from harness import alternate, compare
from swag_lora import SwagPosterior
from swag_lora.generation import generate

SAMPLES, PROMPT, NEW = 32, 8, 16


def llama() -> tuple[torch.nn.Module, SwagPosterior]:
    """A 12-layer, 768-wide Llama with random weights and LoRA on q and v, and a posterior of four collections."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(LlamaForCausalLM(config), lora).eval()
    posterior = SwagPosterior(model, rank=4)
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        posterior.collect()
    return model, posterior


@torch.no_grad()
def bench_decode(report, benchmark):
    model, posterior = llama()
    prompt = torch.randint(0, 32000, (1, PROMPT))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    weights = posterior.draw(SAMPLES, seed=0, scale=0.5, method="antithetic")
    random = {name: parameter for name, parameter in model.named_parameters() if name in weights}

    def set_sample(index):
        for name, parameter in random.items():
            parameter.data = weights[name][index]

    def one_pass():
        return generate(model, posterior, prompt, SAMPLES, **options)

    def one_after_the_other():
        tokens = []
        for index in range(SAMPLES):
            set_sample(index)
            tokens.append(model.generate(input_ids=prompt, **options))
        return tokens

    def check(generation):
        """Log-probabilities of the generated tokens, by K forwards over the whole sequence."""
        probs = 0
        for index in range(SAMPLES):
            set_sample(index)
            logits = model(input_ids=generation.sequences).logits[:, PROMPT - 1 : -1]
            probs = probs + logits.softmax(-1) / SAMPLES
        exact = probs.log().gather(-1, generation.sequences[:, PROMPT:, None]).squeeze(-1)
        torch.testing.assert_close(generation.log_probs, exact, rtol=1e-4, atol=1e-4)
        assert torch.equal(generation.sequences[:, PROMPT:], probs.argmax(-1))

    trained = {name: parameter.data for name, parameter in random.items()}
    try:
        check(one_pass())
        seconds = alternate({"one pass": one_pass, "K decodes": one_after_the_other}, rounds=3, warmup=0)
    finally:
        for name, parameter in random.items():
            parameter.data = trained[name]
    case = f"generate, Llama 12 x 768, LoRA r=8 on q and v, K={SAMPLES}, batch 1, {PROMPT} + {NEW} tokens"
    report(compare(case, seconds, "one pass", {"K decodes": 6.0}))
    benchmark.pedantic(one_pass, rounds=3, warmup_rounds=0)
