"""Seeds as an explicit mix, so that what a path samples depends on where it stands in its tree and on nothing else.

The seed of a request is the mix of (run seed, step, problem id, path), where the path lists, for each segment from the
prompt down, the response position at which it was forked and its ordinal among the forks there. Order of arrival, batch
capacity and the other problems do not enter. The mixing function is splitmix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

from functools import reduce

_BITS = (1 << 64) - 1

Path = tuple[tuple[int, int], ...]  # (response tokens before the fork, ordinal among the forks there), prompt downwards


def splitmix64(x: int) -> int:
    """One output of splitmix64 for state `x`: a bijection of the 64-bit integers with full avalanche."""
    z = (x + 0x9E3779B97F4A7C15) & _BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _BITS
    return z ^ (z >> 31)


def mix(*words: int | str, state: int = 0) -> int:
    """Mix integers and texts, in order, into 64 bits; a text enters as its FNV-1a hash (64 bit, UTF-8).

    `state` is what earlier words were mixed into: mix(a, b) == mix(b, state=mix(a)).
    """
    for word in words:
        value = _fnv1a(word) if isinstance(word, str) else int(word)
        state = splitmix64(state ^ splitmix64(value & _BITS))
    return state


def request_seed(seed: int, step: int, problem: str, path: Path) -> int:
    """Seed of the segment that stands at `path` of a problem's tree in one step of a run."""
    return reduce(lambda above, fork: fork_seed(above, *fork), path, root_seed(seed, step, problem))


def root_seed(seed: int, step: int, problem: str) -> int:
    """Seed of the prompt, from which the seeds of the segments below follow; nothing is sampled with it."""
    return mix(seed, step, problem, "segment")


def fork_seed(above: int, position: int, ordinal: int) -> int:
    """Seed of the segment that is forked off a path whose last segment has seed `above`."""
    return mix(position, ordinal, state=above)


def growth_seed(seed: int, step: int, problem: str) -> int:
    """Seed of the sampler's own decisions about one problem's tree."""
    return mix(seed, step, problem, "growth")


def _fnv1a(text: str) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & _BITS
    return value
