"""Constraints on what a response may be: automata over tokens, and the sets of tokens that they allow."""
