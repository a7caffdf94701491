"""Cleaning rules: a change returns new messages, a drop raises RecordError."""

import re
from collections.abc import Collection, Iterator
from itertools import pairwise

from sft.opendata.conversation import Message, validate
from sft.opendata.fields import RecordError


def strip_edges(messages: list[Message]) -> list[Message]:
    """Strip whitespace from both ends of each text."""
    return [message | {"content": message["content"].strip()} for message in messages]


def cut_at_empty_turn(messages: list[Message]) -> list[Message]:
    """Keep what comes before the first exchange with an empty text; an empty system message just goes."""
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    end = next((i for i, message in enumerate(messages) if not message["content"].strip()), None)
    if messages and end is None:
        return messages
    # Back to where the user began to speak: the question goes with the answer.
    while end and messages[end]["role"] == "assistant":
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
        if turns and turns[-1]["role"] == message["role"]:
            # Two texts of which one is not to be learned become one that is not.
            turns[-1] = turns[-1] | message | {"content": f"{turns[-1]['content']}\n{message['content']}"}
        elif message["role"] != "assistant" or any(turn["role"] == "user" for turn in turns):
            turns.append(message)
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RecordError("role_order", "no user message is followed by a reply")
    return turns


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
    if "```" in reply and len(re.findall(r"^[ \t]*```", reply, re.MULTILINE)) % 2:
        raise RecordError("cut_off", f"messages[{number}] opens a ``` block that it does not close")
    if _DANGLING_MARKER.search(reply):
        raise RecordError("cut_off", f"messages[{number}] ends in a list number without its text")
    if reply.endswith((",", "，", "、")):
        raise RecordError("cut_off", f"messages[{number}] ends in a comma")
    if _stops_in_prose(reply.rpartition("\n")[2]):
        raise RecordError("cut_off", f'messages[{number}] stops in mid-sentence: "…{reply[-30:]}"')


def _stops_in_prose(line: str) -> bool:
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
    """Each reply as (what was asked, its number, its text)."""
    for number, (before, message) in enumerate(pairwise(messages), start=1):
        if message["role"] == "assistant":
            yield before["content"], number, message["content"]


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
    num_words, num_symbols = len(_LATIN_WORD.findall(text)), len(re.findall(r"[{}()\[\]<>=;_\\/|$#]", text))
    return num_words >= 8 and num_symbols < num_words / 3


# --- All rules


CHANGES = {rule.__name__: rule for rule in (strip_edges, cut_at_empty_turn, fix_roles)}
DROPS = {rule.__name__: rule for rule in (drop_self_identity, drop_cut_off, drop_language_mismatch, drop_role_words)}
RULES = (*CHANGES, *DROPS)


def clean(messages: list[Message], rules: Collection[str] = RULES) -> tuple[list[Message], list[str]]:
    """Apply the named rules in order; return the messages and which rules changed them. Raises RecordError to drop."""
    changed = []
    for name, change in CHANGES.items():
        if name in rules and (after := change(messages)) != messages:
            messages = after
            changed.append(name)
    validate({"id": "", "source": "", "messages": messages})
    for name, drop in DROPS.items():
        if name in rules:
            drop(messages)
    return messages, changed
