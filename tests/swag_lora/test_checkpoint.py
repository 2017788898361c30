import json
import os
import signal
import warnings

import pytest
import torch
from peft import PeftModel, peft_model
from posterior_models import TwoTensors, step, tiny_base, tiny_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from swag_lora import checkpoint
from swag_lora.checkpoint import POSTERIOR_NAME
from swag_lora.posterior import SwagPosterior

ADAPTER_NAME = "adapter_model.safetensors"


def collected(model, rank=3, times=5, **options):
    posterior = SwagPosterior(model, rank=rank, **options)
    for _ in range(times):
        step(model)
        posterior.collect()
    return posterior


def same(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def rewrite(path, change_tensors=dict, change_metadata=dict):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(change_tensors(load_file(path)), path, metadata=change_metadata(metadata))


@pytest.fixture
def saved(tmp_path):
    posterior = collected(tiny_peft())
    posterior.save_pretrained(tmp_path / "posterior")
    return posterior, tmp_path / "posterior"


@pytest.mark.parametrize("times, rank", [(5, 3), (2, 3), (4, 0)])
@pytest.mark.parametrize("params", ["trainable", "lora"])
def test_round_trip_goes_on_where_it_stopped(tmp_path, times, rank, params):
    model = tiny_peft()
    posterior = collected(model, rank, times, params=params, var_clamp=1e-20)
    posterior.save_pretrained(tmp_path / "new" / "folder")
    loaded = SwagPosterior.from_pretrained(model, tmp_path / "new" / "folder")
    assert same(posterior, loaded) and loaded.layout == posterior.layout
    assert (loaded.rank, loaded.var_clamp, loaded.model) == (rank, 1e-20, model)
    assert torch.equal(loaded.draw(3).buffer, posterior.draw(3).buffer)
    for _ in range(3):
        step(model)
        posterior.collect()
        loaded.collect()
    assert same(posterior, loaded)


@pytest.mark.parametrize("adapter", ["default", "task"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_peft_loads_the_mean(tmp_path, adapter, dtype):
    model = tiny_peft(adapter=adapter).to(dtype)
    posterior = collected(model)
    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    posterior.save_pretrained(tmp_path / "p")
    assert all(torch.equal(p, now[name]) for name, p in model.named_parameters())
    assert sorted(os.listdir(tmp_path)) == ["p"]
    assert sorted(os.listdir(tmp_path / "p")) == ["README.md", "adapter_config.json", ADAPTER_NAME, POSTERIOR_NAME]

    base = tiny_base().to(dtype)
    fresh = PeftModel.from_pretrained(base, tmp_path / "p", adapter_name=adapter, autocast_adapter_dtype=False)
    weights = dict(fresh.named_parameters())
    for name, mean in posterior.mean_state_dict().items():
        assert torch.equal(weights[name], mean) and mean.dtype == dtype
    loaded = SwagPosterior.from_pretrained(fresh, tmp_path / "p")
    assert torch.equal(loaded.draw(4).buffer, posterior.draw(4).buffer)


def test_lora_posterior_keeps_the_trained_classifier_in_the_adapter(tmp_path):
    model = tiny_peft()
    collected(model, params="lora").save_pretrained(tmp_path / "p")
    fresh = PeftModel.from_pretrained(tiny_base(), tmp_path / "p")
    assert torch.equal(
        fresh.base_model.model.classifier.modules_to_save["default"].weight,
        model.base_model.model.classifier.modules_to_save["default"].weight,
    )


def test_parameters_outside_the_adapter_come_back_with_load_mean(tmp_path):
    def norms(name, parameter):
        return "LayerNorm.bias" in name or "lora_" in name

    model = tiny_peft()
    posterior = SwagPosterior(model, params=norms)
    for _ in range(3):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(0.1 * torch.randn_like(p)) if norms(name, p) else None
        posterior.collect()
    posterior.save_pretrained(tmp_path / "p")
    fresh = PeftModel.from_pretrained(tiny_base(), tmp_path / "p")
    SwagPosterior.from_pretrained(fresh, tmp_path / "p").load_mean()
    weights = dict(fresh.named_parameters())
    mean = posterior.mean_state_dict()
    assert any("LayerNorm" in name for name in mean)
    assert all(torch.equal(weights[name], tensor) for name, tensor in mean.items())


def test_a_model_without_adapter(tmp_path):
    model = TwoTensors()
    posterior = collected(model)
    posterior.save_pretrained(tmp_path / "p")
    assert os.listdir(tmp_path / "p") == [POSTERIOR_NAME]
    assert same(posterior, SwagPosterior.from_pretrained(TwoTensors(), tmp_path / "p"))


def test_metadata_describes_the_arena(saved):
    posterior, folder = saved
    with safe_open(folder / POSTERIOR_NAME, framework="pt") as file:
        metadata = file.metadata()
        mean = file.get_tensor("mean")
    rows = json.loads(metadata["layout"])
    assert [row["name"] for row in rows] == list(posterior.layout.names)
    for row in rows:
        n = torch.Size(row["shape"]).numel()
        expected = posterior.mean_state_dict()[row["name"]]
        assert torch.equal(mean[row["offset"] : row["offset"] + n].view(row["shape"]), expected)
        assert row["dtype"] == "float32"


def test_saving_into_a_folder_keeps_its_other_files(saved):
    posterior, folder = saved
    (folder / "README.md").write_text("---\ntags:\n- mine\n---\nmy words")
    (folder / "notes.txt").write_text("kept")
    step(posterior.model)
    posterior.collect()
    posterior.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "kept" and "my words" in (folder / "README.md").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert same(posterior, SwagPosterior.from_pretrained(posterior.model, folder))


def test_saving_what_cannot_be_saved(tmp_path):
    model = tiny_peft()
    with pytest.raises(RuntimeError, match="nothing collected yet"):
        SwagPosterior(model).save_pretrained(tmp_path / "p")
    (tmp_path / "file").write_text("")
    posterior = collected(model)
    with pytest.raises(ValueError, match="is a file"):
        posterior.save_pretrained(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_several_active_adapters(tmp_path):
    model = tiny_peft(modules_to_save=None)
    posterior = collected(model)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="2 were active when it was made: default, other"):
        collected(model).save_pretrained(tmp_path / "p")
    assert not os.listdir(tmp_path)
    model.set_adapter("other")
    posterior.save_pretrained(tmp_path / "p")
    fresh = dict(PeftModel.from_pretrained(tiny_base(), tmp_path / "p").named_parameters())
    assert all(torch.equal(fresh[name], mean) for name, mean in posterior.mean_state_dict().items())


STAGES = {
    "adapter": (peft_model, "safe_save_file"),
    "save_file": (checkpoint, "save_file"),
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
}


def interrupt(monkeypatch, stage, call, action):
    """Make the given call of a stage act instead; counts calls if ``call`` is None."""
    owner, name = STAGES[stage]
    real, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(args)
        if len(calls) - 1 == call:
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def fail():
    raise OSError("disk full")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def run_killed(save):
    """Run ``save`` in a forked child, which is expected to die of the kill."""
    child = os.fork()
    if not child:
        try:
            save()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("action", [fail, kill])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_save_leaves_the_old_posterior_or_the_new(saved, monkeypatch, stage, action):
    posterior, folder = saved
    model = posterior.model
    with monkeypatch.context() as patch:
        calls = interrupt(patch, stage, None, fail)
        posterior.save_pretrained(folder)
    assert calls
    for call in range(len(calls)):
        old = SwagPosterior.from_pretrained(model, folder)
        adapters = [load_file(folder / ADAPTER_NAME)]
        step(model)
        posterior.collect()
        with monkeypatch.context() as patch:
            interrupt(patch, stage, call, action)
            if action is kill:
                run_killed(lambda: posterior.save_pretrained(folder))
            else:
                with pytest.raises(OSError, match="disk full"):
                    posterior.save_pretrained(folder)
        if action is fail:
            assert not list(folder.glob(".*"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            found = SwagPosterior.from_pretrained(model, folder)
        reported = any("is not the adapter" in str(w.message) for w in caught)
        assert same(found, old) or same(found, posterior)
        posterior.save_pretrained(folder.parent / f"{stage}{call}")
        adapters.append(load_file(folder.parent / f"{stage}{call}" / ADAPTER_NAME))
        now = load_file(folder / ADAPTER_NAME)
        versions = [i for i, adapter in enumerate(adapters) if all(torch.equal(now[k], adapter[k]) for k in adapter)]
        assert len(versions) == 1
        assert reported == (versions != [int(same(found, posterior))])
        # The posterior goes last: what is torn is a new adapter beside the old posterior, never the reverse.
        assert not reported or same(found, old)
        posterior.save_pretrained(folder)


def test_an_interrupted_first_save_leaves_no_folder(tmp_path, monkeypatch):
    posterior = collected(tiny_peft())
    for stage, action in (("save_file", fail), ("fsync", kill)):
        with monkeypatch.context() as patch:
            interrupt(patch, stage, 0, action)
            if action is kill:
                run_killed(lambda: posterior.save_pretrained(tmp_path / "p"))
            else:
                with pytest.raises(OSError):
                    posterior.save_pretrained(tmp_path / "p")
                assert not os.listdir(tmp_path)
        assert not (tmp_path / "p").exists()


def test_an_adapter_saved_over_is_reported(saved):
    posterior, folder = saved
    posterior.model.save_pretrained(folder)
    with pytest.warns(RuntimeWarning, match="is not the adapter that .* was saved with"):
        assert same(posterior, SwagPosterior.from_pretrained(posterior.model, folder))


def test_missing_folder_or_posterior(tmp_path):
    model = tiny_peft()
    with pytest.raises(FileNotFoundError, match="no posterior in"):
        SwagPosterior.from_pretrained(model, tmp_path / "nowhere")
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"it has no {POSTERIOR_NAME}"):
        SwagPosterior.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated(saved, keep):
    posterior, folder = saved
    content = (folder / POSTERIOR_NAME).read_bytes()
    (folder / POSTERIOR_NAME).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=f"{POSTERIOR_NAME} is truncated"):
        SwagPosterior.from_pretrained(posterior.model, folder)


def drop(name):
    return lambda entries: {key: value for key, value in entries.items() if key != name}


def put(**new):
    return lambda entries: {**entries, **new}


@pytest.mark.parametrize(
    "tensors, metadata, said",
    [
        (dict, lambda m: {"format": "pt"}, "is not a posterior: it was not written by"),
        (dict, lambda m: None, "is not a posterior"),
        (dict, put(version="99"), "has format version 99, this package reads version 1"),
        (dict, put(layout="[]"), "has damaged metadata"),
        (dict, drop("rank"), "has damaged metadata"),
        (drop("m2"), dict, "has no tensor m2"),
        (drop("count"), dict, "holds no collection count"),
        (put(mean=torch.zeros(7)), dict, r"mean is torch.float32 \[7\] instead of torch.float32 \[10240\]"),
        (put(m2=torch.zeros(10240).double()), dict, r"m2 is torch.float64"),
        (
            put(deviations=torch.zeros(2, 10240)),
            dict,
            r"deviations is torch.float32 \[2, 10240\] instead of .*\[3, 10240\]",
        ),
    ],
)
def test_foreign_or_damaged(saved, tensors, metadata, said):
    posterior, folder = saved
    rewrite(folder / POSTERIOR_NAME, tensors, metadata)
    with pytest.raises(ValueError, match=said):
        SwagPosterior.from_pretrained(posterior.model, folder)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"layers": 1}, r"layer.1.attention.self.query.lora_A.default.weight \[2, 16\] is missing"),
        ({"layers": 3}, r"layer.2.attention.self.query.lora_A.default.weight \[2, 16\] is not expected"),
        ({"rank": 3}, r"layer.0.attention.self.query.lora_A.default.weight has shape \[3, 16\] instead of \[2, 16\]"),
        ({"hidden": 8}, r"query.lora_A.default.weight has shape \[2, 8\] instead of \[2, 16\]"),
        ({"adapter": "other"}, r"lora_A.default.weight \[2, 16\] is missing.*its adapters: other"),
        ({"modules_to_save": None}, r"classifier.modules_to_save.default.weight \[3, 16\] is missing"),
        ({"target_modules": ["query", "key", "value"]}, r"self.key.lora_A.default.weight \[2, 16\] is not expected"),
    ],
)
def test_another_model_is_refused_by_tensor(saved, options, said):
    _, folder = saved
    with pytest.raises(ValueError, match=f"{POSTERIOR_NAME} does not fit the model: .*{said}"):
        SwagPosterior.from_pretrained(tiny_peft(**options), folder)
    with pytest.raises(ValueError, match="does not fit the model"):
        SwagPosterior.from_pretrained(TwoTensors(), folder)


def test_lora_layers_frozen_when_saved_are_not_missed(tmp_path):
    model = tiny_peft()
    for name, parameter in model.named_parameters():
        if "layer.0." in name:
            parameter.requires_grad = False
    posterior = collected(model)
    posterior.save_pretrained(tmp_path / "p")
    fresh = PeftModel.from_pretrained(tiny_base(), tmp_path / "p")
    assert same(posterior, SwagPosterior.from_pretrained(fresh, tmp_path / "p"))
