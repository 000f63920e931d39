"""Rewards: images [B, 3, H, W] in [0, 1] and prompts to one score an image [B], with gradient. One file a reward."""
