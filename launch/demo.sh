#!/usr/bin/env bash
# Distil a real teacher on this machine: install what is missing, then run SmolLM2-135M over CPython's help texts on
# two workers and show what was kept. Run it again to see that nothing is done twice; arguments go to distill.generate.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh demo
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
torchrun --nproc_per_node "${WORKERS:-2}" -m distill.generate configs/demo.yaml "$@"
