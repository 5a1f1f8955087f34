#!/bin/bash
# Submits study/run.py as jobs that share out=: what all variants need, then one job a variant, then meshes and tables.
#   slurm/study.sh [out=runs/study] [variants=[stage1,no_reference]] [--gpus-per-node=1 cpu=false processes=1]
# Words:  --option       for sbatch, of all jobs
#         key=value      override of study/run.py
# A variant's job that fails costs itself and those that take its stage 1: the last job tries them once more.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=slurm/site.env
set +u # what modules run often reads unset variables
[ ! -f slurm/site.env ] || source slurm/site.env
set -u

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  sed -n '2,/^set /s/^# //p' "$0"
  exit 0
fi

options=() words=() variants=''
for word in "$@"; do
  case $word in
    --*) options+=("$word") ;;
    variants=*) variants=$word ;;
    *=*) words+=("$word") ;;
    *)
      echo "error: $word is neither key=value nor --option=value; slurm/study.sh --help" >&2
      exit 2
      ;;
  esac
done

read -ra container <<<"${CONTAINER:-}"
python=("${container[@]}" "${PYTHON:-.venv/bin/python}")
listed=$("${python[@]}" study/run.py "${words[@]}" ${variants:+"$variants"} list_variants=true) || exit # what is wrong is told here
declare -A begins_with=() number=()
names=()
while read -r name beginning; do
  names+=("$name") begins_with[$name]=$beginning
done <<<"$listed"

submit() { # NAME WORD...
  local submitted
  submitted=$(sbatch --parsable --job-name="isotropic3d-study-$1" "${options[@]}" "${after[@]}" slurm/study.sbatch \
    "${words[@]}" "${@:2}")
  echo "${submitted%%;*}" # on a federation, the cluster's name follows
}
jobs=()
give_up() {
  [ ${#jobs[@]} -eq 0 ] || scancel "${jobs[@]}"
  echo "error: not all jobs could be submitted; those that were are cancelled" >&2
  exit 1
}
after=(--kill-on-invalid-dep=yes)
first=$(submit "${names[0]}" "variants=[${names[0]}]" distil=0 tables=false) || give_up
jobs+=("$first")
echo "${names[0]}: job $first"
number[${begins_with[${names[0]}]}]=$first
others=''
for name in "${names[@]:1}"; do
  beginning=${number[${begins_with[$name]}]:-$first} # the job that trains its stage 1, or what all need
  after=(--kill-on-invalid-dep=yes "--dependency=afterok:$beginning")
  number[$name]=$(submit "$name" "variants=[$name]" distil=0 tables=false) || give_up
  : "${number[${begins_with[$name]}]:=${number[$name]}}" # its own name is not among the variants
  jobs+=("${number[$name]}") others+=:${number[$name]}
  echo "$name: job ${number[$name]} after job $beginning"
done
after=(--kill-on-invalid-dep=yes "--dependency=afterok:$first${others:+,afterany$others}")
last=$(submit results ${variants:+"$variants"}) || give_up
echo "meshes and tables: job $last after all, slurm-isotropic3d-study-results-$last.out"
