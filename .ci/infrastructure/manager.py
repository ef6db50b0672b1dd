"""Runs `fargate runners` with the variables of the manager's container, against a server in place of GitLab."""

import http.server
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import NamedTuple

TOKEN = "glrt-" + "0" * 20


class GitLab:
    """Answers requests to verify a runner's token. `refuses`: as GitLab does for a token that it does not know."""

    def __init__(self, refuses=False):
        self.requests = requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append({"path": self.path, **body})
                answer = json.dumps({"message": "403 Forbidden"} if refuses else {"id": 1, "token": body["token"]})
                self.send_response(403 if refuses else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Files(NamedTuple):
    runner_config: Path
    driver_config: Path


def configure(stack, driver, gitlab, directory, succeeds=True):
    """Writes the files that the manager writes at its start."""
    config = directory / "config.toml"
    variables = {**stack.environment(), "GITLAB_URL": gitlab.url, "CONFIG_FILE": str(config)}
    env = {"PATH": os.environ["PATH"], "HOME": str(directory), **variables, "GITLAB_RUNNER_TOKEN": TOKEN}
    finished = subprocess.run([driver, "runners"], env=env, capture_output=True, text=True, check=False, timeout=120)
    assert (finished.returncode == 0) is succeeds, finished.stderr
    if succeeds:
        assert "warning" not in finished.stderr, finished.stderr
    return Files(config, directory / "fargate-default.toml")
