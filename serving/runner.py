"""vLLM's model runner V1, as far as it tells which tokens of which requests a pass is over."""

from __future__ import annotations

from typing import Any

from skipcal.arch.patch import InstancePatches
from skipcal.serving.clock import Clock
from skipcal.serving.host import ServingHost
from skipcal.serving.requests import target_asked


class WatchedRunner:
    """Hands the passes over requests to `host`.

    `_model_forward` is what the runner offers to be overridden, and calls for nothing else: passes that warm
    up or measure call the model itself.
    """

    def __init__(self, runner: Any, host: ServingHost) -> None:
        """runner: a GPUModelRunner of vllm/v1/worker/gpu_model_runner.py, or a subclass of it."""
        self._runner = runner
        self.host = host
        self._clock = Clock()
        self._patches = InstancePatches()

    def attach(self) -> None:
        """Stand between the runner and its model."""
        runner, own = self._runner, self._runner._model_forward

        def model_forward(input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
            batch = runner.input_batch
            count = batch.num_reqs
            names = batch.req_ids[:count]
            tokens = self._clock.tokens(
                names,
                computed=batch.num_computed_tokens_cpu[:count],
                prompt=batch.num_prompt_tokens[:count],
                starts=runner.query_start_loc.np[: count + 1],
                targets=[target_asked(runner.requests[name].sampling_params) for name in names],
                alive=runner.requests,
            )
            return self.host.run(tokens, input_ids, lambda: own(input_ids, *args, **kwargs))

        self.host.attach()
        self._patches.set(runner, "_model_forward", model_forward)

    def detach(self) -> None:
        """Leave runner and model as they were."""
        self._patches.restore()
        self.host.detach()
