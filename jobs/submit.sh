#!/usr/bin/env bash
# Submits a search to a running Ray cluster, and follows its log:
#
#   RAY_API_SERVER_ADDRESS=http://head:8265 jobs/submit.sh \
#     --data /shared/AffectNetFused --results /shared/ray_results --space search_spaces/gpu.yaml --name affectnet
#
# All arguments are those of `python -m raytune_emotion.search`. The code and the search spaces travel with the job;
# other paths are those of the cluster: results, and data as a packed store, lie where every node sees them, or results
# at a URI. Unless --results says otherwise a study goes to ray_results in the project's folder. The nodes need its
# requirements: by `make setup` in a folder that they share with this machine, or in the environment of `ray start`.
# Without RAY_API_SERVER_ADDRESS the cluster is sought on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."

# Clusters started where there is a token (`ray get-auth-token --generate`) ask for it; `ray job` offers it when told,
# and fails when told where there is none.
if [[ ${RAY_AUTH_TOKEN-}${RAY_AUTH_TOKEN_PATH-} || -e ~/.ray/auth_token ]]; then
  export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
fi

name=search results=
for ((i = 1; i <= $#; i++)); do
  next=$((i + 1))
  case ${!i} in
    --name) name=${!next-} ;;
    --name=*) name=${!i#*=} ;;
    --results | --results=*) results=given ;;
  esac
done
if [[ ! $name =~ ^[A-Za-z0-9_][A-Za-z0-9_.=,+-]*$ ]]; then
  echo "error: --name: expected letters, digits and . _ - = , +, got '$name'" >&2
  exit 2
fi
# A job's own folder is gone when it ends.
[[ $results ]] || set -- --results "$PWD/ray_results" "$@"

ray=ray
[[ -x .venv/bin/ray ]] && ray=.venv/bin/ray

# Only the code travels: with everything else in this folder the upload would pass Ray's limit.
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
cp -r raytune_emotion search_spaces "$package"
find "$package" -name __pycache__ -prune -exec rm -rf {} +

# None where this folder lies in the repository of something else.
commit=
if git ls-files --error-unmatch jobs/submit.sh &> /dev/null; then
  commit=$(git describe --always --dirty --abbrev=40 '--exclude=*')
fi

# A job runs the first python of the PATH that `ray start` had, which need not be the one with Ray. The project's own
# comes first where the nodes see it. Ray puts their PATH in its place.
"$ray" job submit \
  --submission-id "$name-$(date +%Y%m%d-%H%M%S)" \
  --metadata-json "{\"study\": \"$name\"}" \
  --runtime-env-json \
  "{\"env_vars\": {\"PATH\": \"$PWD/.venv/bin:\${PATH}\", \"RAYTUNE_EMOTION_COMMIT\": \"$commit\"}}" \
  --working-dir "$package" \
  -- python -m raytune_emotion.search --address auto "$@"
