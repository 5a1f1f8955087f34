#!/bin/bash
# A SLURM cluster of this machine alone, to try the batch scripts on: real slurmctld and slurmds, two nodes by default.
#   slurm/local-cluster.sh install        Debian's packages (root or sudo)
#   slurm/local-cluster.sh start          starts it and prints how to reach it
#   slurm/local-cluster.sh stop           ends its jobs and daemons
#   slurm/local-cluster.sh node-up NODE   starts one node's daemon again
# Environment: CLUSTER (its folder, default /tmp/isotropic3d-cluster-UID), NODES (2), CPUS a node (4; may exceed what is
# there), MEMORY a node in MB (8000), PORT (16820; nodes take those after it).  Each node pretends to two GPUs.
# Jobs of its partition urgent preempt those of main, which have half a minute to save, and of brief, which have only
# KillWait's 5 s; both start again.
# Its configuration, keys, logs and state are in that folder; nothing of an installed SLURM is touched but /etc/hosts,
# where the nodes' names are written, since jobs look each other up by them.
set -euo pipefail
base=${CLUSTER:-/tmp/isotropic3d-cluster-$(id -u)}
nodes=${NODES:-2} cpus=${CPUS:-4} memory=${MEMORY:-8000} port=${PORT:-16820}
PATH=$PATH:/usr/sbin:/sbin # Debian's daemons
export SLURM_CONF=$base/slurm.conf

as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi; }

install() {
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge
}

write_configuration() {
  mkdir -p "$base/state" "$base/log"
  chmod 755 "$base"
  if [ ! -s "$base/munge.key" ]; then
    (umask 077 && head -c 128 /dev/urandom >"$base/munge.key")
    chmod 400 "$base/munge.key"
  fi
  # No accounting and no cgroups: they want a database and a kernel set up for them.  Timeouts are short, for tests.
  cat >"$SLURM_CONF" <<EOF
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$base/munge.socket,cred_expire=5
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool.%n
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/slurmd.%n.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.%n.log
SlurmdTimeout=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
GresTypes=gpu
NodeName=DEFAULT CPUs=$cpus RealMemory=$memory Gres=gpu:2
NodeName=node[1-$nodes] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))]
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=brief Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
EOF
  # GPUs for SLURM to deal out; they have to be devices, and no program finds CUDA in these.
  printf "NodeName=node[1-$nodes] Name=gpu File=%s\n" /dev/null /dev/zero >"$base/gres.conf"
  for number in $(seq "$nodes"); do
    mkdir -p "$base/spool.node$number"
    getent hosts "node$number" >/dev/null || echo "127.0.0.1 node$number" | as_root tee -a /etc/hosts >/dev/null
  done
}

running() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

start() {
  for program in slurmctld slurmd sbatch munged; do
    if ! command -v $program >/dev/null; then
      echo "error: $program is not installed; slurm/local-cluster.sh install" >&2
      exit 2
    fi
  done
  if running "$base/slurmctld.pid"; then
    echo "error: a cluster runs in $base; slurm/local-cluster.sh stop, or choose another CLUSTER= and PORT=" >&2
    exit 2
  fi
  write_configuration
  munged --key-file="$base/munge.key" --socket="$base/munge.socket" --pid-file="$base/munged.pid" \
    --log-file="$base/log/munged.log" --seed-file="$base/munge.seed"
  slurmctld
  for number in $(seq "$nodes"); do slurmd -N "node$number"; done
  for _ in $(seq 300); do
    if [ "$(sinfo --noheader --partition=main --Node --format=%T 2>/dev/null | grep -c '^idle$')" -eq "$nodes" ]; then
      echo "a cluster of $nodes nodes is up:  export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.1
  done
  echo "error: the cluster did not come up; the last lines of $base/log:" >&2
  tail -n 10 "$base"/log/*.log >&2
  stop
  exit 1
}

stop() {
  if running "$base/slurmctld.pid"; then scancel --user="$(id -un)" 2>/dev/null || true; sleep 1; fi
  local pids=() file
  for file in "$base"/slurmd.*.pid "$base/slurmctld.pid" "$base/munged.pid"; do
    if running "$file"; then pids+=("$(cat "$file")"); fi
  done
  if [ ${#pids[@]} -eq 0 ]; then return; fi
  kill "${pids[@]}" 2>/dev/null || true
  for _ in $(seq 100); do
    kill -0 "${pids[@]}" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -9 "${pids[@]}" 2>/dev/null || true
}

case "${1:-}" in
  install | start | stop) "$1" ;;
  node-up) slurmd -N "${2:?which node}" ;;
  *) sed -n '2,/^set /s/^# //p' "$0" >&2; exit 2 ;;
esac
