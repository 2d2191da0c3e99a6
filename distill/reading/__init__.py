"""Samples out of a store: one by one, or in shuffled batches.

Nothing here needs a model. A store is read in the process that asks, when it asks.

cache    TeacherCache: a store as a sequence of samples
index    Index: which samples, and where they are. shared: arrays that the processes of a machine share
mixture  Mixture: several caches of one vocabulary as one. shares: whose turn it is
samples  collate, empty_sample, RowReader, Sample, Batch: samples as dicts of tensors, and batches of them
shuffle  ShuffledBatches: an epoch in random order, for any number of ranks and readers
"""
