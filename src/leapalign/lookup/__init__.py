"""Resolve words that the user typed to recipes, model sources, rewards, prompts and detectors."""
