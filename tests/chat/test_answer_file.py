"""A file of questions: checked as a whole, answered once, in order, resumed after a kill."""

import json
import shutil
from datetime import date

import pytest
import torch

from sft.chat.answer_file import (
    Partial,
    answer_missing,
    check_questions,
    hash_weights,
    read_questions,
    reply_to_file,
    to_prompt,
)
from sft.chat.reply import Chat, Reply, load_chat
from sft.chat.sampling import GREEDY, Sampling
from sft.format.render import Renderer
from sft.opendata.fields import FieldCounts, RecordError

QUESTIONS = [f"question {number}" for number in range(3)]
RUN = {"questions": "q", "sampling": {"temperature": 0.0}}


def asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def test_a_question_file_may_hold_any_form():
    assert to_prompt({"prompt": "你好"}) == asked("你好")
    assert to_prompt({"prompt": "你好", "system": "s"}) == [{"role": "system", "content": "s"}, *asked("你好")]
    assert to_prompt({"instruction": "你好", "input": "", "output": ""}) == asked("你好")
    assert to_prompt({"instruction": "Sum", "input": "1 2", "output": "3"}) == asked("Sum\n1 2")
    with_reply = {"messages": [*asked("a"), {"role": "assistant", "content": "b"}]}
    assert to_prompt(with_reply) == asked("a")
    for broken in ({"messages": [{"role": "assistant", "content": "b"}]}, {"prompt": " "}, {"prompt": "\ud800"}, 5):
        with pytest.raises(RecordError):
            to_prompt(broken)


def test_fields_beside_a_lone_question_are_read_as_in_training_data_or_counted():
    counts = FieldCounts()
    earlier = [*asked("a"), {"role": "assistant", "content": "b"}]
    assert to_prompt({"prompt": "c", "history": [["a", "b"]]}, counts=counts) == [*earlier, *asked("c")]
    assert to_prompt({"instruction": "Sum", "context": "1 2"}, counts=counts) == asked("Sum\n1 2")
    assert to_prompt({"messages": asked("a"), "prompt": "b"}, counts=counts) == asked("a")
    assert to_prompt({"question": "Who?", "context": "text", "lang": "en"}, counts=counts) == asked("Who?")
    assert to_prompt({"prompt": "a", "chosen": "b", "rejected": "c", "label": False}, counts=counts) == asked("a")
    assert counts.unread == {"prompt": 1, "context": 1, "lang": 1}
    with pytest.raises(RecordError, match="images holds media"):
        to_prompt({"prompt": "a", "images": ["a.png"]})


def test_a_record_brings_its_own_tools_and_template_variables(tiny_base, tmp_path):
    tool = {"name": "t", "parameters": {"type": "object", "properties": {}}}
    records = [
        {"prompt": "你好"},
        {"prompt": "你好", "tools": [tool]},
        {"messages": asked("你好"), "tools": json.dumps([tool]), "chat_template_kwargs": {"tone": "dry"}},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    base = tmp_path / "base"
    shutil.copytree(tiny_base("qwen2"), base)
    (base / "chat_template.jinja").write_text(
        "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}{{ tone }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = load_chat(str(base), chat_format="base")
    questions = [question for _line, question in read_questions(str(tmp_path / "in.jsonl"))]
    prompts = [chat.renderer.tokenizer.decode(chat.prompt_ids(question)) for question in questions]
    shown = '<|im_start|>tools\n[{"type": "function", "function": {"name": "t", "parameters": {"type": "object", '
    shown += '"properties": {}}}}]'
    plain = "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [plain, f"{shown}<|im_end|>\n{plain}", f"{shown}dry<|im_end|>\n{plain}"]
    reply_to_file(chat, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), sampling=Sampling(max_new_tokens=1))
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer.get("chat_template_kwargs") for answer in answers] == [None, None, {"tone": "dry"}]
    assert [tool["function"]["name"] for answer in answers for tool in answer.get("tools", [])] == ["t", "t"]


def test_records_with_tools_are_refused_in_one_line_where_the_format_has_no_place(tiny_base, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "tools": [{"name": "t"}]}\n')
    chat = load_chat(str(tiny_base("qwen2")), chat_format="blossom")
    with pytest.raises(ValueError, match=r"in.jsonl line 1: chat format 'blossom' has no place for tools; use chatml"):
        reply_to_file(chat, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    chat.renderer.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat.renderer = Renderer(chat.renderer.tokenizer, "base")
    with pytest.raises(ValueError, match=r"in.jsonl line 1: chat format 'base' has no place for tools"):
        reply_to_file(chat, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    with pytest.raises(RecordError, match="is a list; write an object of template variables"):
        to_prompt({"prompt": "a", "chat_template_kwargs": [1]})


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    return str(path)


def test_a_system_message_is_added_before_questions_that_have_none(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "system": "own"}\n')
    systems = [messages[0]["content"] for _line, messages in read_questions(str(tmp_path / "in.jsonl"), "given")]
    assert systems == ["given", "own"]


def test_the_check_names_file_and_line_and_finds_a_changed_question(source, tmp_path):
    def at_most_ten(messages):
        if "2" in messages[-1]["content"]:
            raise ValueError("too long")

    with pytest.raises(ValueError, match=r"in\.jsonl line 3: too long$"):
        check_questions(source, None, at_most_ten)
    count, digest = check_questions(source, None, len)
    assert count == 3
    assert check_questions(source, "s", len)[1] != digest
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        check_questions(str(tmp_path / "empty.jsonl"), None, len)


def reply_backwards(questions):
    """Replies come in another order than the questions, as the short ones end first."""
    for position, messages in reversed(list(questions)):
        yield position, Reply(messages[-1]["content"].upper(), True, 1)


def answered(path) -> list[str]:
    return [json.loads(line)["messages"][-1]["content"] for line in path.read_text().splitlines()]


def test_an_answer_that_was_cut_is_not_to_be_trained(source, tmp_path):
    def reply(questions):
        for position, _messages in list(questions):
            yield position, Reply("an answer", position == 1, 1)

    list(answer_missing(Partial(tmp_path / "partial", {}), read_questions(source), reply))
    lines = (tmp_path / "partial").read_text().splitlines()[1:]
    assert [json.loads(line)["messages"][-1].get("train") for line in lines] == [False, None, False]


def test_the_answers_are_in_the_order_of_the_questions(source, tmp_path):
    partial = Partial(tmp_path / "out.partial", RUN)
    assert len(list(answer_missing(partial, read_questions(source), reply_backwards))) == 3
    partial.finish(tmp_path / "out", overwrite=False)
    partial.close()
    assert answered(tmp_path / "out") == [question.upper() for question in QUESTIONS]
    assert json.loads((tmp_path / "out").read_text().splitlines()[0]) == {
        "messages": [*asked("question 0"), {"role": "assistant", "content": "QUESTION 0"}],
        "ended": True,
        "num_tokens": 1,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]


def test_a_file_cut_off_at_any_byte_resumes_with_every_answer_that_is_whole(source, tmp_path):
    path = tmp_path / "out.partial"
    partial = Partial(path, RUN)
    list(answer_missing(partial, read_questions(source), reply_backwards))
    partial.close()
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        partial = Partial(path, RUN)
        kept = max(whole[:size].count(b"\n") - 1, 0)
        assert sorted(partial.offsets) == list(range(3))[3 - kept :]
        assert len(list(answer_missing(partial, read_questions(source), reply_backwards))) == 3 - kept
        partial.close()
        assert path.read_bytes() == whole


def test_answers_of_another_run_or_another_file_are_refused_and_stay(tmp_path):
    path = tmp_path / "out.partial"
    Partial(path, RUN).close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds answers of a run with another sampling; rerun that run's own command"):
        Partial(path, {**RUN, "sampling": {"temperature": 0.5}})
    assert path.read_bytes() == before
    for foreign in ("notes of mine", "[1]\n", '{"answers_of": 1}\n'):
        path.write_text(foreign)
        with pytest.raises(ValueError, match=r"not written by sft\.chat; move it away"):
            Partial(path, RUN)
        assert path.read_text() == foreign


def test_two_processes_never_write_one_file(tmp_path):
    partial = Partial(tmp_path / "out.partial", RUN)
    with pytest.raises(ValueError, match="another process is writing it"):
        Partial(tmp_path / "out.partial", RUN)
    partial.close()
    Partial(tmp_path / "out.partial", RUN).close()


def test_a_damaged_line_is_answered_again(source, tmp_path):
    path = tmp_path / "out.partial"
    partial = Partial(path, RUN)
    list(answer_missing(partial, read_questions(source), reply_backwards))
    partial.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\0\0\0\n", *lines[3:]]))
    partial = Partial(path, RUN)
    assert len(list(answer_missing(partial, read_questions(source), reply_backwards))) == 1
    partial.finish(tmp_path / "out", overwrite=False)
    assert answered(tmp_path / "out") == [question.upper() for question in QUESTIONS]


def test_an_output_that_appeared_meanwhile_is_not_replaced(source, tmp_path):
    partial = Partial(tmp_path / "out.partial", RUN)
    list(answer_missing(partial, read_questions(source), reply_backwards))
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="exists; add --overwrite"):
        partial.finish(tmp_path / "out", overwrite=False)
    assert (tmp_path / "out").read_text() == "mine" and (tmp_path / "out.partial").exists()


SHORT = Sampling(temperature=0.0, repetition_penalty=1.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def tiny_chat(tiny_base) -> Chat:
    return load_chat(str(tiny_base("qwen2")))


def test_another_checkpoint_is_known_by_its_weights(tiny_base):
    chat = load_chat(str(tiny_base("qwen2")))
    before = hash_weights(chat.model)
    assert before == hash_weights(load_chat(str(tiny_base("qwen2"))).model)
    with torch.no_grad():
        chat.model.lm_head.weight *= 1.001
    assert hash_weights(chat.model) != before


def test_a_partial_file_of_another_model_or_sampling_is_refused(tiny_chat, tiny_base, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    source, output = str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")

    def broken(questions, *_arguments, **_options):
        raise KeyboardInterrupt

    stopped = Chat(tiny_chat.model, tiny_chat.renderer)
    stopped.reply_each = broken
    with pytest.raises(KeyboardInterrupt):
        reply_to_file(stopped, source, output, sampling=SHORT)
    with pytest.raises(ValueError, match="of a run with another sampling; rerun that run's own command"):
        reply_to_file(tiny_chat, source, output, sampling=GREEDY)
    retrained = load_chat(str(tiny_base("qwen2")))
    with torch.no_grad():
        retrained.model.lm_head.weight *= 1.001
    with pytest.raises(ValueError, match="of a run with another model; rerun that run's own command"):
        reply_to_file(retrained, source, output, sampling=SHORT)
    assert reply_to_file(tiny_chat, source, output, sampling=SHORT) == 3
    with pytest.raises(ValueError, match="is the file of questions"):
        reply_to_file(tiny_chat, output, output, sampling=SHORT, overwrite=True)


def test_answers_that_are_resumed_on_another_day_have_the_first_days_prompts(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base("qwen2"), tmp_path / "base")
    (base / "chat_template.jinja").write_text(
        "<|im_start|>system\n{{ strftime_now('%d.%m.') }}<|im_end|>\n"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    source, output = str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")
    first, second = load_chat(str(base), chat_format="base"), load_chat(str(base), chat_format="base")
    first.renderer, second.renderer = (
        chat.renderer.on_day(date(2026, 1, day)) for chat, day in ((first, 2), (second, 3))
    )

    def stopped(questions, *_arguments, **_options):
        yield next(iter(questions))[0], Reply("x", True, 1)
        raise KeyboardInterrupt

    first.reply_each = stopped
    with pytest.raises(KeyboardInterrupt):
        reply_to_file(first, source, output, sampling=SHORT)
    assert reply_to_file(second, source, output, sampling=SHORT) == 2
    lines = [json.loads(line)["messages"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [messages[0]["content"] for messages in lines] == ["a", "b"]
