#!/usr/bin/env bash
# Submits a search to a running Ray cluster, and follows its log.
#
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 jobs/submit.sh \
#     --data /shared/affectnet-224 --results /shared/ray_results --space gpu --name affectnet
#
# The arguments are those of `python -m raytune_emotion.search`. Without RAY_API_SERVER_ADDRESS the cluster must run on
# this machine. Only the package and the search spaces are uploaded, and a file of this machine that --space names. All
# other paths are those of the cluster: data and results must be on a file system that all nodes share, or at a URI. The
# default of --results is ray_results in this folder. The nodes need the project's dependencies: in the environment of
# `ray start`, or in .venv of this folder if they share it.
set -euo pipefail
cd "$(dirname "$0")/.."

# Ray keeps the arguments of a job, and shows them: the search itself would refuse credentials too late. The patterns are
# those of its own check.
secret='secret|token|password|credential([^_]|_[^k]|$)|signature|access_?key|account_?key|^sig$'
shopt -s nocasematch
for word in "$@"; do
  [[ $word == *://* ]] || continue
  found=
  [[ ${word%%\?*} =~ ://[^/@]*:.*@ ]] && found=yes
  if [[ $word == *\?* ]]; then
    IFS='&' read -r -a settings <<< "${word#*\?}"
    for setting in ${settings[@]+"${settings[@]}"}; do
      [[ ${setting%%=*} =~ $secret ]] && found=yes
    done
  fi
  if [[ $found ]]; then
    echo "error: ${word%%://*}://***: contains credentials, which would be written into the log of the job; put them" \
      "into the environment of \`ray start\` on the nodes, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" >&2
    exit 2
  fi
done
shopt -u nocasematch

# `ray job` sends a token only with RAY_AUTH_MODE=token, and then fails if there is none.
if [[ ${RAY_AUTH_TOKEN-}${RAY_AUTH_TOKEN_PATH-} || -e ~/.ray/auth_token ]]; then
  export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
fi

name=search results=
for ((i = 1; i <= $#; i++)); do
  next=$((i + 1))
  case ${!i} in
    --name) name=${!next-} ;;
    --name=*) name=${!i#*=} ;;
    # The search takes the beginning of an option's name, too.
    --resul*=*) results=${!i#*=} ;;
    --resul*) results=${!next-} ;;
  esac
done
if [[ ! $name =~ ^[A-Za-z0-9_][A-Za-z0-9_.=,+-]*$ ]]; then
  echo "error: --name: expected letters, digits and . _ - = , +, got '$name'" >&2
  exit 2
fi
# The folder of a job is deleted when the job ends, so results never go there.
case $results in
  "") set -- --results "$PWD/ray_results" "$@" ;;
  /* | *://*) ;;
  *)
    echo "error: --results: expected an absolute path that every node sees, or a URI, got '$results'" >&2
    exit 2
    ;;
esac

ray=ray
[[ -x .venv/bin/ray ]] && ray=.venv/bin/ray
if ! command -v "$ray" > /dev/null; then
  echo "error: ray: the command is missing; run \`make setup\`, or activate an environment that has it" >&2
  exit 2
fi

# Upload only the code: all of this folder may be larger than Ray allows.
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
cp -r raytune_emotion search_spaces "$package"
find "$package" -name __pycache__ -prune -exec rm -rf {} +

# A search space of one's own goes along.
options=("$@")
for i in "${!options[@]}"; do
  case ${options[i]} in
    --sp*=*) before=${options[i]%%=*}= ;;
    --sp*) before= i=$((i + 1)) ;;
    *) continue ;;
  esac
  space=${options[i]-}
  space=${space#"$before"}
  file=$space
  [[ $file == /* ]] || file=$OLDPWD/$file
  if [[ -f $file ]]; then
    mkdir -p "$package/space"
    cp "$file" "$package/space"
    options[i]=${before}space/${space##*/}
  fi
done

# Empty if this folder is in the repository of another project.
commit=
if git ls-files --error-unmatch jobs/submit.sh &> /dev/null; then
  commit=$(git describe --always --dirty --abbrev=40 '--exclude=*')
fi

# A job runs the first python in the PATH of `ray start`. If the nodes share .venv of this folder, its python comes
# first. Ray replaces ${PATH} by the PATH of the node. By default `ray job stop` kills a job after three seconds: the
# search gets five minutes to end in order.
"$ray" job submit \
  --submission-id "$name-$(date +%Y%m%d-%H%M%S)" \
  --metadata-json "{\"job_name\": \"$name\"}" \
  --runtime-env-json \
  "{\"env_vars\": {\"PATH\": \"$PWD/.venv/bin:\${PATH}\", \"RAYTUNE_EMOTION_COMMIT\": \"$commit\", \
\"RAY_JOB_STOP_WAIT_TIME_S\": \"300\"}}" \
  --working-dir "$package" \
  -- python -m raytune_emotion.search --address auto ${options[@]+"${options[@]}"}
