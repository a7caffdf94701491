"""Measures of replies and of speed, and the summary of a run's log."""

import csv
import re
import resource
import statistics
from collections.abc import Sequence
from pathlib import Path

from sft.chat.reply import Reply
from sft.model.load import count_parameters
from sft.opendata.cleaning import HAN
from sft.report.charts import points_of

with open(Path(__file__).with_name("gpus.csv"), encoding="utf-8", newline="") as stream:
    # Dense bf16 or fp16 with fp32 sums, from NVIDIA's data sheets and (GeForce) architecture whitepapers.
    PEAK_FLOPS = {row["gpu"]: float(row["teraflops"]) * 1e12 for row in csv.DictReader(stream)}


def repetition(text: str) -> float:
    """Share of a reply's 4-grams that repeat an earlier one (seq-rep-4, Welleck et al. 2020); Chinese by character."""
    words = re.findall(rf"[{HAN}]|[^\W{HAN}]+|[^\w\s]", text)
    grams = list(zip(*(words[start:] for start in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def rates(replies: Sequence[Reply]) -> dict[str, float]:
    """Share of replies that ended by themselves, and the mean of their repetition."""
    return {
        "stop_rate": sum(reply.ended for reply in replies) / len(replies),
        "repetition_rate": sum(repetition(reply.text) for reply in replies) / len(replies),
    }


def replies_entry(step: int, questions: Sequence[str], replies: Sequence[Reply]) -> dict:
    """Return the log entry of what the model said at a step; a checkpoint keeps it with the log."""
    said = [{"question": q, "reply": r.text, "ended": r.ended} for q, r in zip(questions, replies, strict=False)]
    return {"step": step, **rates(replies), "replies": said}


def peak_flops(device: str) -> float | None:
    """Return the FLOP/s that a GPU reaches at most in bf16 or fp16, None where it is not known."""
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(rf"\b{pattern}", device)), None)


def mfu_of_a_token(model, *, device: str, world_size: int) -> float | None:
    """Return the model FLOPs utilisation at one token per second; None where the device's peak is not known.

    A token takes 2 FLOPs per parameter forward, 2 backward, and 2 for the gradient of a trained one (Kaplan et al.
    2020). Left out: attention over the row, recomputed activations, and input embeddings, which are looked up.
    """
    peak = peak_flops(device)
    if peak is None:
        return None
    trained, total = count_parameters(model)
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is not None and embedding.weight is not head.weight:
        size = getattr(embedding.weight, "ds_numel", embedding.weight.numel())
        total = total - size
        trained = trained - size * embedding.weight.requires_grad
    return (4 * total + 2 * trained) / (peak * world_size)


def peak_memory() -> float:
    """Return the most GiB that this process has held: on its GPU, or without one, in main memory."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def summarise_log(log_history: list[dict]) -> dict:
    """Return the numbers of a run that its log holds, None where it has none: typical speed, most memory, last rest."""

    def values(key: str) -> list[float]:
        return [value for _step, value in points_of(log_history, key)]

    losses = values("loss")
    speeds = values("tokens_per_second")
    shares = values("mfu")
    last = ("router_loss", "eval_loss", "eval_perplexity", "eval_token_accuracy", "stop_rate", "repetition_rate")
    return {
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        **{name: values(name)[-1] for name in last if values(name)},
        "tokens_per_second": round(statistics.median(speeds), 1) if speeds else None,
        "mfu": statistics.median(shares) if shares else None,
        "peak_memory_gib": max(values("peak_memory_gib"), default=None),
    }
