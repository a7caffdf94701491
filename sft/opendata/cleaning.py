"""Cleaning rules, one function each, and duplicates, exact and near.

A change returns new messages, a drop raises RecordError.
"""

import hashlib
import json
import mmap
import re
import unicodedata
from array import array
from collections.abc import Collection, Iterator
from typing import BinaryIO

from sft.opendata.conversation import Conversation, Message, check_messages
from sft.opendata.fields import RecordError, is_blank
from sft.opendata.files import hash_to_share


def strip_edges(messages: list[Message]) -> list[Message]:
    """Strip whitespace from both ends of each text."""
    texts = ("content", "reasoning_content")
    return [message | {key: message[key].strip() for key in texts if key in message} for message in messages]


def cut_at_empty_turn(messages: list[Message]) -> list[Message]:
    """Keep what comes before the first exchange with an empty text; an empty system message just goes."""
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    end = next((i for i, message in enumerate(messages) if is_blank(message)), None)
    if messages and end is None:
        return messages
    # Back to the user's message: the question is dropped with the answer.
    while end and messages[end]["role"] in ("assistant", "tool"):
        end -= 1
    while end and messages[end - 1]["role"] == messages[end]["role"] == "user":
        end -= 1
    if not any(message["role"] == "assistant" for message in messages[:end]):
        raise RecordError("empty", "no exchange is left before the first empty text")
    return messages[:end]


def fix_roles(messages: list[Message]) -> list[Message]:
    """Put one system message first, merge neighbours of one role, begin with a user and end with a reply."""
    turns: list[Message] = []
    for message in sorted(messages, key=lambda message: message["role"] != "system"):
        if turns and turns[-1]["role"] == message["role"] != "tool":
            turns[-1] = _merge_messages(turns[-1], message)
        elif message["role"] in ("system", "user") or any(turn["role"] == "user" for turn in turns):
            turns.append(message)
    while turns and turns[-1]["role"] in ("user", "tool"):
        turns.pop()
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RecordError("role_order", "no user message is followed by a reply")
    return turns


def _merge_messages(first: Message, second: Message) -> Message:
    """One message of two by one speaker. Raises RecordError where that would change what is learned."""
    if first.get("train") != second.get("train"):
        raise RecordError("loss_switch", "of two replies in a row only one is to be learned, so they can't be merged")
    if "tool_calls" in first:
        raise RecordError("role_order", "a reply with calls is followed by a reply, without a result")
    if second.get("reasoning_content"):
        raise RecordError("role_order", "of two replies in a row the second has a thought, so they can't be merged")
    return second | first | {"content": f"{first['content']}\n{second['content']}"}


_MODEL_ZH = r"(?:大型?|自然|人工智能|AI|智能|语言|聊天|虚拟|计算机|机器人|对话){0,4}"
_MODEL_ZH += r"(?:语言模型|人工智能|AI|语言AI|聊天机器人|智能助手|AI助手|虚拟助手|助手程序|计算机程序)"
_MODEL_EN = r"(?:(?:large|advanced|artificial intelligence|AI|virtual|language|text-based|conversational)[ -]){0,4}"
_MODEL_EN += r"(?:AI|artificial intelligence|language model|virtual assistant|chatbot|computer program)"
_NAMES = r"(?:ChatGPT|GPT-?[345][\w.]*|OpenAI|文心一言|通义千问)"
_MADE = r"(?:trained|developed|created|made|built|designed)"
_SELF_IDENTITY = re.compile(
    rf"作为(?:一[个名款种位])?{_MODEL_ZH}(?:程序|系统|模型|助手|机器人)?[,，\s]{{0,2}}(?:我|无法|不能|没有|如果您)"
    rf"|(?<!如果)(?<!假如)(?<!假设)我(?:只|仅仅|其实|本身)?是(?:一[个名款种位])?(?:由.{{0,20}}的)?(?:{_MODEL_ZH}|{_NAMES})"
    rf"|我[^。！？\n]{{0,12}}(?:由|被|是)\s*OpenAI[^。！？\n]{{0,6}}(?:开发|训练|创建|研发|推出)"
    rf"|\bas an? {_MODEL_EN}(?: (?:model|assistant|system|program|chatbot))?(?: {_MADE} by \w+)?,? (?:I\b|I'm\b|it is)"
    rf"|\bI(?:'m| am) (?:just |only |actually |simply )?(?:an? )?(?:{_MODEL_EN}|{_NAMES})(?! (?:engineer|researcher))\b"
    rf"|\bI (?:was|am|have been) {_MADE} by (?:a team at )?OpenAI",
    re.IGNORECASE,
)
# No match without "AI" or one of these; looking for them first is ten times as fast.
_SELF_HINTS = ("人工智能", "语言模型", "机器人", "助手", "计算机程序", "gpt", "openai", "文心一言", "通义千问")
_SELF_HINTS += ("artificial", "language model", "virtual assistant", "chatbot", "computer program")


def drop_self_identity(messages: list[Message]) -> None:
    """Drop conversations in which a reply claims to be some model; ChatGPT as a subject is fine."""
    for question, number, reply in _replies(messages):
        lower = reply.lower()
        hinted = (" ai" if reply.isascii() else "ai") in lower or any(hint in lower for hint in _SELF_HINTS)
        match = hinted and _SELF_IDENTITY.search(reply)
        if match and not _SELF_IDENTITY.search(question):
            raise RecordError("self_identity", f'messages[{number}] claims to be a model: "{match.group()[:60]}"')


_DANGLING_MARKER = re.compile(r"\n[ \t]*(?:\d{1,3}[.、)）]|[-•])$")


def drop_cut_off(messages: list[Message]) -> None:
    """Drop conversations whose last reply stops in the middle, as at a token limit."""
    *_, (_, number, reply) = _replies(messages)
    reply = reply.rstrip()
    if reply.startswith("<think>") and "</think>" not in reply:
        raise RecordError("cut_off", f"messages[{number}] opens a thought that it does not close")
    if "```" in reply and len(re.findall(r"^[ \t]*```", reply, re.MULTILINE)) % 2:
        raise RecordError("cut_off", f"messages[{number}] opens a ``` block that it does not close")
    if _DANGLING_MARKER.search(reply):
        raise RecordError("cut_off", f"messages[{number}] ends in a list number without its text")
    if reply.endswith((",", "，", "、")):
        raise RecordError("cut_off", f"messages[{number}] ends in a comma")
    if _is_cut_in_prose(reply.rpartition("\n")[2]):
        raise RecordError("cut_off", f'messages[{number}] stops in mid-sentence: "…{reply[-30:]}"')


def _is_cut_in_prose(line: str) -> bool:
    """Whether a line is long running text that ends in a word; titles, names, tags, links and formulas are not."""
    if not line[-1:].isalnum():
        return False
    last_word = line.rpartition(" ")[2]
    if "://" in line or last_word.startswith(("#", "@", "www.")) or re.search(r"[\"”] ?[-–—~] ?.{0,40}$", line):
        return False
    if count_han(line) >= 30:
        return bool(re.search(r"[，。；！？]", line))
    sentences = re.search(r"[a-z]{2}[.,;?!] ", line)
    return len(line) >= 80 and bool(sentences) and line[-1].isascii() and line[-1].isalpha() and line.count(" ") >= 10


_ASKS_FOR_LANGUAGE = re.compile(
    r"翻译|译成|译为|英[文语]|中[文英]|双语|语言|外语|[法德日韩俄]语|单词|词汇|字母|拼音|缩写|代码|编程|编写|程序|函数|脚本|公式|算法"
    r"|正则|名[字称]|网址|链接|邮[箱件]|translat|chinese|mandarin|english|pinyin|language|code|sql|html|python|java|regex|url",
    re.IGNORECASE,
)


def drop_language_mismatch(messages: list[Message]) -> None:
    """Drop conversations with a Chinese question and a reply without any Chinese, or the other way round."""
    for question, number, reply in _replies(messages):
        in_chinese = has_han(question)
        if in_chinese == has_han(reply) or "```" in reply or _ASKS_FOR_LANGUAGE.search(question):
            continue
        # A Chinese question about an English word may well be answered in English.
        if in_chinese and not re.search(r"[a-z]{3}", question) and _is_chinese(question) and _is_english(reply):
            raise RecordError("language_mismatch", f"messages[{number}] answers a Chinese question in English")
        if not in_chinese and _is_english(question) and _is_chinese(reply):
            raise RecordError("language_mismatch", f"messages[{number}] answers an English question in Chinese")


_ROLE_WORDS = re.compile(
    r"^[ \t]*(?:(?:Human|Assistant|User|用户|助手)[ \t]*[:：]|\|(?:Human|Bot)\|[:：]"
    r"|### ?(?:Instruction|Response|Input):|<\|im_(?:start|end)\|>)",
    re.MULTILINE,
)


def drop_role_words(messages: list[Message]) -> None:
    """Drop conversations in whose replies a line begins like a chat format's turn."""
    for _, number, reply in _replies(messages):
        if match := _ROLE_WORDS.search(reply):
            raise RecordError("role_words", f'messages[{number}] has a line that begins with "{match.group().strip()}"')


def _replies(messages: list[Message]) -> Iterator[tuple[str, int, str]]:
    """Each reply as (the question before it, its number, its text)."""
    question = ""
    for number, message in enumerate(messages):
        if message["role"] == "user":
            question = message["content"]
        elif message["role"] == "assistant":
            yield question, number, message["content"]


# --- Languages


# Chinese characters as the body of a regular expression's class: 〇, the ideographs of Unicode 16 and their extensions.
HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_HAN_CHARACTER = re.compile(f"[{HAN}]")
_LATIN_WORD = re.compile(r"[A-Za-z]{2,}")


def has_han(text: str) -> bool:
    """Whether there is a Chinese character."""
    return not text.isascii() and _HAN_CHARACTER.search(text) is not None


def count_han(text: str) -> int:
    """The number of Chinese characters."""
    return len(_HAN_CHARACTER.findall(text))


def _is_chinese(text: str) -> bool:
    num_han = count_han(text)
    return num_han >= 6 and num_han > 3 * len(_LATIN_WORD.findall(text))


def _is_english(text: str) -> bool:
    """Whether a text without Chinese is prose, and not just a few words, code or numbers."""
    num_words = len(_LATIN_WORD.findall(text))
    num_symbols = len(re.findall(r"[{}()\[\]<>=;_\\/|$#]", text))
    return num_words >= 8 and num_symbols < num_words / 3


# --- All rules


CHANGES = {rule.__name__: rule for rule in (strip_edges, cut_at_empty_turn, fix_roles)}
DROPS = {rule.__name__: rule for rule in (drop_self_identity, drop_cut_off, drop_language_mismatch, drop_role_words)}
RULES = (*CHANGES, *DROPS)


def clean_messages(messages: list[Message], rules: Collection[str] = RULES) -> tuple[list[Message], list[str]]:
    """Apply the named rules in order; return the messages and which rules changed them. Raises RecordError to drop."""
    changed = []
    for name, change in CHANGES.items():
        if name in rules and (after := change(messages)) != messages:
            messages = after
            changed.append(name)
    check_messages(messages)
    for name, drop in DROPS.items():
        if name in rules:
            drop(messages)
    return messages, changed


# --- Duplicates


def normalise_text(text: str) -> str:
    """Fold width (NFKC), case and whitespace, so that texts which look alike are equal."""
    if not text.isascii():
        # The common ones by hand: without them most Chinese text passes NFKC's quick check, ten times as fast.
        for wide, narrow in zip("，！？：；（）", ",!?:;()", strict=True):
            text = text.replace(wide, narrow)
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def digest_conversation(conversation: Conversation) -> int:
    """Return 128 bits of what is learned and shown, equal after NFC and without whitespace at the edges of texts."""
    messages = conversation["messages"]
    turns = ((message["role"], unicodedata.normalize("NFC", message["content"]).strip()) for message in messages)
    whole = "\x1e".join(map("\x1f".join, turns))
    rest = [{key: message[key] for key in message if key not in ("role", "content")} for message in messages]
    if any(rest) or "tools" in conversation:
        extra = json.dumps([rest, conversation.get("tools")], ensure_ascii=False, sort_keys=True)
        whole = f"{whole}\x1d{unicodedata.normalize('NFC', extra)}"
    return int.from_bytes(hashlib.blake2b(whole.encode(), digest_size=16).digest())


# --- Near duplicates


SHINGLE = 5
# 16 bands of 6 permutations find 99% of the pairs with a similarity of 0.8, and 22% of those with 0.5.
NUM_BANDS = 16
ROWS = 6
# Per band. The table takes 256 MiB at most; above a million conversations newcomers find ever more slots taken.
NUM_SLOTS = 1 << 21


def shingles(conversation: Conversation) -> set[str]:
    """The character 5-grams of the normalised texts, thoughts and calls."""
    text = normalise_text("\n".join(map(_join_texts, conversation["messages"])))
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}


def _join_texts(message: Message) -> str:
    if len(message) == 2:
        return message["content"]
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if "tool_calls" in message else ""
    return "\n".join([message.get("reasoning_content", ""), message["content"], calls])


def band_keys(grams: set[str]) -> tuple[int, ...]:
    """A 64-bit key per band; two texts that share a key are candidates."""
    import rensa

    minhash = rensa.RMinHash(num_perm=NUM_BANDS * ROWS, seed=0)
    minhash.update(list(grams))
    digest = minhash.digest()
    return tuple(hash(tuple(digest[i : i + ROWS])) % 2**64 for i in range(0, len(digest), ROWS))


class NearDuplicates:
    """Finds the kept conversation of which a new one is nearly a copy, in bounded memory.

    Band keys only give candidates. Each is verified by the exact Jaccard similarity of its 5-grams, read again from the
    file it was written to.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        # An entry is 32 bits of the key and the number of a conversation plus one; anonymous memory starts as zeros.
        self.table = memoryview(mmap.mmap(-1, 8 * NUM_BANDS * NUM_SLOTS)).cast("Q")
        self.files: list[BinaryIO] = []
        self.places = array("Q")

    def find_or_add(self, keys: tuple[int, ...], line: bytes, file: BinaryIO, offset: int) -> bool:
        """Return whether a near duplicate of the conversation in `line` was added before; if not, add this one.

        `keys` are its band keys. Its line is about to be written at `offset` of `file`.
        """
        slots = [band * NUM_SLOTS + key % NUM_SLOTS for band, key in enumerate(keys)]
        entries = [(self.table[slot], key >> 32) for slot, key in zip(slots, keys, strict=True)]
        candidates = sorted({entry & 0xFFFFFFFF for entry, key in entries if entry and entry >> 32 == key})
        grams = shingles(json.loads(line)) if candidates else set()
        if any(self._similarity(grams, candidate - 1) >= self.threshold for candidate in candidates):
            return True
        if file not in self.files:
            self.files.append(file)
        self.places.append(offset << 1 | self.files.index(file))
        for slot, (entry, key) in zip(slots, entries, strict=True):
            self.table[slot] = entry or key << 32 | len(self.places)
        return False

    def _similarity(self, grams: set[str], candidate: int) -> float:
        file = self.files[self.places[candidate] & 1]
        offset = self.places[candidate] >> 1
        end = file.tell()
        file.seek(offset)
        other = shingles(json.loads(file.readline()))
        file.seek(end)
        return len(grams & other) / len(grams | other)


# --- The held-out split


def is_held_out(conversation: Conversation, eval_share: float) -> bool:
    """Return whether the first question puts a conversation into the held-out split.

    The split depends on that text alone: it stays when data is added, and no prompt is on both sides.
    """
    question = next(message["content"] for message in conversation["messages"] if message["role"] == "user")
    return hash_to_share(normalise_text(question)) < eval_share
