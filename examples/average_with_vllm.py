"""Averages the answers of adapters that `swag-lora export` wrote and vLLM serves, see the README.

python average_with_vllm.py adapters/manifest.json http://localhost:8000 "Question: ...\\nAnswer:" " A" " B" " C" " D"
"""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen


def ask(url, adapter, prompt, answers):
    """One sample's distribution over the answers, each a single token."""
    body = {"model": adapter, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 100}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    found = json.load(urlopen(request))["choices"][0]["logprobs"]["top_logprobs"][0]
    missing = [answer for answer in answers if answer not in found]
    if missing:
        raise ValueError(f"{missing} are not among the {len(found)} most probable tokens: raise logprobs")
    odds = [math.exp(found[answer]) for answer in answers]
    return [one / sum(odds) for one in odds]


def average(url, adapters, prompt, answers):
    """Probabilities of the answers, and the mutual information: what the samples disagree about, in nats."""
    with ThreadPoolExecutor(len(adapters)) as pool:  # at once, so that vLLM runs them in one batch
        samples = list(pool.map(lambda adapter: ask(url, adapter, prompt, answers), adapters))
    probs = [sum(column) / len(samples) for column in zip(*samples, strict=True)]
    return probs, entropy(probs) - sum(map(entropy, samples)) / len(samples)


def entropy(probs):
    return -sum(p * math.log(p) for p in probs if p > 0)


if __name__ == "__main__":
    manifest, url, prompt, *answers = sys.argv[1:]
    listed = json.loads(Path(manifest).read_text(encoding="utf-8"))["adapters"]
    samples = [entry["name"] for entry in listed if "sample" in entry]
    probs, mutual_information = average(url, samples, prompt, answers)
    for answer, p in zip(answers, probs, strict=True):
        print(f"{answer.strip()}  {p:.4f}")
    print(f"mutual information  {mutual_information:.4f} nats")
