"""The running batch: the same tokens as alone, each request with its own settings, and no request left waiting."""

import threading
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from sft.chat.batching import BusyError, Decoder
from sft.chat.reply import load_chat
from sft.chat.rows import PREFILL_TOKENS
from sft.chat.sampling import Sampling

# A family's context may be long or short; these prompts pass a piece, and Mistral's window of 256 here.
PENALTY = 1.05
LENGTHS = (5, 300, 17, PREFILL_TOKENS + 40, 41, 3)


@pytest.fixture(scope="module")
def model(tiny_base):
    return load(tiny_base("qwen2"))


def greedy(max_new_tokens: int) -> Sampling:
    return Sampling(temperature=0.0, repetition_penalty=PENALTY, max_new_tokens=max_new_tokens)


def load(folder):
    """Load a base and make its layers strong: as it is it says one token for ever, which any mistake would leave so."""
    model = load_chat(str(folder)).model
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" not in name and "lm_head" not in name and weight.dim() > 1:
                weight *= 25
    return model


def prompts(model) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    size = model.config.vocab_size - 100
    return [torch.randint(20, size, (length,), generator=generator).tolist() for length in LENGTHS]


def alone(model, prompt: list[int], num_tokens: int, **options) -> list[int]:
    """The tokens that transformers' own `generate` gives."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": num_tokens, **options}
    options |= {"repetition_penalty": PENALTY}
    with torch.inference_mode():
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def join_and_leave(decoder: Decoder, texts: list[list[int]]) -> list:
    """Start a request every few tokens, with replies of different lengths, so that rows come and go."""
    requests = []
    for index, prompt in enumerate(texts):
        requests.append(decoder.add(prompt, greedy(9 + 7 * (index % 3))))
        for _ in range(4):
            decoder.step()
    decoder.run()
    return requests


def test_replies_that_join_and_leave_are_those_of_generate(family, tiny_base):
    model = load(tiny_base(family))
    decoder = Decoder(model, stop_ids=[])
    texts = prompts(model)
    assert decoder.joins_rows
    found = [request.ids for request in join_and_leave(decoder, texts)]
    assert found == [alone(model, text, 9 + 7 * (index % 3)) for index, text in enumerate(texts)]


def test_rows_are_really_computed_together(model, monkeypatch):
    shapes = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, *args, **given: shapes.append(tuple(given["input_ids"].shape)) or forward(self, *args, **given),
    )
    decoder = Decoder(model, stop_ids=[])
    join_and_leave(decoder, prompts(model))
    assert max(rows for rows, columns in shapes if columns == 1) >= 3
    assert max(columns for _rows, columns in shapes) == PREFILL_TOKENS


def test_a_token_that_the_model_has_no_row_for_is_refused_before_it_fails_the_others(model):
    decoder = Decoder(model, stop_ids=[])
    rows = model.get_input_embeddings().num_embeddings
    running = decoder.add([5, rows - 1], greedy(3))
    with pytest.raises(ValueError, match=f"a token of id {rows}, but the model has {rows} embedding rows"):
        decoder.add([5, rows], greedy(3))
    decoder.run()
    assert len(running.ids) == 3


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-7])
def test_a_temperature_near_zero_is_greedy_and_fails_no_other_request(model, temperature):
    decoder = Decoder(model, stop_ids=[])
    cold = replace(greedy(3), temperature=temperature)
    requests = [decoder.add([5, 6], sampling) for sampling in (greedy(3), cold)]
    decoder.run()
    assert requests[0].ids == requests[1].ids
    with pytest.raises(ValueError, match=r"the repetition penalty must be from 0\.01 to 100"):
        decoder.add([5, 6], Sampling(repetition_penalty=1e-300))


@pytest.mark.parametrize("keeps", [True, False])
def test_a_model_whose_rows_cannot_be_joined_answers_in_turns(model, keeps, monkeypatch):
    decoder = Decoder(model, stop_ids=[])
    decoder.row_model.joins_rows = False
    if not keeps:  # nor gives it a cache
        decoder.row_model.accepted = {"input_ids", "attention_mask", "logits_to_keep"}
        monkeypatch.setattr(model.config, "use_cache", False)
    texts = prompts(model)[:3]
    found = [request.ids for request in join_and_leave(decoder, texts)]
    monkeypatch.undo()
    assert found == [alone(model, text, 9 + 7 * (index % 3)) for index, text in enumerate(texts)]


@pytest.mark.parametrize("kind", ["mamba", "qwen3_next"])
def test_a_state_space_or_hybrid_model_answers_in_turns_too(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 1000, "intermediate_size": 32}
    if kind == "qwen3_next":
        sizes |= {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "layer_types": ["linear_attention", "full_attention"],
        }
        sizes |= {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 16}
        sizes |= {"shared_expert_intermediate_size": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    decoder = Decoder(model, stop_ids=[])
    assert not decoder.joins_rows
    texts = prompts(model)[:3]
    found = [request.ids for request in join_and_leave(decoder, texts)]
    assert found == [alone(model, text, 9 + 7 * (index % 3)) for index, text in enumerate(texts)]


def test_a_model_without_a_cache_answers_in_turns():
    from benchmarks.families import build_model, compare_replies

    assert compare_replies(build_model("openai-gpt")) == "equal, in turn"


def test_remote_code_answers_in_turns(model, monkeypatch):
    monkeypatch.setattr(type(model), "__module__", "transformers_modules.someone.modeling")
    assert not Decoder(model, stop_ids=[]).joins_rows


def test_a_seed_gives_the_same_reply_alone_and_in_a_batch(model):
    texts, sampling = prompts(model)[:3], Sampling(temperature=1.0, max_new_tokens=12)
    together = Decoder(model, stop_ids=[])
    requests = [together.add(text, sampling, seed=index) for index, text in enumerate(texts)]
    together.run()
    for index, (text, request) in enumerate(zip(texts, requests, strict=True)):
        single = Decoder(model, stop_ids=[])
        again = single.add(text, sampling, seed=index)
        single.run()
        assert again.ids == request.ids
    assert together.add(texts[0], sampling, seed=8).random.random() != requests[0].random.random()


def test_a_stop_token_a_limit_and_the_context_window_end_a_reply(model):
    prompt = prompts(model)[0]
    tokens = alone(model, prompt, 8)
    decoder = Decoder(model, stop_ids=[tokens[5]], window=len(prompt) + 3)
    request = decoder.add(prompt, greedy(100))
    none_left = decoder.add([1] * 9, greedy(100))
    decoder.run()
    assert request.ids == tokens[:3] and none_left.ids == [] and none_left.done
    decoder.window = None
    single = decoder.add(prompt, greedy(1))
    decoder.run()
    assert single.ids == tokens[:1]
    request = decoder.add(prompt, greedy(100))
    decoder.run()
    assert request.ids == tokens[: tokens.index(tokens[5]) + 1]


def test_a_cancelled_request_is_gone_before_the_next_token_and_the_others_stay_right(model):
    texts = prompts(model)[:3]
    decoder = Decoder(model, stop_ids=[])
    first, second, third = (decoder.add(text, greedy(30)) for text in texts)
    for _ in range(5):
        decoder.step()
    second.cancel()
    length = len(second.ids)
    decoder.step()
    assert (len(second.ids), second.done, decoder.num_active) == (length, True, 2)
    # The long row took its columns with it.
    assert decoder.batches[0].mask.shape[1] == len(texts[2]) + len(third.ids)
    decoder.run()
    assert [first.ids, third.ids] == [alone(model, texts[0], 30), alone(model, texts[2], 30)]


def test_a_request_that_is_cancelled_while_it_waits_never_runs(model):
    decoder = Decoder(model, stop_ids=[])
    decoder.max_active = 1
    first, second = (decoder.add([5, 6], greedy(4)) for _ in range(2))
    decoder.step()
    assert (decoder.queue_position(first), decoder.queue_position(second), decoder.num_active) == (-1, 0, 1)
    second.cancel()
    decoder.run()
    assert (len(first.ids), second.ids, second.done) == (4, [], True)


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty"])
def test_a_setting_that_is_no_number_is_refused_before_it_can_fail_the_others(model, name):
    decoder = Decoder(model, stop_ids=[])
    request = decoder.add([5, 6], greedy(3))
    with pytest.raises(ValueError, match="must be a finite number"):
        decoder.add([5], Sampling(**{name: float("nan")}))
    decoder.run()
    assert len(request.ids) == 3


def test_as_many_wait_and_run_as_are_let_in(model):
    decoder = Decoder(model, stop_ids=[])
    decoder.max_active, decoder.max_waiting = 2, 1
    requests = [decoder.add([5, 6], greedy(3)) for _ in range(3)]
    with pytest.raises(BusyError, match="3 requests are waiting"):
        decoder.add([5], greedy(3))
    decoder.step()
    assert (decoder.num_active, len(decoder.waiting)) == (2, 1)
    decoder.run()
    assert [len(request.ids) for request in requests] == [3, 3, 3]


def test_long_rows_are_not_laid_beside_so_many_that_memory_ends(model, monkeypatch):
    monkeypatch.setattr("sft.chat.batching.MAX_CACHED_TOKENS", 100)
    decoder = Decoder(model, stop_ids=[])
    requests = [decoder.add([5] * 30, greedy(10)) for _ in range(4)]
    most = 0
    while decoder.step():
        most = max(most, decoder.num_active)
    assert most == 2
    assert [len(request.ids) for request in requests] == [10] * 4


def test_a_long_prompt_is_read_in_pieces_while_the_others_generate(model):
    decoder = Decoder(model, stop_ids=[])
    short = decoder.add([5, 6], greedy(50))
    decoder.step()
    long = decoder.add([7] * (PREFILL_TOKENS * 3), greedy(3))
    counts = []
    while not long.done:
        before = len(short.ids)
        decoder.step()
        counts.append(len(short.ids) - before)
    assert counts[:3] == [1, 1, 1]


def test_an_exception_in_the_model_reaches_every_reader_and_later_requests_are_answered(model, monkeypatch):
    decoder = Decoder(model, stop_ids=[])
    decoder.max_active = 2
    requests = [decoder.add([5, 6], greedy(50)) for _ in range(4)]
    errors = []

    def read(request) -> None:
        try:
            list(decoder.follow(request))
        except RuntimeError as error:
            errors.append(str(error))

    def broken(*_args, **_given):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", broken)
        readers = [threading.Thread(target=read, args=(request,)) for request in requests]
        for reader in readers:
            reader.start()
        decoder.start()
        for reader in readers:
            reader.join(30)
    assert errors == ["out of memory"] * 4
    decoder.start()
    request = decoder.add([5, 6], greedy(4))
    decoder.start()
    assert list(decoder.follow(request))[-1] == 4


def test_numbers_that_are_not_finite_are_an_error(model, monkeypatch):
    forward = type(model).forward

    def nan(self, *args, **given):
        output = forward(self, *args, **given)
        output.logits[:] = torch.nan
        return output

    monkeypatch.setattr(type(model), "forward", nan)
    decoder = Decoder(model, stop_ids=[])
    request = decoder.add([5], Sampling())
    decoder.run()
    with pytest.raises(ValueError, match="not finite"):
        list(decoder.follow(request))


def test_many_threads_read_their_own_replies(model):
    decoder = Decoder(model, stop_ids=[])
    texts = [[20 + index, 30, 40 + index] for index in range(10)]
    expected = [alone(model, text, 10) for text in texts]
    found = [None] * len(texts)

    def ask(index: int) -> None:
        request = decoder.add(texts[index], greedy(10))
        decoder.start()
        list(decoder.follow(request))
        found[index] = request.ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_a_training_model_is_evaluated_and_trains_on(model):
    model.train()
    try:
        decoder = Decoder(model, stop_ids=[])
        request = decoder.add([5, 6], greedy(3))
        decoder.run()
        assert model.training
    finally:
        model.eval()
    assert request.ids == alone(model, [5, 6], 3)


def test_requests_without_memory_fail_and_the_next_ones_are_answered(model, monkeypatch):
    decoder = Decoder(model, stop_ids=[])
    with monkeypatch.context() as patched:
        patched.setattr(
            decoder.row_model, "to_rows", lambda requests: (_ for _ in ()).throw(RuntimeError("out of memory"))
        )
        lost = decoder.add([1, 2, 3], greedy(2))
        decoder.step()
    assert lost.done and str(lost.error) == "out of memory"
    answered = decoder.add([1, 2, 3], greedy(2))
    decoder.run()
    assert answered.error is None and len(answered.ids) == 2
