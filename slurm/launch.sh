# shellcheck shell=bash
# Shared by the sbatch scripts: start one torchrun on each node of the job and pass SLURM's warning on.
#
#   R1V2_CONTAINER  image for srun --container-image (pyxis); empty: run in the environment of the job
#   R1V2_MOUNTS     for --container-mounts; default: the submit folder at its own path

# Runs on each node. SLURM passes a signal to every process of the step. torchrun would die of SIGUSR1, so it starts with
# the signal ignored; so do its workers, until the trainer asks to hear of it.
R1V2_NODE_SCRIPT='trap "" USR1; exec torchrun "$@"'

# launch MODULE RECIPE [section.key=value ...]
launch() {
  local module=$1
  shift
  local gpus warned=0 status=0 srun_pid
  local nodes=() container=()
  # Not "| head": scontrol may then die of SIGPIPE, and with pipefail the job with it.
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  gpus=${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node}
  if [[ -n "${R1V2_CONTAINER:-}" ]]; then
    container=(--container-image="$R1V2_CONTAINER" --container-mounts="${R1V2_MOUNTS:-$PWD:$PWD}"
      --container-workdir="$PWD")
  fi

  # "$!" in the background plus wait, because a shell that waits in the foreground runs no trap.
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    "${container[@]}" bash -c "$R1V2_NODE_SCRIPT" node \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$gpus" --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="${nodes[0]}:$((20000 + SLURM_JOB_ID % 10000))" \
    -m "$module" "$@" &
  srun_pid=$!
  trap 'warned=1; kill -USR1 "$srun_pid" || true' USR1
  # A trap ends wait early, with srun still at work; the last wait has its real exit status.
  while kill -0 "$srun_pid" 2>/dev/null; do
    wait "$srun_pid" || true
  done
  wait "$srun_pid" || status=$?

  # After the warning the run saves and ends well: put the job back in the queue, where it resumes. A run that had
  # just finished resumes at its last step and ends at once.
  if ((warned && status == 0)); then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$status"
}
