"""How many tokens a model can read, found before it is trained."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModel,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MPNetConfig,
    OPTConfig,
    RobertaConfig,
    T5Config,
)

from swag_lora import data
from swag_lora.experiment.run import prepare
from swag_lora.experiment.settings import Settings
from swag_lora.fit import fit
from swag_lora.positions import capacity
from swag_lora.recipe import Recipe

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BART = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
}  # fmt: skip
CONFIGS = {
    "bert": BertConfig(**SMALL, max_position_embeddings=24),
    "roberta": RobertaConfig(**SMALL, max_position_embeddings=26),
    "mpnet": MPNetConfig(**SMALL, max_position_embeddings=26),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=24),
    "opt": OPTConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
        max_position_embeddings=24, word_embed_proj_dim=16,
    ),
    "bart": BartConfig(**BART, max_position_embeddings=24),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_reads_as_many_tokens_and_no_more(config):
    model = AutoModel.from_config(config).eval()
    most = capacity(model)
    assert most == 24
    ids = torch.randint(5, 50, (1, most + 1))
    model(input_ids=ids[:, :most])
    with pytest.raises((RuntimeError, IndexError)):
        model(input_ids=ids)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, max_position_embeddings=24),
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
    ],
    ids=["llama", "t5"],
)
def test_computed_positions_have_no_end(config):
    assert capacity(AutoModel.from_config(config)) is None


@pytest.mark.parametrize("split", ["train", "val", "test", "oos_test"])
def test_texts_longer_than_the_model_are_refused_before_training(home, tmp_path, split):
    colors = data.load(home / "colors")
    folder = tmp_path / "colors"
    folder.mkdir()
    for name, examples in colors.splits.items():
        lines = [{"text": e.text, "label": max(e.label, 0)} for e in examples]
        if name == split:
            lines[-1]["text"] = "red " * 40
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    settings = Settings(str(home / "bert"), str(folder), max_length=64)
    with pytest.raises(
        ValueError, match="an example has 42 tokens, and .*bert has positions for 32: take --max-length 32"
    ):
        prepare(settings)
    prepare(replace(settings, max_length=32))
    if split in ("train", "val"):
        with pytest.raises(ValueError, match="positions for 32"):
            fit(tmp_path / "run", home / "bert", data.load(folder), Recipe(), 64)
