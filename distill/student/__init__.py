"""The student: built, trained on what the teacher said, measured, and saved.

distill.train, distill.hf and loops of one's own share the loss and the model's wiring.

model       find, check, build: the student itself
learner     Learner, BatchLoss: from a batch to the sum of its losses
packing     samples end to end in one row, for the length of a call
loss        DistillationLoss: between a student's logits and what a store keeps of the teacher
divergence  the divergences of each row, with gradients written out
batches     split, open_caches, StepBatches: what is trained on, and what each step reads of it
training    Training: a run and its steps
optimizer   AdamW; gradients over workers and micro-batches: DistributedDataParallel, FSDP2
checkpoint  Checkpoints, lock_output, settings_of: what a stopped run is continued from
evaluate    held-out figures; divergences: of each row from the teacher
metrics     Metrics, SHOWN, evaluations, summary, is_run, side_by_side: what was measured, on disk and as tables
"""
