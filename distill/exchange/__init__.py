"""Out of a store and into one: the columns that other trainers read, and what others captured.

columns     the columns of axolotl's distillation, from rows of a store
exporting   plan_job, Worker, summary: a store as a folder of Parquet files
"""
