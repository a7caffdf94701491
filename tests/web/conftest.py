"""A tiny chat, and handlers that need no open page."""

from types import SimpleNamespace

import pytest

from sft.chat.reply import load_chat
from sft.web.handlers import Handlers
from sft.web.models import LocalModel


@pytest.fixture(scope="module")
def chat(tiny_base):
    return load_chat(str(tiny_base("qwen2")))


@pytest.fixture
def new_handlers(chat):
    def make(**options) -> Handlers:
        made = Handlers({"tiny": LocalModel(chat)}, **options)
        made.page = SimpleNamespace()
        return made

    return make
