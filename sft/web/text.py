"""The page's texts in English and Chinese, and the choice between them."""

import json
from pathlib import Path

import gradio as gr

# [English, Chinese] by key. "page": the page's fixed parts, whose language the browser chooses; "labels": the
# conversation, which the server renders in the language of each request.
_TABLE = json.loads(Path(__file__).with_name("texts.json").read_text(encoding="utf-8"))
TEXTS = _TABLE["page"]
LABELS = _TABLE["labels"]
ENGLISH = {key: english for key, (english, _chinese) in TEXTS.items()}
CHINESE = {key: chinese for key, (_english, chinese) in TEXTS.items()}
I18N = gr.I18n(**{"en": ENGLISH, "zh": CHINESE, "zh-CN": CHINESE, "zh-TW": CHINESE})


def is_chinese(request: gr.Request | None) -> bool | None:
    """Say whether a browser prefers Chinese; None where it names no language."""
    languages = request.headers.get("accept-language", "") if request else ""
    return languages.startswith("zh") if languages else None


def label(key: str, chinese: bool | None, **values) -> str:
    """Return a text in one language, or in both where `chinese` is None."""
    english_text, chinese_text = (text.format(**values) for text in LABELS[key])
    if chinese is None:
        return f"{chinese_text} · {english_text}"
    return chinese_text if chinese else english_text


def refusal(request: gr.Request | None, key: str, **values) -> gr.Error:
    """Return an error that the page shows as a note in its corner."""
    chinese = is_chinese(request)
    return gr.Error(label(key, chinese, **values), title=label("note", chinese), print_exception=False)
