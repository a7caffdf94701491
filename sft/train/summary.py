"""Output of a run: its opening lines, replies before and after, run.json, run page, card and curve."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi

from sft.base import RUN_RECORD, BaseIdentity
from sft.chat.reply import Chat, Reply
from sft.chat.rows import NotFinite
from sft.chat.sampling import GREEDY
from sft.checkpoint.manifest import step_of
from sft.checkpoint.save import PAGE
from sft.dataset.ledger import ledger_lines
from sft.dataset.mixture import mixture_table
from sft.dataset.tokenise import batches
from sft.evaluate import quick
from sft.files import write_json, write_text
from sft.format.render import Renderer
from sft.model.load import context_window, count_parameters
from sft.opendata.conversation import read_conversations
from sft.opendata.files import describe_skipped
from sft.report.card import write_card
from sft.report.charts import plot_losses
from sft.report.measures import mfu_of_a_token, rates, replies_entry, summarise_log
from sft.report.provenance import provenance
from sft.report.run_page import RunPage, render_page
from sft.report.text import paint, say
from sft.train.setup import Data, Run, check_saved_folder, describe_processes
from sft.train.trainer import Trainer

EVALUATION_METRICS = ("eval_loss", "eval_perplexity", "eval_token_accuracy")
LORA_FLAGS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_variant", "lora_router")
MAX_REPLY_CHARACTERS = 80  # of the reply before training
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
        self.trainer = trainer
        self.renderer = run.renderer
        self.max_new_tokens = data.max_new_tokens
        chosen = pick_questions(list(run.files.times), data.num_reply_prompts, encoding=data.encoding)
        self.questions = self._answerable(chosen)
        self.fixed = self.questions[: len(FIXED_PROMPTS)]
        self.before = self.ask_fixed()
        self.after = []
        asked = quick.questions() if data.eval_quick else []
        self._quick_questions = self._answerable([(question["prompt"], question) for question in asked])
        self._quick_before = self._ask(self._quick_questions)

    def ask_fixed(self) -> list[Reply]:
        """Reply to the fixed prompts with the weights as they are now."""
        return self._ask(self.fixed)

    def ask_all(self) -> None:
        """Reply to all questions and keep the replies in `after`."""
        self.after = self._ask(self.questions)

    def compare_quick(self) -> dict:
        """With --eval_quick, ask the quick check's questions again; return its entry of run.json, else nothing."""
        after = self._ask(self._quick_questions) if self._quick_before else []
        if not after:
            return {}
        questions = [question for _prompt, question in self._quick_questions]
        found = quick.compare_replies(questions, after, self._quick_before)
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


def make_record(run: Run, data: Data, model, fingerprint: dict) -> dict:
    """Return what run.json, the run page and the model card say of the run before its first step."""
    trained, total = count_parameters(model)
    left_out = {"data", "base", "chat_format"} | (set() if hasattr(model, "peft_config") else set(LORA_FLAGS))
    is_plain = data.rows.mixture.is_plain
    example = [user("1+1等于几？"), {"role": "assistant", "content": "2"}]
    return {
        **provenance(),
        "model": run.model_path,
        **run.renderer.describe(),
        "seed": run.seed,
        "data": {"train": run.files.train_hashes, "eval": run.files.held_out_hashes},
        "mixture": [] if is_plain else mixture_table(data.rows.mixture, data.examples.lengths),
        "ledger": data.ledgers,
        "parameters": {"all": total, "trained": trained},
        "device": fingerprint["told"]["device"],
        "settings": {name: value for name, value in fingerprint["exact"].items() if name not in left_out},
        "example": run.renderer.text(example),
    }


def store_base(trainer: Trainer, run: Run) -> BaseIdentity:
    """Hash the base in the background, on the rank that saves, and store the hash with checkpoints and adapters."""
    base = BaseIdentity(run.model_path, cache_dir=run.settings.data.cache_dir, say=say)
    if trainer.args.should_save:
        base.start()
    trainer.saves.base = base
    if run.settings.model.lora:
        base.store_with_adapters(trainer.model)
    return base


def say_opening(trainer: Trainer, run: Run, data: Data) -> None:
    """Print what goes in: ledger, one row with its trained tokens, mixture, tokens, steps, parameters."""
    examples = data.examples
    rows = data.rows
    renderer = run.renderer
    for name, ledger in zip(("data", "held out"), data.ledgers.values(), strict=False):
        say("\n".join(f"{name}: {line}" for line in ledger_lines(ledger)))
    for line in describe_skipped(run.files.skipped):
        say(f"data: {line}")
    say(f"chat format {renderer.name}: {renderer.reason}")
    if renderer.writes_date:
        say(f"the chat template writes the date: this run trains with {renderer.today}, a server writes its own")
    if renderer.thinking is not None:
        say(describe_thinking(renderer))
    say(f"first row, trained tokens marked (chat format {renderer.name}):")
    say(paint(renderer.tokenizer, **examples[0]))
    if not rows.mixture.is_plain:
        for file, count, often, taken, _tokens, share in mixture_table(rows.mixture, examples.lengths)[1:]:
            say(f"mixture: {file}: an epoch takes {taken} of {count} conversations ({often}x), {share} of its tokens")
    if rows.fill:
        say(f"packed: {len(rows):,} rows, {rows.fill:.1%} full")
    tokens = int(examples.lengths.sum())
    trained = examples.num_trained_tokens
    say(f"tokens: {tokens:,}, trained {trained:,} ({trained / tokens:.0%})")
    _say_steps(trainer, rows, renderer.stop_ids)
    trained, total = count_parameters(trainer.model)
    say(f"parameters: {total:,}, trained {trained:,} ({trained / total:.1%})")


def describe_thinking(renderer: Renderer) -> str:
    """Say what the thinking switch's default is after this training, and how to set it in a server."""
    state, kind = ("on", "have") if renderer.thinking else ("off", "lack")
    variable = json.dumps({renderer.thinking_switch: renderer.thinking})
    why = f"all trained replies {kind} a thought"
    return f"thinking is {state} by default, as {why}; set it in a server by chat_template_kwargs {variable}"


def _say_steps(trainer: Trainer, rows, stop_ids: list[int]) -> None:
    arguments = trainer.args
    per_update = trainer.updates.rows_per_update
    steps = trainer.updates.in_all(arguments.num_train_epochs, arguments.max_steps)
    tokens = rows.num_tokens * per_update // len(rows)
    shares = f"{arguments.train_batch_size} x {arguments.gradient_accumulation_steps} x {describe_processes(arguments)}"
    say(f"steps: {steps:,} of {per_update} rows ({shares}), about {tokens:,} tokens; stop ids: {stop_ids}")


def run_page(trainer: Trainer, run: Run, record: dict, replies: Replies) -> RunPage:
    """Return the callback that keeps report.html up to date, from before the first step on."""
    arguments = trainer.args
    questions = [question for question, _answers in replies.fixed]
    mfu = None
    if arguments.bf16 or arguments.fp16:
        mfu = mfu_of_a_token(trainer.model, device=record["device"], world_size=arguments.world_size)
    asks = replies.before and run.settings.data.eval_replies
    return RunPage(
        Path(run.output_dir),
        record,
        before=replies_entry(0, questions, replies.before) if replies.before else None,
        questions=questions,
        reply=replies.ask_fixed if asks else None,
        mfu=mfu,
    )


def last_evaluation(trainer: Trainer) -> dict[str, float]:
    """Return the metrics of the model on the held-out rows, evaluating only if that was not done yet.

    The model is that of the last step, or of the best checkpoint under --load_best_model_at_end.
    """
    if trainer.eval_dataset is None or trainer.args.eval_strategy == "no":
        return {}
    step = trainer.state.global_step
    if trainer.args.load_best_model_at_end:
        best = trainer.state.best_model_checkpoint
        step = step_of(Path(best)) if best else step
        say(f"the model is that of step {step}")
        if step != trainer.state.best_global_step:
            say(f"the best evaluation was at step {trainer.state.best_global_step}, of which no checkpoint was saved")
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == step]
    return evaluations[-1] if evaluations else trainer.evaluate()


def write_results(trainer: Trainer, run: Run, record: dict, metrics: dict, replies: Replies, *, seconds: float) -> None:
    """Write run.json, the run page, the model card and training_loss.png; show the replies, and sum the run up."""
    folder = Path(run.output_dir)
    history = trainer.state.log_history
    steps = trainer.state.global_step
    plot_losses(history, folder / "training_loss.png")
    summary = {
        "steps": steps,
        **summarise_log(history),
        "seconds": round(seconds, 1),
        "tokens_seen": trainer.state.num_input_tokens_seen,
        **{name: metrics[name] for name in EVALUATION_METRICS if name in metrics},
    }
    if replies.after:
        summary |= rates(replies.after)
        summary["replies_as_in_data"] = _count_known(replies)
        fixed = [question for question, _answers in replies.fixed]
        history.append(replies_entry(steps, fixed, replies.after[: len(fixed)]))
    asked = _entries(replies)
    record = {**record, "metrics": summary, "replies": asked, "log_history": history}
    write_json(folder / RUN_RECORD, record)
    write_text(folder / PAGE, render_page(record, folder, step=steps, steps=steps, finished=True))
    write_card(folder, record)
    for entry in asked[: len(replies.before)]:
        before = entry["before"][:MAX_REPLY_CHARACTERS]
        say(f"\n> {entry['question']}\n  before: {before!r}\n  after:  {entry['after']}")
    say("\ndone: " + ", ".join(f"{name} {_short(value)}" for name, value in summary.items() if value is not None))
    say(f"the run, its curves and replies: {folder / PAGE}")
    say(f"chat with it: python -m sft.chat --model_path {folder}")


def _count_known(replies: Replies) -> str:
    """Return how many questions of the data got an answer of the data."""
    pairs = zip(replies.after, replies.questions, strict=True)
    known = [reply.text in answers for reply, (_question, answers) in pairs if answers]
    return f"{sum(known)} of {len(known)}"


def _entries(replies: Replies) -> list[dict]:
    """Return run.json's entry of each question."""
    entries = []
    for number, ((question, answers), reply) in enumerate(zip(replies.questions, replies.after, strict=False)):
        entry = {"question": question, "answers_in_data": answers, "after": reply.text, "ended": reply.ended}
        if number < len(replies.before):
            entry["before"] = replies.before[number].text
        entries.append(entry)
    return entries


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check_and_push(trainer: Trainer, run: Run) -> None:
    """Check the finished output folder; upload it, without its checkpoints, where --push_to_hub asks for it."""
    say(check_saved_folder(run))
    if not trainer.args.push_to_hub:
        return
    folder = trainer.args.output_dir
    repository = trainer.hub_model_id
    options = {"ignore_patterns": ["checkpoint-*", ".*", "_*"], "revision": trainer.args.hub_revision}
    try:
        say(f"pushing to {repository}")
        HfApi().upload_folder(repo_id=repository, folder_path=folder, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{folder} is saved, but not pushed: {reason}; hf upload {repository} {folder}") from error
