import argparse
import copy
import json
import os

import pytest
import torch
import transformers as hf
from encoder_models import PROMPT_WORDS, save_tokenizer
from language_models import BUILD
from peft import LoraConfig, PeftModel, get_peft_model
from posterior_models import step, tiny_base, tiny_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES

from swag_lora import SampledModel, SwagPosterior
from swag_lora.adapter_folder import AdapterFolder, load_posterior
from swag_lora.data import Dataset
from swag_lora.examples import Example
from swag_lora.export import MANIFEST_NAME, export_samples, vllm
from swag_lora.tasks import Task
from swag_lora.transfer_cli import export_arguments, run_export

pytestmark = pytest.mark.filterwarnings("ignore:vLLM does not serve", "ignore::peft.utils.warning.PeftWarning")
NAMES = [f"seed-3-sample-{k}" for k in range(4)]


def collected(model, rank=4, times=6, **options):
    posterior = SwagPosterior(model, rank=rank, **options)
    for _ in range(times):
        step(model)
        posterior.collect()
    return posterior.model.eval() and posterior


def saved_base(tmp_path, base):
    base.save_pretrained(tmp_path / "base")
    return type(base).from_pretrained(tmp_path / "base").eval()


def decoder(tmp_path, build=BUILD["llama"], **options):
    """A posterior of LoRA tensors alone, in a folder, with a batch."""
    base = saved_base(tmp_path, build())
    config = {"task_type": "CAUSAL_LM", "r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    posterior = collected(get_peft_model(base, LoraConfig(**config)))
    posterior.save_pretrained(tmp_path / "posterior")
    return posterior, {"input_ids": torch.randint(3, 50, (2, 6))}


def tied_llama():
    base = BUILD["llama"]()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    return base


def letters(tmp_path, train_head=False, targets=("q_proj", "v_proj")):
    """A posterior of a task whose model has the rows of five letters for a head, in a folder, and the task."""
    base = saved_base(tmp_path, BUILD["llama"]())
    save_tokenizer(tmp_path / "base", {"unk_token": "[UNK]", "pad_token": "[PAD]"}, PROMPT_WORDS)
    data = Dataset("questions", {"train": [Example("which is red ?", 1, ("sky", "sea"))]}, None)
    task = Task.of(tmp_path / "base", data, 64, 0, train_head=train_head)
    posterior = collected(task.peft_model(task.tokenizer(), LoraConfig(r=2, target_modules=list(targets))))
    posterior.save_pretrained(tmp_path / "posterior")
    task.save(tmp_path / "posterior")
    assert base.config.vocab_size > len(posterior.model.get_base_model().get_output_embeddings().weight) == 5
    return posterior, task


def classifier(tmp_path):
    """A posterior of LoRA tensors and a trained head."""
    torch.manual_seed(0)
    base = saved_base(tmp_path, tiny_base())
    config = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    posterior = collected(get_peft_model(base, config))
    posterior.save_pretrained(tmp_path / "posterior")
    return posterior, {"input_ids": torch.randint(3, 20, (3, 7))}


def fresh(kind, tmp_path, **options):
    return kind.from_pretrained(tmp_path / "base", **options).eval()


def loaded(base, out, names):
    model = PeftModel.from_pretrained(base, out / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(out / name, name)
    return model.eval()


@torch.no_grad()
def logits_at(posterior, sample, batch):
    """The model's with that sample in its parameters, for layers that `SampledModel` does not run."""
    model = copy.deepcopy(posterior.model)
    own = dict(model.named_parameters())
    for name, value in sample.items():
        own[name].copy_(value)
    return model(**batch).logits


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def plain_key(name):
    return name.replace(".default", "").replace(".modules_to_save", "")


@torch.no_grad()
def test_a_mixed_batch_of_exported_adapters_has_the_sampled_models_numbers(tmp_path):
    posterior, batch = decoder(tmp_path)
    manifest = export_samples(tmp_path / "posterior", tmp_path / "out", 4, seed=3)
    weights = posterior.draw(4, seed=3)
    expected = SampledModel(posterior.model, weights)(**batch).logits
    model = loaded(fresh(hf.LlamaForCausalLM, tmp_path), tmp_path / "out", NAMES)
    for s, name in enumerate(NAMES):
        held = dict(model.named_parameters())
        for parameter, drawn in weights.items():
            assert torch.equal(held[parameter.replace(".default.", f".{name}.")], drawn[s])
    rows = batch["input_ids"].repeat(4, 1)
    mixed = model(input_ids=rows, adapter_names=[name for name in NAMES for _ in range(2)]).logits
    torch.testing.assert_close(mixed.view_as(expected), expected, rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    assert [entry["name"] for entry in manifest["adapters"]] == NAMES and manifest["vllm"]["problems"] == []


@torch.no_grad()
def test_a_trained_head_comes_along(tmp_path):
    posterior, batch = classifier(tmp_path)
    with pytest.warns(UserWarning, match="no modules that were trained whole .*classifier"):
        export_samples(posterior, tmp_path / "out", 4, seed=3, model=tmp_path / "base")
    weights = posterior.draw(4, seed=3)
    expected = SampledModel(posterior.model, weights)(**batch).logits
    model = loaded(fresh(hf.BertForSequenceClassification, tmp_path, num_labels=3), tmp_path / "out", NAMES)
    rows = batch["input_ids"].repeat(4, 1)
    mixed = model(input_ids=rows, adapter_names=[name for name in NAMES for _ in range(3)]).logits
    torch.testing.assert_close(mixed.view_as(expected), expected, rtol=1e-5, atol=1e-5)
    for s, name in enumerate(NAMES):
        model.set_adapter(name)
        torch.testing.assert_close(model(**batch).logits, expected[s], rtol=1e-5, atol=1e-5)
        held = tensors(tmp_path / "out" / name)
        assert held.keys() == tensors(tmp_path / "posterior").keys()
        assert all(torch.equal(held[plain_key(key)], drawn[s]) for key, drawn in weights.items())


@torch.no_grad()
def test_a_head_of_several_layers_needs_set_adapter(tmp_path):
    base = FAMILIES["roberta"].build()
    untouched = copy.deepcopy(base)
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    posterior = collected(get_peft_model(base, config))
    export_samples(posterior, tmp_path / "out", 2, seed=3, model="base")
    batch = FAMILIES["roberta"].batch(3, "right")
    expected = SampledModel(posterior.model, posterior.draw(2, seed=3))(**batch).logits
    model = loaded(untouched, tmp_path / "out", NAMES[:2])
    for name, logits in zip(NAMES[:2], expected, strict=True):
        model.set_adapter(name)
        torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="Mixed batching"):
        model(**batch, adapter_names=[NAMES[0], NAMES[1], NAMES[0]])


@pytest.mark.parametrize("family", ["roberta", "gpt2"])
def test_names_are_peft_s(tmp_path, family):
    model = FAMILIES[family].lora(bias="lora_only", lora_bias=family == "roberta")
    posterior = collected(model)
    posterior.save_pretrained(tmp_path / "posterior")
    keys = AdapterFolder.load(tmp_path / "posterior").keys(posterior.layout)
    assert sorted(key for tied in keys.values() for key in tied) == sorted(tensors(tmp_path / "posterior"))
    export_samples(posterior, tmp_path / "out", 1, model="base", scale=0.7)
    weights = posterior.draw(1, scale=0.7)
    base = FAMILIES[family].build()
    reloaded = PeftModel.from_pretrained(base, tmp_path / "out" / "seed-0-sample-0")
    held = dict(reloaded.named_parameters())
    assert all(torch.equal(held[name], drawn[0]) for name, drawn in weights.items())


def test_the_files_are_what_vllm_reads(tmp_path):
    decoder(tmp_path, use_rslora=True)
    manifest = export_samples(tmp_path / "posterior", tmp_path / "out", 1, dtype=torch.bfloat16)
    folder = tmp_path / "out" / "seed-0-sample-0"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules", "base_model_name_or_path"} <= config.keys()
    assert (config["peft_type"], config["bias"], config["use_dora"], config["use_rslora"]) == (
        "LORA",
        "none",
        False,
        True,
    )
    assert config["modules_to_save"] is None and config["inference_mode"] is True
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    for key, tensor in tensors(folder).items():
        module = key.rpartition(".lora_")[0].split(".")
        assert key.startswith("base_model.model.model.layers.") and module[-1] in config["target_modules"]
        assert key.endswith((".lora_A.weight", ".lora_B.weight")) and 3 in tensor.shape
        assert tensor.dtype == torch.bfloat16
    assert manifest["vllm"] == {"max_lora_rank": 8, "problems": []}
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    "option, word",
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True}, "DoRA"),
        ({"rank_pattern": {"q_proj": 64}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 64}}, "alpha_pattern"),
        *[
            ({"init_lora_weights": init}, f"'{init}' changed")
            for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
        ],
        ({"kasa_config": {"beta": 0.1}}, "kasa_config changed"),
        ({"r": 1024}, "1024"),
    ],
)
def test_what_vllm_does_not_serve_is_said(option, word):
    found = vllm({"r": 16, "lora_alpha": 32, "bias": "none", **option})
    assert len(found["problems"]) == 1 and word in found["problems"][0]
    assert found["max_lora_rank"] == {"rank_pattern": 64, "r": None}.get(next(iter(option)), 16)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_other_ways_to_begin_leave_the_base_as_it_is(init):
    assert vllm({"r": 16, "lora_alpha": 32, "bias": "none", "init_lora_weights": init})["problems"] == []


def test_sample_k_is_the_same_whatever_else_is_exported(tmp_path):
    posterior, _ = decoder(tmp_path)
    for method in ("iid", "antithetic+orthogonal"):
        export_samples(tmp_path / "posterior", tmp_path / "many", 4, seed=3, method=method)
        manifest = export_samples(tmp_path / "posterior", tmp_path / "one", 1, seed=3, first=2, method=method)
        one, many = tensors(tmp_path / "one" / NAMES[2]), tensors(tmp_path / "many" / NAMES[2])
        drawn = posterior.draw(4, seed=3, method=method)
        assert all(torch.equal(one[plain_key(name)], value[2]) for name, value in drawn.items())
        assert all(torch.equal(one[key], many[key]) for key in one)
        assert manifest["samples"] == {"number": 1, "seed": 3, "first": 2, "scale": 0.5, "method": method}


def test_the_manifest_names_everything(tmp_path):
    posterior, _ = decoder(tmp_path)
    manifest = export_samples(tmp_path / "posterior", tmp_path / "out", 2, mean=True)
    assert json.loads((tmp_path / "out" / MANIFEST_NAME).read_text()) == manifest
    assert sorted(os.listdir(tmp_path / "out")) == [MANIFEST_NAME, "mean", "seed-0-sample-0", "seed-0-sample-1"]
    assert manifest["adapters"][2] == {"name": "mean", "folder": "mean", "mean": True}
    assert manifest["posterior"]["collections"] == 6 and manifest["posterior"]["deviations"] == 4
    assert manifest["posterior"]["weights"] == posterior.layout.numel and len(manifest["posterior"]["sha256"]) == 64
    assert "softmax" in manifest["average"] and manifest["versions"]["torch"] == torch.__version__
    mean, saved = tensors(tmp_path / "out" / "mean"), tensors(tmp_path / "posterior")
    assert all(torch.equal(mean[key], saved[key]) for key in saved)
    alone = export_samples(tmp_path / "posterior", tmp_path / "alone", 0, mean=True)
    assert [entry["name"] for entry in alone["adapters"]] == ["mean"]


def test_tensors_that_are_not_random_are_the_adapters_own(tmp_path):
    model = tiny_peft(rank=4, adapter="task")
    posterior = collected(model, params="lora")
    posterior.save_pretrained(tmp_path / "posterior")
    export_samples(tmp_path / "posterior", tmp_path / "out", 1, model="somewhere/base")
    own, out = tensors(tmp_path / "posterior"), tensors(tmp_path / "out" / "seed-0-sample-0")
    same = {key for key in own if torch.equal(own[key], out[key])}
    assert same == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    config = json.loads((tmp_path / "out" / "seed-0-sample-0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere/base"


def test_a_tied_parameter_is_written_under_all_its_names(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    posterior = collected(get_peft_model(tied_llama(), config))
    export_samples(posterior, tmp_path / "out", 1, model="base")
    out = tensors(tmp_path / "out" / "seed-0-sample-0")
    [name] = (name for name in posterior.layout.names if "embed_tokens" in name)
    drawn = posterior.draw(1)[name][0]
    assert torch.equal(out["base_model.model.model.embed_tokens.weight"], drawn)
    assert torch.equal(out["base_model.model.lm_head.weight"], drawn)


def test_an_adapter_of_another_time_is_reported(tmp_path):
    decoder(tmp_path)
    path = tmp_path / "posterior" / "adapter_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.warns(RuntimeWarning, match="is not the adapter"):
        export_samples(tmp_path / "posterior", tmp_path / "out", 1)


@torch.no_grad()
def test_merged_models_are_loaded_by_transformers_alone(tmp_path):
    posterior, batch = classifier(tmp_path)
    expected = SampledModel(posterior.model, posterior.draw(4, seed=3))(**batch).logits
    posterior.load_mean()
    before = {name: p.clone() for name, p in posterior.model.named_parameters()}
    at_mean = posterior.model(**batch).logits
    for source in (tmp_path / "posterior", posterior):
        manifest = export_samples(source, tmp_path / "out", 2, seed=3, mean=True, merge=True, model=tmp_path / "base")
        assert manifest["merged"] and manifest["vllm"] is None
        for name, logits in (*zip(NAMES[:2], expected, strict=False), ("mean", at_mean)):
            model, report = hf.AutoModelForSequenceClassification.from_pretrained(
                tmp_path / "out" / name, output_loading_info=True
            )
            assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            torch.testing.assert_close(model.eval()(**batch).logits, logits, rtol=1e-5, atol=1e-5)
    export_samples(posterior, tmp_path / "one", 1, merge=True, model=tmp_path / "base")
    now = dict(posterior.model.named_parameters())
    assert now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())
    export_samples(posterior, tmp_path / "half", 1, merge=True, dtype=torch.bfloat16, model=tmp_path / "base")
    half = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "half" / "seed-0-sample-0", dtype="auto")
    assert half.dtype == torch.bfloat16 and next(posterior.model.parameters()).dtype == torch.float32


@torch.no_grad()
def test_a_model_that_answers_with_letters_gets_its_whole_head_back(tmp_path):
    posterior, batch = decoder(tmp_path)
    task = Task(str(tmp_path / "base"), None, kind="letters", template="{question} {choices}", letters=4)
    task.save(tmp_path / "posterior")
    export_samples(tmp_path / "posterior", tmp_path / "out", 1, merge=True)
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "seed-0-sample-0").eval()
    expected = SampledModel(posterior.model, posterior.draw(1))(**batch).logits[0]
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_posterior_that_answers_with_letters_is_merged_from_its_folder_alone(tmp_path):
    posterior, _ = letters(tmp_path)
    assert export_samples(posterior, tmp_path / "adapters", 1)["vllm"]["problems"] == []
    with pytest.raises(ValueError, match=r"letters alone.*swag-lora export FOLDER --merge"):
        export_samples(posterior, tmp_path / "out", 1, merge=True)
    export_samples(tmp_path / "posterior", tmp_path / "out", 1, merge=True)
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "seed-0-sample-0")
    assert len(merged.lm_head.weight) == merged.config.vocab_size


@torch.no_grad()
@pytest.mark.parametrize("train_head, targets", [(True, ["q_proj"]), (False, ["q_proj", "lm_head"])])
def test_a_changed_head_of_letters_is_named(tmp_path, train_head, targets):
    posterior, task = letters(tmp_path, train_head, targets)
    for source in (tmp_path / "posterior", posterior):
        with pytest.warns(UserWarning, match="does not serve") as caught:
            manifest = export_samples(source, tmp_path / "out", 1)
        [warning] = [str(w.message) for w in caught if "does not serve" in str(w.message)]
        [problem] = manifest["vllm"]["problems"]
        assert warning.endswith(problem) and "letters' rows alone" in problem and "lm_head" in problem
        assert "only through swag_lora" in problem and "--merge" not in warning
    with pytest.raises(ValueError, match=r"lm_head\S* belongs to a head with rows for the answers' letters") as caught:
        export_samples(tmp_path / "posterior", tmp_path / "more", 1, merge=True)
    assert "export adapters" not in str(caught.value) and "without --train-head" in str(caught.value)
    with pytest.raises(ValueError, match="letters alone"):
        export_samples(posterior, tmp_path / "more", 1, merge=True)
    sample = tmp_path / "out" / "seed-0-sample-0"
    base, _ = task.base_model(task.tokenizer())
    batch = {"input_ids": torch.randint(3, 20, (2, 6))}
    expected = SampledModel(posterior.model, posterior.draw(1))(**batch).logits[0]
    through = PeftModel.from_pretrained(base, sample).eval()(**batch).logits
    torch.testing.assert_close(through, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(fresh(hf.LlamaForCausalLM, tmp_path), sample)


@torch.no_grad()
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_lora_on_tied_weights_is_not_merged(tmp_path, target):
    posterior, batch = decoder(tmp_path, tied_llama, target_modules=["q_proj", target])
    for source in (tmp_path / "posterior", posterior):
        with pytest.raises(ValueError, match=rf"{target}, which has LoRA, is tied to .*export adapters instead"):
            export_samples(source, tmp_path / "out", 1, merge=True)
    export_samples(tmp_path / "posterior", tmp_path / "out", 1, seed=3)
    model = loaded(fresh(hf.LlamaForCausalLM, tmp_path), tmp_path / "out", NAMES[:1])
    expected = logits_at(posterior, posterior.draw(1, seed=3).sample(0), batch)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_lora_on_a_head_that_is_not_tied_is_merged(tmp_path):
    posterior, batch = decoder(tmp_path, target_modules=["q_proj", "lm_head", "embed_tokens"])
    export_samples(tmp_path / "posterior", tmp_path / "out", 1, merge=True)
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "seed-0-sample-0").eval()
    expected = logits_at(posterior, posterior.draw(1).sample(0), batch)
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("init, repeats", [("pissa", True), ("olora", True), ("pissa_niter_2", False)])
def test_an_adapter_that_changed_the_base_is_written_as_whole_models_alone(tmp_path, init, repeats):
    posterior, batch = decoder(tmp_path, init_lora_weights=init)
    where = "" if repeats else " in the program that trained it"
    for source in (tmp_path / "posterior", posterior):
        with pytest.raises(
            ValueError, match=rf"{init}.*changed the weights of the base.*--merge \(merge=True\){where}$"
        ):
            export_samples(source, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()
    expected = SampledModel(posterior.model, posterior.draw(1))(**batch).logits[0]
    for source in (tmp_path / "posterior", posterior):
        if source != posterior and not repeats:
            with pytest.raises(ValueError, match=f"{init}.*PEFT does not repeat.*in the program that trained it"):
                export_samples(source, tmp_path / "out", 1, merge=True)
            continue
        export_samples(source, tmp_path / "out", 1, merge=True, model=tmp_path / "base")
        merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "seed-0-sample-0").eval()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_biases_of_lora_layers_are_merged_where_there_is_a_bias(tmp_path):
    posterior, _ = decoder(tmp_path, lora_bias=True)
    with pytest.warns(UserWarning, match=r"\(lora_bias\); --merge writes whole models where .* biases of their own$"):
        export_samples(posterior, tmp_path / "out", 1)
    for source in (tmp_path / "posterior", posterior):
        with pytest.raises(ValueError, match=r"q_proj has a bias \(lora_bias\).*none.*export adapters instead"):
            export_samples(source, tmp_path / "out", 1, merge=True)
    model = FAMILIES["roberta"].lora(lora_bias=True)
    posterior, batch = collected(model), FAMILIES["roberta"].batch(3, "right")
    export_samples(posterior, tmp_path / "out", 1, merge=True, model="base")
    merged = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "seed-0-sample-0").eval()
    expected = SampledModel(posterior.model, posterior.draw(1))(**batch).logits[0]
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("source", ["folder", "posterior"])
def test_dora_comes_along(tmp_path, source):
    posterior, batch = decoder(tmp_path, use_dora=True)
    with pytest.warns(UserWarning, match="it has no DoRA; --merge"):
        export_samples(tmp_path / "posterior" if source == "folder" else posterior, tmp_path / "out", 2, seed=3)
    weights = posterior.draw(2, seed=3)
    model = loaded(fresh(hf.LlamaForCausalLM, tmp_path), tmp_path / "out", NAMES[:2])
    held = dict(model.named_parameters())
    assert sum("lora_magnitude_vector" in name for name in weights) == 6
    for k, name in enumerate(NAMES[:2]):
        for parameter, value in weights.sample(k).items():
            assert torch.equal(held[parameter.replace(".default.", f".{name}.")], value)
        model.set_adapter(name)
        expected = logits_at(posterior, weights.sample(k), batch)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_random_base_weights_need_whole_models(tmp_path):
    base = saved_base(tmp_path, BUILD["llama"]())
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    model.get_parameter("base_model.model.model.norm.weight").requires_grad_()
    posterior = collected(model)
    posterior.save_pretrained(tmp_path / "posterior")
    for source in (posterior, tmp_path / "posterior"):
        with pytest.raises(ValueError, match=r"model\.norm\.weight is random.*--merge"):
            export_samples(source, tmp_path / "out", 1, model=tmp_path / "base")
    assert not (tmp_path / "out").exists()
    batch = {"input_ids": torch.randint(3, 50, (2, 6))}
    with torch.no_grad():
        expected = SampledModel(model, posterior.draw(1))(**batch).logits[0]
        export_samples(tmp_path / "posterior", tmp_path / "out", 1, merge=True)
        merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "seed-0-sample-0").eval()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_quantised_base_is_not_merged(tmp_path):
    posterior, _ = decoder(tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantised.*export adapters.*--model"):
        export_samples(tmp_path / "posterior", tmp_path / "out", 1, merge=True)
    layer = next(m for m in posterior.model.modules() if hasattr(m, "base_layer")).base_layer
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is quantised"):
        export_samples(posterior, tmp_path / "out", 1, merge=True, model="base")
    export_samples(tmp_path / "posterior", tmp_path / "out", 1)


def test_a_base_of_another_size_is_not_merged(tmp_path):
    decoder(tmp_path)
    config = BUILD["llama"]().config
    config.hidden_size *= 2
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match="does not fit .*wider"):
        export_samples(tmp_path / "posterior", tmp_path / "out", 1, merge=True, model=tmp_path / "wider")


def test_only_its_own_export_is_replaced(tmp_path):
    decoder(tmp_path)
    out = tmp_path / "out"
    export_samples(tmp_path / "posterior", out, 2)
    export_samples(tmp_path / "posterior", out, 1, seed=1)
    assert sorted(os.listdir(out)) == [MANIFEST_NAME, "seed-1-sample-0"]
    (out / "seed-1-sample-0" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out holds seed-1-sample-0/notes\.txt"):
        export_samples(tmp_path / "posterior", out, 1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"other holds thesis\.tex"):
        export_samples(tmp_path / "posterior", other, 1)
    assert (other / "thesis.tex").exists() and (out / "seed-1-sample-0" / "notes.txt").exists()
    with pytest.raises(ValueError, match="is a file"):
        export_samples(tmp_path / "posterior", other / "thesis.tex", 1)


def test_what_is_added_while_it_works_is_not_lost(tmp_path, monkeypatch):
    decoder(tmp_path)
    export_samples(tmp_path / "posterior", tmp_path / "out", 1)
    write = AdapterFolder.write

    def write_and_add(*arguments):
        (tmp_path / "out" / "notes.txt").write_text("mine")
        write(*arguments)

    monkeypatch.setattr(AdapterFolder, "write", write_and_add)
    with pytest.raises(ValueError, match=r"out holds notes\.txt"):
        export_samples(tmp_path / "posterior", tmp_path / "out", 1, seed=1)
    assert sorted(os.listdir(tmp_path / "out")) == [MANIFEST_NAME, "notes.txt", "seed-0-sample-0"]
    assert sorted(os.listdir(tmp_path)) == ["base", "out", "posterior"]


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    decoder(tmp_path)
    export_samples(tmp_path / "posterior", tmp_path / "out", 1)
    before = tensors(tmp_path / "out" / "seed-0-sample-0")

    def fail(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr("swag_lora.adapter_folder.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        export_samples(tmp_path / "posterior", tmp_path / "out", 1, seed=1)
    after = tensors(tmp_path / "out" / "seed-0-sample-0")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert sorted(os.listdir(tmp_path)) == ["base", "out", "posterior"]


def test_bad_input(tmp_path):
    posterior, _ = decoder(tmp_path)
    folder, out = tmp_path / "posterior", tmp_path / "out"
    with pytest.raises(ValueError, match="nothing to export"):
        export_samples(folder, out, 0)
    with pytest.raises(ValueError, match="scale"):
        export_samples(folder, out, 1, scale=-1.0)
    with pytest.raises(ValueError, match="method"):
        export_samples(folder, out, 1, method="mirror")
    with pytest.raises(FileNotFoundError, match="no folder"):
        export_samples(tmp_path / "nowhere", out, 1)
    with pytest.raises(FileNotFoundError, match=r"no posterior in .*swag_posterior"):
        export_samples(tmp_path / "base", out, 1)
    with pytest.raises(ValueError, match="only posteriors of PEFT models"):
        export_samples(collected(torch.nn.Linear(2, 2)), out, 1)
    nameless = collected(tiny_peft())
    with pytest.raises(ValueError, match=r"which base model.*--model"):
        export_samples(nameless, out, 1)
    collected(torch.nn.Linear(2, 2)).save_pretrained(tmp_path / "plain")
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        export_samples(tmp_path / "plain", out, 1)
    other = tmp_path / "other"
    larger = LoraConfig(r=5, target_modules=["q_proj", "v_proj", "down_proj"])
    collected(get_peft_model(BUILD["llama"](), larger)).save_pretrained(other)
    os.replace(other / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=r"shape \[5, 12\].*not of one model"):
        export_samples(folder, out, 1)
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="truncated"):
        export_samples(folder, out, 1)
    assert not out.exists() and posterior.rank == 4


def test_a_posterior_without_its_model_draws_the_same(tmp_path):
    posterior, _ = decoder(tmp_path)
    offline = load_posterior(tmp_path / "posterior")
    assert torch.equal(offline.draw(3, seed=1).buffer, posterior.draw(3, seed=1).buffer)
    model = tiny_peft(adapter="task").to(torch.bfloat16)
    posterior = collected(model)
    posterior.save_pretrained(tmp_path / "bf16")
    offline = load_posterior(tmp_path / "bf16")
    assert torch.equal(offline.draw(2).buffer, posterior.draw(2).buffer) and offline.draw(1).dtype == torch.bfloat16


def test_the_command(tmp_path, capsys):
    posterior, _ = classifier(tmp_path)
    Task(str(tmp_path / "base"), ("a", "b", "c"), scale=2.0, rank=3).save(tmp_path / "posterior")
    parser = argparse.ArgumentParser()
    export_arguments(parser)
    options = ["--num-samples", "1", "--first", "3", "--seed", "5", "--dtype", "float16", "--method", "iid"]
    run_export(parser.parse_args([str(tmp_path / "posterior"), "--output", str(tmp_path / "out"), *options]))
    said = capsys.readouterr().err
    assert "1 adapter of" in said and "seed-5-sample-3" in said and said.count("warning: vLLM does not serve") == 1
    out = tensors(tmp_path / "out" / "seed-5-sample-3")
    posterior = posterior.truncated(3)  # as the task says
    drawn = posterior.draw(1, seed=5, first=3, scale=2.0, method="iid", dtype=torch.float16)
    assert all(torch.equal(out[plain_key(name)], value[0]) for name, value in drawn.items())
    run_export(
        parser.parse_args([str(tmp_path / "posterior"), "--output", str(tmp_path / "merged"), *options, "--merge"])
    )
    name = next(name for name in drawn.layout.names if "classifier.modules_to_save" in name and name.endswith("weight"))
    head = load_file(tmp_path / "merged" / "seed-5-sample-3" / "model.safetensors")["classifier.weight"]
    assert torch.equal(head, drawn[name][0])
