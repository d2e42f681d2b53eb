"""What stands on instances for a while, attributes and forward hooks, and is taken off again.

Other libraries put things on the same modules meanwhile, and take them off in any order. So `restore`
takes away what is still ours, leaves what somebody else has set, and says so. What is set should pass
calls through once it has been taken off: a wrapper of somebody else's may hold it for longer.

A copy or a pickle of a module has nothing of ours, at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)

_ABSENT = object()
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Patch:
    """`target.name` is `value`; before, its `__dict__` held `before`, and `original` was what one got."""

    target: Any
    name: str
    value: Any
    before: Any
    original: Any

    def undo(self, attributes: dict[str, Any]) -> bool:
        """Take the value out of the target's `__dict__`, or a copy of it; False: it stood there no more."""
        found = attributes.get(self.name, _ABSENT)
        if found is self.value or found is _ABSENT:
            attributes.pop(self.name, None)
            if self.before is not _ABSENT:
                attributes[self.name] = self.before
        return found is self.value

    def hand_over(self, attributes: dict[str, Any]) -> None:
        """Give the original to a wrapper that keeps on the instance what it puts back: accelerate's does."""
        if callable(self.value):
            for name in [name for name, held in attributes.items() if held is self.value]:
                attributes[name] = self.original


def _undo(patches: list[_Patch], attributes_of: Callable[[_Patch], dict[str, Any]]) -> list[_Patch]:
    """Take all of them out, the last first; return those that stood there no more."""
    lost = [patch for patch in reversed(patches) if not patch.undo(attributes_of(patch))]
    for patch in reversed(patches):
        patch.hand_over(attributes_of(patch))
    return lost


class InstancePatches:
    """Sets attributes in the `__dict__` of objects, and hooks modules; `restore` puts back what was there."""

    def __init__(self, root: nn.Module | None = None) -> None:
        """Start with nothing set. root: in which modules have the names that warnings call them by."""
        self._root = root
        self._patches: list[_Patch] = []
        self._hooks: list[tuple[nn.Module, RemovableHandle]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set `target.name`, hiding what its class or module registry says."""
        before, original = target.__dict__.get(name, _ABSENT), getattr(target, name, None)
        patch = _Patch(target, name, value, before, original)
        self._patches.append(patch)
        if isinstance(target, nn.Module):
            _PlainState.of(target).patches.append(patch)
        target.__dict__[name] = value

    def before_forward(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Have `hook(module, args, kwargs)` called before the module's forward."""
        self._hooked(module, module.register_forward_pre_hook(hook, with_kwargs=True))

    def after_forward(
        self, module: nn.Module, hook: Callable[..., Any], *, always_call: bool = False
    ) -> None:
        """Have `hook(module, args, output)` called after the module's forward.

        always_call: after one that raised, too; output is None then.
        """
        self._hooked(module, module.register_forward_hook(hook, always_call=always_call))

    def restore(self) -> list[str]:
        """Undo all of it, the last first, and return the names that somebody else holds. A second call: [].

        What somebody else has set stays, with a warning.
        """
        while self._hooks:
            module, handle = self._hooks.pop()
            handle.remove()
            _PlainState.of(module).forget_hook(handle.id)
        patches, self._patches = self._patches, []
        lost = _undo(patches, lambda patch: patch.target.__dict__)
        for patch in lost:
            logger.warning(
                "somebody else has changed %s since skipcal set it, and what they set stays; take hooks of "
                "other libraries off in the reverse order of putting them on",
                self._called(patch),
            )
        for patch in patches:
            if isinstance(patch.target, nn.Module):
                _PlainState.of(patch.target).forget(patch)
        return [patch.name for patch in lost]

    def _hooked(self, module: nn.Module, handle: RemovableHandle) -> None:
        self._hooks.append((module, handle))
        _PlainState.of(module).hooks.add(handle.id)

    def _called(self, patch: _Patch) -> str:
        """The attribute, with the place of its module in the root, or else its class."""
        inside = self._root.named_modules() if self._root is not None else ()
        place = next((name for name, module in inside if module is patch.target and name), None)
        return f"{place or type(patch.target).__name__}.{patch.name}"


class _PlainState:
    """`__getstate__` of a module while something of ours stands on it: its state without that."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.patches: list[_Patch] = []
        self.hooks: set[int] = set()

    @classmethod
    def of(cls, module: nn.Module) -> _PlainState:
        """That of `module`, which is set there if it is not yet."""
        found = module.__dict__.get("__getstate__")
        if not isinstance(found, cls):
            found = module.__dict__["__getstate__"] = cls(module)
        return found

    def __call__(self) -> Any:
        """What `copy` and `pickle` take for the module's state."""
        state = dict(type(self._module).__getstate__(self._module))
        state.pop("__getstate__", None)
        _undo(self.patches, lambda _: state)
        for name in (name for name in _HOOKS if name in state):
            state[name] = type(state[name])((i, h) for i, h in state[name].items() if i not in self.hooks)
        return state

    def forget(self, patch: _Patch) -> None:
        """The patch has been taken off."""
        self.patches.remove(patch)
        self._leave()

    def forget_hook(self, hook: int) -> None:
        """The hook has been taken off."""
        self.hooks.discard(hook)
        self._leave()

    def _leave(self) -> None:
        if not self.patches and not self.hooks:
            self._module.__dict__.pop("__getstate__", None)
