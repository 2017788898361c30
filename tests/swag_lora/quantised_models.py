"""Tiny models whose linear layers are quantised, as users of bitsandbytes, torchao, GPTQ, AWQ and AQLM have them.

bitsandbytes and torchao run on the CPU as themselves. GPTQ, AWQ and AQLM have no layers for the CPU: PEFT's own LoRA
layers for them go around a stand-in. Where bitsandbytes or torchao is not installed PEFT has no class for it, and a
stand-in goes under its path, with a warning.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from tiny_models import scramble
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

VOCAB = 61
# bitsandbytes' 4-bit layers for the CPU take widths in multiples of their blocks of 64.
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
    "num_labels": 3,
}
TARGETS = ("q_proj", "v_proj", "down_proj")


class GroupQuantised(nn.Module):
    """Codes of four bits, two in a byte, with a scale and a zero point for each group of 32 inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        groups = linear.weight.detach().float().unflatten(1, (-1, 32))
        zeros, high = groups.aminmax(dim=2, keepdim=True)
        scales = (high - zeros) / 15
        codes = ((groups - zeros) / scales).round().to(torch.uint8).flatten(1)
        self.register_buffer("qweight", codes[:, ::2] | codes[:, 1::2] << 4)
        self.register_buffer("qzeros", zeros)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([self.qweight & 15, self.qweight >> 4], -1).flatten(1).unflatten(1, (-1, 32))
        return F.linear(x, (codes * self.scales + self.qzeros).flatten(1).to(x.dtype), self.bias)


def _bnb(kind: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
    def quantised(linear: nn.Linear) -> nn.Module:
        from bitsandbytes import nn as bnb

        layer, parameter = getattr(bnb, kind), bnb.Int8Params if kind == "Linear8bitLt" else bnb.Params4bit
        own = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {"quant_type": options["quant_type"]}
        new = layer(linear.in_features, linear.out_features, **options)
        new.weight, new.bias = parameter(linear.weight.detach(), requires_grad=False, **own), linear.bias
        return new.to("cpu")

    return quantised


def _torchao(bits: int) -> Callable[[nn.Module], nn.Module]:
    def quantised(linear: nn.Linear) -> nn.Module:
        from torchao.quantization import quantize_

        quantize_(linear, torchao_config(bits))
        return linear

    return quantised


def torchao_config(bits: int) -> Any:
    """Weight-only. `Int4WeightOnlyConfig` has no packing for the CPU; its prototype for the CPU gives a tensor that has."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig

    if bits == 8:
        return Int8WeightOnlyConfig()
    return PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)


# kind: PEFT's class for it, and how one linear layer is quantised.
_EIGHT: dict[str, Any] = {"has_fp16_weights": False}
KINDS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "bnb int8": ("bnb.Linear8bitLt", _bnb("Linear8bitLt", **_EIGHT)),
    "bnb int8 with outliers": ("bnb.Linear8bitLt", _bnb("Linear8bitLt", threshold=2.0, **_EIGHT)),
    "bnb nf4": ("bnb.Linear4bit", _bnb("Linear4bit", quant_type="nf4")),
    "bnb fp4": ("bnb.Linear4bit", _bnb("Linear4bit", quant_type="fp4", compress_statistics=False)),
    "torchao int8": ("torchao.TorchaoLoraLinear", _torchao(8)),
    "torchao int4": ("torchao.TorchaoLoraLinear", _torchao(4)),
    "gptq": ("gptq.GPTQLoraLinear", GroupQuantised),
    "awq": ("awq.AwqLoraLinear", GroupQuantised),
    "aqlm": ("aqlm.AqlmLoraLinear", GroupQuantised),
}
_AROUND_STAND_INS: dict[str, type[nn.Module]] = {"gptq": GPTQLoraLinear, "awq": AwqLoraLinear, "aqlm": AqlmLoraLinear}
LIBRARIES = {"bnb": "bitsandbytes", "torchao": "torchao"}


def installed(kind: str) -> bool:
    """Whether the layers are the library's own, as against a stand-in; warns where the library is missing."""
    library = LIBRARIES.get(kind.split()[0])
    if library is None:
        return False
    if find_spec(library) is None:
        warnings.warn(f"{library} is not installed: {kind} is tested with a stand-in alone", stacklevel=3)
        return False
    return True


def _stand_in(kind: str) -> type[nn.Module]:
    family, _, name = KINDS[kind][0].partition(".")
    if family in _AROUND_STAND_INS:
        return _AROUND_STAND_INS[family]
    return type(
        name, (LoraLinear if family == "torchao" else AwqLoraLinear,), {"__module__": f"peft.tuners.lora.{family}"}
    )


def quantised(model: nn.Module, kind: str) -> nn.Module:
    """Every linear layer but the head, in place."""
    quantise = KINDS[kind][1] if installed(kind) else GroupQuantised
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name not in ("lm_head", "score"):
                setattr(parent, name, quantise(child))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = "bnb int8" in kind, kind in ("bnb nf4", "bnb fp4")
    return model


def fine_tune(kind: str, dtype: torch.dtype = torch.float32, head: str = "SEQ_CLS", **options: Any) -> Any:
    """The same model each time: a quantised Llama with a trained LoRA adapter, and a classifier or language head."""
    torch.manual_seed(0)
    core = LlamaForSequenceClassification if head == "SEQ_CLS" else LlamaForCausalLM
    base = quantised(scramble(core(LlamaConfig(**CONFIG))).to(dtype), kind)
    config = LoraConfig(**{"target_modules": list(TARGETS), "r": 4, "lora_alpha": 6, "task_type": head} | options)
    if not installed(kind):
        config._register_custom_module({GroupQuantised: _stand_in(kind)})
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.7 * parameter.shape[-1] ** -0.5)
    return model.eval()


def base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers below the LoRA layers, by the LoRA layers' names."""
    return {name: m.base_layer for name, m in model.named_modules() if isinstance(m, LoraLayer)}


@torch.no_grad()
def dequantised(model: nn.Module) -> nn.Module:
    """A float64 copy whose quantised layers are plain ones of the weights they stand for; PEFT's layers keep their class."""
    dtype = model.get_input_embeddings().weight.dtype
    model = copy.deepcopy(model)
    exact: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            of = type(child).__module__, type(getattr(child, "weight", None)).__module__
            own = isinstance(child, GroupQuantised) or "bitsandbytes" in of[0] or "torchao" in of[1]
            if own and not isinstance(child, LoraLayer):
                parent._modules[name] = exact.setdefault(child, _plain(child, dtype))
    return model.double()


def _plain(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Its weight is the layer's answer to the unit vectors, which no quantisation of activations rounds."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=torch.float64)
    weight = layer(torch.eye(layer.in_features, dtype=dtype)[None])[0]
    if layer.bias is not None:
        linear.bias.copy_(layer.bias)
        weight = weight - layer.bias
    linear.weight.copy_(weight.T)
    return linear
