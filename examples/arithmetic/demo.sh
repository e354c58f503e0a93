#!/usr/bin/env bash
# The whole of R-PRM in a small world, each stage as you would type it: from cases to the final table, in minutes.
#   examples/arithmetic/demo.sh [OUT] [--teacher FOLDER]
# The teacher is the embedded base model, which knows the form of an analysis and judges poorly; nothing but its own
# filtered samples and preferences improves it.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/demo base=examples/arithmetic/base teacher=examples/arithmetic/base
while [ $# -gt 0 ]; do
    case $1 in
        --teacher) teacher=${2:?error: --teacher needs a folder}; shift 2 ;;
        -*) echo "error: unknown flag $1; usage: demo.sh [OUT] [--teacher FOLDER]" >&2; exit 2 ;;
        *) out=$1; shift ;;
    esac
done
[ -d "$teacher" ] || { echo "error: $teacher: not a folder; give --teacher a checkpoint folder" >&2; exit 2; }
[ ! -e "$out" ] || { echo "error: $out exists already; remove it or name another folder" >&2; exit 2; }
python -c "import matplotlib" 2>/dev/null || { echo "error: the plots need matplotlib: pip install -r requirements-dev.txt" >&2; exit 2; }
mkdir -p "$out"
set -x
python examples/arithmetic/world.py --out "$out/world" --train 400 --validation 0 --test 120 --pretrain 0
python data.py cases --input "$out/world/train.jsonl" --out "$out/cases.jsonl"

# the direct PRM: the verdict alone, learned from the same cases
python data.py sft --direct --samples "$out/cases.jsonl" --prompt-file examples/arithmetic/direct_prompt.txt --out "$out/direct.jsonl"
python train_sft.py --model $base --train "$out/direct.jsonl" --validation "$out/direct.validation.jsonl" --out "$out/direct" \
    --lr 3e-4 --batch-size 32 --epochs 3 --eval-every 20

# R-PRM SFT: the teacher's analyses whose verdict is the label
python data.py sample --model "$teacher" --cases "$out/cases.jsonl" --n 4 --max-new-tokens 120 --batch-size 64 --out "$out/seed.jsonl"
python data.py sft --samples "$out/seed.jsonl" --out "$out/sft.jsonl"
python train_sft.py --model $base --train "$out/sft.jsonl" --validation "$out/sft.validation.jsonl" --out "$out/sft" \
    --lr 1e-4 --batch-size 32 --eval-every 20

# R-PRM DPO: right against wrong analyses of the SFT model itself
python data.py sample --model "$out/sft/model" --cases "$out/cases.jsonl" --n 8 --seed 1 --max-new-tokens 120 --batch-size 64 --out "$out/preferences.jsonl"
python data.py pairs --samples "$out/preferences.jsonl" --out "$out/pairs.jsonl"
python train_dpo.py --model "$out/sft/model" --train "$out/pairs.jsonl" --validation "$out/pairs.validation.jsonl" --out "$out/dpo" \
    --lr 1e-4 --nll 5 --epochs 2 --batch-size 32 --eval-every 5

python score.py --model $base --input "$out/world/test.jsonl" --all-steps --k 1 4 10 --max-new-tokens 120 --batch-size 64 --out "$out/scores.base.jsonl"
python score.py --model "$out/direct/model" --direct --input "$out/world/test.jsonl" --all-steps --k 1 --out "$out/scores.direct.jsonl"
for name in sft dpo; do
    python score.py --model "$out/$name/model" --input "$out/world/test.jsonl" --all-steps --k 1 4 10 --max-new-tokens 120 --batch-size 64 --out "$out/scores.$name.jsonl"
done
python examples/arithmetic/report.py --scores "$out"/scores.{base,direct,sft,dpo}.jsonl --names base "direct PRM" "R-PRM SFT" "R-PRM DPO" \
    --runs "$out"/{direct,sft,dpo} --out "$out"
