import json
import math
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
IDS = {"Answer:": 5, " A": 10, " B": 11, " C": 12, "A": 20, "B": 21}
LOGPROBS = {
    f"seed-{seed}-sample-{k}": {
        **{" A": math.log(0.1 + 0.1 * k + 0.05 * seed), " B": math.log(0.2), " C": math.log(0.05)},
        **{"A": math.log(0.01), "B": math.log(0.02)},
    }
    for seed in range(2)
    for k in range(4)
}
SEEDS = [[name for name in LOGPROBS if name.startswith(f"seed-{seed}")] for seed in range(2)]


def pieces(text):
    """Token ids; an answer is one with the space before it, as in vocabularies of SentencePiece."""
    found = []
    while text:
        piece = next((piece for piece in sorted(IDS, key=len, reverse=True) if text.startswith(piece)), text[0])
        found.append(IDS.get(piece, ord(piece[0]) + 100))
        text = text[len(piece) :]
    return found


def reply(path, asked, knows_ids=True):
    """As vLLM does: token ids of `/tokenize`, and logprobs by id, or by a text that has lost its leading space."""
    if path == "/tokenize":
        special = [1] if asked["add_special_tokens"] else []
        return {"tokens": special + pieces(asked["prompt"])}
    assert path == "/v1/completions" and asked["max_tokens"] == 1 and asked["prompt"] == "Answer:"
    by_id = knows_ids and asked.get("return_tokens_as_token_ids")
    odds = LOGPROBS[asked["model"]].items()
    top = {f"token_id:{IDS[token]}" if by_id else token.strip(): value for token, value in odds}
    return {"choices": [{"logprobs": {"top_logprobs": [top]}}]}


@pytest.fixture
def serve():
    servers = []

    def start(knows_ids=True):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = json.dumps(reply(self.path, asked, knows_ids)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("localhost", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://localhost:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def manifest(folder, names=SEEDS[0], mean=True):
    folder.mkdir()
    listed = [{"name": name, "sample": k} for k, name in enumerate(names)] + [{"name": "mean"}] * mean
    (folder / "manifest.json").write_text(json.dumps({"adapters": listed}))
    return str(folder / "manifest.json")


def run(*arguments):
    command = [sys.executable, str(EXAMPLES / "average_with_vllm.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def expected(names):
    odds = [[math.exp(LOGPROBS[name][answer]) for answer in (" A", " B")] for name in names]
    samples = [[p / sum(row) for p in row] for row in odds]
    mean = [sum(column) / len(names) for column in zip(*samples, strict=True)]
    entropies = [-sum(p * math.log(p) for p in row) for row in (mean, *samples)]
    information = entropies[0] - sum(entropies[1:]) / len(names)
    return ["A", f"{mean[0]:.4f}", "B", f"{mean[1]:.4f}", "mutual", "information", f"{information:.4f}", "nats"]


def test_the_client_averages_probabilities(serve, tmp_path):
    """Of " A", though the server's text for it is that of "A" too."""
    ended = run(manifest(tmp_path / "one"), serve(), "Answer:", " A", " B")
    assert ended.stdout.split() == expected(SEEDS[0]), ended.stderr


def test_several_manifests_are_one_mixture(serve, tmp_path):
    both = [manifest(tmp_path / f"seed-{seed}", names) for seed, names in enumerate(SEEDS)]
    url = serve()
    ended = run(*both, url, "Answer:", " A", " B")
    assert ended.stdout.split() == expected(LOGPROBS), ended.stderr
    for same in (both[0], manifest(tmp_path / "again")):
        ended = run(both[0], same, url, "Answer:", " A", " B")
        assert f"{same} both have seed-0-sample-0: export each with a --seed" in ended.stderr and ended.returncode == 1


def test_what_the_server_does_not_give_is_named(serve, tmp_path):
    one, url = manifest(tmp_path / "one"), serve()
    assert "['\\n'] are not among the 5" in run(one, url, "Answer:", " A", "\n").stderr
    assert "answer ' AB' is no token of its own behind the prompt: it adds the ids [10, 21]" in (
        run(one, url, "Answer:", " A", " AB").stderr
    )
    assert "' A' is no token of its own" in run(one, url, "Answer:", " A", " A").stderr
    old = run(one, serve(knows_ids=False), "Answer:", " A", " B")
    assert "as text, such as 'A', may be several" in old.stderr and "--return-tokens-as-token-ids" in old.stderr
    assert "no samples in" in run(manifest(tmp_path / "mean", []), url, "Answer:", " A", " B").stderr
    assert "average_with_vllm.py: " in run(str(tmp_path / "none.json"), url, "Answer:", " A", " B").stderr


def test_the_usage_is_one_that_a_shell_takes(tmp_path):
    usage = run().stderr
    assert usage == run(manifest(tmp_path / "one"), "http://localhost", "Answer:").stderr
    [line] = [line for line in usage.splitlines() if line.startswith("python ")]
    printed = subprocess.run(["bash", "-c", f"printf '%s|' {line}"], capture_output=True, text=True).stdout.split("|")
    assert printed[4:6] == ["Question: ...\nAnswer:", " A"] and printed[:4] == shlex.split(line)[:4]
