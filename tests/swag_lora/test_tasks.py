import copy
import dataclasses
import json

import pytest
import torch
from encoder_models import PROMPT_WORDS, save_tiny_bert, save_tiny_gpt2, save_tokenizer
from language_models import given
from peft import LoraConfig, PeftModel
from tiny_models import scramble
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from swag_lora import answer_head, prompts
from swag_lora.data import Dataset
from swag_lora.examples import Example
from swag_lora.patch import SampledModel
from swag_lora.predictor import Predictor
from swag_lora.tasks import TASK_FILE, Task, TaskForward

SIZES = {
    "vocab_size": len(PROMPT_WORDS),
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
}
GEMMA = {"final_logit_softcapping": 1.5, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
BUILD = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **GEMMA)),
}
QUESTIONS = [
    Example("which is red ?", 1, ("sky", "apple", "sea")),
    Example("which is the sea ?", 0, ("blue or green", "red stone", "hat", "door", "car")),
    Example("is the leaf green ?", 1, ("the leaf", "sky")),
]
CHOICE = Dataset("questions", {"train": QUESTIONS}, None)
PAIRS = Dataset(
    "pairs", {"train": [Example("the sky", 0, text_pair="blue"), Example("sea", 1, text_pair="red hat")]}, ("no", "yes")
)
TEXTS = Dataset("texts", {"train": [Example("the sky is blue", 0), Example("the hat", 1)]}, ("no", "yes"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("tasks")
    save_tiny_bert(home / "bert")
    save_tiny_gpt2(home / "gpt2")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    for name, build in BUILD.items():
        save_tokenizer(home / name, names, PROMPT_WORDS)
        torch.manual_seed(0)
        model = scramble(build())
        model.tie_weights()
        model.save_pretrained(home / name)
    return home


def lora_model(home, name, **options):
    task = Task.of(home / name, CHOICE, 64, 0, **options)
    tokenizer = task.tokenizer()
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    model = task.peft_model(tokenizer, LoraConfig(r=2, target_modules=targets)).double().eval()
    return task, tokenizer, model


def collated(task, tokenizer, examples):
    return task.collate(tokenizer, task.encode(tokenizer, examples))


@pytest.mark.parametrize("name", ["llama", "tied llama", "gemma3", "gpt2"])
def test_letters_have_the_logits_of_the_whole_model_after_the_prompt(home, name):
    task, tokenizer, model = lora_model(home, name)
    logits = task.logits(model, collated(task, tokenizer, QUESTIONS))
    whole = AutoModelForCausalLM.from_pretrained(home / name).double().eval()
    assert logits.shape == (3, 5)
    for row, example in zip(logits, QUESTIONS, strict=True):
        lines = [f"{letter} . {choice}" for letter, choice in zip("abcde", example.choices, strict=False)]
        words = f"[CLS] question : {example.text} {' '.join(lines)} answer :".split()
        ids = torch.tensor([[PROMPT_WORDS.index(word) for word in words]])
        answers = [PROMPT_WORDS.index(letter) for letter in "abcde"[: len(example.choices)]]
        torch.testing.assert_close(row[: len(answers)], whole(input_ids=ids).logits[0, -1, answers])
        assert (row.softmax(-1)[len(answers) :] == 0).all()


@pytest.mark.parametrize("name", ["llama", "tied llama"])
def test_only_the_letters_rows_of_the_head_are_left(home, name):
    task, tokenizer, model = lora_model(home, name)
    core = model.get_base_model()
    assert core.lm_head.weight.shape == (5, 12) and not core.lm_head.weight.requires_grad
    assert len(core.get_input_embeddings().weight) == len(PROMPT_WORDS)
    before = core.lm_head.weight.clone()
    core.tie_weights(recompute_mapping=False)
    core.tie_weights()
    assert torch.equal(core.lm_head.weight, before)
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_one_pass_equals_the_loop(home, name, train_head):
    task, tokenizer, model = lora_model(home, name, train_head=train_head)
    scramble(model)
    batch = collated(task, tokenizer, QUESTIONS)
    posterior = given(model, 4)
    weights = posterior.draw(4, seed=0, first=0, scale=1.0, method="iid")
    assert any("lm_head" in parameter for parameter in weights) == train_head
    looped, single = [], copy.deepcopy(model)
    parameters = dict(single.named_parameters())
    with torch.no_grad():
        for s in range(4):
            for parameter, values in weights.items():
                parameters[parameter].copy_(values[s])
            looped.append(task.logits(single, batch))
        sampled = task.logits(SampledModel(model, weights), batch)
    looped = torch.stack(looped)
    assert sampled.shape == (4, 3, 5)
    torch.testing.assert_close(sampled, looped)
    assert (looped[0] - looped[1]).abs().max() > 1e-3

    def predicted(examples, rows):
        forward = TaskForward(task, 5)
        few = Predictor(model, posterior, 4, method="iid", samples_per_pass=2, examples_per_pass=rows, forward=forward)
        return few(collated(task, tokenizer, examples)).probs

    expected = looped.softmax(-1).mean(0)
    torch.testing.assert_close(predicted(QUESTIONS, 3).double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(predicted(QUESTIONS[::-1], 2).double(), expected.flip(0), rtol=1e-4, atol=1e-6)


def test_a_trained_head_is_saved_with_the_adapter(home, tmp_path):
    task, tokenizer, model = lora_model(home, "tied llama", train_head=True)
    for parameter in model.float().parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    task.save(tmp_path)
    again = Task.load(tmp_path)
    assert again == task and again.train_head and again.letters == 5
    base, fresh = again.base_model(tokenizer)
    assert fresh == ["lm_head"]
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    batch = collated(task, tokenizer, QUESTIONS)
    torch.testing.assert_close(task.logits(loaded, batch), task.logits(model, batch))


def test_gradients_reach_the_head_where_it_is_trained(home):
    for train_head in (False, True):
        task, tokenizer, model = lora_model(home, "llama", train_head=train_head)
        batch = collated(task, tokenizer, QUESTIONS)
        torch.nn.functional.cross_entropy(task.logits(model, batch), batch["labels"]).backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert any("lora_B" in name for name in trained)
        assert any("lm_head" in name for name in trained) == train_head
    head = next(p for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad)
    assert head.grad.abs().sum(1).min() > 0


def test_a_long_prompt_keeps_its_end(home):
    task = Task.of(home / "llama", CHOICE, 8, 0)
    batch = collated(task, task.tokenizer(), QUESTIONS)
    words = [PROMPT_WORDS[i] for i in batch["input_ids"][1]]
    assert words == ["[CLS]", ".", "door", "e", ".", "car", "answer", ":"]
    with pytest.raises(ValueError, match="max_length 1 leaves no room"):
        dataclasses.replace(task, max_length=1).encode(task.tokenizer(), QUESTIONS)


def test_prompts_are_padded_on_the_left(home):
    task = Task.of(home / "gpt2", CHOICE, 64, 0)
    batch = collated(task, task.tokenizer(), QUESTIONS)
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == 3 and bool((batch["attention_mask"][:, -1] == 1).all())
    assert batch["position_ids"].max(1).values.tolist() == (lengths - 1).tolist()
    assert batch["sizes"].tolist() == [3, 5, 2] and batch["labels"].tolist() == [1, 0, 1]
    assert "token_type_ids" not in batch


def bytes_tokenizer(merges):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer), vocabulary


def test_letters_are_the_tokens_that_follow_the_prompt():
    template = "{question}\n{choices}\nAnswer:"
    tokenizer, vocabulary = bytes_tokenizer([("Ġ", letter) for letter in "ABCDE"])
    assert answer_head.letter_tokens(tokenizer, template, 3) == [vocabulary[f"Ġ{letter}"] for letter in "ABC"]
    with pytest.raises(ValueError, match=r"PreTrainedTokenizerFast|TokenizersBackend") as caught:
        answer_head.letter_tokens(bytes_tokenizer([("Ġ", "A")])[0], template, 2)
    assert "'B' no token of its own" in str(caught.value) and "--task scores" in str(caught.value)
    merged, _ = bytes_tokenizer([(":", "Ġ"), (":Ġ", "A")])
    merged.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with pytest.raises(ValueError, match="'A' no token of its own"):
        answer_head.letter_tokens(merged, template, 1)


def test_letters_that_the_tokenizer_does_not_know(home, tmp_path):
    save_tokenizer(tmp_path, {"unk_token": "[UNK]", "eos_token": "[SEP]"}, PROMPT_WORDS[:-3])
    BUILD["llama"]().save_pretrained(tmp_path)
    task = Task.of(tmp_path, CHOICE, 64, 0)
    with pytest.raises(ValueError, match="'D' no token of its own"):
        task.base_model(task.tokenizer())


def test_a_head_without_rows_is_refused(home, tmp_path):
    class Other(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = BUILD["llama"]()
    model.lm_head = Other(12, 30)
    with pytest.raises(ValueError, match="LlamaForCausalLM is a Other"):
        answer_head.keep_rows(model, [1, 2])
    model.lm_head = torch.nn.Linear(12, 30)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(30, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="leave the head out of quantisation"):
        answer_head.keep_rows(model, [1, 2])
    model = BUILD["llama"]()
    model.lm_head = torch.nn.Linear(12, 30)
    assert answer_head.keep_rows(model, [7, 2]) == "lm_head" and model.lm_head.bias.shape == (2,)
    save_tokenizer(tmp_path, {"unk_token": "[UNK]", "eos_token": "[SEP]"}, PROMPT_WORDS)
    BUILD["llama"]().model.save_pretrained(tmp_path)
    task = Task.of(tmp_path, CHOICE, 64, 0)
    with pytest.raises(ValueError, match="no whole language model, its checkpoint lacks lm_head.weight"):
        task.base_model(task.tokenizer())


def test_the_kind_follows_from_the_data_and_the_model(home):
    assert Task.of(home / "llama", CHOICE, 8, 0).kind == Task.of(home / "gpt2", CHOICE, 8, 0).kind == "letters"
    assert Task.of(home / "bert", CHOICE, 8, 0).kind == "scores"  # BERT is a causal model too, if asked
    assert Task.of(home / "llama", TEXTS, 8, 0).kind == "classification"
    scores = Task.of(home / "gpt2", CHOICE, 8, 0, "scores")
    assert scores.kind == "scores" and scores.template is None and scores.letters == 0
    six = Dataset("six", {"test": [Example("q", 0, tuple("uvwxyz"))]}, None)
    assert Task.of(home / "gpt2", six, 8, 0).letters == 6
    many = Dataset("many", {"test": [Example("q", 0, ("x",) * 27)]}, None)
    for call, message in (
        (
            lambda: Task.of(home / "llama", TEXTS, 8, 0, "letters"),
            "classification data is a task of kind classification",
        ),
        (
            lambda: Task.of(home / "llama", CHOICE, 8, 0, "classification"),
            "kind scores or letters, not 'classification'",
        ),
        (lambda: Task.of(home / "bert", CHOICE, 8, 0, train_head=True), "train_head is for tasks of kind letters"),
        (lambda: Task.of(home / "gpt2", many, 8, 0), "many has a question with 27 choices, more than letters"),
        (
            lambda: Task.of(home / "gpt2", CHOICE, 8, 0).check(six),
            "six has a question with 6 choices, the model answers",
        ),
        (lambda: Task.of(home / "gpt2", CHOICE, 8, 0).check(TEXTS), "texts is text classification, the model is for"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_scores_of_a_decoder(home):
    task = Task.of(home / "gpt2", CHOICE, 64, 0, "scores")
    tokenizer = task.tokenizer()
    model = scramble(task.peft_model(tokenizer, LoraConfig(r=2, target_modules=["c_attn"]))).double().eval()
    whole = task.logits(model, collated(task, tokenizer, QUESTIONS))
    assert whole.shape == (3, 5) and whole.softmax(-1)[2, 2:].sum() == 0
    for row, example in zip(whole, QUESTIONS, strict=True):
        torch.testing.assert_close(task.logits(model, collated(task, tokenizer, [example]), 5)[0], row)


def test_pairs_are_two_segments(home):
    task = Task.of(home / "bert", PAIRS, 64, 0)
    tokenizer = task.tokenizer()
    batch = collated(task, tokenizer, PAIRS.splits["train"])
    assert tokenizer.decode(batch["input_ids"][0]) == "[CLS] the sky [SEP] blue [SEP]"
    assert tokenizer.decode(batch["input_ids"][1]) == "[CLS] sea [SEP] red hat [SEP]"
    assert "sizes" not in batch
    batch = collated(task, tokenizer, TEXTS.splits["train"])
    assert tokenizer.decode(batch["input_ids"][0]) == "[CLS] the sky is blue [SEP]"


def template(tmp_path, text):
    (tmp_path / "prompt.txt").write_text(text)
    return tmp_path / "prompt.txt"


def test_a_template_replaces_the_prompt(home, tmp_path):
    file = template(tmp_path, "Pick one of {letters} {{!}}\n{question}\n\n{choices}\n=>\n\n")
    task = Task.of(home / "gpt2", CHOICE, 64, 0, template=file)
    odd = Example("a {question} in {0}", 0, ("x}", "y"))
    assert prompts.fill(task.template, "letters", odd) == [
        "Pick one of A, B {!}\na {question} in {0}\n\nA. x}\nB. y\n=>"
    ]
    task.save(tmp_path)
    file.unlink()
    assert Task.load(tmp_path) == task
    assert Task.of(home / "gpt2", CHOICE, 64, 0).template == "Question: {question}\n{choices}\nAnswer:"

    task = Task.of(home / "bert", CHOICE, 64, 0, template=template(tmp_path, "{question} is {choice}"))
    tokenizer = task.tokenizer()
    batch = collated(task, tokenizer, QUESTIONS[:1])
    assert tokenizer.decode(batch["input_ids"][1]) == "[CLS] which is red ? is apple [SEP]"
    task = Task.of(home / "bert", PAIRS, 64, 0, template=template(tmp_path, "{text_pair} or {text} ?"))
    batch = collated(task, tokenizer, PAIRS.splits["train"][:1])
    assert tokenizer.decode(batch["input_ids"][0]) == "[CLS] blue or the sky ? [SEP]"
    with pytest.raises(ValueError, match=r"texts does not fit the task's prompt template:1: the field \{text_pair\}"):
        task.check(TEXTS)


BAD_TEMPLATES = {
    "unknown": (
        "gpt2",
        CHOICE,
        "{question}\n{choice}\n{choices}",
        "prompt.txt:2: unknown field {choice}; a template for letters",
    ),
    "missing": ("gpt2", CHOICE, "{question}\nAnswer:\n", "prompt.txt:2: ends without the field {choices}"),
    "positional": ("gpt2", CHOICE, "{question}{}", "prompt.txt:1: unknown field {}"),
    "attribute": ("gpt2", CHOICE, "{question.x}", "prompt.txt:1: unknown field {question.x}"),
    "format": ("gpt2", CHOICE, "\n{question:>9}", "prompt.txt:2: the field {question} takes no format"),
    "conversion": ("gpt2", CHOICE, "{question!r}", "prompt.txt:1: the field {question} takes no format"),
    "brace": ("gpt2", CHOICE, "{question}\n}", "prompt.txt:2: Single '}' encountered"),
    "open": ("gpt2", CHOICE, "{question}\n{", "prompt.txt:2: Single '{' encountered"),
    "scores": ("bert", CHOICE, "{question} {choices}", "prompt.txt:1: unknown field {choices}; a template for scores"),
    "text": (
        "bert",
        TEXTS,
        "{question}",
        "unknown field {question}; a template for classification has {text}, {text_pair}",
    ),
    "pair dropped": ("bert", PAIRS, "\n{text}", "prompt.txt:2: ends without the field {text_pair}"),
    "no pair": ("bert", TEXTS, "{text}\n{text_pair}", "prompt.txt:2: the field {text_pair}, and the data are no pairs"),
}


@pytest.mark.parametrize("name, dataset, text, message", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_bad_templates_are_named(home, tmp_path, name, dataset, text, message):
    with pytest.raises(ValueError) as caught:
        Task.of(home / name, dataset, 64, 0, template=template(tmp_path, text))
    assert message in str(caught.value) and "prompt.txt:" in str(caught.value)


def test_a_template_with_a_byte_order_mark(home, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbf{question}\n{choices}\nAnswer:")
    assert Task.of(home / "gpt2", CHOICE, 64, 0, template=file).template == "{question}\n{choices}\nAnswer:"


def test_a_template_that_is_not_there(home, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prompt template .*nowhere\.txt"):
        Task.of(home / "bert", TEXTS, 64, 0, template=tmp_path / "nowhere.txt")
    (tmp_path / "prompt.txt").write_bytes(b"\xff{text}")
    with pytest.raises(ValueError, match=r"prompt\.txt: no UTF-8"):
        Task.of(home / "bert", TEXTS, 64, 0, template=tmp_path / "prompt.txt")


@pytest.mark.parametrize("labels, kind", [(None, "scores"), (["no", "yes"], "classification")])
def test_a_task_file_from_before_there_were_kinds(tmp_path, labels, kind):
    values = {"model": "m", "labels": labels, "max_length": 64, "seed": 3, "scale": 2.0}
    (tmp_path / TASK_FILE).write_text(json.dumps(values))
    task = Task.load(tmp_path)
    assert (task.kind, task.template, task.letters, task.train_head) == (kind, None, 0, False)
    assert (task.model, task.max_length, task.seed, task.scale) == ("m", 64, 3, 2.0)
    for wrong in ({"kind": "letter"}, {"labels": 3}):
        (tmp_path / TASK_FILE).write_text(json.dumps(values | wrong))
        with pytest.raises(ValueError, match="is not a task"):
            Task.load(tmp_path)
    (tmp_path / TASK_FILE).write_text("[]")
    with pytest.raises(ValueError, match="is not a task"):
        Task.load(tmp_path)
