#!/usr/bin/env bash
# Everything that docs/performance.md has of a GPU, and the scorers, part by part, at full width.
#   benchmarks/gpu.sh OUT PART [PART ...]
# A part that fails leaves the others be; none takes longer than LIMIT seconds, 540 by default.
# PyTorch is needed beside jaxpref[cuda] for what is compared with it.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=$1
shift
mkdir -p "$out"
export XLA_PYTHON_CLIENT_PREALLOCATE=false TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONPATH=${PYTHONPATH:-}:$PWD
configs=jaxpref/pipelines
sd15=(--model="$configs/sd15" --dtype=bfloat16)
sdxl=(--model="$configs/sdxl" --dtype=bfloat16)

timed() { timeout "${LIMIT:-540}" python3 "$@"; }

part() {
  case $1 in
    sanity) # the bundled model, a minute
      timed benchmarks/train_step.py --dtype=bfloat16 --turns=2 ;;
    attention)
      timed benchmarks/attention.py --against=torch --dtype=bfloat16 --kernels xla cudnn --turns=5 \
        --shapes 16x4096x8x40 16x1024x8x80 16x256x8x160 16x4096x10x64 --out="$out/gpu_attention.json" ;;
    train_step)
      timed benchmarks/train_step.py "${sd15[@]}" --rows=32 --against=torch --rivals P1 P2 --apart \
        --turns=5 --out="$out/gpu_train_step.json" ;;
    sampler)
      timed benchmarks/sampler.py "${sd15[@]}" --rows=16 --against=torch --rivals P1 P2 \
        --turns=3 --out="$out/gpu_sampler.json" ;;
    dro_loop)
      timed benchmarks/dro_loop.py "${sd15[@]}" --rows=16 --lots=4 --set rollout.num_steps=20 \
        --against=torch --rivals P0 P1 --apart --turns=2 --out="$out/gpu_dro_loop.json" ;;
    sdxl) # 1024 pixels
      timed benchmarks/train_step.py "${sdxl[@]}" --rows=8 --set model.remat=blocks \
        --turns=3 --out="$out/gpu_sdxl.json" ;;
    run) # the main job, a real run
      timed -m jaxpref.main --config=configs/dro.py --workdir="$out/run" --config.train.num_updates=200 \
        --config.profile=3 > "$out/gpu_run.log" 2>&1
      code=$?
      tail -30 "$out/gpu_run.log"
      return $code ;;
    stock | norm | remat) # train_step's update otherwise
      declare -A fields=([stock]="model.attention=xla" [norm]="model.norm=stock" [remat]="model.remat=blocks")
      timed benchmarks/train_step.py "${sd15[@]}" --rows=16 --set "${fields[$1]}" --turns=3 \
        --out="$out/gpu_$1.json" ;;
    scorers | scorers_float32) # images a second, weights of no meaning
      declare -A dtypes=([scorers]=bfloat16 [scorers_float32]=float32)
      timed benchmarks/scorers.py --images=64 --repeats=5 --dtype="${dtypes[$1]}" --out="$out/gpu_$1.json" ;;
    *) echo "no part $1" >&2; return 2 ;;
  esac
}
for name in "$@"; do
  began=$(date +%s)
  echo "== $name"
  if part "$name"; then said=ok; else said="failed ($?)"; fi
  echo "== $name: $said, $(($(date +%s) - began)) s"
  if [ "$name" = sanity ] && [ "$said" != ok ]; then exit 1; fi
done
