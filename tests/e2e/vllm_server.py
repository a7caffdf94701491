"""vLLM's OpenAI-compatible server as a process. It needs an environment of its own; .ci/run makes .venv-vllm."""

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import ROOT

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
START_SECONDS = 420  # at most; 33 on two quiet cores
needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM in .venv-vllm, as .ci/run installs it")
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def post(url: str, body: dict) -> dict:
    """Return the JSON answer to a JSON request; AssertionError with the server's words when it refuses."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=180) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: HTTP {error.code}: {error.read().decode(errors='replace')}") from None


class VllmServer:
    """vLLM with the model in `folder`, in fp32; a context manager that returns once it answers."""

    def __init__(self, folder: Path, *flags: str, max_length: int = 512):
        self.folder = folder
        self.url = f"http://127.0.0.1:{free_port()}"
        self._command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        self._command += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2], "--dtype", "float32"]
        self._command += ["--enforce-eager", "--max-model-len", str(max_length), "--max-num-seqs", "2", *flags]

    def __enter__(self) -> "VllmServer":
        self._log = tempfile.TemporaryFile("w+")
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            self._command, env=kept | SETTINGS, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self._log.seek(0)
        raise AssertionError(f"vLLM did not start:\n{self._log.read()[-3000:]}")

    def __exit__(self, *_error) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def chat(self, messages: list[dict], **options) -> dict:
        """Return the answer to a greedy chat request, with "prompt_token_ids" and each choice's "token_ids"."""
        body = {"model": str(self.folder), "messages": messages, "temperature": 0, "max_tokens": 40}
        return post(f"{self.url}/v1/chat/completions", body | {"return_token_ids": True} | options)
