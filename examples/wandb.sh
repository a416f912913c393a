#!/usr/bin/env bash
# Tracking with Weights & Biases. Log in once with `wandb login`; without a login or a network the run is recorded
# offline in the output folder, and the command that uploads it is printed at the end.
#
#   examples/wandb.sh
#   MODEL=./my-model DATA=./my-pairs.jsonl examples/wandb.sh --wandb_run_name first-try
set -euo pipefail
cd "$(dirname "$0")/.."

"${PYTHON:-python}" advanced_dpo_script.py \
    --model_name_or_path "${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" \
    --dataset_name "${DATA:-trl-lib/ultrafeedback_binarized}" \
    --output_dir "${OUTPUT:-./runs/wandb}" \
    --use_lora \
    --logging_steps 10 \
    --eval_steps 100 \
    --use_wandb --wandb_project "${WANDB_PROJECT:-dpo}" \
    --on_bad_rows skip \
    "$@"
