# shellcheck shell=bash
# Shared by the sbatch scripts: one torchrun on each node of the job, SLURM's warning passed on, the job put back in the
# queue when it was interrupted.
#
#   R1V2_CONTAINER     image for srun --container-image (pyxis); empty: run in the environment of the job. Of the image
#                      that Dockerfile builds: a file that all nodes see (enroot import -o /SHARED/megatron_r1v2.sqsh
#                      dockerd://megatron_r1v2), or, pushed, docker://REGISTRY#PATH/megatron_r1v2:latest
#   R1V2_MOUNTS        for --container-mounts; default: the submit folder at its own path
#   R1V2_RECIPE        instead of the script's recipe
#   R1V2_LOGS          folder of the ranks' logs, one folder for each job, start and node; default: logs
#   R1V2_MAX_REQUEUES  how often a job is started over, whether we or SLURM put it back (preemption, a failed node);
#                      default: 100
#   R1V2_LAST_SECONDS  a step that the warning has not ended is given up so long before the end of the job: SIGTERM, of
#                      which checkpoint.grace_seconds must fit in two thirds; torchrun kills its ranks only then
#                      (--shutdown-timeout); default: 90
#   R1V2_RETRY_AFTER   a start that fails after so many seconds is put back too (a lost node ends the others' processes
#                      before SLURM notices); one that fails earlier is not: bad settings fail at once; default: 600
#   R1V2_MAX_FAILURES  how many starts of a job may fail and be put back; default: 3
#
# On several nodes, where a node has several networks, set before sbatch (srun and pyxis pass both on):
#   GLOO_SOCKET_IFNAME  the interface over which nodes reach each other, for control messages and checkpoints; gloo takes
#                       that of the host's name otherwise, and hangs or refuses at the start where that is the loopback
#   NCCL_SOCKET_IFNAME  the same for NCCL's start; the data goes over InfiniBand where there is one
#
#   R1V2_GPU           outside of a job: the GPU that the rehearsal is for (r1v2 rehearse --gpu); default: h100
#
# What sbatch reads from the scripts can be changed by its own options (--nodes, --time, ...) or SBATCH_* variables.

# Runs on each node. SLURM passes a signal to every process of the step. torchrun would die of SIGUSR1, so it starts with
# the signal ignored; so do its workers, until the trainer asks to hear of it. SIGTERM torchrun passes on itself.
# shellcheck disable=SC2016 # expanded there
R1V2_NODE_SCRIPT='trap "" USR1
logs="$1/node-$SLURM_NODEID"; shift
mkdir -p "$logs"
exec torchrun --log-dir "$logs" --redirects 3 --tee "0:3" "$@"'

# What is said of the container to srun.
container_options() {
  if [[ -n "${R1V2_CONTAINER:-}" ]]; then
    printf '%s\n' "--container-image=$R1V2_CONTAINER" "--container-mounts=${R1V2_MOUNTS:-$PWD:$PWD}" \
      "--container-workdir=$PWD"
  fi
}

# rehearse_here STAGE RECIPE [--nodes=N] [section.key=value ...]: outside of a job, for the resources that the script
# asks for, or as many nodes as sbatch would be given.
rehearse_here() {
  local stage=$1 recipe=$2 script nodes gpus argument given=()
  shift 2
  script=slurm/$(basename "$0")
  if [[ $stage == evaluate ]]; then
    echo "$script: an evaluation is not rehearsed; submit it with sbatch" >&2
    return 2
  fi
  nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$script")
  gpus=$(sed -n 's/^#SBATCH --gpus-per-node=//p' "$script")
  for argument; do
    case $argument in
      --nodes=*) nodes=${argument#*=} ;;
      *) given+=("$argument") ;;
    esac
  done
  if [[ ! $nodes =~ ^[1-9][0-9]*$ ]]; then
    echo "$script: --nodes=$nodes; accepted: a whole number from 1" >&2
    return 2
  fi
  echo "$script: not in a job, so this rehearses $stage on $nodes x $gpus GPUs; sbatch --nodes=$nodes $script runs it" >&2
  python -m megatron_r1v2 rehearse "$recipe" --gpus $((nodes * gpus)) --gpus-per-node "$gpus" \
    --gpu "${R1V2_GPU:-h100}" "${given[@]}"
}

# launch STAGE RECIPE [section.key=value ...]
launch() {
  local stage=$1 recipe=${R1V2_RECIPE:-$2}
  shift 2
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    rehearse_here "$stage" "$recipe" "$@"
    return
  fi
  check_bound || return 1
  local gpus warned=0 late=0 status=0 srun_pid timer='' logs
  local nodes=() container=() failed=()
  # Not "| head": scontrol may then die of SIGPIPE, and with pipefail the job with it.
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  mapfile -t container < <(container_options)
  gpus=${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node}
  logs=${R1V2_LOGS:-logs}/${SLURM_JOB_NAME:-job}-$SLURM_JOB_ID/start-${SLURM_RESTART_COUNT:-0}

  # Not killed at once when a node ends badly: after SIGTERM each node takes its own time to end. "&" plus wait, because
  # a shell that waits in the foreground runs no trap.
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
    --wait=300 "${container[@]}" bash -c "$R1V2_NODE_SCRIPT" node "$logs" \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$gpus" --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --shutdown-timeout "${R1V2_LAST_SECONDS:-90}" \
    --rdzv-endpoint="${nodes[0]}:$((20000 + SLURM_JOB_ID % 10000))" \
    -m megatron_r1v2 "$stage" "$recipe" "$@" &
  srun_pid=$!
  trap 'warned=1; kill -USR1 "$srun_pid" || true; [[ -n $timer ]] || { ring_before_the_end & timer=$!; }' USR1
  # The tasks, not srun, which would kill them at once. The second time they have not heard: the job goes without them.
  trap 'late=$((late + 1)); scancel --signal=TERM "$SLURM_JOB_ID.0" || true' ALRM
  # A trap ends wait early, with srun still at work; the last wait has its real exit status.
  while ((late < 2)) && kill -0 "$srun_pid" 2>/dev/null; do
    wait "$srun_pid" || true
  done
  trap '' ALRM
  [[ -z $timer ]] || kill "$timer" 2>/dev/null || true
  ((late == 2)) || wait "$srun_pid" || status=$?

  # After the warning the run saves and ends well; preempted, its step is abandoned. A run that had just finished
  # resumes at its last step and ends at once. The two that do not hear the warning are finished when they end well:
  # pairs would refuse its folder, and the jobs after it would never start.
  if ((late < 2 && status == 0)) && [[ $stage == pairs || $stage == evaluate ]]; then
    return 0
  elif ((late)); then
    put_back "out of time in a step" || return 1
  elif ((warned && status == 0)) || was_preempted; then
    put_back "interrupted" || return 1
  elif ((status != 0)); then
    mkdir -p "$logs" && touch "$logs/failed"
    failed=("${logs%/*}"/start-*/failed)
    if ((SECONDS >= ${R1V2_RETRY_AFTER:-600} && ${#failed[@]} <= ${R1V2_MAX_FAILURES:-3})); then
      put_back "failed with status $status after $SECONDS s" || return "$status"
    fi
  fi
  return "$status"
}

# Runs beside the step after the warning: SIGALRM for the script some time before the end of the job, and again at a
# third of that time. A job without an end is not run out of it.
ring_before_the_end() {
  local end before last=${R1V2_LAST_SECONDS:-90}
  end=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([0-9][^ ]*\).*/\1/p')
  [[ -n $end ]] || return 0
  end=$(date --date="$end" +%s)
  for before in "$last" $((last / 3)); do
    while (($(date +%s) < end - before)); do sleep 2; done
    kill -ALRM "$$"
  done
}

was_preempted() {
  [[ "$(scontrol show job "$SLURM_JOB_ID")" =~ PreemptTime=[0-9] ]]
}

# A start beyond the bound, for which SLURM itself or a user has put the job back, does nothing.
check_bound() {
  ((${SLURM_RESTART_COUNT:-0} <= ${R1V2_MAX_REQUEUES:-100})) || say_used_up "put back by SLURM"
}

# say_used_up WHY: fails.
say_used_up() {
  echo "job $SLURM_JOB_ID: $1, but R1V2_MAX_REQUEUES=${R1V2_MAX_REQUEUES:-100} starts over are used up;" \
    "submit again to go on" >&2
  return 1
}

# put_back WHY: within the bound.
put_back() {
  local count=${SLURM_RESTART_COUNT:-0} bound=${R1V2_MAX_REQUEUES:-100}
  ((count < bound)) || { say_used_up "$1"; return 1; }
  echo "job $SLURM_JOB_ID: $1; back into the queue, start over $((count + 1)) of at most $bound" >&2
  scontrol requeue "$SLURM_JOB_ID"
}
