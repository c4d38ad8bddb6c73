#!/bin/sh
# Make an environment with the peers and the wheel in dist/, and run the comparison in it.
#
#   benches/run.sh [--quick] [further options of peers.py]
#
# PYTHON names the interpreter, ALKNET_BENCH_VENV the environment's folder.
set -eu
cd "$(dirname "$0")/.."

venv=${ALKNET_BENCH_VENV:-.venv-bench}
export PIP_DISABLE_PIP_VERSION_CHECK=1

if ! ls dist/*.whl >/dev/null 2>&1; then
    echo 'there is no wheel in dist/: run `make wheel`' >&2
    exit 1
fi
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"

if ! cmp -s benches/requirements.txt "$venv/installed.txt"; then
    # One at a time, so that a peer that cannot be had is missing and the others are there.
    grep -v '^#' benches/requirements.txt | while read -r requirement; do
        "$venv/bin/python" -m pip install -q "$requirement" || echo "missing: $requirement" >&2
    done
    mkdir -p target/bench
    CMAKE_ARGS=-DLLAVA_BUILD=OFF "$venv/bin/python" -m pip install -q llama-cpp-python \
        >target/bench/llama-cpp-python.log 2>&1 ||
        echo 'missing: llama-cpp-python, see target/bench/llama-cpp-python.log' >&2
    cp benches/requirements.txt "$venv/installed.txt"
fi

# The second command is for the wheel's dependencies, which the first leaves out.
"$venv/bin/python" -m pip install -q --force-reinstall --no-deps dist/*.whl
"$venv/bin/python" -m pip install -q dist/*.whl
exec "$venv/bin/python" benches/peers.py "$@"
