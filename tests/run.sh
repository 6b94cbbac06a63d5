#!/usr/bin/env bash
# Set up and pass the tests: bash tests/run.sh
# In an active virtual environment it installs there; elsewhere it makes .venv first. Needs no root and no network
# but the package index.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -d .venv ] || python3 -m venv .venv
  . .venv/bin/activate
fi
pip install -q -e '.[test]'
pip install -q --no-deps cn_clip==1.6.0  # the oracle; its own pin of lmdb has no build for current Pythons
python -m pytest "$@"
