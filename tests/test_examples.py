import json
import math
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LOGPROBS = {
    f"seed-0-sample-{k}": {" A": math.log(0.1 + 0.1 * k), " B": math.log(0.2), " C": math.log(0.05)} for k in range(4)
}


@pytest.fixture
def server():
    """Answers as vLLM's completions do, with other logprobs for each adapter."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/completions" and asked["max_tokens"] == 1 and asked["prompt"] == "Answer:"
            answer = json.dumps({"choices": [{"logprobs": {"top_logprobs": [LOGPROBS[asked["model"]]]}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def ask(server, tmp_path, *answers):
    manifest = tmp_path / "manifest.json"
    listed = [{"name": name, "sample": k} for k, name in enumerate(LOGPROBS)]
    manifest.write_text(json.dumps({"adapters": [*listed, {"name": "mean"}]}))
    command = [sys.executable, str(EXAMPLES / "average_with_vllm.py"), str(manifest), server, "Answer:", *answers]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_client_averages_probabilities(server, tmp_path):
    odds = [[0.1 + 0.1 * k, 0.2] for k in range(4)]
    samples = [[p / sum(row) for p in row] for row in odds]
    mean = [sum(column) / 4 for column in zip(*samples, strict=True)]
    entropies = [-sum(p * math.log(p) for p in row) for row in (mean, *samples)]
    ended = ask(server, tmp_path, " A", " B")
    assert ended.stdout.split() == [
        *("A", f"{mean[0]:.4f}", "B", f"{mean[1]:.4f}"),
        *("mutual", "information", f"{entropies[0] - sum(entropies[1:]) / 4:.4f}", "nats"),
    ], ended.stderr


def test_an_answer_that_the_server_does_not_give_is_named(server, tmp_path):
    assert "[' D'] are not among the 3" in ask(server, tmp_path, " A", " D").stderr
