"""What rows carry, known to the workflow that makes it and to the verdict that checks it."""

LAST_HOP = 8
PAGE_EVERY = 10
"""Every so many rows carry a value above the offload threshold."""


def page(x: int, hop: int) -> str:
    """What a row with a page carries away from a hop: more than a message holds."""
    return f"{x}:{hop}," * 12_000
