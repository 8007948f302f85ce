"""Decoding: the conversation, A/B answers, batched greedy answers."""
