# shellcheck shell=bash
# Read by all batch scripts: the site's values, the environment's Python, and how a job starts again.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source=slurm/site.env
set +u # what modules run often reads unset variables
[ ! -f slurm/site.env ] || source slurm/site.env
set -u
read -ra container <<<"${CONTAINER:-}"
python=("${container[@]}" "${PYTHON:-.venv/bin/python}")
if [ ${#container[@]} -eq 0 ] && ! command -v "${python[0]}" >/dev/null; then
  echo "error: no Python at ${python[0]}; run make install, or set PYTHON in slurm/site.env" >&2
  exit 2
fi

REQUEUE=75 # what our programs end with that have saved and want to be started again (EX_TEMPFAIL)

# until_the_end COMMAND...: runs it, and hands the scheduler's warning on to it.  Returns its status.
until_the_end() {
  local status=0 warned=
  cancelled=
  "$@" &
  step=$!
  trap 'echo "$(date +%T) the time limit is near, or SIGUSR1 came: saving"; warned=1; kill -USR1 "$step"' USR1
  # The scheduler takes the job away, and starts it again by itself when it was preempted.
  trap 'cancelled=1; kill -USR1 "$step"' TERM
  while kill -0 "$step" 2>/dev/null; do # a trap ends `wait` early
    status=0
    wait "$step" || status=$?
  done
  trap - USR1 TERM
  # A program that has nothing to save, or has not begun to, ends by the signal itself.
  [ -z "$warned" ] || [ "$status" -ne 138 ] || status=$REQUEUE
  return "$status"
}

# end_with STATUS: requeues the job where that is what its program asked for, else ends it.
end_with() {
  local count=${SLURM_RESTART_COUNT:-0} most=${MAX_REQUEUES:-20}
  if [ "$1" -eq $REQUEUE ] && [ -z "$cancelled" ]; then
    if [ "$count" -lt "$most" ]; then
      echo "job $SLURM_JOB_ID: saved, and requeued (time $((count + 1)) of at most $most)"
      scontrol requeue "$SLURM_JOB_ID"
      sleep 60 # until the scheduler ends this script
    fi
    echo "error: job $SLURM_JOB_ID was requeued $count times, and MAX_REQUEUES=$most; submit it again to go on" >&2
  elif [ "$1" -ne 0 ]; then
    echo "error: job $SLURM_JOB_ID ended with status $1; its own words are above" >&2
    waiting=$(squeue --noheader --format='%i %j %E' | awk -v id="$SLURM_JOB_ID" '$3 ~ ":" id "[^0-9]|:" id "$" {print $1 " (" $2 ")"}')
    [ -z "$waiting" ] || echo "error: what waits for it does not start: ${waiting//$'\n'/, }" >&2
  fi
  exit "$1"
}
