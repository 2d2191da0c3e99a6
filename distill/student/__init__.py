"""The student: built, trained on what the teacher said, measured, and saved.

distill.train, distill.hf and loops of one's own share the loss and the model's wiring.

model       find, check, build, sees_neighbours: the student itself
loss        DistillationLoss: divergences between a student's logits and the kept targets
batches     StepBatches: what each optimizer step reads
training    Training: the state of a run, and its steps
gradients   summed: gradients over workers and micro-batches; DistributedDataParallel, FSDP2
optimizer   AdamW and its schedule
checkpoint  settings_of, find: checkpoints, and whose they are
evaluate    held-out figures
metrics     Metrics, summary, is_run, side_by_side: what was measured, on disk and as tables
"""
