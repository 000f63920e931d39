"""Experiments that train, evaluate and report as a whole."""
