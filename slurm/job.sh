# shellcheck shell=bash
# Read by all batch scripts: the site's values, the environment's Python, and how a job starts again.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
# As scontrol means this job alone: one task of an array may bear the number of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Signals that come while no program runs are noted, and none is begun any more.
warned='' cancelled='' step=''
hand_on() { [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true; }
trap 'echo "$(date +%T) the time limit is near, or SIGUSR1 came: saving"; warned=$SECONDS; hand_on' USR1
# The scheduler takes the job away, and starts it again by itself when it was preempted.
trap 'cancelled=1; hand_on' TERM

# shellcheck source=slurm/site.env
set +u # what modules run often reads unset variables
[ ! -f slurm/site.env ] || source slurm/site.env
set -u
[ -z "${TMPDIR:-}" ] || mkdir -p "$TMPDIR"
read -ra container <<<"${CONTAINER:-}"
python=("${container[@]}" "${PYTHON:-.venv/bin/python}")
if [ ${#container[@]} -eq 0 ] && ! command -v "${python[0]}" >/dev/null; then
  echo "error: no Python at ${python[0]}; run make install, or set PYTHON in slurm/site.env" >&2
  exit 2
fi

REQUEUE=75 # what our programs end with that have saved and want to be started again (EX_TEMPFAIL)

# until_the_end COMMAND...: runs it, and hands the scheduler's warning on to it.  Returns its status.
until_the_end() {
  local status=0
  [ -z "$warned$cancelled" ] || return $REQUEUE
  "$@" &
  step=$!
  [ -z "$warned$cancelled" ] || hand_on # a signal between the two lines
  while kill -0 "$step" 2>/dev/null; do # a trap ends `wait` early
    status=0
    wait "$step" || status=$?
  done
  step=
  # A program that has nothing to save, or has not begun to, ends by the signal itself.
  [ -z "$warned" ] || [ "$status" -ne 138 ] || status=$REQUEUE
  # Of several nodes' launchers one was killed: a node that goes or comes back, seldom its own fault; see count_requeues.
  [ "${SLURM_JOB_NUM_NODES:-1}" -eq 1 ] || [ "$status" -ne 137 ] || status=$REQUEUE
  return "$status"
}

# count_requeues: how often this job has requeued itself, in all and since its last sign of progress, by its log.
# SLURM's own count has preemptions and lost nodes in it; it is taken where starts do not append to one log.
count_requeues() {
  local log flags
  log=$(readlink "/proc/$$/fd/1") flags=$(awk '/^flags/ {print $2}' "/proc/$$/fdinfo/1")
  requeues=${SLURM_RESTART_COUNT:-0} idle=0
  if [ -f "$log" ] && ((8#$flags & 8#2000)); then # O_APPEND
    read -r requeues idle < <(awk -v mine="job $job: requeued" -v progress="${progress:-}" '
      progress != "" && $0 ~ progress && $0 != last { last = $0; idle = 0 }
      index($0, mine) == 1 { all++; idle++ }
      END { print all + 0, progress == "" ? 0 : idle + 0 }' "$log")
  fi
}

requeue() {
  for _ in {1..10}; do # the controller may be slow to answer
    if scontrol requeue "$job"; then sleep 600; fi # until SLURM ends this script
    sleep 15
  done
  echo "error: job $job could not be requeued; submit it again to go on" >&2
}

# end_with STATUS: requeues the job where that is what its program asked for, else ends it.
end_with() {
  local most=${MAX_REQUEUES:-20} requeues idle waiting
  if [ -n "$cancelled" ] && [ "$1" -ne 0 ]; then
    # Whether it starts again is SLURM's to know, which ends this script; ended by itself, it would count as failed.
    echo "job $job: SLURM takes it away; a preempted job is started again, a cancelled one is not"
    trap '' USR1 TERM
    sleep 600
  elif [ "$1" -eq $REQUEUE ]; then
    trap - USR1 TERM
    count_requeues
    if [ -z "$warned" ] && scontrol show job "$job" | grep ' PreemptTime=[0-9]' >/dev/null; then
      echo "job $job: preempted, and requeued"
      requeue
    elif [ "$idle" -ge 2 ]; then
      echo "error: job $job started 3 times without a newer checkpoint; the reason is above" >&2
    elif [ -n "$warned" ] && [ "$warned" -lt 60 ] && [ "$requeues" -ge 2 ]; then
      echo "error: job $job is warned as soon as it starts; give sbatch a longer --time," \
        "or a --signal=B:USR1@ of fewer seconds" >&2
    elif [ "$requeues" -ge "$most" ]; then
      echo "error: job $job was requeued $requeues times, and MAX_REQUEUES=$most; submit it again to go on" >&2
    else
      echo "job $job: requeued (time $((requeues + 1)) of at most $most)"
      requeue
    fi
  elif [ "$1" -ne 0 ]; then
    echo "error: job $job ended with status $1; its own words are above" >&2
  fi
  if [ "$1" -ne 0 ]; then
    waiting=$(squeue --noheader --format='%i %j %E' |
      awk -v id="$SLURM_JOB_ID" '$3 ~ ":" id "[^0-9]|:" id "$" {print $1 " (" $2 ")"}') ||
      waiting='what squeue would name, and does not answer'
    [ -z "$waiting" ] || echo "error: what waits for it does not start: ${waiting//$'\n'/, }" >&2
  fi
  exit "$1"
}
