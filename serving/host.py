"""The host: before each FFN of a pass it asks the rule which tokens skip, and counts.

The passes are vLLM's own. What stands on its modules is `forward` on the instance: of the norm before
each FFN, to see the stream, and of the FFN. Names and weights stay where vLLM looks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipcal.arch.patch import InstancePatches
from skipcal.core.host import PassTokens
from skipcal.core.policy import Policy
from skipcal.core.rule import Rule
from skipcal.core.surrogates import Surrogates
from skipcal.errors import SessionError
from skipcal.serving.blocks import ServedBlock
from skipcal.serving.clock import BatchTokens
from skipcal.serving.counts import ServingReport
from skipcal.serving.grouped import together
from skipcal.serving.proof import SumProof
from skipcal.serving.tally import Tally
from skipcal.serving.targets import TargetRules


class ServingHost:
    """Runs the passes it is told of under a policy, and counts what is skipped.

    tally: the counts so far, of each request too.
    """

    def __init__(
        self,
        blocks: Sequence[ServedBlock],
        policy: Policy,
        *,
        policy_at: Callable[[float], Policy] | None = None,
    ) -> None:
        """Prepare for the blocks of a loaded model; nothing is set on it.

        policy: of requests that say nothing; policy_at: of those with a target skip ratio of their own. Both
        have the same surrogates.
        """
        policy.check_layers(len(blocks))
        self.tally = Tally(policy.method, len(blocks))
        self._rules = TargetRules(policy, policy_at)
        self._rule = self._rules.of(None).rule  # of the tokens of this pass
        self._blocks = tuple(blocks)  # every one: the targets to come may differ in their layers
        given: Surrogates = getattr(policy, "surrogates", Surrogates({}))
        self._surrogates = given.for_blocks(blocks)
        self._proof: SumProof | None = SumProof(blocks)
        self._patches = InstancePatches()
        self._rows: Tensor | slice | None = None  # the tokens under the rule; None: the full model runs
        self._state: Any = None  # the rule's, of these tokens
        self._decided: dict[int, Tensor | bool] = {}  # by layer: those of them that skip, [ruled]
        self._h: Tensor | None = None  # the stream before the FFN to come, of all tokens
        self._asked = 0  # FFNs of this pass

    @property
    def report(self) -> ServingReport:
        """The counts so far, of all requests."""
        return self.tally.report

    def attach(self) -> None:
        """Set `forward` on the modules of every block."""
        for block in self._blocks:
            self._patches.set(block.norm, "forward", self._norm(block))
            self._patches.set(block.ffn, "forward", self._ffn(block))

    def detach(self) -> None:
        """Put back what `attach` found. A second call does nothing."""
        self._patches.restore()

    def run(self, tokens: BatchTokens, ids: Tensor | None, forward: Callable[[], Any]) -> Any:
        """What `forward` returns, a pass over `tokens`. Whatever calls the model outside is the full model.

        Raises UnsupportedModel where the first pass shows that h + f is not what the model adds up.
        """
        rules = [self._rules.of(target) for target in tokens.targets]
        warm_up = np.array([each.warm_up_tokens for each in rules])
        ruled = tokens.skips & (tokens.steps >= warm_up[tokens.owner])
        methods = [each.method for each in rules]
        if not ruled.any():
            output = forward() if self._proof is None else self._proven(forward)
            self.tally.add(tokens, ruled, {}, methods)
            return output
        if self._proof is not None:
            raise SessionError("the first pass of an engine holds decoded tokens, so nothing is proven yet")
        self._begin_pass(tokens, ruled, ids, [each.rule for each in rules])
        try:
            output = forward()
            if self._asked != len(self._blocks):
                raise SessionError(
                    f"{self._asked} of {len(self._blocks)} FFNs asked whether to skip: something else has "
                    "replaced the forward of vLLM's modules"
                )
            self.tally.add(tokens, ruled, self._decided, methods)
            return output
        finally:
            self._end_pass()

    def _proven(self, forward: Callable[[], Any]) -> Any:
        assert self._proof is not None
        with self._proof:
            output = forward()
        self._proof.check()
        self._proof = None
        return output

    def _begin_pass(self, tokens: BatchTokens, ruled: Any, ids: Tensor | None, rules: Sequence[Rule]) -> None:
        device = self._device
        chosen = np.flatnonzero(ruled)
        everyone = len(chosen) == len(ruled)
        self._rows = slice(0, len(chosen)) if everyone else torch.from_numpy(chosen).to(device)
        self._rule = together([rules[n] for n in tokens.owner[chosen]], device)
        counted = tokens.counted[chosen]
        found = PassTokens(
            active=torch.ones(len(chosen), dtype=torch.bool, device=device),
            counted=None if counted.all() else torch.from_numpy(counted).to(device),
            step=torch.from_numpy(tokens.steps[chosen].astype(np.int64)).to(device),
            ids=None if ids is None else ids[self._rows],
        )
        self._state = self._rule.start(found, device)
        self._decided = {}

    def _end_pass(self) -> None:
        self._rows = self._state = self._h = None
        self._asked = 0

    @property
    def _device(self) -> torch.device:
        return self._blocks[0].place[0] if self._blocks else torch.device("cpu")

    # What stands on the modules

    def _norm(self, block: ServedBlock) -> Callable[..., Any]:
        own = block.norm.forward

        def forward(*given: Any) -> Any:
            output = own(*given)
            if self._rows is not None:
                self._h = output[1]
            return output

        return forward

    def _ffn(self, block: ServedBlock) -> Callable[[Tensor], Tensor]:
        own = block.ffn.forward

        def forward(x: Tensor) -> Tensor:
            if self._rows is None:
                f: Tensor = own(x)
                return f
            self._asked += 1
            if block.index not in self._rule.layers:
                f = own(x)
                return f
            assert self._h is not None
            h, self._h = self._h[self._rows], None  # [ruled, hidden]; later norms may add to it in place
            skip, self._state = self._rule.before(block.index, self._state, h)
            self._decided[block.index] = skip
            if len(x) == 1:
                return self._one(block.index, own, x, h, bool(skip))
            mask = torch.as_tensor(skip, device=h.device).reshape(-1)  # one token may be answered by a bool
            return self._many(block.index, own, x, h, mask)

        return forward

    def _one(self, layer: int, own: Callable[..., Any], x: Tensor, h: Tensor, skip: bool) -> Tensor:
        """What the FFN adds in a pass of a single token."""
        if skip:
            return self._in_place_of(layer, h)
        f: Tensor = own(x)
        if self._rule.learns:
            self._state = self._rule.after(layer, self._state, h, f, True)
        return f

    def _many(self, layer: int, own: Callable[..., Any], x: Tensor, h: Tensor, skip: Tensor) -> Tensor:
        """What the FFN adds in a pass of several tokens, [tokens, hidden]; those that run are gathered."""
        assert self._rows is not None
        skipping = int(skip.sum())
        if skipping == 0:
            f: Tensor = own(x)
        elif skipping == len(x):
            f = self._in_place_of(layer, h)
        else:
            running = torch.ones(len(x), dtype=torch.bool, device=x.device)
            running[self._rows] = ~skip
            rows = running.nonzero().squeeze(-1)
            f = torch.zeros_like(x)
            f[self._rows] = self._in_place_of(layer, h)
            f.index_copy_(0, rows, own(x[rows]))
        if self._rule.learns:
            ran: Tensor | bool = ~skip if len(h) > 1 else not skipping
            self._state = self._rule.after(layer, self._state, h, f[self._rows], ran)
        return f

    def _in_place_of(self, layer: int, h: Tensor) -> Tensor:
        """What tokens that skip add: their surrogate, or zeros that nothing else holds."""
        s = self._surrogates(layer, h)
        return torch.zeros_like(h) if s is None else s
