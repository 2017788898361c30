"""MultiSWAG: which member a sample comes from, and that the mixture is a posterior like any other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from posterior_models import step, tiny_base, tiny_peft
from prediction_models import assert_same, fine_tune, texts

from swag_lora import Prediction, SampledModel, SwagPosterior, predict
from swag_lora.mixture import Mixture, member_seed

METHODS = ["iid", "antithetic", "antithetic+orthogonal"]


def posteriors(members=3, rank=4):
    """Posteriors at different places, tied to one model."""
    torch.manual_seed(5)
    model = tiny_peft().eval()
    found = []
    for _ in range(members):
        step(model, 0.5)
        posterior = SwagPosterior(model, rank=rank)
        for _ in range(6):
            step(model)
            posterior.collect()
        found.append(posterior)
    return model, found


MODEL, MEMBERS = posteriors()


@pytest.mark.parametrize("method", METHODS)
def test_which_member_draws_which_sample(method):
    drawn = Mixture(MEMBERS).draw(14, seed=7, method=method)
    assert (drawn.seed, drawn.first, drawn.method, drawn.num_samples) == (7, 0, method, 14)
    for k in range(14):
        if method == "iid":
            member, sample = k % 3, k // 3
        else:
            pair, half = k // 2, k % 2
            member, sample = pair % 3, 2 * (pair // 3) + half
        alone = MEMBERS[member].draw(1, seed=member_seed(7, member), first=sample, method=method)
        assert torch.equal(drawn.buffer[k], alone.buffer[0]), k


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, 40), number=st.integers(1, 9), members=st.integers(1, 3), seed=st.integers(0, 2**64 - 1))
def test_sample_k_does_not_depend_on_what_else_is_drawn(method, first, number, members, seed):
    mixture = Mixture(MEMBERS[:members])
    several = mixture.draw(number, seed, first, method=method).buffer
    for row in {0, number // 2, number - 1}:
        assert torch.equal(several[row], mixture.draw(1, seed, first + row, method=method).buffer[0])


def test_one_member_is_that_posterior():
    for method in METHODS:
        alone = MEMBERS[0].draw(7, seed=2**63 + 5, first=3, scale=2.0, method=method)
        assert torch.equal(Mixture(MEMBERS[:1]).draw(7, 2**63 + 5, 3, 2.0, method).buffer, alone.buffer)


def test_pairs_mirror_about_their_member_s_mean():
    buffer = Mixture(MEMBERS).draw(12, method="antithetic").buffer
    for pair, (plus, minus) in enumerate(buffer.unflatten(0, (-1, 2))):
        torch.testing.assert_close((plus + minus) / 2, MEMBERS[pair % 3].mean)


def test_a_member_s_pairs_keep_their_orthogonality():
    """Their low-rank parts are orthogonal in the coordinates z, which pairs that skip would not be."""
    members = Mixture([posterior for posterior in MEMBERS[:2]])
    own = MEMBERS[1].draw(8, seed=member_seed(0, 1), method="antithetic+orthogonal").buffer
    rows = [2 * (2 * j + 1) + half for j in range(4) for half in (0, 1)]
    assert torch.equal(members.draw(16, method="antithetic+orthogonal").buffer[rows], own)


def test_members_share_no_random_numbers():
    """The same posterior twice is drawn from twice, and neighbouring seeds do not meet."""
    twice = Mixture([MEMBERS[0], MEMBERS[0]])
    rows = torch.cat([twice.draw(4, seed, method="iid").buffer for seed in (0, 1, 2)])
    assert len(rows.unique(dim=0)) == 12
    seeds = {member_seed(seed, member) for seed in range(50) for member in range(20)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**64 for seed in seeds)
    assert member_seed(11, 0) == 11 and member_seed(0, 1) == member_seed(0, 1) != member_seed(0, 2)
    # Philox4x32-10 at counter (1, 0, 0, 4) under key 0: the name of a sample must not change between versions.
    assert member_seed(0, 1) == 14976865104319805569


def test_each_member_is_asked_once_for_consecutive_samples():
    calls = []

    class Told:
        layout = MEMBERS[0].layout

        def draw(self, num_samples, **named):
            calls.append((num_samples, named["first"], named["scale"]))
            return MEMBERS[0].draw(num_samples, **named)

    Mixture([Told(), Told()], scales=[1, 4]).draw(9, first=4, scale=0.5, method="antithetic")
    assert calls == [(5, 2, 0.5), (4, 2, 2.0)]


def test_scales_are_each_member_s_own():
    mixture = Mixture(MEMBERS, scales=[0.0, 1.0, 8.0])
    drawn = mixture.draw(6, scale=0.5, method="iid").buffer
    assert torch.equal(drawn[0], MEMBERS[0].mean)
    for member, scale in [(1, 0.5), (2, 4.0)]:
        alone = MEMBERS[member].draw(2, member_seed(0, member), scale=scale, method="iid").buffer
        assert torch.equal(drawn[member::3], alone)


def test_prediction_counts_members_times_samples():
    """Against the average of every sample's own forward, in which members disagree too."""
    prediction = predict(MODEL, Mixture(MEMBERS), texts(), 12, seed=1)
    weights = Mixture(MEMBERS).draw(12, seed=1)
    with torch.no_grad():
        logits = SampledModel(MODEL, weights).eval()(**texts()).logits
    by_sample = Prediction.from_logits(logits, antithetic=True)
    assert prediction.num_samples == 12
    assert_same(prediction, by_sample, exact=False)
    within = torch.stack([predict(MODEL, member, texts(), 12).mutual_information for member in MEMBERS]).mean()
    assert prediction.mutual_information.mean() > within
    assert_same(prediction, predict(MODEL, Mixture(MEMBERS), texts(), 12, seed=1, samples_per_pass=4), exact=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Fits of two seeds as folders: own heads and LoRA tensors on one base."""
    home, saved = tmp_path_factory.mktemp("fits"), []
    torch.manual_seed(0)
    base = tiny_base().state_dict()
    for seed in range(2):
        torch.manual_seed(10 + seed)
        model = tiny_peft()
        model.get_base_model().load_state_dict({k: v for k, v in base.items() if "query" not in k}, strict=False)
        posterior = SwagPosterior(model, rank=3)
        for _ in range(4):
            step(model, 0.3)
            posterior.collect()
        posterior.save_pretrained(home / f"seed-{seed}")
        saved.append((home / f"seed-{seed}", model, posterior))
    return saved


def test_members_from_folders_on_one_model(folders):
    torch.manual_seed(99)
    base = tiny_base()
    model = PeftModel.from_pretrained(base, folders[0][0]).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mixture = Mixture([SwagPosterior.from_pretrained(model, folder) for folder, _, _ in folders])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(member.model is model for member in mixture.members)
    assert any("modules_to_save" in name for name in mixture.layout.names)
    drawn = mixture.draw(4, method="iid")
    for index, (_, _, posterior) in enumerate(folders):
        own = posterior.draw(2, member_seed(0, index), method="iid")
        for name in own:
            assert torch.equal(drawn[name][index::2], own[name]), name


def test_an_adapter_of_another_name_does_not_fit(folders):
    model = PeftModel.from_pretrained(tiny_base(), folders[0][0], adapter_name="other")
    with pytest.raises(ValueError, match=r"adapter name of the posterior .its adapters: other"):
        SwagPosterior.from_pretrained(model, folders[1][0])


def test_refusals():
    with pytest.raises(ValueError, match="at least one member"):
        Mixture([])
    with pytest.raises(ValueError, match="2 scales for 3 members"):
        Mixture(MEMBERS, scales=[1, 2])
    with pytest.raises(ValueError, match="finite and not negative"):
        Mixture(MEMBERS[:1], scales=[float("nan")])
    _, wider = fine_tune(rank=3)
    with pytest.raises(
        ValueError, match=r"member 1 has other tensors than member 0: .*query.lora_A.*has shape \[3, 16\]"
    ):
        Mixture([MEMBERS[0], wider])
    mixture = Mixture(MEMBERS)
    for arguments, message in [
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"num_samples": 2, "first": -1}, "first must be at least 0"),
        ({"num_samples": 2, "seed": 2**64}, "seed must lie in"),
        ({"num_samples": 2, "first": 2**32}, "outside"),
        ({"num_samples": 2, "method": "sobol"}, "method must be one of"),
        ({"num_samples": 2, "scale": -1.0}, "scale must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixture.draw(**arguments)
