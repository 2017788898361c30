"""Point estimates as members: order, values, and adapters read from folders as PEFT itself reads them."""

import json
import os

import pytest
import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from posterior_models import step, tiny_base, tiny_peft, trainable
from prediction_models import assert_same, fine_tune, texts

from swag_lora import Prediction, Predictor, SwagPosterior, predict
from swag_lora.ensemble import Ensemble
from swag_lora.mixture import Mixture


def members(count=4):
    torch.manual_seed(2)
    model = tiny_peft().eval()
    states = []
    for _ in range(count):
        step(model, 0.5)
        states.append(trainable(model))
    return model, states


def logits_of(model, states, batch):
    """One forward for each member with its weights set."""
    with torch.no_grad():
        return torch.stack([torch.func.functional_call(model, state, kwargs=batch).logits for state in states])


def test_prediction_is_the_average_of_the_members():
    model, states = members()
    before = trainable(model)
    ensemble, batch = Ensemble(model, states), texts()
    prediction = predict(model, ensemble, batch, 4, method="iid")
    assert_same(prediction, Prediction.from_logits(logits_of(model, states, batch)), exact=False)
    two = Predictor(model, ensemble, 2, first=1, method="iid", seed=9, scale=7.0, samples_per_pass=1)(batch)
    assert_same(two, Prediction.from_logits(logits_of(model, states[1:3], batch)), exact=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable(model).items())


def test_members_by_number():
    model, states = members()
    ensemble = Ensemble(model, [dict(reversed(state.items())) for state in states])
    assert len(ensemble) == 4 and list(ensemble.layout.names) == list(trainable(model))
    drawn = ensemble.draw(2, first=2)
    assert (drawn.first, drawn.method, drawn.seed) == (2, "given", None)
    for name in states[0]:
        assert torch.equal(drawn[name], torch.stack([states[2][name], states[3][name]]))
    states[0][name].add_(1)
    assert not torch.equal(ensemble.draw(1)[name][0], states[0][name]), "members are copies"


def test_dtype_is_the_model_s():
    model, states = members(2)
    assert Ensemble(model.to(torch.bfloat16), states).draw(1).dtype == torch.bfloat16


def test_means_of_posteriors():
    model, one = fine_tune()
    other = SwagPosterior(model, rank=2)
    for _ in range(3):
        step(model)
        other.collect()
    drawn = Ensemble.of_means([one, other]).draw(2)
    for row, posterior in enumerate((one, other)):
        for name, mean in posterior.mean_state_dict().items():
            assert torch.equal(drawn[name][row], mean)
    with pytest.raises(ValueError, match="at least one member"):
        Ensemble.of_means([])


def test_in_a_mixture():
    model, states = members()
    mixture = Mixture([Ensemble(model, states[:2]), Ensemble(model, states[2:])])
    name = next(iter(states[0]))
    assert torch.equal(mixture.draw(4, method="iid")[name], torch.stack([states[i][name] for i in (0, 2, 1, 3)]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home, paths = tmp_path_factory.mktemp("adapters"), []
    for seed in range(3):
        torch.manual_seed(seed)
        model = tiny_peft(adapter="mine" if seed == 2 else "default")
        step(model, 0.5)
        model.save_pretrained(str(home / str(seed)), save_embedding_layers=False)
        paths.append(home / str(seed) / ("mine" if seed == 2 else ""))
    return paths


@pytest.mark.parametrize("adapter", ["default", "another"])
def test_folders_as_peft_reads_them(folders, adapter):
    """Whatever the adapter is called here and was called there."""
    torch.manual_seed(7)
    model = PeftModel.from_pretrained(tiny_base(), folders[0], adapter_name=adapter).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ensemble = Ensemble.from_folders(model, folders)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert any(f"modules_to_save.{adapter}" in name for name in ensemble.layout.names)
    for index, folder in enumerate(folders):
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter)
        with torch.no_grad():
            expected = model(**texts()).logits
        one = predict(model, ensemble, texts(), 1, first=index)
        torch.testing.assert_close(one.log_probs, expected.log_softmax(-1))
        for name, tensor in model.named_parameters():
            if name in ensemble.layout.names:
                assert torch.equal(ensemble.draw(1, first=index)[name][0], tensor)


def damaged(folder, target, edit):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    edit(target)
    return target


def test_folders_that_do_not_fit(folders, tmp_path):
    model = PeftModel.from_pretrained(tiny_base(), folders[0])

    def other_alpha(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))

    with pytest.raises(ValueError, match="alpha has lora_alpha=99, the model lora_alpha=8"):
        Ensemble.from_folders(model, [folders[0], damaged(folders[1], tmp_path / "alpha", other_alpha)])
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        target = tmp_path / file.replace(".", "")
        with pytest.raises(FileNotFoundError, match=f"has no {file}"):
            Ensemble.from_folders(
                model, [damaged(folders[1], target, lambda folder, file=file: (folder / file).unlink())]
            )
    with pytest.raises(ValueError, match="truncated"):
        cut = damaged(
            folders[1], tmp_path / "cut", lambda folder: os.truncate(folder / "adapter_model.safetensors", 99)
        )
        Ensemble.from_folders(model, [cut])
    with pytest.raises(ValueError, match=r"the model's adapter has .*0.attention.self.key.lora_A.weight, .* has not"):
        Ensemble.from_folders(tiny_peft(target_modules=["query", "value", "key"]), [folders[0]])
    several = tiny_peft(modules_to_save=None)
    several.add_adapter("second", several.peft_config["default"])
    several.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="activate one adapter"):
        Ensemble.from_folders(several, folders)


def test_refusals():
    model, states = members(3)
    ensemble, name = Ensemble(model, states), next(iter(states[0]))
    with pytest.raises(ValueError, match="3 members; 2 from number 2 on were asked for"):
        ensemble.draw(2, first=2)
    with pytest.raises(ValueError, match="method must be 'iid', got 'antithetic'"):
        predict(model, ensemble, texts(), 2)
    for arguments in ({"num_samples": 0}, {"num_samples": 1, "first": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            ensemble.draw(**arguments)
    with pytest.raises(ValueError, match="at least one member"):
        Ensemble(model, [])
    with pytest.raises(ValueError, match="at least one member with at least one tensor"):
        Ensemble(model, [{}])
    with pytest.raises(ValueError, match=f"member 1 does not fit member 0: {name} .* is missing"):
        Ensemble(model, [states[0], {k: v for k, v in states[1].items() if k != name}])
    with pytest.raises(ValueError, match=f"member 1 does not fit member 0: {name} has shape"):
        Ensemble(model, [states[0], {**states[1], name: torch.zeros(2, 2)}])
    with pytest.raises(
        ValueError, match="member 0 does not fit the model's parameters: nothing.here .* is not expected"
    ):
        Ensemble(model, [{**states[0], "nothing.here": torch.zeros(1)}])
    with pytest.raises(ValueError, match="member 0 does not fit the model's parameters: nothing.here"):
        Ensemble(model, [{"nothing.here": torch.zeros(1)}])
