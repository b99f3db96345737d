"""A rollout of a vision-language model, scored in several contexts: inputs, pictures, ablation."""
