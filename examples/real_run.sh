#!/usr/bin/env bash
# The whole pipeline on a real language model and real solutions, in less than an hour on 2 cores:
#   examples/real_run.sh SMOLLM2-135M-FOLDER PROCESSBENCH-GSM8K.JSON OUT
# The model does not keep to the verification line by itself, so as a teacher it is shown two examples (few_shot.txt)
# and --complete lets it answer the line. docs/real_run.md holds what this printed.
set -euo pipefail
model=$1 gsm8k=$2 out=$3
cd "$(dirname "$0")/.."
mkdir -p "$out"
set -x

# every 10th solution is kept for the score, the others give the training data
python -c "import json, sys; rows = json.load(open('$gsm8k')); json.dump(rows[::10], open('$out/held_out.json', 'w')); json.dump([r for i, r in enumerate(rows) if i % 10], open('$out/solutions.json', 'w'))"

time python data.py cases --input "$out/solutions.json" --out "$out/cases.jsonl"
time python data.py sample --model "$model" --cases "$out/cases.jsonl" --limit 240 --n 4 --complete --prompt-file prompts/few_shot.txt \
    --max-new-tokens 48 --temperature 0.7 --out "$out/seed.jsonl"
time python data.py sft --samples "$out/seed.jsonl" --max-per-case 2 --validation 0.1 --out "$out/sft.jsonl"
time python train_sft.py --model "$model" --train "$out/sft.jsonl" --validation "$out/sft.validation.jsonl" --out "$out/sft" \
    --lr 5e-5 --batch-size 16 --micro-tokens 2048 --eval-every 6 --save-every 6

time python data.py sample --model "$out/sft/model" --cases "$out/cases.jsonl" --limit 160 --n 6 --max-new-tokens 80 --seed 1 --out "$out/preferences.jsonl"
time python data.py pairs --samples "$out/preferences.jsonl" --max-per-case 1 --validation 0.1 --out "$out/pairs.jsonl"
time python train_dpo.py --model "$out/sft/model" --train "$out/pairs.jsonl" --validation "$out/pairs.validation.jsonl" --out "$out/dpo" \
    --lr 5e-6 --batch-size 8 --micro-tokens 2048 --eval-every 4 --save-every 4

for name in sft dpo; do
    time python score.py --model "$out/$name/model" --input "$out/held_out.json" --k 1 4 --max-new-tokens 80 --out "$out/scores.$name.jsonl"
done
