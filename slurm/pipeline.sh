#!/bin/bash
# Submits stage 1, stage 2 after it, and an array that distils a mesh of each picture after that; prints the job ids.
#   slurm/pipeline.sh images=pictures name=mine experiment=paper data.shards=shards stage1:init_from=weights/mvdream
# Words:  --option       for sbatch, of both stages
#         key=value      Hydra override, of both stages; wandb.* of distill too
#         stage1:WORD    for stage 1 alone               stage2:WORD, distill:WORD    likewise
# images= (a picture or a folder of pictures) and out= (default runs/NAME/meshes) are for distill; without images=, the
# two stages alone are submitted.  A stage that fails leaves what comes after it unstarted, and its log says so.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=slurm/site.env
set +u # what modules run often reads unset variables
[ ! -f slurm/site.env ] || source slurm/site.env
set -u

if [ $# -eq 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
  sed -n '2,/^set /s/^# //p' "$0"
  exit 0
fi

name=isotropic3d images='' out=''
stage1=() stage2=() distill=() shared=() options1=() options2=() options3=()
for word in "$@"; do
  case $word in
    images=*) images=${word#*=} ;;
    out=*) out=${word#*=} ;;
    stage1:--*) options1+=("${word#*:}") ;;
    stage2:--*) options2+=("${word#*:}") ;;
    distill:--*) options3+=("${word#*:}") ;;
    stage1:*) stage1+=("${word#*:}") ;;
    stage2:*) stage2+=("${word#*:}") ;;
    distill:*) distill+=("${word#*:}") ;;
    --*) options1+=("$word") options2+=("$word") ;;
    *=*)
      stage1+=("$word") stage2+=("$word")
      case $word in
        name=*) name=${word#*=} ;;
        wandb.*) shared+=("$word") ;;
      esac
      ;;
    *)
      echo "error: $word is neither key=value nor --option=value; slurm/pipeline.sh --help" >&2
      exit 2
      ;;
  esac
done
if [ -n "$images" ] && [ ! -e "$images" ]; then
  echo "error: images=$images does not exist" >&2
  exit 2
fi

# Keys and choices that do not exist are told here, and not after hours in a queue; values, when the job starts.
refuse_unknown() { # PROGRAM OVERRIDE...
  local python=${PYTHON:-.venv/bin/python} said status=0
  [ -z "${CONTAINER:-}" ] && command -v "$python" >/dev/null || return 0
  said=$("$python" "$@" --cfg job 2>&1 >/dev/null) || status=$?
  if [ $status -eq 2 ]; then
    echo "$said" >&2
    exit 2
  fi
}
distill=("checkpoint=runs/$name/stage2/export" "name=$name" "wandb.mode=${WANDB_MODE:-offline}" "${shared[@]}" "${distill[@]}")
refuse_unknown train/stage1.py "${stage1[@]}"
refuse_unknown train/stage2.py "${stage2[@]}"
[ -z "$images" ] || refuse_unknown distill/generate.py "${distill[@]}"

after=(--kill-on-invalid-dep=yes)
first=$(sbatch --parsable "${options1[@]}" slurm/stage1.sbatch "${stage1[@]}")
first=${first%%;*} # on a federation, the cluster's name follows
echo "stage 1: job $first, slurm-isotropic3d-stage1-$first.out"
second=$(sbatch --parsable "${after[@]}" --dependency="afterok:$first" "${options2[@]}" slurm/stage2.sbatch \
  "${stage2[@]}") || {
  scancel "$first"
  echo "error: stage 2 could not be submitted; job $first is cancelled" >&2
  exit 1
}
second=${second%%;*}
echo "stage 2: job $second after it, slurm-isotropic3d-stage2-$second.out"
if [ -n "$images" ]; then
  third=$(sbatch --parsable "${after[@]}" --dependency="afterok:$second" "${options3[@]}" slurm/distill.sbatch \
    "images=$images" "out=${out:-runs/$name/meshes}" "${distill[@]}") || {
    scancel "$first" "$second"
    echo "error: distill could not be submitted; jobs $first and $second are cancelled" >&2
    exit 1
  }
  third=${third%%;*}
  echo "distill: job array $third after it, slurm-isotropic3d-distill-${third}_*.out"
fi
