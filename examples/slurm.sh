#!/bin/bash
# Search a campaign on all nodes of a Slurm job:
#
#     sbatch slurm.sh campaign.yaml postgresql://me@dbhost/merges
#
# Ten minutes before its time is up the search lets finish what is under way, and the job goes back into the queue, where
# it goes on. To end it so that it stays ended: scancel --batch --signal=TERM JOBID. The same sbatch resumes the run.
#
# To edit: the #SBATCH lines, and the environment that evomerge is installed in. Paths must lead to the same files on all
# nodes. So must the run: a database (its password in ~/.pgpass), or a folder on a disk that one and the same node has.

#SBATCH --job-name=evomerge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=evomerge-%j.log

set -euo pipefail
campaign=${1:?usage: sbatch slurm.sh CAMPAIGN RUN} run=${2:?usage: sbatch slurm.sh CAMPAIGN RUN}

# shellcheck source=/dev/null
source "${EVOMERGE_VENV:-$HOME/evomerge/.venv}/bin/activate"

# A cluster of our own, which only this job's processes may enter: the network is shared.
read -r head_ip _ < <(hostname -I) # by which the other nodes reach this one, the first
export RAY_ADDRESS="$head_ip:$((20000 + SLURM_JOB_ID % 10000))"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
export RAY_USAGE_STATS_ENABLED=0
folder=/tmp/ray-$SLURM_JOB_ID ray_log=evomerge-$SLURM_JOB_ID-ray.log

srun --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --cpu-bind=none \
    ray start --head --node-ip-address="$head_ip" --port="${RAY_ADDRESS##*:}" --temp-dir="$folder" \
    --num-cpus="$SLURM_CPUS_ON_NODE" --include-dashboard=false --block >>"$ray_log" 2>&1 &
steps=($!)
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others)); then
    # shellcheck disable=SC2016  # the number of CPUs is each node's own
    srun --nodes="$others" --ntasks="$others" --exclude="$SLURMD_NODENAME" --cpu-bind=none bash -c '
        until ray start --address="$RAY_ADDRESS" --num-cpus="$SLURM_CPUS_ON_NODE" --block; do sleep 5; done' \
        >>"$ray_log" 2>&1 &
    steps+=($!)
fi
# shellcheck disable=SC2317  # called at the end, whatever that is
stop_cluster() {
    trap - EXIT
    kill -TERM "${steps[@]}" 2>/dev/null || true
    wait "${steps[@]}" || true
    srun --ntasks-per-node=1 rm -rf "$folder" || true
}
trap stop_cluster EXIT
until ray status >/dev/null 2>&1; do
    kill -0 "${steps[0]}" || { echo "the head of the Ray cluster has died: see $ray_log" >&2 && exit 1; }
    sleep 2
done

# Nodes that come later get work when they are there.
evomerge search "$campaign" --run "$run" --workers ray:auto &
driver=$! requeue=false
trap 'kill -TERM $driver' TERM
trap 'requeue=true; kill -TERM $driver' USR1
while true; do
    wait $driver && status=0 || status=$? # of the driver, or of a signal that came meanwhile
    kill -0 $driver 2>/dev/null || break
done
stop_cluster
if $requeue; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
