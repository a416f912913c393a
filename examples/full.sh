#!/usr/bin/env bash
# Full fine-tuning; the reference is a frozen copy of the initial weights.
# --precompute_ref_log_probs lets go of it before training starts; with --use_4bit no second model is held at all.
#
#   examples/full.sh
#   MODEL=./my-model DATA=./my-pairs.jsonl examples/full.sh --use_4bit
set -euo pipefail
cd "$(dirname "$0")/.."

"${PYTHON:-python}" advanced_dpo_script.py \
    --model_name_or_path "${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" \
    --dataset_name "${DATA:-trl-lib/ultrafeedback_binarized}" \
    --output_dir "${OUTPUT:-./runs/full}" \
    --beta 0.1 \
    --learning_rate 1e-6 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 8 \
    --logging_steps 10 \
    --save_steps 200 \
    --on_bad_rows skip \
    "$@"
