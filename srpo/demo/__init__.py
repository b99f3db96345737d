"""What `python -m srpo demo` runs: a small vision-language model, trained with token credit on a CPU."""
