"""SwagCallback in training runs of several ranks: DistributedDataParallel, and FSDP2."""

from __future__ import annotations

import os

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from ranks import run_ranks
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from swag_lora import SwagCallback, SwagPosterior
from swag_lora.trainer import SUBFOLDER

START = 2
SAVED = 4
FSDP = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "auto_wrap_policy": "NO_WRAP", "state_dict_type": "SHARDED_STATE_DICT"},
}


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(0, 40, (24, 6), generator=generator)
        self.labels = torch.randint(0, 3, (24,), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


class Recorder(TrainerCallback):
    """The whole trainable weights after each optimizer step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }


def make_model():
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "value"])
    return get_peft_model(BertForSequenceClassification(config), lora)


def train(folder, callback, steps, model=None, resume=None, **options):
    recorder = Recorder()
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="steps",
        save_steps=SAVED, report_to=[], disable_tqdm=True, use_cpu=True, seed=3, logging_strategy="no",
        lr_scheduler_type="constant", resume_from_checkpoint=resume, **options,
    )  # fmt: skip
    trainer = Trainer(model=model or make_model(), args=arguments, train_dataset=Rows(), callbacks=[callback, recorder])
    trainer.train(resume_from_checkpoint=resume)
    return recorder


def let_accelerate_shard_on_the_cpu():
    """accelerate takes an FSDP plugin into use on GPUs alone, though nothing in it needs one."""
    real = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def same_as_one_process(saved, recorder, times, before=None):
    """Whether the folder ``saved`` holds what one process collects from the recorded weights of the steps ``times``."""
    model = make_model()
    reference = SwagPosterior.from_pretrained(model, before) if before else SwagPosterior(model, rank=3)
    for step in times:
        model.load_state_dict(recorder.weights[step], strict=False)
        reference.collect()
    found = SwagPosterior.from_pretrained(make_model(), saved)
    state = reference.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())


def run(folder, how, steps, resume=None):
    options = {}
    if how == "fsdp":
        let_accelerate_shard_on_the_cpu()
        options = FSDP
    callback = SwagCallback(rank=3, start=START, every=1)
    recorder = train(folder, callback, steps, resume=resume, **options)
    posterior = callback.posterior
    assert (posterior.sharding is not None) == (how == "fsdp") and posterior.replicated == (how == "ddp")
    posterior.save_pretrained(f"{folder}/end")
    assert os.path.isdir(f"{folder}/end")
    first = SAVED if resume else START
    assert sorted(recorder.weights) == list(range((SAVED if resume else 0) + 1, steps + 1))
    before = f"{resume}/{SUBFOLDER}" if resume else None
    assert same_as_one_process(f"{folder}/end", recorder, range(first + 1, steps + 1), before)
    if not resume:
        steps_then = range(START + 1, SAVED + 1)
        assert same_as_one_process(f"{folder}/checkpoint-{SAVED}/{SUBFOLDER}", recorder, steps_then)


def made_before(folder):
    let_accelerate_shard_on_the_cpu()
    model = make_model()
    try:
        train(folder, SwagCallback(SwagPosterior(model), start=START, every=1), 3, model=model, **FSDP)
    except RuntimeError as error:
        return str(error)


def test_data_parallel_and_resumed_on_more_ranks(tmp_path):
    run_ranks(run, 2, str(tmp_path / "two"), "ddp", 6)
    run_ranks(run, 3, str(tmp_path / "three"), "ddp", 6, str(tmp_path / "two" / f"checkpoint-{SAVED}"))


def test_fully_sharded_and_resumed_on_more_ranks(tmp_path):
    run_ranks(run, 2, str(tmp_path / "two"), "fsdp", 6)
    run_ranks(run, 3, str(tmp_path / "three"), "fsdp", 6, str(tmp_path / "two" / f"checkpoint-{SAVED}"))


def test_a_posterior_made_before_the_model_was_sharded(tmp_path):
    for said in run_ranks(made_before, 2, str(tmp_path)):
        assert (
            "does not fit the model as the Trainer has prepared it" in said and "lora_A.default.weight is shard" in said
        )
