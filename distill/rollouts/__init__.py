"""Rollouts: what a student writes after prompts, as token ids with the log-probabilities that they were drawn with.

A part, a fixed range of the prompts, is the unit of work. What is written does not depend on who does which part.

prompts   Prompts, read: from a dataset or a store to the ids that the student continues
sampling  Sampler, stop_ids: the student writes, batch by batch
draws     Draws: one token after the other, each by one number
parts     Parts: the folder of the rollouts: its manifest, and what is finished
prepare   find, plan_job, load: what is done before the student writes
worker    Worker: a worker's parts
summary   summary: rollouts in words
"""
