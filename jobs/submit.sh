#!/usr/bin/env bash
# Submits a search to a running Ray cluster, and follows its log:
#
#   RAY_API_SERVER_ADDRESS=http://head:8265 jobs/submit.sh --data /shared/AffectNetFused --space search_spaces/gpu.yaml --name affectnet
#
# All arguments are those of `python -m raytune_emotion.search`. Paths are those of the cluster: data and results must
# lie where every node sees them. The cluster's nodes need the project's requirements; the code itself travels with the
# job. Without RAY_API_SERVER_ADDRESS the cluster is sought on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."

# Ray's clusters ask for a token, which lies in ~/.ray/auth_token or RAY_AUTH_TOKEN; `ray job` offers it only when told.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}

name=search
for ((i = 1; i < $#; i++)); do
  if [[ ${!i} == --name ]]; then
    next=$((i + 1))
    name=${!next}
  fi
done

ray=ray
[[ -x .venv/bin/ray ]] && ray=.venv/bin/ray

# Only the code travels: with everything else in this folder the upload would pass Ray's limit.
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
cp -r raytune_emotion search_spaces "$package"
find "$package" -name __pycache__ -prune -exec rm -rf {} +

"$ray" job submit \
  --submission-id "$name-$(date +%Y%m%d-%H%M%S)" \
  --metadata-json "{\"study\": \"$name\"}" \
  --working-dir "$package" \
  -- python -m raytune_emotion.search --address auto "$@"
