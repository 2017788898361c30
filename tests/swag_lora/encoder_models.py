"""Tiny model folders with tokenizers, and small data folders, as the command line reads them."""

import gzip
import json
import random

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

COLORS = ("red", "green", "blue")
OBJECTS = ("stone", "leaf", "sea", "apple", "hat", "door", "car", "sky")
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


WORDS = (*SPECIALS, *COLORS, *OBJECTS, "the", "is", "or", "which", "?")
PROMPT_WORDS = (*WORDS, "question", "answer", ":", ".", *"abcdef")


def save_tiny_bert(folder):
    """A random BERT of two layers whose words are WORDS; its checkpoint has no pooler and no head."""
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    save_tokenizer(folder, names)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def save_tiny_gpt2(folder):
    """A random GPT-2 of two layers: no multiple-choice head in transformers, and no padding token."""
    save_tokenizer(folder, {"unk_token": "[UNK]", "eos_token": "[SEP]"}, PROMPT_WORDS)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(PROMPT_WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=32, eos_token_id=3)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_tokenizer(folder, names, words=WORDS):
    """Words in lower case; every text begins with [CLS] and ends with [SEP]."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def write_lines(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def save_colors(folder, sizes=None):
    """Which color the text says, some of the labels wrong; `oos_test` says none."""
    rng = random.Random(0)
    for split, size in (sizes or {"train": 48, "val": 24, "test": 24}).items():
        rows = []
        for _ in range(size):
            label = rng.randrange(3)
            text = f"the {rng.choice(OBJECTS)} is {COLORS[label]}"
            rows.append({"text": text, "label": label if rng.random() < 0.8 else rng.randrange(3)})
        write_lines(folder / f"{split}.jsonl", rows)
    write_lines(folder / "oos_test.jsonl.gz", [{"text": f"which {o} ? or {o}", "label": -1} for o in OBJECTS])
    (folder / "labels.json").write_text(json.dumps(COLORS))
    return folder


def save_questions(folder):
    """Multiple choice with two to four choices, the right one being the color of the question."""
    rng = random.Random(1)
    for split, size in {"train": 24, "val": 12, "test": 13}.items():
        rows = []
        for _ in range(size):
            color = rng.choice(COLORS)
            choices = [color, *rng.sample(OBJECTS, rng.randrange(1, 4))]
            rng.shuffle(choices)
            rows.append({"question": f"which is {color} ?", "choices": choices, "answer": choices.index(color)})
        write_lines(folder / f"{split}.jsonl", rows)
    return folder
