#!/usr/bin/env bash
# What needs a CUDA GPU, in less than 9 minutes; one JSON object on stdout (tests/support/gpu_checks.py).
# WHEELS: a folder of wheels that this machine's python3 lacks; they go into a temporary folder, without a network.
set -euo pipefail
cd "$(dirname "$0")/.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [[ -n ${WHEELS:-} ]]; then
    python3 -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl 1>&2 ||
        echo "the wheels in $WHEELS cannot be installed" 1>&2 # the report says what cannot be imported
fi
PYTHONPATH=$site:$PWD python3 -m tests.support.gpu_checks
