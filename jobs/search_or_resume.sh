#!/usr/bin/env bash
# Starts a search, or continues it if its study exists. For platforms that start a stopped job again with the same
# command.
#
#   jobs/search_or_resume.sh --results URI --name NAME [options of `python -m raytune_emotion.search`]
set -euo pipefail

results= name=
for ((i = 1; i <= $#; i++)); do
  next=$((i + 1))
  case ${!i} in
    --results) results=${!next-} ;;
    --results=*) results=${!i#*=} ;;
    --name) name=${!next-} ;;
    --name=*) name=${!i#*=} ;;
  esac
done
if [[ ! $results || ! $name ]]; then
  echo "error: --results and --name: a study can be continued only if its place is known; give both" >&2
  exit 2
fi

# If the results cannot be read now, end with exit code 1: Kubernetes and SkyPilot try again, and the files for them say
# how often. Slurm does not: submit the job again. The search itself reports a wrong option.
resume=$(python -c '
import sys
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.storage.locations import parse_location
try:
    study = parse_location(sys.argv[1]) / sys.argv[2]
    print("" if study.read("study.yaml") is None else "--resume")
except UserError:
    pass
except (Breakdown, OSError) as error:
    sys.exit(f"error: {error}")
' "$results" "$name")

# `exec`: signals reach the search.
exec python -m raytune_emotion.search "$@" $resume
