"""The step: non-pad tokens per CPU second and peak memory of forward, backward and AdamW, ours beside TRL and alpaca.

    python benchmarks/step_speed.py                          # the usual rows, three times
    python benchmarks/step_speed.py --rows qwen2-32k-fp32 --repeats 1

Four layers, hidden size 256, up to 2048 tokens a row. One optimizer step is a packed row of 2048 tokens, or eight
padded examples (2,000 tokens on average) in parts of four; of bloom, whose vocabulary would not fit into memory, and
falcon four, in parts of two. Two steps are measured, one of the slow rows, after one to warm up. TRL runs
with its best settings on a CPU: packed for Qwen2, padded for bloom and falcon, whose documents see each other in its
packed rows. All sides run on the peers' interpreter, so that torch and transformers are the same.
"""

import argparse
import json

from records import alternate, median, peer_python

SHAPE = {"hidden_size": 256, "num_hidden_layers": 4}
SHAPES = {
    "qwen2": {**SHAPE, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"tie_word_embeddings": True, "max_position_embeddings": 2048},
    "bloom": {"hidden_size": 256, "n_layer": 4, "n_head": 4},
    "falcon": {**SHAPE, "num_attention_heads": 4, "multi_query": True, "parallel_attn": True, "bias": False},
}
VOCABULARIES = {"32k": 32_000, "152k": 151_936, "251k": 250_880, "65k": 65_024}
# Also made for: qwen2-152k-bf16, bloom-251k-bf16, falcon-65k-bf16.
ROWS = ["qwen2-32k-fp32", "qwen2-32k-bf16", "qwen2-152k-fp32", "bloom-251k-fp32", "falcon-65k-fp32"]


def variants(row: str) -> dict[str, dict]:
    family, vocabulary, precision = row.split("-")
    config = {**SHAPES[family], "vocab_size": VOCABULARIES[vocabulary], "bos_token_id": 1, "eos_token_id": 2}
    slow = vocabulary in ("152k", "251k")
    common = {"family": family, "config": config, "bf16": precision == "bf16", "steps": 1 if slow else 2}
    part = 4 if family == "qwen2" else 2
    padded = {**common, "packing": False, "rows": part, "accumulation": 2}
    sides = {"ours": common, "trl": common if family == "qwen2" else padded, "alpaca": padded}
    return {
        side: {
            "command": ("step_side.py", side, json.dumps(settings)),
            "python": peer_python(),
        }
        for side, settings in sides.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for row in args.rows:
        print(row, flush=True)
        runs = alternate("step", row, variants(row), args.repeats)
        for side, found in runs.items():
            speed = median(found, "tokens") / median(found, "seconds")
            print(f"  {side:7} {speed:9,.0f} tokens per CPU second, {median(found, 'peak_mib'):7,.0f} MiB")


if __name__ == "__main__":
    main()
