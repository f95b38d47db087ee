#!/usr/bin/env bash
# What needs a CUDA GPU, in one go: the tests marked gpu, and what a SAM step costs at a GPU's size.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -n 0 -m gpu
python -m tests.benchmarks.step "$@"
