"""The host: before each FFN of a pass it asks the rule which tokens skip, and counts.

The passes are vLLM's own. What stands on its modules is `forward` on the instance, of each FFN and the norm
before it. Names and weights stay where vLLM looks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipcal.arch.patch import InstancePatches
from skipcal.core.host import PassTokens
from skipcal.core.policy import Policy
from skipcal.errors import SessionError
from skipcal.ops.ffn import MAX_ROWS
from skipcal.serving.blocks import OwnFFN, ServedBlock
from skipcal.serving.captured import CapturedPasses, captured_passes, capturing
from skipcal.serving.clock import BatchTokens, Bools
from skipcal.serving.counts import ServingReport
from skipcal.serving.grouped import StandIn, of_those_that_skip, together
from skipcal.serving.operator import FFN, operator_name, through_operator
from skipcal.serving.proof import SumProof
from skipcal.serving.tally import Tally
from skipcal.serving.targets import RequestRule, TargetRules


class ServingHost:
    """Runs the passes it is told of under a policy, and counts what is skipped."""

    def __init__(
        self,
        blocks: Sequence[ServedBlock],
        policy: Policy,
        *,
        policy_at: Callable[[float], Policy] | None = None,
        gathers: bool = True,
        agreed: Callable[[Tensor | bool], Tensor] | None = None,
    ) -> None:
        """Prepare for the blocks of a loaded model; nothing is set on it.

        policy: of requests that say nothing; policy_at: of those with a target skip ratio of their own.
        gathers: tokens that run are taken apart from those that skip; False: the FFN runs for all tokens of a
        pass unless all of them skip. agreed: what all processes that share a layer do, given one's decision;
        None: it has no other.
        """
        policy.check_layers(len(blocks))
        self._tally = Tally(policy.method, len(blocks))
        self._blocks = tuple(blocks)
        self._device = blocks[0].place[0] if blocks else torch.device("cpu")
        self._rules, self._other_targets = TargetRules(policy, policy_at, blocks), policy_at is not None
        own = self._rules.of(None)
        self._rule = own.rule  # of the tokens of this pass
        self._stand_in: StandIn = of_those_that_skip(own.surrogates)
        self._gathers = gathers and not any(block.whole for block in blocks)
        self._agreed = agreed
        self._proven = False
        self._captured: CapturedPasses | None = None  # None: no graph holds a whole pass
        self._patches = InstancePatches()
        self._registry: MutableMapping[str, Any] = {}
        self._registered: dict[str, FFN] = {}  # what is left in the registry: the model's own FFNs
        self._rows: Tensor | slice | None = None  # the tokens under the rule; None: the full model runs
        self._state: Any = None  # the rule's, of these tokens
        self._decided: dict[int, Tensor | bool] = {}  # by layer: those of them that skip, [ruled]
        self._size = 0  # tokens of this pass
        self._asked = 0  # FFNs of this pass

    @property
    def report(self) -> ServingReport:
        """The counts so far, of all requests."""
        return self.tally.report

    @property
    def tally(self) -> Tally:
        """The counts so far, of each request too."""
        if self._captured is not None:
            self._tally.add_later(*self._captured.fetch())
        return self._tally

    @property
    def proven(self) -> bool:
        """Whether a pass has shown that h + f is what the model adds up; until then it has to run eagerly."""
        return self._proven

    def attach(self, registry: MutableMapping[str, Any] | None = None) -> None:
        """Stand in for the FFN of every block.

        registry: where the engine keeps what its compiled passes look up by name; None: they are eager. All
        blocks are handed over, whatever the policy: what has been compiled holds for every other policy, too.
        """
        for block in self._blocks:
            ffn = self._ffn(block)
            if registry is not None:
                name = operator_name(block.index)
                registry[name], self._registered[name] = ffn, _full(block)
                ffn = through_operator(block.index)
            block.hand_to(ffn, self._patches)
        self._registry = {} if registry is None else registry

    def detach(self) -> None:
        """Put back what `attach` found. A second call does nothing.

        What has been compiled goes on asking by name, and gets the model's own FFNs; graphs are told that the
        full model runs.
        """
        if self._captured is not None:
            self._captured.say_full_no_sync()
        self._patches.restore()
        self._registry.update(self._registered)
        self._registered.clear()

    def run(self, tokens: BatchTokens, ids: Tensor | None, forward: Callable[[], Any]) -> Any:
        """What `forward` returns, a pass over `tokens`. Whatever calls the model outside is the full model.

        Raises UnsupportedModel where the first pass shows that h + f is not what the model adds up.
        """
        rules, ruled = self._judged(tokens)
        methods = [each.method for each in rules]
        if not ruled.any():
            output = forward() if self._proven else self._proving(len(ruled), forward)
            self._tally.add(tokens, ruled, {}, methods)
            return output
        if not self._proven:
            raise SessionError("the first pass of an engine holds decoded tokens, so nothing is proven yet")
        self._begin_pass(tokens, ruled, ids, rules)
        try:
            output = forward()
            if self._asked != len(self._blocks):
                raise SessionError(
                    f"{self._asked} of {len(self._blocks)} FFNs asked whether to skip: something else has "
                    "replaced the forward of vLLM's modules"
                )
            self._tally.add(tokens, ruled, self._decided, methods)
            return output
        finally:
            self._end_pass()

    def prepare_graphs(self, sizes: Sequence[int]) -> str | None:
        """Be ready for whole passes to be captured, over so many rows; why that cannot be, None: it can.

        To be called before `attach`, and before anything is captured.
        """
        found = captured_passes(self._blocks, self._rules.of(None), other_targets=self._other_targets)
        if isinstance(found, str):
            return found
        found.warm_up([rows for rows in sizes if rows <= MAX_ROWS])
        self._captured = found
        return None

    @property
    def captures(self) -> bool:
        """Whether graphs may hold whole passes."""
        return self._captured is not None

    def replays(self, targets: Iterable[float | None], rows: int) -> bool:
        """Whether a pass over requests with these targets may be the replay of a graph over so many rows."""
        captured = self._captured
        if captured is None or not self._proven or not captured.holds(rows):
            return False
        return all(captured.fits(self._rules.of(target)) for target in set(targets))

    def replay(self, tokens: BatchTokens | None, rows: int, replay: Callable[[], Any]) -> Any:
        """What `replay` returns, the graph over so many rows of a pass over `tokens`; None: over nobody's."""
        captured = self._captured
        assert captured is not None
        if tokens is None:
            captured.say_full_no_sync()
            return replay()
        if not self.replays(tokens.targets, rows):
            raise SessionError(f"a graph over {rows} rows is replayed that does not decide what they skip")
        rules, ruled = self._judged(tokens)
        if not captured.room_for(tokens):
            self._tally.add_later(*captured.fetch())
        captured.say_no_sync(tokens, ruled, rules)
        output = replay()
        each = self._tally.add(tokens, ruled, {}, [judged.method for judged in rules])
        captured.count_no_sync(tokens, each)
        return output

    def _judged(self, tokens: BatchTokens) -> tuple[list[RequestRule], Bools]:
        """The rule of each request, and the tokens to which it applies."""
        if self._captured is not None:
            self._captured.forget(tokens.ended)
        rules = [self._rules.of(target) for target in tokens.targets]
        warm_up = np.array([each.warm_up_tokens for each in rules])
        return rules, tokens.skips & (tokens.steps >= warm_up[tokens.owner])

    def _proving(self, tokens: int, forward: Callable[[], Any]) -> Any:
        with (proof := SumProof(self._blocks, tokens)):
            output = forward()
        proof.check()
        self._proven = True
        return output

    def _begin_pass(
        self, tokens: BatchTokens, ruled: Any, ids: Tensor | None, rules: Sequence[RequestRule]
    ) -> None:
        device = self._device
        chosen = np.flatnonzero(ruled)
        everyone, self._size = len(chosen) == len(ruled), len(ruled)
        self._rows = slice(0, len(chosen)) if everyone else torch.from_numpy(chosen).to(device)
        self._rule, self._stand_in = together([rules[n] for n in tokens.owner[chosen]], device)
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
        self._rows = self._state = None
        self._size = self._asked = 0

    # What stands on the modules

    def _ffn(self, block: ServedBlock) -> FFN:
        own = block.own_ffn()

        def ffn(x: Tensor, stream: Tensor) -> Tensor:
            if self._size == 1 and x.shape[0] == 1:
                return self._one(block, own, x, stream)
            if self._captured is not None and capturing(x):
                f = self._captured.ffn_no_sync(block.index, x, stream)
                return own(x) if f is None else f
            if self._rows is None:
                return own(x)
            if len(x) > self._size:  # graphs are made for certain sizes, and passes are padded to the next
                f = torch.zeros_like(x)
                f[: self._size] = ffn(x[: self._size], stream[: self._size])
                return f
            return self._many(block, own, x, stream)

        return ffn

    def _one(self, block: ServedBlock, own: OwnFFN, x: Tensor, h: Tensor) -> Tensor:
        """What the FFN makes in a pass of a single token, where on a CPU every small operation shows."""
        self._asked += 1
        rule, layer = self._rule, block.index
        if layer not in rule.layers:
            return own(x)
        decision, self._state = rule.before(layer, self._state, h)
        skip = self._decided[layer] = bool(decision if self._agreed is None else self._agreed(decision))
        if skip:
            return self._in_place_of(block, h, None)
        made = own(x)
        if rule.learns:
            self._state = rule.after(layer, self._state, h, _scaled(made, block.scale), True)
        return made

    def _many(self, block: ServedBlock, own: OwnFFN, x: Tensor, stream: Tensor) -> Tensor:
        """What the FFN makes in a pass of several tokens, [tokens, hidden]."""
        assert self._rows is not None
        self._asked += 1
        layer = block.index
        if layer not in self._rule.layers:
            return own(x)
        h = stream[self._rows]  # [ruled, hidden]; later norms may add to it in place
        decision, self._state = self._rule.before(layer, self._state, h)
        decided = self._decided[layer] = decision if self._agreed is None else self._agreed(decision)
        skip = torch.as_tensor(decided, device=h.device).reshape(-1)  # one token may be answered by a bool
        skipping = int(skip.sum())
        if skipping == 0:
            made = own(x)
        elif skipping == len(x):
            made = self._in_place_of(block, h, None)
        else:
            skips = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            skips[self._rows] = skip
            if self._gathers:
                made, runs = torch.empty_like(x), ~skips
                made[runs] = own(x[runs])
            else:
                made = own(x)
            made[skips] = self._in_place_of(block, h, skip)
        if self._rule.learns:
            ran: Tensor | bool = ~skip if len(h) > 1 else not skipping
            f = _scaled(made[self._rows], block.scale)
            self._state = self._rule.after(layer, self._state, h, f, ran)
        return made

    def _in_place_of(self, block: ServedBlock, h: Tensor, skip: Tensor | None) -> Tensor:
        """Surrogates of those of the streams that skip, or zeros that nothing else holds. None: all skip."""
        s = self._stand_in(block.index, h, skip)
        if s is None:
            return torch.zeros_like(h if skip is None else h[skip])
        return _scaled(s, 1 / block.scale)


def _scaled(made: Tensor, scale: float) -> Tensor:
    return made if scale == 1 else made * scale


def _full(block: ServedBlock) -> FFN:
    own = block.own_ffn()
    return lambda x, stream: own(x)
