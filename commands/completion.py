"""What a shell offers after an option: the names that are known.

It asks at each press of a key, so nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Complete = Callable[[str], list[str]]


def _starting(names: Sequence[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def one_of(*names: str) -> Complete:
    """Names from a fixed list."""

    def complete(incomplete: str) -> list[str]:
        return _starting(names, incomplete)

    return complete


def listed(complete: Complete) -> Complete:
    """The same for a list with commas: what follows the last comma."""

    def complete_last(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in complete(last)]

    return complete_last


def profiles(incomplete: str) -> list[str]:
    """Shipped profiles; where none is meant, the shell offers files."""
    from skipcal.profiles.sources import shipped_profiles

    return _starting(shipped_profiles(), incomplete)


def configs(incomplete: str) -> list[str]:
    """Shipped configurations; where none is meant, the shell offers files."""
    from skipcal.configs.run import shipped_configs

    return _starting(shipped_configs(), incomplete)


def corpora(incomplete: str) -> list[str]:
    """Known corpora; any other hub id can be typed."""
    from skipcal.text.known import KNOWN_CORPORA

    return _starting(sorted(KNOWN_CORPORA), incomplete)


def tasks(incomplete: str) -> list[str]:
    """Tasks of evaluate and sweep."""
    from skipcal.configs.sweep import TASKS

    return _starting(TASKS, incomplete)


def rules(incomplete: str) -> list[str]:
    """Rules that tune can try."""
    from skipcal.configs.tune import RULES

    return _starting(RULES, incomplete)


def shapes(incomplete: str) -> list[str]:
    """Shapes that bench can time."""
    from skipcal.configs.shapes import shapes as known

    return _starting(sorted(known()), incomplete)
