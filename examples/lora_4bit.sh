#!/usr/bin/env bash
# QLoRA: a 7B model on one 24 GB GPU. The base is held in 4-bit, the adapter is trained, and the reference is the
# base with the adapter switched off, so only one model is in memory.
#
#   examples/lora_4bit.sh                                  (Llama-2-7B on UltraFeedback)
#   MODEL=./my-model DATA=./my-pairs.jsonl examples/lora_4bit.sh --max_samples 1000
set -euo pipefail
cd "$(dirname "$0")/.."

"${PYTHON:-python}" advanced_dpo_script.py \
    --model_name_or_path "${MODEL:-meta-llama/Llama-2-7b-hf}" \
    --dataset_name "${DATA:-trl-lib/ultrafeedback_binarized}" \
    --output_dir "${OUTPUT:-./runs/lora-4bit}" \
    --use_lora --use_4bit \
    --lora_r 64 --lora_alpha 16 \
    --beta 0.1 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --logging_steps 10 \
    --save_steps 200 \
    --on_bad_rows skip \
    "$@"
