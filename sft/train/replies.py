"""Replies before and after training: to four fixed prompts, to questions of the data, and to the quick check's."""

import math
from collections.abc import Sequence
from dataclasses import replace

from sft.chat.reply import Chat, Reply
from sft.chat.rows import NotFinite
from sft.chat.sampling import GREEDY
from sft.dataset.dataset import batches
from sft.evaluate import quick
from sft.model.load import context_window
from sft.opendata.conversation import read_conversations
from sft.report.text import say
from sft.train.setup import Run
from sft.train.trainer import Trainer

FIXED_PROMPTS = ("你好", "Hello", "写一首关于春天的诗", "What is the capital of France?")
BATCH_SIZE = 8  # questions
MAX_QUESTION_CHARACTERS = 200
MAX_QUESTIONS_OF_A_FILE = 1000  # from which those to ask are chosen


class Replies:
    """Asks the fixed prompts before training; afterwards those and questions of the data, whose answers are known.

    Under ZeRO-3 and on all ranks but the first, nothing is asked and the lists of replies stay empty.
    """

    def __init__(self, trainer: Trainer, run: Run):
        data = run.settings.data
        self.trainer, self.renderer, self.max_new_tokens = trainer, run.renderer, data.max_new_tokens
        chosen = pick_questions(list(run.files.times), data.num_reply_prompts, encoding=data.encoding)
        self.questions = self._answerable(chosen)
        self.fixed = self.questions[: len(FIXED_PROMPTS)]
        self.before, self.after = self.ask_fixed(), []
        asked = quick.questions() if data.eval_quick else []
        self._quick_questions = self._answerable([(question["prompt"], question) for question in asked])
        self._quick_before = self._ask(self._quick_questions)

    def ask_fixed(self) -> list[Reply]:
        """Reply to the fixed prompts with the weights as they are now."""
        return self._ask(self.fixed)

    def ask_all(self) -> None:
        """Reply to all questions; the replies stand in `after`."""
        self.after = self._ask(self.questions)

    def compare_quick(self) -> dict:
        """With --eval_quick, ask the quick check's questions again; return its entry of run.json, else nothing."""
        after = self._ask(self._quick_questions) if self._quick_before else []
        if not after:
            return {}
        questions = [question for _prompt, question in self._quick_questions]
        found = quick.compare(questions, after, self._quick_before)
        say(f"\nquick check, before training (base) and after (tuned):\n{quick.quick_table(found['rows'])}")
        return {"quick": found}

    def _answerable(self, questions: list[tuple]) -> list[tuple]:
        """Return the (question, ...) that leave room for a reply in the model's context window."""
        window = context_window(self.trainer.model.config) or math.inf
        return [pair for pair in questions if len(self.renderer.prompt([user(pair[0])])) < window]

    def _ask(self, questions: list[tuple]) -> list[Reply]:
        """Reply greedily to each question, on the first process; under ZeRO-3 each rank holds only a part."""
        from transformers.integrations import is_deepspeed_zero3_enabled

        if not questions:
            return []
        if is_deepspeed_zero3_enabled():
            say("replies: not shown under ZeRO-3; ask the saved model with python -m sft.chat")
            return []
        if not self.trainer.is_world_process_zero():
            return []
        chat = Chat(self.trainer.model.to(self.trainer.args.device), self.renderer)
        sampling = replace(GREEDY, max_new_tokens=self.max_new_tokens)
        asked = [[user(question)] for question, _answers in questions]
        try:
            return [reply for batch in batches(asked, BATCH_SIZE) for reply in chat.reply_batch(batch, sampling)]
        except NotFinite as error:  # the training itself names the rows
            say(f"replies: none, {error}")
            return []


def pick_questions(files: Sequence[str], number: int, *, encoding: str = "utf-8") -> list[tuple[str, list[str]]]:
    """Return (question, its answers in the data): the fixed prompts, then `number` of the data, from every file."""
    answers: dict[str, list[str]] = {}
    share = math.ceil(number / len(files))
    chosen = []
    for file in files:
        pool = []
        for conversation, error, _file, _line in read_conversations([file], encoding=encoding):
            if error is None and [message["role"] for message in conversation["messages"]] == ["user", "assistant"]:
                question, answer = (message["content"].strip() for message in conversation["messages"])
                answers.setdefault(question, []).append(answer)
                if len(question) <= MAX_QUESTION_CHARACTERS:
                    pool.append(question)
            if len(pool) >= MAX_QUESTIONS_OF_A_FILE:
                break
        chosen += pool[:: max(1, len(pool) // share)][:share] if share else []
    questions = dict.fromkeys([*FIXED_PROMPTS, *chosen[:number]])
    return [(question, answers.get(question, [])) for question in questions]


def user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}
