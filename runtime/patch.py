"""Attributes set on instances for a while, and taken off again."""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class InstancePatches:
    """Sets attributes in the `__dict__` of objects; `restore` puts back what was there, or nothing."""

    def __init__(self) -> None:
        """Start with nothing set."""
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set `target.name`, hiding what its class or module registry says."""
        self._before.append((target, name, target.__dict__.get(name, _ABSENT)))
        target.__dict__[name] = value

    def restore(self) -> None:
        """Undo every `set`, the last first. A second call does nothing."""
        while self._before:
            target, name, value = self._before.pop()
            if value is _ABSENT:
                del target.__dict__[name]
            else:
                target.__dict__[name] = value
