"""From a word the user typed to what it names: recipe, model source, reward, prompts, detector."""
