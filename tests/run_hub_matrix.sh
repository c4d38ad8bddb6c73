#!/bin/sh
# Runs the Hub tests under the newest 1.x and the newest 2.x of huggingface_hub.
#
# Usage: tests/run_hub_matrix.sh WHEEL
set -eu
wheel=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for versions in '>=1.6,<2' '>=2,<3'; do
    python3 -m venv --clear "$folder/venv"
    "$folder/venv/bin/pip" -q install "$wheel" "huggingface_hub$versions" pytest pytest-asyncio
    "$folder/venv/bin/python" -m pytest -q tests/test_hub.py
done
