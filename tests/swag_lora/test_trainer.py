"""SwagCallback in real training runs of a tiny BERT, against loops and schedules written out by hand."""

import math
import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from swag_lora import SwagCallback, SwagPosterior

ROWS = 24


class Rows(torch.utils.data.Dataset):
    def __init__(self, n=ROWS):
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(0, 40, (n, 6), generator=generator)
        self.labels = torch.randint(0, 3, (n,), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from (Rows()[i] for i in range(ROWS))


class Recorder(TrainerCallback):
    """Added after SwagCallback: the weights after each optimizer step, and the rate each step ran at."""

    def __init__(self, names, stop_at=None):
        self.names, self.stop_at = names, stop_at
        self.weights, self.rates = {}, []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        parameters = dict(model.named_parameters())
        weights = [parameters[name].detach().float().flatten() for name in self.names]
        self.weights[state.global_step] = torch.cat(weights).clone()
        if state.global_step == self.stop_at:
            control.should_training_stop = True


@pytest.fixture
def peft_model():
    return make_model()


def make_model(dropout=0.1):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], lora_dropout=dropout)
    return get_peft_model(BertForSequenceClassification(config), lora)


def train(model, folder, callback, *, rows=None, stop_at=None, resume=None, more=(), **arguments):
    """24 rows in batches of 4: six steps an epoch."""
    options = {
        "num_train_epochs": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "seed": 3,
        "remove_unused_columns": False,
    } | arguments  # fmt: skip
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    recorder = Recorder(names, stop_at)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **options),
        train_dataset=rows or Rows(),
        eval_dataset=Rows(4),
        callbacks=[callback, recorder, *more],
    )
    trainer.train(resume_from_checkpoint=resume)
    recorder.trainer = trainer
    recorder.logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    return recorder


def mean_of(posterior):
    return torch.cat([view.flatten() for view in posterior.layout.views(posterior.mean).values()])


def assert_collected(posterior, recorder, steps):
    """The posterior is that of the weights after exactly these steps."""
    assert int(posterior.count) == len(steps)
    rows = torch.stack([recorder.weights[step] for step in steps]).double()
    torch.testing.assert_close(mean_of(posterior).double(), rows.mean(0), rtol=1e-5, atol=1e-7)
    views = posterior.layout.views(posterior.m2).values()
    m2 = torch.cat([view.flatten() for view in views]).double()
    torch.testing.assert_close(m2, (rows - rows.mean(0)).square().sum(0), rtol=1e-4, atol=1e-8)


def assert_same_posterior(a, b):
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


@pytest.mark.parametrize(
    ("start", "every", "steps"),
    [
        (0.5, "epoch", [18, 24]),
        (12, 1, list(range(13, 25))),
        (0.25, 5, [11, 16, 21]),
        (0, "epoch", [6, 12, 18, 24]),
        (0.0, 10, [10, 20]),
        (13, "epoch", [18, 24]),
        (0.9, 1, [23, 24]),
    ],
)
def test_when_it_collects(peft_model, tmp_path, start, every, steps):
    callback = SwagCallback(rank=3, start=start, every=every)
    recorder = train(peft_model, tmp_path, callback)
    assert_collected(callback.posterior, recorder, steps)
    assert callback.posterior.rank == 3


def test_same_as_a_plain_loop(tmp_path):
    """The loop of the class docstring, with the Trainer's optimizer and no dropout."""
    callback = SwagCallback(start=6, every=2, rank=4)
    train(make_model(dropout=0), tmp_path, callback, num_train_epochs=2, lr_scheduler_type="constant", seed=3)

    model = make_model(dropout=0).train()
    posterior = SwagPosterior(model, rank=4)
    reference = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], learning_rate=1e-2,
            per_device_train_batch_size=4, seed=3,
        ),
        train_dataset=Rows(),
    )  # fmt: skip
    batches = reference.get_train_dataloader()
    optimizer = reference.create_optimizer()
    step, start, every = 0, 6, 2
    for epoch in range(2):
        batches.set_epoch(epoch)
        for batch in batches:
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step >= start and (step - start + 1) % every == 0:
                posterior.collect()
            step += 1
    assert int(posterior.count) == int(callback.posterior.count) == 3
    torch.testing.assert_close(posterior.mean, callback.posterior.mean, rtol=1e-4, atol=1e-6)


def test_gradient_accumulation_counts_optimizer_steps(peft_model, tmp_path):
    """Six batches, four to a step: two steps an epoch, the second of two batches."""
    callback = SwagCallback(start=2, every=1)
    recorder = train(peft_model, tmp_path, callback, gradient_accumulation_steps=4)
    assert sorted(recorder.weights) == list(range(1, 9))
    assert_collected(callback.posterior, recorder, [3, 4, 5, 6, 7, 8])

    callback = SwagCallback(start=2, every="epoch")
    recorder = train(make_model(), tmp_path, callback, gradient_accumulation_steps=4)
    assert_collected(callback.posterior, recorder, [4, 6, 8])


def test_bfloat16(peft_model, tmp_path):
    callback = SwagCallback(start=0.5, every=3)
    recorder = train(peft_model, tmp_path, callback, bf16=True)
    assert_collected(callback.posterior, recorder, [15, 18, 21, 24])


def test_max_steps_within_an_epoch(peft_model, tmp_path):
    callback = SwagCallback(start=6)
    recorder = train(peft_model, tmp_path, callback, max_steps=15)
    assert_collected(callback.posterior, recorder, [12, 15])


def test_data_set_without_a_length(peft_model, tmp_path):
    """The Trainer knows no epochs then; each pass over the data is one."""
    callback = SwagCallback(start=0.5)
    recorder = train(peft_model, tmp_path, callback, rows=Stream(), max_steps=20)
    assert_collected(callback.posterior, recorder, [12, 18, 20])


def test_steps_the_scaler_skips(peft_model, tmp_path):
    class Skips(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            optimizer._is_overflow = state.global_step + 1 in (16, 18, 23, 24)

    callback = SwagCallback(start=12, every=1)
    recorder = train(peft_model, tmp_path, callback, more=[Skips()])
    assert_collected(callback.posterior, recorder, [13, 14, 15, 17, 19, 20, 21, 22])

    # An epoch's last step was skipped: the weights have changed since the last epoch all the same.
    callback = SwagCallback(start=12, every="epoch")
    recorder = train(make_model(), tmp_path, callback, more=[Skips()])
    assert_collected(callback.posterior, recorder, [18, 24])


def schedule(step, begin=12, rate=3e-3, total=24, anneal_steps=0, anneal="cosine"):
    """Trainer's default linear decay, then the annealed rate."""
    linear = 1e-2 * (total - min(step, begin)) / total
    if step < begin:
        return linear
    t = min(1.0, (step - begin) / anneal_steps) if anneal_steps else 1.0
    alpha = (1 - math.cos(math.pi * t)) / 2 if anneal == "cosine" else t
    return linear + alpha * (rate - linear)


@pytest.mark.parametrize("anneal", [{}, {"anneal_steps": 5}, {"anneal_steps": 20, "anneal": "linear"}])
def test_rate_of_every_step_and_in_the_logs(peft_model, tmp_path, anneal):
    recorder = train(peft_model, tmp_path, SwagCallback(start=0.5, lr=3e-3, **anneal))
    expected = [schedule(step, **anneal) for step in range(24)]
    assert [rates[0] for rates in recorder.rates] == pytest.approx(expected, rel=1e-12)
    assert recorder.logged == pytest.approx(expected, rel=1e-12)


def test_annealing_is_that_of_torch(peft_model, tmp_path):
    recorder = train(peft_model, tmp_path, SwagCallback(start=6, lr=3e-3, anneal_steps=7), lr_scheduler_type="constant")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    swalr = torch.optim.swa_utils.SWALR(optimizer, swa_lr=3e-3, anneal_epochs=7, anneal_strategy="cos")
    expected = []
    for _ in range(18):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        swalr.step()
    assert [rates[0] for rates in recorder.rates[6:]] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["linear", "cosine", "reduce_lr_on_plateau"])
def test_constant_rate_under_any_schedule(peft_model, tmp_path, kind):
    evaluate = {"eval_strategy": "epoch"} if kind == "reduce_lr_on_plateau" else {}
    callback = SwagCallback(start=12, lr=4e-3)
    recorder = train(peft_model, tmp_path, callback, lr_scheduler_type=kind, **evaluate)
    assert {rate for rates in recorder.rates[12:] for rate in rates} == {4e-3}
    assert 4e-3 not in {rates[0] for rates in recorder.rates[:12]}


def test_no_rate_leaves_the_schedule(peft_model, tmp_path):
    recorder = train(peft_model, tmp_path, SwagCallback(start=0.5))
    assert recorder.logged == pytest.approx([1e-2 * (24 - step) / 24 for step in range(24)], rel=1e-12)


def test_one_rate_for_each_parameter_group(peft_model, tmp_path):
    recorder = train(peft_model, tmp_path, SwagCallback(start=0.5, lr=[1e-3, 2e-3]))
    assert all(rates == [1e-3, 2e-3] for rates in recorder.rates[12:])
    with pytest.raises(RuntimeError, match="lr has 3 values for the optimizer's 2 parameter groups"):
        train(make_model(), tmp_path, SwagCallback(start=0.5, lr=[1e-3] * 3))


@pytest.mark.parametrize(
    ("own", "stop_at", "save_steps", "callback_arguments"),
    [
        (True, 18, 6, {"start": 0.25, "every": "epoch", "lr": 5e-3}),
        (False, 14, 7, {"start": 0.25, "every": 2, "lr": 5e-3, "anneal_steps": 12}),
        (True, 7, 7, {"start": 0.5, "every": "epoch", "lr": 5e-3}),
        (False, 16, 4, {"start": 10, "every": 5}),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, own, stop_at, save_steps, callback_arguments):
    """Dropout is on: every random number, weight, rate and moment has to come back."""
    arguments = {"save_strategy": "steps", "save_steps": save_steps, "save_total_limit": 1}

    def callback_for(model):
        return SwagCallback(None if own else SwagPosterior(model, rank=3), rank=3, **callback_arguments)

    model = make_model()
    straight = callback_for(model)
    whole = train(model, tmp_path / "straight", straight, **arguments)

    model = make_model()
    train(model, tmp_path / "cut", callback_for(model), stop_at=stop_at, **arguments)
    assert os.listdir(tmp_path / "cut") == [f"checkpoint-{stop_at}"]

    model = make_model()
    resumed = callback_for(model)
    handle = None if own else resumed.posterior
    second = train(model, tmp_path / "cut", resumed, resume=True, **arguments)

    assert own or handle is resumed.posterior
    assert list(model.peft_config) == ["default"]
    assert second.rates == whole.rates[stop_at:] and second.logged == whole.logged
    for step, weights in second.weights.items():
        assert torch.equal(weights, whole.weights[step]), step
    assert_same_posterior(straight.posterior, resumed.posterior)


def test_resume_drops_what_was_collected_after_the_checkpoint(tmp_path):
    """In one process, where the posterior still holds the run that broke off."""
    arguments = {"save_strategy": "steps", "save_steps": 5}
    straight = SwagCallback(start=8, every=1, rank=3)
    train(make_model(), tmp_path / "straight", straight, **arguments)

    model = make_model()
    callback = SwagCallback(SwagPosterior(model, rank=3), start=8, every=1)
    train(model, tmp_path / "cut", callback, stop_at=13, **arguments)
    assert int(callback.posterior.count) == 5
    # From step 10, which had two of the five, and then from step 5, which had none.
    for folder in (True, str(tmp_path / "cut" / "checkpoint-5")):
        train(model, tmp_path / "cut", callback, resume=folder, **arguments)
        assert_same_posterior(straight.posterior, callback.posterior)


def test_checkpoint_holds_a_posterior_and_a_plain_adapter(peft_model, tmp_path):
    callback = SwagCallback(start=6, every=2, rank=3)
    train(peft_model, tmp_path, callback, save_strategy="steps", save_steps=6)
    assert not (tmp_path / "checkpoint-6" / "swag").exists()
    folder = tmp_path / "checkpoint-24" / "swag" / "posterior"
    loaded = SwagPosterior.from_pretrained(make_model(), folder)
    assert_same_posterior(loaded, callback.posterior)
    assert int(SwagPosterior.from_pretrained(make_model(), tmp_path / "checkpoint-12/swag/posterior").count) == 3


def test_moved_checkpoint(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 14}
    straight = SwagCallback(start=6, every=2, rank=3)
    train(make_model(), tmp_path / "a", straight, **arguments)
    train(make_model(), tmp_path / "b", SwagCallback(start=6, every=2, rank=3), stop_at=14, **arguments)
    shutil.move(tmp_path / "b" / "checkpoint-14", tmp_path / "elsewhere")

    # Another run's checkpoint of the same step lies where ours would.
    train(make_model(), tmp_path / "b", SwagCallback(), stop_at=14, learning_rate=1e-3, **arguments)
    here = str(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="its checkpoint is not in"):
        train(make_model(), tmp_path / "b", SwagCallback(start=6, every=2, rank=3), resume=here)
    resumed = SwagCallback(start=6, every=2, rank=3)
    train(make_model(), tmp_path / "b", resumed, resume=here, resume_from_checkpoint=here)
    assert_same_posterior(straight.posterior, resumed.posterior)


def test_resume_with_another_rank_is_refused(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 12}
    train(make_model(), tmp_path, SwagCallback(start=0, every=2, rank=3), stop_at=12, **arguments)
    with pytest.raises(ValueError, match="deviations"):
        train(make_model(), tmp_path, SwagCallback(start=0, every=2, rank=5), resume=True)


def test_a_given_posterior_goes_on_and_a_new_one_starts_anew(peft_model, tmp_path):
    posterior = SwagPosterior(peft_model, rank=2)
    posterior.collect()
    given = SwagCallback(posterior, start=12)
    train(peft_model, tmp_path, given)
    assert given.posterior is posterior and int(posterior.count) == 3

    callback = SwagCallback(start=12)
    train(peft_model, tmp_path, callback)
    first = callback.posterior
    train(peft_model, tmp_path, callback)
    assert callback.posterior is not first and int(callback.posterior.count) == int(first.count) == 2


def test_second_training_anneals_from_its_own_schedule(peft_model, tmp_path):
    callback = SwagCallback(start=12, lr=3e-3, anneal_steps=4)
    recorder = train(peft_model, tmp_path, callback)
    assert recorder.rates[12][0] == pytest.approx(schedule(12, rate=0, anneal_steps=4))
    recorder.rates.clear()
    recorder.trainer.args.num_train_epochs = 8
    recorder.trainer.train()
    assert recorder.rates[12][0] == pytest.approx(1e-2 * 36 / 48)


@pytest.mark.parametrize("wrap", ["compiled", "given"])
def test_wrapped_models(peft_model, tmp_path, wrap):
    model = torch.compile(peft_model, backend="eager") if wrap == "compiled" else peft_model
    callback = SwagCallback(SwagPosterior(peft_model) if wrap == "given" else None, start=22, every=1)
    train(model, tmp_path, callback)
    assert callback.posterior.model is peft_model and int(callback.posterior.count) == 2
    assert not any("_orig_mod" in name for name in callback.posterior.layout.names)


def test_only_lora(peft_model, tmp_path):
    callback = SwagCallback(params="lora", start=20, every=1)
    train(peft_model, tmp_path, callback)
    assert all("lora_" in name for name in callback.posterior.layout.names)


def test_only_the_main_process_writes(peft_model, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "should_save", property(lambda self: False))
    callback = SwagCallback(start=0, every=1)
    train(peft_model, tmp_path, callback, save_strategy="steps", save_steps=6)
    assert not list(tmp_path.rglob("swag_posterior*"))


def test_model_of_another_trainer_is_refused(peft_model, tmp_path):
    with pytest.raises(RuntimeError, match="another model than the Trainer trains"):
        train(peft_model, tmp_path, SwagCallback(SwagPosterior(make_model())))


def test_start_after_the_end_is_refused(peft_model, tmp_path):
    with pytest.raises(RuntimeError, match="starts after step 24, but training ends at step 24"):
        train(peft_model, tmp_path, SwagCallback(start=24))


def test_no_posterior_before_training():
    with pytest.raises(RuntimeError, match="made when training begins"):
        _ = SwagCallback().posterior


def test_too_few_collections_are_reported(peft_model, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("swag_lora.trainer.logger.warning", messages.append)
    train(peft_model, tmp_path, SwagCallback(start=20))
    assert len(messages) == 1 and "collected 1 times" in messages[0]
    train(peft_model, tmp_path, SwagCallback(start=12))
    assert len(messages) == 1


def test_a_weight_that_is_not_finite_stops_training_and_names_it(peft_model, tmp_path):
    name, parameter = next((n, p) for n, p in peft_model.named_parameters() if p.requires_grad)

    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 16:
                parameter.data[0, 0] = math.nan

    callback = SwagCallback(start=12, every=2)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        train(peft_model, tmp_path, callback, more=[Break()])
    assert int(callback.posterior.count) == 2 and callback.posterior.mean.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start": 1.0}, ValueError, r"fraction in \[0, 1\), got 1.0"),
        ({"start": -1}, ValueError, "start must be"),
        ({"start": float("nan")}, ValueError, "start must be"),
        ({"start": "half"}, TypeError, "start must be"),
        ({"start": True}, TypeError, "start must be"),
        ({"every": 0}, ValueError, "every must be 'epoch' or a number of steps"),
        ({"every": "step"}, ValueError, "every must be"),
        ({"every": 2.5}, ValueError, "every must be"),
        ({"lr": -1e-3}, ValueError, "lr must be finite"),
        ({"lr": [1e-3, float("nan")]}, ValueError, "lr must be finite"),
        ({"anneal_steps": 5}, ValueError, "0 without lr"),
        ({"lr": 1e-3, "anneal_steps": -1}, ValueError, "anneal_steps must be"),
        ({"lr": 1e-3, "anneal": "step"}, ValueError, "'cosine' or 'linear', got 'step'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        SwagCallback(**arguments)
