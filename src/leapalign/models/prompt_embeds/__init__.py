"""Prompt embeds: cached in memory and on disk."""
