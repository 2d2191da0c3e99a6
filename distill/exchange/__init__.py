"""Out of a store and into one: the columns that other trainers read, and what others captured.

columns     the columns of axolotl's distillation, from rows of a store
exporting   plan_job, Worker, summary: a store as a folder of Parquet files
captured    CapturedReader: what a row of others' data says, in its several forms
ingesting   find, plan_job, Worker, summary: such rows as a store
"""
