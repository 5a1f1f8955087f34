#!/bin/bash
# launch.sh SCRIPT OVERRIDES: trains on all nodes of the job, one launcher a node and one process a GPU.  Called by the
# .sbatch files, in the job.
# shellcheck source=slurm/job.sh
source "${SLURM_SUBMIT_DIR:-.}/slurm/job.sh"

progress='going on from|saved at step' # what a start says that has a newer checkpoint than the one before it
nodes=${SLURM_JOB_NUM_NODES:-1}
processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
[ "$processes" -ge 1 ] || processes=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# From the job's number, so that two jobs on a node do not meet, and free here, on the first node.
port=$("${python[@]}" slurm/free_port.py $((20000 + SLURM_JOB_ID % 20000)))

command=("${python[@]}" slurm/node_launcher.py --use_deepspeed --deepspeed_multinode_launcher standard
  --num_machines "$nodes" --num_processes $((nodes * processes)) --main_process_ip "$first" --main_process_port "$port"
  --mixed_precision no --dynamo_backend no)
echo "on each of $nodes nodes: $(printf '%q ' "${command[@]}")--machine_rank \$SLURM_NODEID $(printf '%q ' "$@")"
# srun does not take over the job's --cpus-per-task (since SLURM 22.05), so it is said again.
status=0
# shellcheck disable=SC2016  # both are each task's own
on_node='[ -z "${TMPDIR:-}" ] || mkdir -p "$TMPDIR"
  exec "${@:2:$1}" --machine_rank "$SLURM_NODEID" "${@:$1+2}"'
until_the_end srun --nodes="$nodes" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  --kill-on-bad-exit=0 bash -c "$on_node" launch "${#command[@]}" "${command[@]}" "$@" || status=$?
end_with "$status"
