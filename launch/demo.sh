#!/usr/bin/env bash
# Distil a real teacher on this machine: install what is missing, run SmolLM2-135M over CPython's help texts on two
# workers, take six of its thirty layers out, and train the rest twice, on the text alone and on what the teacher said.
# A report of all this ends it. Run it again to see that nothing is done twice; arguments go to distill.generate.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh demo
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
outputs=${OUTPUTS:-outputs}
run="torchrun --nproc_per_node ${WORKERS:-2} -m"
$run distill.generate configs/demo.yaml "$@"
for argument in "$@"; do
  case $argument in store.path=*) store=$argument ;; esac
done
echo && echo "a student, the teacher without six of its thirty layers, learns from the text alone (cross-entropy) ..."
$run distill.train configs/train_demo.yaml ${store:+"$store"} loss.alpha=0 output="$outputs/text_only"
echo && echo "... and the same student, as many steps, from what the teacher said"
$run distill.train configs/train_demo.yaml ${store:+"$store"} output="$outputs/distilled"
echo
python -m distill.inspect "$outputs/text_only" "$outputs/distilled"
store=${store:-store.path=outputs/demo.zarr}
python -m distill.report "${store#store.path=}" "$outputs/text_only" "$outputs/distilled" --teacher -o "$outputs/report.html"
