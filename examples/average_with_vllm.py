r"""Averages the answers of adapters that `swag-lora export` wrote and vLLM serves, see the README.

python average_with_vllm.py adapters/manifest.json http://localhost:8000 $'Question: ...\nAnswer:' " A" " B" " C" " D"

Several manifests before the address, as of a MultiSWAG's seeds, are averaged together, each sample with the same weight.

An answer is the token that the server's tokenizer has for it behind the prompt, so write the space between the two. Answers
are told apart by token ids: as text, tokenizers such as Llama 2's give " A" and "A" the same name.
"""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen


def post(url, body):
    return json.load(urlopen(Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})))


def tokens(url, adapter, prompt, answers):
    """The id of each answer as it follows the prompt, where it has to be one token."""
    texts = [prompt, *(prompt + answer for answer in answers)]
    asked = [{"model": adapter, "prompt": text, "add_special_tokens": False} for text in texts]
    before, *after = [post(f"{url}/tokenize", body)["tokens"] for body in asked]
    found = []
    for answer, ids in zip(answers, after, strict=True):
        added = ids[len(before) :]
        if ids[: len(before)] != before or len(added) != 1 or added[0] in found:
            raise ValueError(f"the answer {answer!r} is no token of its own behind the prompt: it adds the ids {added}")
        found += added
    return found


def ask(url, adapter, prompt, answers, ids):
    """One sample's distribution over the answers, of which `ids` are the tokens."""
    body = {"model": adapter, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 100}
    choice = post(f"{url}/v1/completions", {**body, "return_tokens_as_token_ids": True})["choices"][0]
    found = choice["logprobs"]["top_logprobs"][0]
    if not all(token.startswith("token_id:") for token in found):
        raise ValueError(
            f"{url} does not know return_tokens_as_token_ids, and its tokens as text, such as {min(found)!r}, may be "
            "several: start it with --return-tokens-as-token-ids, or take a newer vLLM"
        )
    missing = [answer for answer, token in zip(answers, ids, strict=True) if f"token_id:{token}" not in found]
    if missing:
        raise ValueError(f"{missing} are not among the {len(found)} most probable tokens: raise logprobs")
    odds = [math.exp(found[f"token_id:{token}"]) for token in ids]
    return [one / sum(odds) for one in odds]


def average(url, adapters, prompt, answers):
    """Probabilities of the answers, and the mutual information: what the samples disagree about, in nats."""
    ids = tokens(url, adapters[0], prompt, answers)
    with ThreadPoolExecutor(len(adapters)) as pool:  # at once, so that vLLM runs them in one batch
        samples = list(pool.map(lambda adapter: ask(url, adapter, prompt, answers, ids), adapters))
    probs = [sum(column) / len(samples) for column in zip(*samples, strict=True)]
    return probs, entropy(probs) - sum(map(entropy, samples)) / len(samples)


def entropy(probs):
    return -sum(p * math.log(p) for p in probs if p > 0)


def adapters_of(manifests):
    """The names of the samples that the manifests list, each of which the server has to know as one adapter."""
    found = {}
    for manifest in manifests:
        listed = json.loads(Path(manifest).read_text(encoding="utf-8"))["adapters"]
        for name in [entry["name"] for entry in listed if "sample" in entry]:
            if name in found:
                raise ValueError(f"{found[name]} and {manifest} both have {name}: export each with a --seed of its own")
            found[name] = manifest
    if not found:
        raise ValueError(f"no samples in {', '.join(manifests)}: export some with --num-samples")
    return list(found)


def main(arguments):
    at = next((i for i, one in enumerate(arguments) if one.startswith(("http://", "https://"))), 0)
    if not at or len(arguments) < at + 4:
        sys.exit(__doc__)
    url, prompt, *answers = arguments[at:]
    try:
        probs, mutual_information = average(url.rstrip("/"), adapters_of(arguments[:at]), prompt, answers)
    except (OSError, ValueError) as error:
        sys.exit(f"average_with_vllm.py: {error}")
    for answer, p in zip(answers, probs, strict=True):
        print(f"{answer.strip()}  {p:.4f}")
    print(f"mutual information  {mutual_information:.4f} nats")


if __name__ == "__main__":
    main(sys.argv[1:])
