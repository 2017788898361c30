import argparse
import copy
import json
import os
import pickle
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from posterior_models import step, tiny_base, tiny_peft
from safetensors import safe_open
from safetensors.torch import load_file
from test_compat import Published

from swag_lora import SWAG, SampledModel, SwagPosterior
from swag_lora.imported import import_run
from swag_lora.transfer_cli import import_arguments, run_import

RANK = 4


def train(swag, model, times=6):
    for _ in range(times):
        step(model)
        swag.collect_model(model)


def save_run(folder, swag, model):
    """A run folder: the adapter of some epoch, and the state of the SWAG module with the whole base model in it."""
    model.save_pretrained(folder / "base_model")
    torch.save(swag.state_dict(), folder / "swag_model.pt")
    return folder


def published_run(folder, times=6, rank=RANK, dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = tiny_peft(**config).to(dtype)
    swag = SWAG(model, no_cov_mat=not rank, max_num_models=rank)
    train(swag, model, times)
    return swag, save_run(folder, swag, model)


def change(folder, edit):
    state = torch.load(folder / "swag_model.pt", weights_only=True)
    edit(state)
    torch.save(state, folder / "swag_model.pt")


def reload(out, base=None, adapter="default"):
    model = PeftModel.from_pretrained(base or tiny_base(), out, adapter_name=adapter, autocast_adapter_dtype=False)
    return SwagPosterior.from_pretrained(model, out)


def moments(posterior):
    """For each tensor mean, variance and deviations, oldest first, as `SWAG.generate_mean_var_covar` gives them."""
    count, rank, layout = int(posterior.count), posterior.rank, posterior.layout
    slots = [i % rank for i in range(max(count - rank, 0), count)] if rank else []
    return (
        list(layout.views(posterior.mean).values()),
        list(layout.views(posterior.m2 / count).values()),
        [posterior.deviations[slots][:, segment] for segment in layout.segments],
    )


@pytest.mark.parametrize("times, rank", [(6, 4), (9, 4), (4, 4), (5, 0)])
def test_moments_are_those_of_the_run(tmp_path, times, rank):
    swag, run = published_run(tmp_path / "run", times, rank)
    found = import_run(run, tmp_path / "out")
    posterior = reload(tmp_path / "out")
    assert list(posterior.layout.names) == [name.removeprefix("base.") for name in swag._moments.layout.names]
    assert int(posterior.count) == times and posterior.rank == min(times, rank)
    assert (found["collections"], found["deviations"]) == (times, min(times, rank))
    for mine, its in zip(moments(posterior), swag.generate_mean_var_covar(), strict=True):
        for a, b in zip(mine, its, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-7)


@torch.no_grad()
def test_the_mean_predicts_as_the_run_does(tmp_path):
    swag, run = published_run(tmp_path / "run")
    import_run(run, tmp_path / "out")
    base = swag.base.get_base_model()
    frozen = {k.replace(".base_layer", ""): v for k, v in base.state_dict().items() if "lora_" not in k}
    fresh = tiny_base()
    fresh.load_state_dict(
        {k.replace("original_module.", ""): v for k, v in frozen.items() if "modules_to_save" not in k}
    )
    batch = {"input_ids": torch.randint(20, (3, 7))}
    swag.eval()
    swag.sample(0.0)
    expected = swag(**batch).logits
    posterior = reload(tmp_path / "out", fresh)
    model = posterior.model.eval()
    torch.testing.assert_close(model(**batch).logits, expected)
    at_mean = SampledModel(model, posterior.draw(2, scale=0.0))(**batch).logits
    torch.testing.assert_close(at_mean, expected.expand(2, -1, -1), rtol=1e-5, atol=1e-6)
    sampled = SampledModel(model, posterior.draw(2, seed=1, scale=1.0))(**batch).logits
    for name, value in posterior.draw(1, seed=1, scale=1.0).items():
        swag.base.get_parameter(name).copy_(value[0])
    torch.testing.assert_close(sampled[0], swag(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("times, configured", [(6, 4), (3, 8)])
def test_draws_have_the_published_covariance(tmp_path, times, configured):
    swag, run = published_run(tmp_path / "run", times, configured)
    import_run(run, tmp_path / "out", max_num_models=configured)
    posterior = reload(tmp_path / "out")
    k = min(times, configured)
    mine = torch.cat(moments(posterior)[2], 1).double()
    its = torch.cat(swag.generate_mean_var_covar()[2], 1).double()
    torch.testing.assert_close(mine.T @ mine / (k - 1), its.T @ its / (configured - 1), rtol=1e-5, atol=1e-9)
    # The op divides by the columns held: one sample with the diagonal part taken out shows it.
    posterior.m2.zero_()
    posterior.var_clamp = 0.0
    draw = posterior.draw(4000, scale=1.0, method="iid").buffer - posterior.mean
    at = its.square().sum(0).topk(5).indices
    flat = torch.cat([draw[:, segment] for segment in posterior.layout.segments], 1)[:, at]
    variance = its.square().sum(0)[at] / (configured - 1)
    torch.testing.assert_close(flat.double().var(0), variance, rtol=0.1, atol=0)


def test_the_folder_is_what_save_pretrained_writes(tmp_path):
    _, run = published_run(tmp_path / "run")
    import_run(run, tmp_path / "out")
    posterior = reload(tmp_path / "out")
    posterior.save_pretrained(tmp_path / "again")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "again"))
    name = "swag_posterior.safetensors"
    with safe_open(tmp_path / "out" / name, "pt") as one, safe_open(tmp_path / "again" / name, "pt") as other:
        assert one.metadata() == other.metadata()
    for file in (name, "adapter_model.safetensors"):
        one, other = load_file(tmp_path / "out" / file), load_file(tmp_path / "again" / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    run_keys = load_file(run / "base_model" / "adapter_model.safetensors").keys()
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == run_keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_in_the_published_classes_own_order(tmp_path, dtype):
    """Written by the published formulas: moments are buffers beside their parameters, in the model's dtype."""
    model = tiny_peft().to(dtype)
    published = Published(model, RANK)
    model.base_model.model.bert.embeddings.LayerNorm.register_buffer("running_mean", torch.zeros(16))
    for _ in range(6):
        step(model)
        published.collect_model(model)
    run = save_run(tmp_path / "run", published, model)
    change(run, lambda state: state.update({"base.base_model.model.weight_format": "row"}))
    assert any(key.endswith("_sq_mean") for key in load_file(run / "base_model" / "adapter_model.safetensors"))
    found = import_run(run, tmp_path / "out")
    posterior = reload(tmp_path / "out", tiny_base().to(dtype))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(posterior.layout.names) == names and set(posterior.layout.dtypes) == {dtype}
    for name, value in posterior.mean_state_dict().items():
        path, _, leaf = name.rpartition(".")
        assert torch.equal(value, getattr(model.get_submodule(path), f"{leaf}_mean"))
    assert any("mostly rounding" in note for note in found["notes"]) == (dtype == torch.bfloat16)


def test_tensors_that_were_not_collected_keep_their_values(tmp_path):
    model = tiny_peft(rank=3)
    swag = SWAG(model, no_cov_mat=False, max_num_models=RANK, modules_to_swag="lora_only")
    train(swag, model)
    run = save_run(tmp_path / "run", swag, model)
    for name, parameter in model.named_parameters():
        if "lora_" not in name and parameter.requires_grad:
            parameter.data.add_(1)
    model.save_pretrained(run / "base_model")  # of another epoch: only its names count
    import_run(run, tmp_path / "out")
    state = torch.load(run / "swag_model.pt", weights_only=True)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    head = state["base.base_model.model.classifier.modules_to_save.default.weight"]
    assert torch.equal(saved["base_model.model.classifier.weight"], head)
    assert all("lora_" in name for name in reload(tmp_path / "out").layout.names)


def test_some_lora_tensors_may_be_frozen(tmp_path):
    model = tiny_peft()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    swag = SWAG(model, no_cov_mat=False, max_num_models=RANK)
    train(swag, model)
    import_run(save_run(tmp_path / "run", swag, model), tmp_path / "out")
    assert not any("lora_A" in name for name in reload(tmp_path / "out").layout.names)


def test_frozen_weights_beside_trained_biases_are_left_out(tmp_path):
    """The published class collects every parameter of a layer that has a trained one."""
    model = tiny_peft(bias="lora_only")
    swag = SWAG(model, no_cov_mat=False, max_num_models=RANK)
    train(swag, model)
    found = import_run(save_run(tmp_path / "run", swag, model), tmp_path / "out")
    names = reload(tmp_path / "out").layout.names
    assert not any(name.endswith("base_layer.weight") for name in names)
    assert sum(name.endswith("base_layer.bias") for name in names) == 4
    assert any("4 frozen base weights" in note for note in found["notes"])


def test_dora_s_magnitudes_come_along(tmp_path):
    torch.manual_seed(0)
    model = tiny_peft(use_dora=True)
    base = tiny_base()
    own = model.get_base_model().state_dict()
    frozen = {key.replace(".base_layer", "").replace("original_module.", ""): value for key, value in own.items()}
    base.load_state_dict({key: frozen[key] for key in base.state_dict()})
    swag = SWAG(model, no_cov_mat=False, max_num_models=RANK)
    train(swag, model)
    import_run(save_run(tmp_path / "run", swag, model), tmp_path / "out")
    posterior = reload(tmp_path / "out", base)
    assert sum("lora_magnitude_vector" in name for name in posterior.layout.names) == 4
    batch = {"input_ids": torch.randint(20, (3, 7))}
    swag.eval().sample(0.0)
    with torch.no_grad():
        torch.testing.assert_close(posterior.model.eval()(**batch).logits, swag(**batch).logits)


def test_an_older_adapter_file_and_another_adapter_name(tmp_path):
    model = tiny_peft(adapter="task")
    swag = SWAG(model, no_cov_mat=False, max_num_models=RANK)
    train(swag, model)
    run = save_run(tmp_path / "run", swag, model)
    for file in (run / "base_model" / "task").iterdir():
        file.rename(run / "base_model" / file.name)
    path = run / "base_model" / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    import_run(run, tmp_path / "out")
    posterior = reload(tmp_path / "out", adapter="task")
    assert int(posterior.count) == 6


class Call:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("where", ["swag_model.pt", "base_model/adapter_model.bin"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    _, run = published_run(tmp_path / "run")
    (run / "base_model" / "adapter_model.safetensors").unlink()
    torch.save({}, run / "base_model" / "adapter_model.bin")
    torch.save({"n_models": torch.ones(1), "evil": Call()}, run / where)
    with pytest.raises(ValueError, match=r"refused.*system.*Nothing in it was called.*state_dict"):
        import_run(run, tmp_path / "out")
    (run / where).write_bytes(pickle.dumps(Call()))
    with pytest.raises(ValueError, match=r"refused|damaged"):
        import_run(run, tmp_path / "out")
    torch.save(torch.nn.Linear(2, 2), run / where)
    with pytest.raises(ValueError, match=r"refused.*torch\.nn\.modules\.linear\.Linear"):
        import_run(run, tmp_path / "out")
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()


LORA = "base.base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight"
EDITS = {
    "n_models": (lambda s: s.pop("n_models"), "has no n_models"),
    "two n_models": (lambda s: s.update(n_models=torch.ones(2)), r"n_models has shape \[2\]"),
    "nothing collected": (lambda s: s["n_models"].zero_(), "no collected model"),
    "foreign key": (lambda s: s.update(optimizer=torch.ones(1)), "key 'optimizer'"),
    "no square": (lambda s: s.pop(f"{LORA}_sq_mean"), rf"no {LORA}_sq_mean"),
    "no mean": (lambda s: s.pop(f"{LORA}_mean"), rf"no {LORA}_mean"),
    "no parameter": (lambda s: s.pop(LORA), "and not that parameter itself"),
    "no columns": (lambda s: s.pop(f"{LORA}_cov_mat_sqrt"), "holds 0 deviations of .*query.lora_A"),
    "columns": (
        lambda s: s.update({f"{LORA}_cov_mat_sqrt": s[f"{LORA}_cov_mat_sqrt"][:, 1:]}),
        r"_cov_mat_sqrt is torch.float32 \[4, 31\] instead of .*\[4, 32\]",
    ),
    "mean": (lambda s: s.update({f"{LORA}_mean": torch.ones(3)}), r"_mean is torch.float32 \[3\] instead of"),
    "not finite": (lambda s: s[f"{LORA}_sq_mean"].fill_(float("nan")), f"{LORA}_sq_mean holds a NaN"),
    "too many": (lambda s: s["n_models"].fill_(3), "4 deviations after 3 collections"),
    "no moments": (lambda s: [s.pop(k) for k in list(s) if "_mean" in k or "_cov" in k], "has no moments"),
    "nested": (lambda s: s.update(state_dict=dict(s)), "not a flat state dict: 'state_dict'"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_state_that_does_not_fit_is_named(tmp_path, edit):
    _, run = published_run(tmp_path / "run")
    change(run, EDITS[edit][0])
    with pytest.raises(ValueError, match=EDITS[edit][1]):
        import_run(run, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_folders_that_do_not_fit_are_named(tmp_path):
    _, run = published_run(tmp_path / "run")
    out = tmp_path / "out"

    def refused(error, match, spoil):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(run, bad)
        spoil(bad)
        with pytest.raises(error, match=match):
            import_run(bad, out)

    refused(FileNotFoundError, "no folder", lambda bad: shutil.rmtree(bad))
    refused(FileNotFoundError, "no swag_model.pt", lambda bad: (bad / "swag_model.pt").unlink())
    refused(FileNotFoundError, "no folder .*base_model", lambda bad: shutil.rmtree(bad / "base_model"))
    refused(FileNotFoundError, "adapter_config.json", lambda bad: (bad / "base_model/adapter_config.json").unlink())
    refused(ValueError, "truncated", lambda bad: os.truncate(bad / "base_model/adapter_model.safetensors", 100))
    refused(FileNotFoundError, "neither", lambda bad: (bad / "base_model/adapter_model.safetensors").unlink())
    refused(ValueError, "damaged", lambda bad: (bad / "swag_model.pt").write_bytes(b"x" * 100))
    refused(
        ValueError,
        "damaged",
        lambda bad: (bad / "swag_model.pt").write_bytes((run / "swag_model.pt").read_bytes()[:-2000]),
    )

    def whole(bad):
        shutil.rmtree(bad / "base_model")
        tiny_base().save_pretrained(bad / "base_model")

    refused(ValueError, "whole model, not a PEFT adapter", whole)

    def other(bad, **config):
        shutil.rmtree(bad / "base_model")
        tiny_peft(**config).save_pretrained(bad / "base_model")

    refused(ValueError, r"has shape \[2, 16\].*\[5, 16\].*different runs", lambda bad: other(bad, rank=5))
    refused(
        ValueError,
        r"no parameter for .*key\.lora_A.*different runs",
        lambda bad: other(bad, target_modules=["query", "value", "key"]),
    )

    def everything(bad):
        model = tiny_peft()
        swag = SWAG(model, no_cov_mat=False, max_num_models=RANK, modules_to_swag="all")
        for _ in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1)
            swag.collect_model(model)
        torch.save(swag.state_dict(), bad / "swag_model.pt")

    refused(ValueError, "weight of the base model.*all", everything)
    with pytest.raises(ValueError, match="max_num_models is not 5.* 4 deviations after 6"):
        import_run(run, out, max_num_models=5)
    with pytest.raises(ValueError, match="max_num_models is not 3"):
        import_run(run, out, max_num_models=3)
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ValueError, match="out is not empty"):
        import_run(run, out)
    assert os.listdir(out) == ["mine"]


def test_a_decoders_head_of_answer_rows(tmp_path):
    """The published code trains multiple choice with the answers' rows of the output head alone."""
    from language_models import BUILD

    base = BUILD["llama"]()
    base.lm_head = torch.nn.Linear(12, 4, bias=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    swag = SWAG(model, no_cov_mat=False, max_num_models=RANK)
    train(swag, model)
    import_run(save_run(tmp_path / "run", swag, model), tmp_path / "out")
    fresh = BUILD["llama"]()
    fresh.lm_head = copy.deepcopy(base.lm_head.original_module)
    assert len(reload(tmp_path / "out", fresh).layout) == 5


def test_the_command(tmp_path, capsys):
    _, run = published_run(tmp_path / "run", times=3)
    parser = argparse.ArgumentParser()
    import_arguments(parser)
    run_import(parser.parse_args([str(run), str(tmp_path / "out")]))
    said = capsys.readouterr().err
    assert "3 collections, 3 deviations" in said and "note: " in said and "--max-num-models" in said
    run_import(parser.parse_args([str(run), str(tmp_path / "more"), "--max-num-models", "5"]))
    assert "--max-num-models" not in capsys.readouterr().err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
