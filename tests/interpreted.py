"""Triton's interpreter, which runs kernels without a GPU: what it read, and what has to be mended."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from skipcal.ops import settings
from skipcal.ops.settings import Settings


def mend_loop_bounds() -> None:
    """Let `range` take bounds that a kernel computed.

    The interpreter of Triton 3.6 makes an int of an array of one element by `int`, which NumPy 2.4
    refuses; 3.7 does as here.
    """
    from triton.runtime import interpreter  # importing it reads TRITON_INTERPRET

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


def patch_language_once() -> None:
    """Let a launch put the interpreter's functions into Triton's language once, and take all of them out.

    It does so anew in every call of one jitted function by another, and looks through the whole language
    for what to replace each time: most of the time that a small kernel takes.
    """
    from triton import language
    from triton.runtime import interpreter

    whole = SimpleNamespace(__globals__={"tl": language, "core": language.core})
    patch, patch_builtin, scope_class = (
        interpreter._patch_lang, interpreter._patch_builtin, interpreter._LangPatchScope
    )  # fmt: skip
    replacements: dict[Any, list[tuple[str, Any]]] = {}
    launched: list[Any] = []

    class Launch(scope_class):  # type: ignore[misc, valid-type]
        def restore(self) -> None:
            super().restore()
            launched.clear()

    def patch_builtin_again(package: Any, builder: Any, scope: Any) -> None:
        if package not in replacements:
            first = scope_class()
            patch_builtin(package, builder, first)
            replacements[package] = [(name, getattr(package, name)) for _, name, _ in first._changes]
            first.restore()
        for name, member in replacements[package]:
            scope.set_attr(package, name, member)

    def patch_at_launch(function: Any) -> Any:
        if launched:
            return scope_class()  # of a call within the launch: nothing is left to do
        launched.append(function)
        return patch(whole)

    interpreter._LangPatchScope = Launch
    interpreter._patch_builtin = patch_builtin_again
    interpreter._patch_lang = patch_at_launch


class Reads:
    """The addresses that interpreted kernels loaded from, with how often."""

    def __init__(self) -> None:
        self._times: Counter[int] = Counter()

    def add(self, addresses: Any, mask: Any) -> None:
        self._times.update(np.asarray(addresses)[np.asarray(mask)].ravel().tolist())

    def of(self, tensor: Tensor) -> Tensor:
        """How often each element was loaded, in the tensor's shape."""
        offsets = torch.zeros(tensor.shape, dtype=torch.long)
        for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            steps = torch.arange(size) * stride
            offsets += steps.view(-1, *[1] * (tensor.dim() - axis - 1))
        addresses = tensor.data_ptr() + offsets.ravel() * tensor.element_size()
        return torch.tensor([self._times[a] for a in addresses.tolist()]).view(tensor.shape)


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of kernels that stream weights, small enough for tiny matrices to need several."""
    one, some = Settings(16, 64, 4, 1), Settings(16, 32, 4, 1)
    by_rows = {1: one, 16: some, 32: some, 64: some}
    monkeypatch.setattr(settings, "DEFAULTS", dict.fromkeys(settings.DEFAULTS, by_rows))
