"""What `skipping` refuses: it names the reason, and nothing has run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sessions import ALWAYS, SOME, prompt

from skipcal.core.policy import SkipPolicy
from skipcal.errors import ConfigError, ProfileMismatch, SessionError, UnsupportedModel
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping


def test_nesting_and_reuse_are_errors_and_a_new_context_works(tiny: Any) -> None:
    session = skipping(tiny, policy=SOME)
    with session:
        with pytest.raises(SessionError, match="already inside"), skipping(tiny, policy=SOME):
            pass
        with pytest.raises(SessionError, match="entered before"):
            session.__enter__()
        tiny.generate(**prompt(), max_new_tokens=3, do_sample=False)
    with pytest.raises(SessionError, match="entered before"):
        session.__enter__()
    with skipping(tiny, policy=SOME) as again:
        tiny.generate(**prompt(), max_new_tokens=3, do_sample=False)
    assert again.report.decode_steps == 2


def test_a_report_before_entering_is_an_error(tiny: Any) -> None:
    with pytest.raises(SessionError, match="before the session"):
        _ = skipping(tiny, policy=SOME).report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "use_cache"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup"),
        ({"custom_generate": lambda *a, **k: None}, "custom_generate"),
        ({"cache_implementation": "paged"}, "continuous batching"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
    ],
)
def test_decoding_that_the_rule_cannot_follow_is_refused(tiny: Any, options: Any, message: str) -> None:
    with skipping(tiny, policy=SOME) as run, pytest.raises(SessionError, match=message):
        tiny.generate(**prompt(), max_new_tokens=4, **options)
    assert run.report.decode_steps == 0


def test_continuous_batching_is_refused(tiny: Any) -> None:
    with skipping(tiny, policy=SOME):
        with pytest.raises(SessionError, match="continuous batching"):
            tiny.generate_batch([[1, 2, 3]])
        with pytest.raises(SessionError, match="continuous batching"):
            tiny.init_continuous_batching()


def test_a_compiled_model_is_refused(tiny: Any) -> None:
    with pytest.raises((SessionError, UnsupportedModel), match="compile"):
        compiled: Any = torch.compile(tiny, backend="eager")
        skipping(compiled, policy=SOME).__enter__()
    tiny.model.layers[1].mlp.compile(backend="eager")
    with pytest.raises(SessionError, match="compiled"):
        skipping(tiny, policy=SOME).__enter__()


def test_training_mode_is_refused(tiny: Any) -> None:
    with skipping(tiny, policy=SOME):
        tiny.train()
        with pytest.raises(SessionError, match="training"):
            tiny(prompt()["input_ids"])
        tiny.eval()
    tiny.train()
    with pytest.raises(SessionError, match="training"):
        skipping(tiny, policy=SOME).__enter__()


def test_a_loss_that_would_be_the_full_models_is_refused(tiny: Any) -> None:
    ids = prompt()["input_ids"]
    with skipping(tiny, policy=SOME), pytest.raises(SessionError, match="teacher_forced"):
        tiny(ids, labels=ids)
    with skipping(tiny, policy=ALWAYS, teacher_forced=True) as run:
        loss = tiny(ids, labels=ids).loss
    assert run.report.skipped_blocks > 0
    assert not torch.isclose(loss, tiny(ids, labels=ids).loss)


def test_packed_sequences_are_refused_by_teacher_forcing(tiny: Any) -> None:
    ids = prompt()["input_ids"]
    with skipping(tiny, policy=SOME, teacher_forced=True), pytest.raises(SessionError, match="packed"):
        tiny(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


def test_a_teacher_forced_session_does_not_generate(tiny: Any) -> None:
    with (
        skipping(tiny, policy=SOME, teacher_forced=True),
        pytest.raises(SessionError, match="teacher_forced"),
    ):
        tiny.generate(**prompt(), max_new_tokens=2)


def test_arguments_that_do_not_fit_are_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="profile or policy"):
        skipping(tiny)
    with pytest.raises(ConfigError, match="target_skip_ratio"):
        skipping(tiny, policy=SOME, target_skip_ratio=0.1)
    with pytest.raises(ConfigError, match="prompt_tokens"):
        skipping(tiny, policy=SOME, prompt_tokens=3)
    with pytest.raises(ConfigError, match="below 1"):
        skipping(tiny, policy=SOME, teacher_forced=True, prompt_tokens=0)
    with pytest.raises(ConfigError, match="'fast' is not one of auto, eager, graph"):
        skipping(tiny, policy=SOME, engine="fast")
    with pytest.raises(ProfileMismatch, match="4 layers"):
        skipping(tiny, policy=SkipPolicy(cold_s=1, cold_e=9, threshold=0.9)).__enter__()


@pytest.mark.slow
def test_a_profile_of_another_model_is_refused(tiny: Any, smollm_profile: SkipProfile) -> None:
    with pytest.raises(ProfileMismatch, match="number of layers 30, the model's is 4"):
        skipping(tiny, smollm_profile)
