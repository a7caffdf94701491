"""Bytes that a training step keeps on each GPU, the ways to train that fit, and bytes on the disk: arithmetic alone.

No file is downloaded or read and no memory allocated: the parameters are counted on the meta device, the activations by
`sft.preview.activations`.
"""

from collections.abc import Sequence
from dataclasses import replace

from sft.model.kernels import rows_at_a_time
from sft.model.load import context_window
from sft.preview.activations import Activations, count_activations
from sft.preview.shape import FULL, LORA, ONE, QLORA, ZERO2, ZERO3, Part, Plan, Shape, Step
from sft.train.callbacks import MAX_SHARE_OF_GPU, choose_sizes
from sft.train.checks import GIB
from sft.train.sequence_parallel import check_model, count_heads

RESERVE = 2 * GIB  # CUDA's context, cuBLAS and NCCL workspaces, gaps between blocks
MIN_ROW_TOKENS = 2**10
MAX_ROW_TOKENS = 2**20
MACHINES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# nf4 in blocks of 64 with a scale each, the scales in 8 bits in blocks of 256 (QLoRA, arXiv 2305.14314, section 3).
BYTES_IN_4_BIT = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# DeepSpeed 0.19.8: reduce_bucket_size of ZeRO-2 (two of them with overlap_comm), stage3_max_live_parameters.
ZERO2_BUCKETS = 2 * 5e8
ZERO3_LIVE = 1e9


def count_trained(shape: Shape, step: Step, plan: Plan) -> int:
    """Count the trained parameters: all, or the adapters' with the rows of embedding and head beside them."""
    if plan.method == FULL:
        return shape.parameters
    rows = step.lora_token_rows * shape.hidden * (1 if shape.tied else 2)
    return shape.adapters.count_parameters(step.lora_rank, step.lora_variant) + rows


def estimate_memory(shape: Shape, step: Step, plan: Plan) -> tuple[list[Part], list[Part]]:
    """Return the parts on each GPU, their sum with what is not there at the same time taken out, and those in RAM."""
    if plan.launcher == ONE:
        step = replace(step, shared=1)
    counted = count_activations(shape, step, plan) or Activations(0, 0, 0)
    loss = loss_part(shape, step, plan)
    weights, gradients, optimizer, buffers, host = _count_states(shape, step, plan)
    peak = max(counted.forward + loss.bytes, counted.backward)
    tied = 4 * shape.embedding if plan.method == FULL and shape.tied else 0
    tokens = f"{step.rows} x {step.length:,} tokens" + (f" / {step.shared}" if step.shared > 1 else "")
    running = Part("activations", counted.forward, f"{shape.layers} layers, {tokens}, traced")
    if counted.host:
        host.append(Part("activations", counted.host, f"the inputs of {shape.layers} layers, {tokens}"))
    kept = gradients.bytes if step.accumulation > 1 or plan.launcher != ONE else 0
    # The backward pass ends in the first layer, when all gradients but the embedding's are there.
    late = gradients.bytes + max(tied, counted.last - (4 * shape.embedding if plan.method == FULL else 0))
    always = weights.bytes + optimizer.bytes + buffers.bytes
    outputs = kept_outputs(shape, step, plan, always + max(kept + peak, late))
    total = always + max(kept + peak + outputs.bytes, late)
    formula = "all of them at once" if kept else "weights + optimizer + max(activations + loss, gradients + a layer)"
    parts = [weights, gradients, optimizer, buffers, running, outputs, loss, Part("peak", int(total), formula)]
    return [part for part in parts if part.bytes], host


def kept_outputs(shape: Shape, step: Step, plan: Plan, others: int) -> Part:
    """Count what checkpointed layers keep where `others`, the bytes without it, leave room on the GPU."""
    room = int(MAX_SHARE_OF_GPU * step.keeps_in) - RESERVE - others
    if not step.checkpointing or plan.launcher == ZERO3 or room <= 0:
        return Part("kept outputs", 0, "")
    half = {"tokens": step.tokens, "element_size": 2 if step.half else 4}
    sizes = choose_sizes(shape.widths, hidden=shape.hidden, room=room, **half)
    return Part("kept outputs", sum(sizes), f"wide products and attention of {len(sizes)} of {shape.layers} layers")


def _count_states(shape: Shape, step: Step, plan: Plan) -> tuple[Part, Part, Part, Part, list[Part]]:
    """Weights, gradients, optimizer state and buffers on a GPU, and what lies in the machine's memory."""
    trained = count_trained(shape, step, plan)
    if plan.launcher == ONE:
        return *_states_of_one(shape, step, plan, trained), Part("buffers", 0, ""), []
    total = trained if plan.method == FULL else shape.parameters + trained
    each = 2 if step.half else 4
    share = f"{_short(trained)} / {plan.gpus}"
    gradients = Part("gradients", 4 * trained // plan.gpus, f"4 bytes (summed in fp32) x {share}")
    optimizer = Part("optimizer", 12 * trained // plan.gpus, f"12 bytes (master, two moments) x {share}")
    if plan.launcher == ZERO2:
        weights = Part("weights", each * total, f"{each} bytes x {_short(total)}")
        # On a CPU memory that was never written to is not taken.
        size = ZERO2_BUCKETS if step.device == "cuda" else min(ZERO2_BUCKETS, 2 * trained)
        buffers = Part("buffers", int(each * size), f"two buckets of {_short(size / 2)} x {each} bytes")
    else:
        weights = Part("weights", each * total // plan.gpus, f"{each} bytes x {_short(total)} / {plan.gpus}")
        live = int(min(total, max(ZERO3_LIVE, shape.embedding)))
        buffers = Part("buffers", each * live, f"gathered weights: {each} bytes x {_short(live)}")
    host = []
    if plan.offload and plan.launcher == ZERO3:
        host.append(weights)
        weights = replace(weights, bytes=0)
    if plan.offload:
        host += [optimizer, replace(gradients, formula=f"4 bytes x {share}")]
        optimizer = replace(optimizer, bytes=0)
        gradients = replace(gradients, bytes=0)
    return weights, gradients, optimizer, buffers, host


def _states_of_one(shape: Shape, step: Step, plan: Plan, trained: int) -> tuple[Part, Part, Part]:
    each = 2 if step.half else 4
    if plan.method == QLORA:
        rest = shape.parameters - shape.linear
        size = BYTES_IN_4_BIT * shape.linear + 4 * rest + 4 * trained
        formula = f"{BYTES_IN_4_BIT:.3f} bytes x {_short(shape.linear)}"
        formula += f" + 4 bytes x ({_short(rest)} + {_short(trained)})"
    elif plan.method == LORA:
        size = each * shape.parameters + 4 * trained
        formula = f"{each} bytes x {_short(shape.parameters)} + 4 bytes x {_short(trained)}"
    else:
        size = 4 * trained
        formula = f"4 bytes x {_short(trained)}"
    gradients = Part("gradients", 4 * trained, f"4 bytes x {_short(trained)}")
    optimizer = Part("optimizer", 8 * trained, f"8 bytes x {_short(trained)}")
    return Part("weights", int(size), formula), gradients, optimizer


def loss_part(shape: Shape, step: Step, plan: Plan) -> Part:
    """Count what the loss in chunks needs: a chunk of logits, the head's gradient, the states' gradient."""
    compute = 2 if step.half else 4
    kept = 2 if step.half and (plan.launcher != ONE or plan.method != FULL) else 4
    head = shape.embedding if plan.method == FULL else 0
    trained = min(step.trained, step.tokens)  # all of them may be in one part of a shared row
    rows = min(trained, rows_at_a_time(shape.vocabulary * compute, step.device))
    copies = 2 if step.device == "cuda" else 1
    chunk = copies * rows * shape.vocabulary * compute
    cast = compute * head if compute != kept else 0
    # A CPU adds the 16-bit product to the fp32 sum through a copy in fp32.
    product = (compute + 4) * head if compute != 4 and step.device == "cpu" else 0
    states = trained * shape.hidden * (kept + 4)
    formula = f"{copies} x {rows:,} rows of logits x {compute} bytes"
    if head:
        formula += f" + {4 + (cast + product) // head} bytes x {_short(head)} (head)"
    return Part("loss", int(chunk + 4 * head + cast + product + states), formula)


def full_logits(shape: Shape, step: Step) -> Part:
    """Bytes of a loss over all logits: logits, their log-softmax and its gradient in fp32."""
    each = 14 if step.half else 12
    tokens = step.tokens
    return Part("logits", tokens * shape.vocabulary * each, f"{tokens:,} tokens x {shape.vocabulary:,} x {each} bytes")


def _short(number: float) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


# --- the machine --------------------------------------------------------------------------------------------------


def has_room(parts: Sequence[Part], gpu_bytes: int) -> bool:
    return parts[-1].bytes + RESERVE <= gpu_bytes


def least_machines(shape: Shape, step: Step, plan: Plan, gpu_bytes: int, gpus_each: int) -> int | None:
    """Return how many machines of this kind the plan needs, or None if even MACHINES' last are too few."""
    for machines in MACHINES if plan.launcher != ONE else (1,):
        gpus = machines * gpus_each if plan.launcher != ONE else 1
        if has_room(estimate_memory(shape, step, replace(plan, gpus=gpus))[0], gpu_bytes):
            return machines
    return None


def all_plans(gpus: int) -> list[Plan]:
    full = [Plan(FULL, launcher, offload, gpus) for launcher in (ZERO2, ZERO3) for offload in (False, True)]
    lora = [Plan(LORA, ZERO3, False, gpus)]
    return [Plan(), *full, Plan(LORA), *lora, Plan(QLORA)]


def plan_table(shape: Shape, step: Step, gpu_bytes: int, gpus: int) -> list[list[str]]:
    """Rows of: how it is trained, peak with and without checkpointing, memory of the machine, machines needed."""
    rows = [["", "with checkpointing", "without", "in the machine's RAM", "machines needed"]]
    kept = replace(step, checkpointing=True)
    full = replace(step, checkpointing=False)
    for plan in all_plans(gpus):
        parts, host = estimate_memory(shape, kept, plan)
        machines = least_machines(shape, kept, plan, gpu_bytes, gpus)
        each = sum(part.bytes for part in host) * gpus
        without = gib(estimate_memory(shape, full, plan)[0][-1].bytes)
        needed = "does not fit" if machines is None else str(machines)
        rows.append([str(plan), gib(parts[-1].bytes), without, gib(each) if each else "-", needed])
    return rows


def gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def fits_best(shape: Shape, step: Step, gpu_bytes: int, gpus: int) -> Plan | None:
    """The first plan, from the simplest to the one that saves most, that fits on one machine without offload first."""
    full = [plan for plan in all_plans(gpus) if plan.method == FULL]
    plans = sorted(full, key=lambda plan: plan.offload)
    return next((plan for plan in plans if has_room(estimate_memory(shape, step, plan)[0], gpu_bytes)), None)


def longest_rows(shape: Shape, step: Step, plan: Plan, gpu_bytes: int) -> list[tuple[int, int]]:
    """Return (GPUs that share a row, tokens of the longest that fits) for 1, 2, 4 ... GPUs; lengths are powers of two.

    One row at a time, with checkpointing, up to the model's positions. Numbers of GPUs that don't divide both those of
    the plan and the heads are left out, and all above 1 for a model whose rows can't be shared.
    """
    heads = count_heads(shape.config) if _can_be_shared(shape) else 1
    found = []
    length = MIN_ROW_TOKENS
    longest = min(context_window(shape.config) or MAX_ROW_TOKENS, MAX_ROW_TOKENS)
    for shared in (2**power for power in range(plan.gpus.bit_length())):
        if plan.gpus % shared or heads % shared or length > longest:
            continue
        row = replace(step, rows=1, documents=(), checkpointing=True, shared=shared)
        while length <= longest:
            parts, _host = estimate_memory(shape, replace(row, length=length, trained=length), plan)
            if not has_room(parts, gpu_bytes):
                break
            length *= 2
        if length > MIN_ROW_TOKENS:
            found.append((shared, length // 2))
    return found


def _can_be_shared(shape: Shape) -> bool:
    options = {"trust_remote_code": True} if shape.trusted else {}
    try:
        check_model(shape.config, parts=2, max_length=MIN_ROW_TOKENS, options=options)
    except ValueError:
        return False
    return True


# --- disk ---------------------------------------------------------------------------------------------------------


def disk_of_checkpoint(shape: Shape, step: Step, plan: Plan) -> Part:
    """Bytes of one checkpoint: weights, and in fp32 two moments (DeepSpeed: masters too); adapters alone under LoRA."""
    trained = count_trained(shape, step, plan)
    each, kept = (8, 4) if plan.launcher == ONE else (12, 2)
    return Part("checkpoint", (each + kept) * trained, f"({kept} + {each}) bytes x {_short(trained)}")


def disk_of_model(shape: Shape, step: Step, plan: Plan) -> Part:
    trained = count_trained(shape, step, plan)
    each = 4 if plan.launcher == ONE else 2
    return Part("model", each * trained, f"{each} bytes x {_short(trained)}")
