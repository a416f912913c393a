#!/usr/bin/env bash
# Two stages. First an adapter learns to imitate the chosen responses; then DPO continues that adapter, and a
# frozen copy of it is the reference. No manual step lies between: stage two starts from the folder of stage one.
#
#   examples/sft_then_dpo.sh
#   MODEL=./my-model DATA=./my-pairs.jsonl OUTPUT=./runs/mine examples/sft_then_dpo.sh
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL="${MODEL:-EleutherAI/pythia-410m}"
DATA="${DATA:-Anthropic/hh-rlhf}"
OUTPUT="${OUTPUT:-./runs/sft-then-dpo}"

"${PYTHON:-python}" advanced_dpo_script.py sft \
    --model_name_or_path "$MODEL" \
    --dataset_name "$DATA" \
    --output_dir "$OUTPUT/sft" \
    --use_lora \
    --on_bad_rows skip \
    "$@"

"${PYTHON:-python}" advanced_dpo_script.py train \
    --model_name_or_path "$OUTPUT/sft" \
    --dataset_name "$DATA" \
    --output_dir "$OUTPUT/dpo" \
    --on_bad_rows skip \
    "$@"
