"""Generation by the average of lanes, against transformers' own generation and against teacher-forced likelihoods."""

from __future__ import annotations

import copy

import pytest
import torch
from language_models import BUILD, VOCAB, Given, assert_frozen, entropy, frozen, given, loop, lora, prompts
from posterior_models import tiny_peft
from tiny_models import FAMILIES
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerFast, StoppingCriteria
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from swag_lora import SampledModel, SwagPosterior
from swag_lora.generation import Generation, generate
from swag_lora.lane_cache import GrowingLayer, grow_in_place
from swag_lora.likelihood import log_probs

SAMPLES, NEW, PAD = 4, 5, 1
FIELDS = ("log_probs", "entropy", "expected_entropy", "mutual_information")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def generated(model, posterior, batch, num_samples=SAMPLES, **options):
    return generate(
        model, posterior, **batch, num_samples=num_samples, **{"pad_token_id": PAD, "max_new_tokens": NEW} | options
    )


def collected(model):
    posterior = SwagPosterior(model, rank=3)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        posterior.collect()
    return posterior


STRATEGIES = {
    "greedy": {},
    "penalised": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_one_sample_at_scale_zero_is_plain_generate_with_the_mean_weights(name, strategy):
    model = lora(name, torch.float32)
    posterior, batch = collected(model), prompts("left")
    options = STRATEGIES[strategy] | {"pad_token_id": PAD, "max_new_tokens": 8, "eos_token_id": [7, 11, 30]}
    mean = copy.deepcopy(model)
    with torch.no_grad():
        for parameter_name, tensor in posterior.draw(1, seed=0, scale=0.0, method="iid").items():
            mean.get_parameter(parameter_name).copy_(tensor[0])
    torch.manual_seed(5)
    plain = mean.generate(**batch, **options)
    torch.manual_seed(5)
    result = generate(model, posterior, **batch, num_samples=1, scale=0.0, **options)
    assert torch.equal(result.sequences, plain)
    assert not torch.equal(model.generate(**batch, **options), plain), "the last weights generate what the mean does"


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"do_sample": True, "top_p": 0.8}]
)
@pytest.mark.parametrize("name", BUILD)
def test_equals_teacher_forcing(name, options):
    model, batch = lora(name), prompts("left")
    posterior = given(model, SAMPLES)
    result = generated(model, posterior, batch, **options)
    assert posterior.asked == [(0, SAMPLES, "antithetic")]
    prompt = batch["input_ids"].shape[1]
    assert torch.equal(result.sequences[:, :prompt], batch["input_ids"])
    assert result.sequences.shape == (3, prompt + NEW) and result.num_samples == SAMPLES
    mask = torch.cat([batch["attention_mask"], torch.ones(3, NEW, dtype=torch.int64)], dim=1)
    forced = log_probs(model, posterior, result.sequences, attention_mask=mask, num_samples=SAMPLES)
    for field in FIELDS:
        torch.testing.assert_close(getattr(result, field), getattr(forced, field)[:, prompt:], **CLOSE)
    assert result.mutual_information.min() > 1e-4, "the samples do not differ"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_tokens_are_the_argmax_of_the_averaged_probabilities(name):
    model, batch = lora(name), prompts("left")
    posterior = given(model, SAMPLES)
    result = generated(model, posterior, batch)
    for row, pad in enumerate((0, 2, 1)):
        probs = loop(model, posterior.weights, result.sequences[row, pad:])[:, -NEW - 1 : -1]
        mean, new = probs.mean(0), result.sequences[row, -NEW:]
        assert torch.equal(mean.argmax(-1), new)
        torch.testing.assert_close(result.log_probs[row], mean.log()[range(NEW), new], **CLOSE)
        torch.testing.assert_close(result.entropy[row], entropy(mean), **CLOSE)
        torch.testing.assert_close(result.expected_entropy[row], entropy(probs).mean(0), **CLOSE)


class Seen(LogitsProcessor):
    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


def test_what_processors_see():
    """log p up to a constant, and the size of a logit: what the best token has on average over the lanes."""
    model, batch = lora("llama"), prompts("left")
    posterior, seen = given(model, SAMPLES), Seen()
    first = generated(model, posterior, batch, max_new_tokens=1, logits_processor=[seen])
    (scores,) = seen.scores
    torch.testing.assert_close(scores.log_softmax(-1).gather(1, first.sequences[:, -1:]), first.log_probs.float())
    logits = []
    for s in range(SAMPLES):
        with torch.no_grad():
            for name, tensor in posterior.weights.items():
                model.get_parameter(name).copy_(tensor[s])
            logits.append(model(input_ids=batch["input_ids"][:1]).logits[0, -1])
    best = int(scores[0].argmax())
    torch.testing.assert_close(scores[0, best], torch.stack(logits)[:, best].mean().float())
    one, alone = Seen(), {"input_ids": batch["input_ids"][:1]}
    generated(model, posterior, alone, num_samples=1, max_new_tokens=1, logits_processor=[one])
    weights = posterior.draw(1, seed=0, first=0, scale=0.5, method="iid")
    with torch.no_grad():
        raw = SampledModel(model, weights)(**alone, logits_to_keep=1).logits[0, :, -1]
    assert torch.equal(one.scores[0], raw.float())


def test_sampling():
    model, batch = lora("llama"), prompts("left")
    posterior = given(model, SAMPLES)

    def sample(seed, **options):
        torch.manual_seed(seed)
        return generated(model, posterior, batch, do_sample=True, **options)

    once, again, other = sample(1), sample(1), sample(2)
    assert torch.equal(once.sequences, again.sequences) and torch.equal(once.log_probs, again.log_probs)
    assert not torch.equal(once.sequences, other.sequences)
    greedy = generated(model, posterior, batch)
    assert torch.equal(sample(3, top_k=1).sequences, greedy.sequences)
    several = sample(4, num_return_sequences=40, max_new_tokens=1)
    assert several.sequences.shape[0] == several.log_probs.shape[0] == 120
    tokens = several.sequences[:, -1].view(3, 40)
    assert all(len(row.unique()) > 5 for row in tokens)
    for row in range(3):  # rows of one prompt share its distribution
        same = several.entropy.view(3, 40)[row]
        torch.testing.assert_close(same, greedy.entropy[row, 0].expand(40), **CLOSE)


class StopAfter(StoppingCriteria):
    """Ends row 0 after so many calls."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, input_ids, scores, **kwargs):
        self.calls -= 1
        return torch.arange(len(input_ids)) < (1 if self.calls <= 0 else 0)


@pytest.mark.parametrize("pad", [PAD, "end token"])
def test_rows_that_end(pad):
    model, batch = lora("llama"), prompts("left")
    posterior = given(model, SAMPLES)
    distinct = {"no_repeat_ngram_size": 1}
    free = generated(model, posterior, batch, **distinct)
    end = int(free.sequences[1, -NEW + 1])
    pad = end if pad == "end token" else pad
    result = generated(model, posterior, batch, eos_token_id=[end, 10_000], pad_token_id=pad, **distinct)
    kept = torch.ones(3, NEW, dtype=torch.bool)
    for row in range(3):
        at = (free.sequences[row, -NEW:] == end).nonzero()
        kept[row, int(at[0]) + 1 if len(at) else NEW :] = False
    assert not kept[1, 2] and kept[1, 1]
    width = result.mask.shape[1]
    assert torch.equal(result.mask, kept[:, :width])
    for field in FIELDS:
        torch.testing.assert_close(getattr(result, field), getattr(free, field).where(kept, 0)[:, :width], **CLOSE)
    options = {"eos_token_id": 10_000, "pad_token_id": pad, "stopping_criteria": [StopAfter(3)]} | distinct
    stopped = generated(model, posterior, batch, **options)
    assert torch.equal(stopped.sequences[1:], free.sequences[1:])
    assert stopped.sequences[0, -2:].tolist() == [pad, pad]
    assert stopped.mask.tolist() == [[True] * 3 + [False] * 2, [True] * NEW, [True] * NEW]
    assert torch.equal(stopped.log_probs[0, 3:], torch.zeros(2, dtype=torch.float64))


def test_rows_that_end_with_a_string():
    words = {f"w{i}.": i for i in range(VOCAB)} | {"abcdef": VOCAB}  # a word that transformers looks for
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0.")))
    model, batch = lora("llama"), prompts("left")
    posterior, distinct = given(model, SAMPLES), {"no_repeat_ngram_size": 1}
    free = generated(model, posterior, batch, **distinct)
    end = int(free.sequences[2, -NEW + 2])
    options = {"stop_strings": [f"w{end}."], "tokenizer": tokenizer, "eos_token_id": 10_000} | distinct
    result = generated(model, posterior, batch, **options)
    assert result.mask[2].tolist() == [True] * 3 + [False] * (result.mask.shape[1] - 3)
    assert (result.sequences[2, 9:] == PAD).all()


class Received(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.flatten())

    def end(self):
        self.ended = True


def test_streamer_and_generation_config():
    model, batch = lora("llama"), {"input_ids": torch.randint(2, VOCAB, (1, 4))}
    posterior, received = given(model, 2), Received()
    config = GenerationConfig(max_new_tokens=3, pad_token_id=PAD, do_sample=False)
    before = config.to_dict()
    result = generate(model, posterior, **batch, num_samples=2, generation_config=config, streamer=received)
    assert config.to_dict() == before
    assert torch.equal(torch.cat(received.tokens), result.sequences[0]) and received.ended
    assert result.log_probs.shape == (1, 3)


def test_the_model_is_untouched():
    model = lora("llama", torch.float32, lora_dropout=0.5).train()
    model.get_base_model().generation_config.top_k = 7
    posterior, batch = collected(model), prompts("left")
    before = frozen(model)
    first = generated(model, posterior, batch, num_samples=2, cache_implementation="static")
    assert_frozen(model, before)
    assert isinstance(first, Generation)
    assert torch.equal(first.sequences, generated(model, posterior, batch, num_samples=2).sequences)


def test_layer_that_grows_in_place():
    """As transformers' own layer, token by token, also where the cache was cut, reordered or filled anew in between."""
    config = BUILD["llama"]().config
    grown, plain = DynamicCache(config=config), DynamicCache(config=config)
    grow_in_place(grown)
    assert all(type(layer) is GrowingLayer for layer in grown.layers)
    rooms = set()
    for step in range(60):
        keys, values = torch.randn(2, 2, 1 if step else 5, 3), torch.randn(2, 2, 1 if step else 5, 4)
        out = [cache.update(keys.clone(), values.clone(), 0) for cache in (grown, plain)]
        for ours, theirs in zip(*out, strict=True):
            assert torch.equal(ours, theirs)
        if step in (20, 40):
            for cache in (grown, plain):
                cache.crop(-3)
                cache.reorder_cache(torch.tensor([1, 1]))
        rooms.add(grown.layers[0].keys.data_ptr())
    assert grown.get_seq_length() == plain.get_seq_length() == 58
    assert len(rooms) < 10
    grown.reset()
    assert grown.get_seq_length() == 0
    ours, _ = grown.update(keys, values, 0)
    assert torch.equal(ours, keys)


def test_only_plain_layers_grow_in_place():
    config = BUILD["gemma3"]().config
    cache = DynamicCache(config=config)
    kinds = {type(layer).__name__ for layer in cache.layers}
    grow_in_place(cache)
    assert {type(layer).__name__ for layer in cache.layers} == kinds - {"DynamicLayer"} | {"GrowingLayer"}
    static = StaticCache(config=config, max_cache_len=8)
    before = list(static.layers)
    grow_in_place(static)
    assert static.layers == before
    grow_in_place(None)


def _refusals(model):
    ids = torch.randint(2, VOCAB, (2, 4))
    yield {"num_beams": 2}, "beam search is not supported.*num_beams=1"
    yield {"num_beams": 2, "do_sample": True}, "beam sample is not supported"
    yield {"generation_config": GenerationConfig(num_beams=3)}, "beam search is not supported"
    yield {"prompt_lookup_num_tokens": 2}, "assisted generation is not supported"
    yield {"assistant_model": model}, "assistant_model is not supported: assisted decoding"
    yield {"penalty_alpha": 0.6, "top_k": 4}, "contrastive search is not supported"
    yield {"dola_layers": "low"}, "dola generation is not supported"
    yield {"custom_generate": lambda **kwargs: None}, "custom_generate is not supported"
    yield {"guidance_scale": 1.5}, "guidance_scale is not supported"
    yield {"past_key_values": DynamicCache()}, "past_key_values is not supported"
    yield {"return_dict_in_generate": True}, "return_dict_in_generate is not supported"
    yield (
        {"generation_config": GenerationConfig(output_scores=True, return_dict_in_generate=True)},
        "not supported: what",
    )
    yield {"cache_implementation": "paged"}, "'paged'"
    yield {"input_ids": ids.clone().fill_(VOCAB)}, f"input_ids has token id {VOCAB}"
    yield {"input_ids": ids[0]}, r"\[B, T\]"
    yield {"attention_mask": torch.ones(2, 3)}, "attention_mask has shape"
    yield {"num_samples": 0}, "num_samples must be at least 1"
    yield {"num_samples": 3, "method": "antithetic"}, "must be even"


def test_what_has_no_average_is_refused_before_anything_is_drawn():
    model, ids = lora("llama"), torch.randint(2, VOCAB, (2, 4))
    posterior = given(model, 2)
    for change, message in _refusals(model):
        with pytest.raises(ValueError, match=message):
            generate(model, posterior, **{"input_ids": ids, "num_samples": 2} | change)
    model.get_base_model().generation_config.num_beams = 4
    with pytest.raises(ValueError, match="beam search is not supported"):
        generate(model, posterior, ids, 2, max_new_tokens=2)
    assert posterior.asked == []
    for other, message in ((tiny_peft(), "no causal language model"), (FAMILIES["t5"].lora(), "encoder-decoder")):
        with pytest.raises(TypeError, match=message):
            generate(other, Given({}), ids, 2)
