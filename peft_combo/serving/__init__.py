"""HTTP service: stored adapters and a fitted recommender, hot-swapped under load, with monitoring and state.

Owns what lives longer than one request: releases in use, new items, events, keys and figures. Never imports tuning or
evaluation: what learns runs in a process of its own.
"""

__all__: list[str] = []
