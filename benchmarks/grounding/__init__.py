"""The grounding check: does token credit point toward the evidence? `benchmarks/learn_grounding.py` runs it."""
