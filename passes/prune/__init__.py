"""Removes positions of axes: channels, FFN neurons, heads, experts, hidden width."""
