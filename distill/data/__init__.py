"""From a dataset to samples in blocks.

A sample is a sequence of token ids. The plan gives each sample its place in the store. No model is needed for that.

dataset    find, Data, MANIFEST, PART: the demo, local files, a saved dataset, one of the hub
files      Row, the rows of local files, as they are
forms      recognize; texts, chats, prompts with completions, instructions. ids: tokens.
asked      ask, turn_end: what columns ask a student. form: Encoded, Form
messages   chat messages as users have them, in one form. chat: from messages to tokens, and which the assistant writes
tokenize   tokenize, Samples, Spool: examples to samples
show       marked: a sample in words, with what is trained on marked
plan       lay_out, Plan, permutation, auto_block_rows, batches: samples to rows, blocks and batches
"""
