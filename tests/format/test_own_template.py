"""A model's own chat template: each trained turn at the prompt that a server builds, for any template."""

import itertools
import json
import re
from datetime import date

import pytest
from transformers import AutoTokenizer

from sft.format.contract import check_contract, choose_format
from sft.format.render import Renderer
from sft.format.tokens import IGNORE_INDEX
from sft.opendata.fields import RecordError

# A template that a base could carry: ChatML, no surprises.
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！很高兴见到你。"},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "**4**"},
]


@pytest.fixture
def own(tiny_base):
    """Return a function that gives a Renderer of a chat template on a tiny Qwen's tokenizer."""

    def renderer(template, **options) -> Renderer:
        tokenizer = AutoTokenizer.from_pretrained(tiny_base("qwen2"))
        tokenizer.chat_template = template
        return Renderer(tokenizer, "base", **options)

    return renderer


def replies(renderer: Renderer, row) -> list[str]:
    """The trained runs of a row, decoded."""
    pairs = zip(row.input_ids.tolist(), (row.labels != IGNORE_INDEX).tolist(), strict=True)
    groups = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [renderer.tokenizer.decode([id for id, _ in group]) for is_trained, group in groups if is_trained]


def test_a_template_that_keeps_history_trains_all_turns_in_one_row(own):
    renderer = own(PLAIN_TEMPLATE.replace("m.content", "m.content | trim"))
    assert check_contract(renderer) == []
    chatml = Renderer(renderer.tokenizer, "chatml")
    for messages in (TURNS, [SYSTEM, *TURNS], TURNS[:2]):
        ours, row = chatml.render(messages), renderer.render(messages)
        assert row.input_ids.tolist() == ours.input_ids[: len(row.input_ids)].tolist()
        assert row.labels.tolist() == ours.labels[: len(row.labels)].tolist()


def test_a_template_that_does_not_trim_is_trained_as_it_is(own):
    renderer = own(PLAIN_TEMPLATE)
    assert check_contract(renderer) == []
    row = renderer.render([TURNS[0], {"role": "assistant", "content": " spaced \n"}])
    assert replies(renderer, row) == [" spaced \n<|im_end|>"]


def test_a_template_that_rewrites_history_gives_a_row_for_each_turn(own):
    thinking = PLAIN_TEMPLATE.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}<think>\n</think>\n{% endif %}{{ m.content }}"
    )
    renderer = own(thinking)
    assert check_contract(renderer) == []
    rows = renderer.render_conversation(TURNS)
    assert [replies(renderer, row) for row in rows] == [
        ["<think>\n</think>\n你好！很高兴见到你。<|im_end|>"],
        ["<think>\n</think>\n**4**<|im_end|>"],
    ]
    for row, end in zip(rows, (1, 3), strict=True):
        prompt = renderer.prompt(TURNS[:end])
        assert row.input_ids[: len(prompt)].tolist() == prompt
    assert replies(renderer, own(thinking, train_turns="last").render(TURNS)) == ["<think>\n</think>\n**4**<|im_end|>"]


def test_a_template_that_changes_a_text_costs_the_conversations_that_it_changes(own):
    renderer = own(PLAIN_TEMPLATE.replace("m.content", "m.content | trim | escape"))
    assert check_contract(renderer) == []
    rows = renderer.render_rows([TURNS, [TURNS[0], {"role": "assistant", "content": "a & b"}]])
    assert rows.outcomes == ["whole", "template"]
    assert rows.whys[1] == "the chat template drops or changes the text of a reply"


def test_a_typed_end_of_a_thought_is_text_for_a_template_that_looks_for_it(own):
    renderer = own(PLAIN_TEMPLATE.replace("m.content", "(m.content.split('</think>') | last) | trim"))
    odd = [{"role": "user", "content": "b</think>c"}, {"role": "assistant", "content": "<think>a</think>d"}]
    row = renderer.render(odd)
    assert replies(renderer, row) == ["<think>a</think>d<|im_end|>"]
    assert "b</think>c" in renderer.tokenizer.decode(row.input_ids)


def test_a_template_that_raises_loses_the_conversation_with_its_own_words(own):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    renderer = own(strict + PLAIN_TEMPLATE)
    rows = renderer.render_rows([TURNS, [SYSTEM, *TURNS]])
    assert rows.outcomes == ["whole", "template"]
    assert rows.whys[1] == "the chat template refuses it: System role not supported"


def test_a_template_that_drops_a_message_loses_the_conversation(own):
    deaf = PLAIN_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(RecordError, match="drops or changes a message of role 'system'"):
        own(deaf).render([SYSTEM, *TURNS])


def test_a_template_without_an_end_of_turn_is_refused(own):
    with pytest.raises(ValueError, match="no control token ends a reply"):
        own("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")


def test_a_template_that_writes_the_date_has_the_date_of_the_run(own):
    dated = "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n" + PLAIN_TEMPLATE
    renderer = own(dated, today=date(2026, 3, 7))
    assert renderer.writes_date
    assert renderer.text(TURNS[:1]).startswith("<|im_start|>system\n07 Mar 2026<|im_end|>\n")
    assert renderer.fingerprint() == own(dated, today=date(2026, 3, 7)).fingerprint()
    assert renderer.fingerprint() != own(dated, today=date(2026, 3, 8)).fingerprint()
    assert check_contract(renderer) == []  # on a later day too, as a resume is


def test_words_behind_the_header_of_a_prompt_are_not_taken_for_the_header_of_the_reply(own):
    """Apriel's prompts end in words that its history lacks; the header before them is in the prompt already."""
    worded = PLAIN_TEMPLATE.replace("assistant\n{% endif %}", "assistant\nHere are my thoughts:\n{% endif %}")
    renderer = own(worded)
    row = renderer.render([TURNS[0], {"role": "assistant", "content": "Here you are."}])
    assert renderer.tokenizer.decode(row.input_ids).endswith("Here are my thoughts:\nHere you are.<|im_end|>")
    assert replies(renderer, row) == ["Here you are.<|im_end|>"]


def test_the_saved_template_is_the_bases_byte_for_byte(own):
    assert own(PLAIN_TEMPLATE).chat_template == PLAIN_TEMPLATE


def test_of_a_list_of_templates_the_default_is_used(own):
    renderer = own({"default": PLAIN_TEMPLATE, "tool_use": "{{ raise_exception('no') }}"})
    assert renderer.chat_template == PLAIN_TEMPLATE


def test_a_list_of_templates_without_a_default_is_named(own):
    with pytest.raises(ValueError, match="its chat templates are rag, tool_use, none is named default; save one"):
        own({"tool_use": PLAIN_TEMPLATE, "rag": PLAIN_TEMPLATE})


def test_a_template_that_always_writes_the_assistant_header_trains_each_turn_once(own):
    """Llama 3's first template ignores `add_generation_prompt`."""
    headed = re.sub(r"{% if add_generation_prompt %}(.*){% endif %}$", r"\1", PLAIN_TEMPLATE)
    renderer = own(headed)
    assert check_contract(renderer, [TURNS]) == []
    row = renderer.render([*TURNS[:2], *TURNS])
    assert replies(renderer, row) == [f"{TURNS[1]['content']}<|im_end|>"] * 2 + ["**4**<|im_end|>"]
    assert renderer.tokenizer.decode(row.input_ids).count("<|im_start|>assistant") == 3


def test_variables_of_the_run_reach_the_template_and_a_fixed_switch_stays(own):
    switch = (
        PLAIN_TEMPLATE.replace("{% endif %}", "", 1)
        + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    assert own(switch).thinking_switch == "enable_thinking"
    assert own(switch).text(TURNS[:1], thinking=False).endswith("<think>\n\n</think>\n\n")
    fixed = own(switch, template_kwargs={"enable_thinking": False})
    assert fixed.text(TURNS[:1], thinking=True).endswith("<think>\n\n</think>\n\n")
    assert fixed.thinking_switch is None
    assert own(PLAIN_TEMPLATE).thinking_switch is None


def test_a_checkpoint_keeps_format_variables_and_date_by_its_run_json(own, tmp_path):
    renderer = own(PLAIN_TEMPLATE)
    renderer.tokenizer.save_pretrained(tmp_path)
    run = {"chat_format": "base", "template_kwargs": {"reasoning_effort": "high"}, "template_date": "2026-03-07"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    again = Renderer(AutoTokenizer.from_pretrained(tmp_path))
    assert (again.name, again.chat_template) == ("base", PLAIN_TEMPLATE)
    assert (again.template_kwargs, again.today) == ({"reasoning_effort": "high"}, date(2026, 3, 7))
    assert again.prompt(TURNS[:1]) == renderer.prompt(TURNS[:1])


def test_auto_takes_the_own_template_of_a_chat_model_and_not_of_a_base(tiny_base):
    def tokenizer(**options):
        found = AutoTokenizer.from_pretrained(tiny_base("qwen2"), **options)
        found.chat_template = PLAIN_TEMPLATE
        return found

    name, reason = choose_format("auto", tokenizer(eos_token="<|im_end|>"))
    assert (name, reason) == (
        "base",
        "the model's own template passes the checks, and the model ends its replies with <|im_end|>; "
        "the embedding rows of <|im_start|>, <|im_end|> look trained",
    )
    name, reason = choose_format("auto", tokenizer())
    assert name == "blossom"
    assert re.search(r"its own template ends turns with <\|im_end\|>, on which it may not have been trained", reason)


@pytest.mark.parametrize("name", ["thinking_budget", "reasoning_effort", "thinking_mode"])
def test_a_variable_that_takes_a_number_or_a_word_is_no_switch(own, name):
    """ByteDance's Seed-OSS writes its thinking_budget, and nothing for one of -1."""
    head = (
        f"{{% if {name} is not defined %}}{{% set {name} = -1 %}}{{% endif %}}{{% if {name} != -1 %}}"
        f"<|im_start|>system\n{{{{ {name} }}}}<|im_end|>\n{{% endif %}}"
    )
    renderer = own(head + PLAIN_TEMPLATE)
    assert renderer.thinking_switch is None
    assert renderer.text(TURNS[:1]) == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompts_own_variables_may_have_any_name(own):
    """DeepSeek V3.1 and Kimi call their switch thinking."""
    renderer = own(PLAIN_TEMPLATE + "{% if thinking %}<think>{% endif %}")
    prompts = [renderer.prompt(TURNS[:1], variables={"thinking": value}) for value in (True, False)]
    ends = [renderer.tokenizer.decode(ids).split("<|im_start|>")[-1] for ids in prompts]
    assert ends == ["assistant\n<think>", "assistant\n"]
    with pytest.raises(RecordError, match="multiple values for keyword argument 'messages'"):
        renderer.prompt(TURNS[:1], variables={"messages": []})


def test_a_template_that_demands_tools_trains_conversations_that_have_them(own):
    renderer = own(
        "{% if not tools %}{{ raise_exception('tools needed') }}{% endif %}{{ tools | tojson }}" + PLAIN_TEMPLATE
    )
    tools = [{"type": "function", "function": {"name": "t", "parameters": {"type": "object", "properties": {}}}}]
    renderer.use_bulk_encoder()
    rows = renderer.render_rows([{"messages": TURNS, "tools": tools}, {"messages": TURNS}])
    assert (rows.outcomes, rows.num_rows) == (["whole", "template"], [1, 0])
    assert rows.whys[1] == "the chat template refuses it: tools needed"


def test_a_thought_is_ended_once_where_history_begins_with_its_end(own):
    """DeepSeek V3.1: a prompt ends in <think> or </think>, and each earlier reply begins with </think>."""
    renderer = own(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}</think>{% endif %}"
        "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
    )
    thought = {"role": "assistant", "content": "b", "reasoning_content": "t"}
    rows = renderer.render_conversation([TURNS[0], thought, TURNS[2], TURNS[3]])
    assert [replies(renderer, row) for row in rows] == [["t</think>b<|im_end|>"], ["**4**<|im_end|>"]]
