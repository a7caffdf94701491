"""Many users of one model: how long do short questions take while somebody has asked for a long reply?

    python benchmarks/many_users.py                 20 users on a tiny CPU model, ours beside the naive pattern

Ours: every user reads `Chat.stream_reply`, which shares one running batch. Naive: one lock around `model.generate`, in
turn. Printed: the median seconds of a short reply, over that of a short reply alone; medians of three rounds.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.chat.reply import Chat, load_chat
from sft.chat.sampling import Sampling
from sft.tiny import build_tiny

SHORT = 24  # tokens
LONG = 800  # tokens


def ours(chat: Chat, num_tokens: int, _lock) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=num_tokens)
    for _reply in chat.stream_reply([{"role": "user", "content": "写一首关于春天的诗"}], sampling):
        pass


def naive(chat: Chat, num_tokens: int, lock) -> None:
    import torch

    ids = torch.tensor([chat.prompt_ids([{"role": "user", "content": "写一首关于春天的诗"}])])
    options = {"do_sample": True, "temperature": 1.0, "top_p": 0.85, "top_k": 50, "repetition_penalty": 1.05}
    options |= {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": num_tokens}
    with lock, torch.inference_mode():
        chat.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def latency(ask, chat: Chat, num_short: int, num_long: int) -> float:
    """Return the median seconds of the short replies, asked for together just after the long ones."""
    lock = threading.Lock()
    seconds = []

    def user(num_tokens: int) -> None:
        begun = time.monotonic()
        ask(chat, num_tokens, lock)
        if num_tokens == SHORT:
            seconds.append(time.monotonic() - begun)

    threads = [threading.Thread(target=user, args=(count,)) for count in [LONG] * num_long + [SHORT] * num_short]
    for index, thread in enumerate(threads):
        thread.start()
        if index == num_long - 1:
            time.sleep(0.05)
    for thread in threads:
        thread.join()
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = build_tiny("qwen2", f"{folder}/base", hidden_size=options.hidden_size, num_layers=options.num_layers)
        chat = load_chat(str(base))
    chat.renderer.stop_ids = ()  # every reply has its full length
    print("| side | users | alone s | median short s | ratio |\n| --- | --- | --- | --- | --- |")
    for num_short in (9, 19):
        for ask in (ours, naive):
            latency(ask, chat, 1, 0)
            rounds = []
            for _ in range(3):
                alone = latency(ask, chat, 1, 0)
                together = latency(ask, chat, num_short, 1)
                rounds.append((together / alone, alone, together))
            ratio, alone, together = sorted(rounds)[1]
            users = f"1 long + {num_short} short"
            print(f"| {ask.__name__} | {users} | {alone:.2f} | {together:.2f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
