"""The arena: methods × seeds on one base, reward, prompts and evaluation, at equal updates and at equal compute."""
