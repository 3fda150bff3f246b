#!/usr/bin/env bash
# Slurm: starts Ray on the nodes of this job, and runs a search on them.
#
#   sbatch jobs/slurm.sh --data /shared/affectnet-224 --results /shared/ray_results --space gpu --name affectnet
#
# Before: run `make setup` in the folder of the project, and submit from there. Folder, data and results must be on a
# file system that all nodes share. Give --results and --name. If the nodes cannot reach the Hugging Face hub, give
# --weights-dir. GPU nodes need an NVIDIA driver of version 580 or newer. For nodes without GPUs, delete the line
# --gpus-per-node, and choose --space quick.
#
# Five minutes before the time limit the search ends in order. The job then goes back to the queue, and continues the
# study at its next start. So it does when one of its nodes fails. Do not give --no-kill: a job whose first node fails
# would then idle until its limit. `scancel --batch --signal=TERM ID` ends the search in order for good.
#
# Change these lines, or give the same options to sbatch:
#SBATCH --job-name=raytune-emotion
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export PATH=$PWD/.venv/bin:$PATH

# Of an array, SLURM_JOB_ID may be taken for the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
requeue= search= code=0 step=()
folder=/tmp/ray-$SLURM_JOB_ID # of Ray's files, on each node
stop() {
  heard=yes
  if [[ $search ]]; then kill -TERM "$search" 2> /dev/null || true; else exit 130; fi
}
finish() {
  code=$?
  trap '' USR1 TERM INT
  # Only Ray's processes of this job.
  kill $(jobs -p) 2> /dev/null || true
  # On the other nodes srun kills them. A second step begins when the first has freed its cores.
  if ((${#step[@]})); then timeout --kill-after=5 30 "${step[@]}" rm -rf "$folder" &> /dev/null || true; fi
  # 143: the signal came before the search could handle it.
  if [[ $requeue && ($code == 130 || $code == 143) ]]; then scontrol requeue "$job"; fi
  wait || true
  rm -rf "$folder" || true
  exit "$code"
}
trap 'requeue=yes; stop' USR1
trap stop TERM INT
trap finish EXIT

# Several jobs may share a node: each has its own token, ports and folder.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
port=$((20000 + SLURM_JOB_ID % 2000 * 4))
ip=$(hostname -I | cut -d ' ' -f 1)
address=$ip:$port
# Ray does not know the limits of Slurm: it would count all cores of the node.
node=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --dashboard-agent-listen-port=$((port + 1)) --disable-usage-stats --block)

ray start --head --node-ip-address="$ip" --port="$port" --ray-client-server-port=$((port + 2)) \
  --include-dashboard=false --temp-dir="$folder" "${node[@]}" &
head=$!
until ray status --address "$address" &> /dev/null; do
  if ! kill -0 "$head" 2> /dev/null; then
    echo "error: Ray does not start on $(hostname); its reason is above" >&2
    exit 1
  fi
  sleep 1
done

others=$((SLURM_JOB_NUM_NODES - 1))
if ((others)); then
  mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # this script runs on the first
  step=(srun --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="${names[0]}"
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0)
  "${step[@]}" ray start --address="$address" "${node[@]}" &
fi
# The search computes the resources of a trial from the nodes that are present when it begins. So wait for all of them.
python - "$address" "$SLURM_JOB_NUM_NODES" << 'END'
import sys
import time

import ray

address, nodes = sys.argv[1], int(sys.argv[2])
ray.init(address=address, logging_level="ERROR", log_to_driver=False)
deadline = time.monotonic() + 300
while (alive := sum(node["Alive"] for node in ray.nodes())) < nodes:
    if time.monotonic() > deadline:
        sys.exit(f"error: {alive} of {nodes} nodes have joined after five minutes; look for the others in this log")
    time.sleep(1)
END

bash jobs/search_or_resume.sh --address "$address" "$@" &
search=$!
heard=yes
while [[ $heard ]]; do # a signal ends `wait` before the search ends
  heard=
  wait "$search" && code=0 || code=$?
done
exit "$code"
