"""hetero_async in the training loops of others: Hugging Face's Trainer, Lightning, Accelerate. One file each.

Each imports its package when it is imported itself; nothing else of hetero_async needs any of them.
"""
