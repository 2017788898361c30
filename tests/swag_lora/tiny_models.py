"""Small random models of real architectures, with LoRA, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

VOCAB, HIDDEN, LENGTH, LABELS = 61, 24, 7, 3

_BERT_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 50,
    "num_labels": LABELS,
    "pad_token_id": 1,
}
_LLAMA_LIKE: dict[str, Any] = _BERT_LIKE | {"num_key_value_heads": 2, "head_dim": 6, "initializer_range": 0.2}
_V3_STYLE: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 8,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
}


@dataclass(frozen=True)
class Family:
    """How to build one architecture: its base model, the linear layers LoRA goes on, its task and its batches."""

    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    task: str
    layers: str
    batch: Callable[[int, str], dict[str, Tensor]]

    def lora(self, **options: Any) -> PeftModel:
        """A LoRA model with scrambled weights in eval mode. `options` override those of `LoraConfig`."""
        options = {"target_modules": list(self.targets), "r": 4, "lora_alpha": 6, "task_type": self.task} | options
        return scramble(get_peft_model(self.build(), LoraConfig(**options))).eval()


def scramble(model: nn.Module) -> Any:
    """Weights of the size a trained model has, so that every part of the forward shows in its output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            if "lora_" in name:
                parameter.mul_(0.7)
    return model


def samples(model: nn.Module, num_samples: int, select: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Samples of the trainable weights, spread about as widely as the weights themselves."""
    return {
        name: parameter.detach() + 0.3 * torch.randn(num_samples, *parameter.shape, dtype=parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and select(name)
    }


def text(batch: int, padding: str) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (batch, LENGTH))
    mask = torch.ones_like(ids)
    for row in range(batch):
        pad = row % 4
        if pad and padding == "right":
            mask[row, -pad:] = 0
        elif pad:
            mask[row, :pad] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def seq2seq(batch: int, padding: str) -> dict[str, Tensor]:
    return text(batch, padding) | {"decoder_input_ids": torch.randint(3, VOCAB, (batch, 5))}


def choices(batch: int, padding: str) -> dict[str, Tensor]:
    return {name: tensor.unflatten(0, (batch, 4)) for name, tensor in text(4 * batch, padding).items()}


def images(batch: int, padding: str) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 12, 12)}


_QV, _QKVO = ("query", "value"), ("q_proj", "v_proj", "o_proj")
_SEQ, _LM = "SEQ_CLS", "CAUSAL_LM"

FAMILIES: dict[str, Family] = {
    "bert": Family(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**_BERT_LIKE)), _QV, _SEQ, "encoder.layer", text
    ),
    "roberta": Family(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_BERT_LIKE)),
        (*_QV, "intermediate.dense"),
        _SEQ,
        "encoder.layer",
        text,
    ),
    "deberta_v2": Family(
        lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**_BERT_LIKE)),
        ("query_proj", "value_proj"),
        _SEQ,
        "encoder.layer",
        text,
    ),
    "deberta_v3": Family(
        lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**_BERT_LIKE, **_V3_STYLE)),
        ("query_proj", "key_proj", "value_proj"),
        _SEQ,
        "encoder.layer",
        text,
    ),
    "deberta_v1": Family(
        lambda: hf.DebertaForSequenceClassification(
            hf.DebertaConfig(**_BERT_LIKE, relative_attention=True, pos_att_type=["p2c", "c2p"])
        ),
        ("in_proj", "pos_proj", "pos_q_proj"),
        _SEQ,
        "encoder.layer",
        text,
    ),
    "gpt2": Family(
        lambda: hf.GPT2ForSequenceClassification(
            hf.GPT2Config(
                vocab_size=VOCAB, n_embd=HIDDEN, n_layer=4, n_head=4, n_positions=50, num_labels=LABELS, pad_token_id=1
            )
        ),
        ("c_attn", "c_proj", "c_fc"),
        _SEQ,
        "transformer.h",
        text,
    ),
    "gpt2_lm": Family(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=4, n_head=4, n_positions=50)),
        ("c_attn",),
        _LM,
        "transformer.h",
        text,
    ),
    "opt": Family(
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**_BERT_LIKE, word_embed_proj_dim=HIDDEN, ffn_dim=40)),
        ("q_proj", "v_proj", "fc1", "fc2"),
        _LM,
        "decoder.layers",
        text,
    ),
    "llama": Family(
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_LLAMA_LIKE)), _QKVO, _SEQ, "model.layers", text
    ),
    "mistral": Family(
        lambda: hf.MistralForSequenceClassification(hf.MistralConfig(**_LLAMA_LIKE, sliding_window=4)),
        (*_QKVO, "down_proj"),
        _SEQ,
        "model.layers",
        text,
    ),
    "qwen3": Family(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA_LIKE)), _QKVO, _LM, "model.layers", text),
    "gemma": Family(
        lambda: hf.GemmaForSequenceClassification(hf.GemmaConfig(**_LLAMA_LIKE)), _QKVO, _SEQ, "model.layers", text
    ),
    "t5": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=VOCAB, d_model=HIDDEN, d_kv=6, d_ff=40, num_layers=4, num_heads=4, decoder_start_token_id=0
            )
        ),
        ("q", "v", "wo"),
        "SEQ_2_SEQ_LM",
        "encoder.block",
        seq2seq,
    ),
    "vit": Family(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=HIDDEN,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=40,
                image_size=12,
                patch_size=4,
                num_labels=LABELS,
            )
        ),
        ("q_proj", "v_proj"),
        None,  # type: ignore[arg-type]
        "layers",
        images,
    ),
    "choice": Family(
        lambda: hf.RobertaForMultipleChoice(hf.RobertaConfig(**_BERT_LIKE)), _QV, _SEQ, "encoder.layer", choices
    ),
}
