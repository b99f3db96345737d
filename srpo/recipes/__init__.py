"""Scripts that train, whole: data, prompt, rewards, settings. Copy them, or run them as they are.

    accelerate launch -m srpo.recipes.train_trl --data geometry3k --size 3b --output_dir out

`prompts`, `rewards` and `data` know nothing of a trainer; `train_trl` brings them to `SRPOTrainer`.
"""
