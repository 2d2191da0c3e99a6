"""From a dataset to samples in blocks.

A sample is a sequence of token ids. The plan gives each sample its place in the store. No model is needed for that.

dataset    load, identity, as_data_error: find a dataset and open it
tokenize   tokenize, Samples: texts or chats to samples
chat       encode_chat: messages to tokens and the loss mask
plan       lay_out, Plan, permutation, auto_block_rows: samples to rows, blocks and batches
"""
