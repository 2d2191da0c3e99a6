"""What the teacher said, on disk: a Zarr group with docs/format.md as its specification.

Only this package uses zarr. It knows arrays, blocks and commits, and nothing of models or logits.

store        Store: open and read
writable     WritableStore: create, write and commit
schema       CAPTURED, INNER_ROWS: which arrays there are
codecs       how an array is cut and compressed
metadata     the zarr.json of the group and of each array, and their digests
requests     together: several requests at the same time
rules        what the values of rows must be
soundness    BlockCheck, Problem, block_problems, metadata_problems, plan_problems: is all as the format promises?
repair       no_other_run, restore_metadata, take_back: what is damaged is made again
location     check_writable, refuse_inside_store, Lock, fsync: folders, object stores, locks, what is safely on disk
web          WebStore: what a web server has, to be read
retry        RetryingStore: what fails for a while is tried again
reasons      why a disk or a server failed, in words
lease        Lease: keeps a second run out of an object store
fingerprint  digest, text_digest, summarize, differences: what makes two runs the same run
"""
