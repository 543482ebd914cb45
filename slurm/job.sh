# shellcheck shell=bash
# What the job scripts of this folder share. Each sources it first, in the folder that it was submitted from.

die() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# Signals are for the ranks, which save and stop. This shell outlives them, to see what became of the run.
trap ':' USR1 TERM

site=${SITE_ENV:-slurm/site.env}
[[ -r $site ]] || die "$site, the settings of this site, can't be read; see slurm/README.md"
# shellcheck source=slurm/site.env
source "$site"
site_setup || die "site_setup in $site failed"
set -euo pipefail # from here on: the functions of module systems use variables that are not set

PYTHON=${SITE_VENV:-.venv}/bin/python
[[ -x $PYTHON ]] || die "there is no $PYTHON: run make setup in the checkout, or correct SITE_VENV in $site"
export PYTHONUNBUFFERED=1
if [[ -n ${SITE_SCRATCH:-} ]]; then
    export NUMBA_CACHE_DIR=$SITE_SCRATCH/numba # compiled code stays on the node
fi
# srun does not take this over from sbatch by itself (since Slurm 22.05).
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# The job's number as people know it: 123, or 123_4 for a task of an array. A requeued job keeps it.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
LOGS=slurm/logs
LOG=$LOGS/$SLURM_JOB_NAME-$JOB
mkdir -p "$LOGS"

say() {
    printf '%s job %s on %s: %s\n' "$(date '+%F %T')" "$JOB" "$SLURM_JOB_NODELIST" "$1"
}

# wait_for PROCESS: to its end, whatever signals arrive in the meantime; its exit status.
wait_for() {
    local status
    while true; do
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2>/dev/null || return "$status"
    done
}

# run_ranks COMMAND…: once for each of the job's tasks, with a log for each. A rank that ends lets the others a minute to end
# by themselves: they have something to say, or a checkpoint to finish.
run_ranks() {
    srun --kill-on-bad-exit=0 --wait=60 --open-mode=append --output="$LOG.rank-%t.log" "$@" &
    wait_for $!
}

# on_each_node COMMAND…: once on every node of the job.
on_each_node() {
    srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "$@" &
    wait_for $!
}

# staged FILE: where all ranks find this dataset: in each node's scratch folder, or where it is if a node has no room.
staged() {
    local paths
    if [[ -z ${SITE_SCRATCH:-} ]]; then
        printf '%s\n' "$1"
        return
    fi
    paths=$(on_each_node "$PYTHON" -m dist_contrastive.stage "$1" "$SITE_SCRATCH") || return
    paths=$(sort -u <<<"$paths")
    if [[ $paths == *$'\n'* ]]; then # the ranks are to be told one path
        paths=$1
    fi
    printf '%s\n' "$paths"
}

# status_of RUN: a line on what became of the run; status 0 where it is done, 75 where it was stopped, another one otherwise.
status_of() (
    trap '' USR1 TERM
    exec "$PYTHON" -m dist_contrastive.status "$1"
)

# saved_step RUN: the step of its newest checkpoint, 0 if there is none.
saved_step() {
    local newest
    newest=$(find "$1/checkpoints" -maxdepth 1 -name 'step-*' -printf '%f\n' 2>/dev/null | sort -V | tail -n 1) || true
    newest=${newest#step-}
    echo $((10#${newest:-0}))
}

# requeue REASON: back into the queue under the same number, and this script ends. A job that is not running any more was
# requeued by Slurm itself, or cancelled.
requeue() {
    local state
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) || true
    if [[ $state == RUNNING ]]; then
        say "$1; requeued"
        scontrol requeue "$SLURM_JOB_ID" || say "it can't be requeued; the same command goes on where this run stopped"
    else
        say "$1; Slurm says that the job is ${state:-gone}"
    fi
    exit 75
}

# give_up_without_progress RUN: end the job where it comes back from the queue again and again, and saves nothing between.
give_up_without_progress() {
    local step before=-1 count=0
    step=$(saved_step "$1")
    if [[ ${SLURM_RESTART_COUNT:-0} != 0 && -r $LOG.progress ]]; then
        read -r before count <"$LOG.progress"
    fi
    count=$((step > before ? 0 : count + 1))
    printf '%s %s\n' "$step" "$count" >"$LOG.progress"
    if ((count > ${SITE_MAX_REQUEUES:-3})); then
        say "gives up: it was requeued $count times and got no further than step $step"
        exit 1
    fi
}

# A rank takes one GPU.
compare_ranks_with_gpus() {
    local ranks=${SLURM_TASKS_PER_NODE%%[(,]*} gpus=${SLURM_GPUS_ON_NODE:-}
    if [[ -n $gpus && $gpus != "$ranks" ]]; then
        say "warning: $gpus GPU(s) and $ranks rank(s) on a node; --ntasks-per-node=$gpus has a rank for each GPU"
    fi
}

# read_command RECIPE [OPTION…]: the run's folder and its dataset, as the trainer reads its command line; a line each. Where
# it refuses the command line, its own error and status.
read_command() {
    "$PYTHON" - "$@" <<'PYTHON'
import sys

from dist_contrastive.cli import main_guard
from dist_contrastive.train import parse


def show() -> None:
    config = parse(sys.argv[1:])
    print(config.run_dir, config.data.path, sep="\n")


sys.exit(main_guard(show))
PYTHON
}

# pretrain RECIPE [OPTION…]: a run in runs/RECIPE-JOB, or where --run-dir says, from its checkpoint where there is one. The
# job ends with 0 once the run is done, is requeued where it was stopped, and ends with an error otherwise.
pretrain() {
    [[ $# -gt 0 && $1 != -* ]] || die "give a recipe and its options: … slurm/pretrain.sbatch RECIPE [--field.name VALUE …]"
    local recipe=$1 plan run data before found status=0 ranks=0
    shift
    set -- "$recipe" --run-dir "runs/$recipe-$JOB" "$@"
    plan=$(read_command "$@") || exit
    run=${plan%$'\n'*} data=${plan#*$'\n'}
    say "$recipe in $run, ${SLURM_NTASKS:-1} rank(s)"
    compare_ranks_with_gpus
    give_up_without_progress "$run"
    data=$(staged "$data") || status=$?
    case $status in
        0) ;;
        2) exit 2 ;;
        *) requeue "the copy of the dataset was interrupted" ;;
    esac
    before=$(status_of "$run" 2>/dev/null) || true
    run_ranks "$PYTHON" -m dist_contrastive.train "$@" --data.path "$data" || ranks=$?
    # What counts is what the run's folder says: srun's status is 0 after a node's death, too.
    found=$(status_of "$run") || status=$?
    printf '%s\n' "$found"
    if [[ $status != 0 && $found == "$before" ]]; then # of an earlier launch: this one's ranks did not get so far
        status=1 found=
    fi
    case $status in
        0) say "done" && return ;;
        75) requeue "stopped" ;;
    esac
    # Ranks that a signal ends before they have begun leave nothing in the folder: 75, or 128 and the number of USR1 or TERM.
    if [[ $ranks =~ ^(75|138|143)$ && $found != "$run: failed"* ]]; then
        requeue "stopped before the first step"
    fi
    # Slurm would requeue the job for a node that is gone, but may take minutes to see it, and the job has ended then.
    timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --output=none true || requeue "a node does not answer"
    say "failed; see $LOG.rank-*.log"
    exit 1
}
