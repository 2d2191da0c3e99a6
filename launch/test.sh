#!/usr/bin/env bash
# Lint, types and all tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh test
ruff check .
ruff format --check .
mypy
python -m pytest -n 2 --dist worksteal "$@"  # most of the time is spent waiting for processes that start
