"""What it means to be one of many workers.

A run is one torchrun: workers with a rank each, on one node or several. This package knows nothing of models or data.

grid       Grid: the ranks, the replicas, and which blocks are whose; refuse_other_launchers
session    run_worker, Session: how a worker starts, and how it ends; signals and failure reports
log        open_log, adapt_to_machine: the console, and a log file for each worker
progress   Bar: a progress bar
board      Board, store_of, first_of_node, from_all: counters and notes that all workers share
parts      PartsFolder, PartsKind: a folder of numbered files, each whole or not there
groups     process_group: of a replica or of a training
nodes      check_nodes, PROBE: whether all nodes have the same versions, settings and folders
watch      Watch: which worker hangs
processes  obey_parent_only, signals_blocked, short_socket_paths, check_readers: a DataLoader's readers; and torchrun's
           other workers
device     pick_device, first_device, count_devices, free_bytes
"""
