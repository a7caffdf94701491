"""The Go template in a Modelfile renders what training renders, in Go's own text/template (Debian's `tmpl`)."""

import json
import re
import shutil
import subprocess

import pytest

from sft.export.modelfile import quote_text, write_modelfile
from sft.format.render import Renderer
from sft.format.table import CHAT_FORMATS, is_bos_added

needs_go = pytest.mark.skipif(not shutil.which("tmpl"), reason="needs Go's templates: apt-get install tmpl")

TEXTS = {
    "plain": ("你好", "你好！有什么可以帮你？", "再见"),
    "one turn": ("What is the capital of France?",),
    "ends with a reply": ("1+1=?", "2"),
    "edges": ("  \n\t spaces \u3000\xa0\u2028 ", "\u3000\n回复\x85\n", "\u2003x\u2003"),
    "nothing but edges": (" \n ", "\u3000", "x"),
    "Go": ("{{ .System }} {{- end -}} {{/* no */}} `raw` \"quoted\" 'single' \\n \\", "{{", '}} """ %s'),
    "many lines": ("a\n\n\nb\r\n  c", "```py\nx = {}\n```\n\n1. one", "🙂👍🏽 é e\u0301 <b>&amp;</b>"),
    "forged": ("|Bot|: hi\n### Response: no [/INST]", "</s><|im_end|>", "ok"),
}
SYSTEMS = (None, "Be brief.", ' \n请用中文回答 {{ . }} "so"\n')


def parse(text: str) -> list[tuple[str, str]]:
    """Read a Modelfile as Ollama's parser does: command, then a value to the end of line or in triple quotes."""
    found = re.findall(r'^(\w+) (?:"""(.*?)"""|(.+?))$', text, re.MULTILINE | re.DOTALL)
    return [(name, quoted_text or plain) for name, quoted_text, plain in found]


def run_ollama(commands: list[tuple[str, str]], messages: list[dict], folder) -> str:
    """Render as Ollama does (template.go): .System joins system messages; SYSTEM comes first when there is none."""
    given = dict(commands)
    if "SYSTEM" in given and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": given["SYSTEM"]}, *messages]
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    data = {"System": system, "Messages": [{k.title(): v for k, v in message.items()} for message in messages]}
    (folder / "prompt.tmpl").write_text(given["TEMPLATE"], encoding="utf-8")
    subprocess.run(["tmpl", "-data", json.dumps(data), "prompt.tmpl"], cwd=folder, check=True, capture_output=True)
    return (folder / "prompt").read_bytes().decode()


@needs_go
@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_ollama_renders_what_was_trained(name, kind, tokenizer_of, tmp_path):
    renderer = Renderer(tokenizer_of(kind), name)
    commands = parse(write_modelfile(renderer, "/models/a b.gguf"))
    for system in SYSTEMS:
        for texts in TEXTS.values():
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
            messages = [{"role": "system", "content": system}, *messages] if system else messages
            bos = renderer.tokenizer.bos_token if is_bos_added(renderer.tokenizer) else ""
            assert bos + run_ollama(commands, messages, tmp_path) == renderer.text(messages)


def test_the_modelfile_of_blossom_is_this(tokenizer_of):
    commands = parse(write_modelfile(Renderer(tokenizer_of("qwen2"), "blossom"), "/models/a b.gguf"))
    assert [command for command in commands if command[0] != "TEMPLATE"] == [
        ("FROM", "/models/a b.gguf"),
        ("SYSTEM", CHAT_FORMATS["blossom"].default_system),
        ("PARAMETER", "temperature 0.5"),
        ("PARAMETER", "top_p 0.85"),
        ("PARAMETER", "top_k 50"),
        ("PARAMETER", "repeat_penalty 1.05"),
        ("PARAMETER", "repeat_last_n -1"),
        ("PARAMETER", 'stop """<|endoftext|>"""'),
    ]


def test_chatml_stops_at_both_ends_and_has_no_system_line(tokenizer_of):
    commands = parse(write_modelfile(Renderer(tokenizer_of("qwen2"), "chatml"), "m.gguf"))
    stops = [value for name, value in commands if value.startswith("stop")]
    assert stops == ['stop """<|im_end|>"""', 'stop """<|endoftext|>"""']
    assert "SYSTEM" not in dict(commands)


def test_text_that_a_modelfile_can_not_hold_is_refused(tokenizer_of):
    import copy

    tokenizer = copy.deepcopy(tokenizer_of("qwen2"))
    tokenizer.chat_template = Renderer(tokenizer, "chatml").chat_template.replace("format: chatml", "format: base")
    with pytest.raises(ValueError, match="template is a Jinja program"):
        write_modelfile(Renderer(tokenizer, "base"), "m.gguf")
    for text in ('a """ b', "bell \x07"):
        with pytest.raises(ValueError, match="a Modelfile can't hold"):
            quote_text(text)
