"""A reward of your own, and a recipe that trains with it beside the embedded one.

leapalign train examples/own_reward.py:warmer --steps 20
leapalign score image.png --reward examples/own_reward.py:warmth --prompt "a photo of a circle"
"""

from dataclasses import replace

from leapalign import Custom, RewardTerm, Run, shapeworld_leapalign


def warmth(images, prompts):
    """Red minus blue, [B]: any differentiable arithmetic on float images [B, 3, H, W] in [0, 1] will do."""
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def warmer() -> Run:
    """Both rewards pull equally hard at every sample, until warmth reaches 0.3."""
    run = shapeworld_leapalign()
    (caption,) = run.rewards
    warm = RewardTerm(reward=Custom(function="own_reward.py:warmth"), threshold=0.3, unit_gradient=True)
    return replace(run, rewards=(replace(caption, unit_gradient=True), warm), out="runs/warmer")
