#!/bin/bash
# Runs `accelerate launch SCRIPT OVERRIDES` once on each node of the job, one process a GPU.  Called by the .sbatch files.
#   PYTHON               the environment's Python (default: .venv/bin/python of the submitting folder)
#   PROCESSES_PER_NODE   default: the GPUs of the node that SLURM gave, or 1
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "error: no Python at $python; run make install, or set PYTHON=" >&2; exit 2; }

nodes=${SLURM_JOB_NUM_NODES:-1}
processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
[ "$processes" -ge 1 ] || processes=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))   # the job's own, so that two jobs on a node do not collide

command=("$python" -m accelerate.commands.launch --use_deepspeed --deepspeed_multinode_launcher standard
  --num_machines "$nodes" --num_processes $((nodes * processes)) --main_process_ip "$first" --main_process_port "$port"
  --mixed_precision no --dynamo_backend no)
echo "on each of $nodes nodes: ${command[*]} --machine_rank \$SLURM_NODEID $*"
# srun does not take over the job's --cpus-per-task (since SLURM 22.05), so it is said again.
# shellcheck disable=SC2016  # SLURM_NODEID is each task's own
srun --nodes="$nodes" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
  bash -c 'exec "${@:2:$1}" --machine_rank "$SLURM_NODEID" "${@:$1+2}"' launch "${#command[@]}" "${command[@]}" "$@"
