"""The GPU room of `srpo`: row statistics, token credit and policy loss on tensors and rows.

Nothing here knows trainers or models. `reference` is plain PyTorch, the kernel files are Triton, `ops` registers both
and chooses. Importing this package loads no kernel and no Triton.
"""
