"""Generate one text under a policy, and time it: what `skipcal generate` does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from transformers import BatchEncoding, TextStreamer, set_seed

from skipcal.arch.limits import check_ids, check_length
from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import input_device
from skipcal.core.report import SkipReport
from skipcal.runtime.greedy import greedy_decoding, sampled_decoding, warn_of_overruled
from skipcal.runtime.session import SkipSession
from skipcal.text.chat_template import WITHOUT, templated
from skipcal.text.opening import row_ids


@dataclass(frozen=True)
class Generation:
    """A generated text and what it took.

    setup_s:   seconds in which the FFN blocks were located and proven, and steps prepared. The other
               times are without it.
    tok_per_s: decode steps a second, after the prefill; None for a single token.
    """

    prompt_tokens: int
    new_tokens: int
    text: str
    setup_s: float
    prefill_s: float
    decode_s: float
    chat_template: bool
    report: SkipReport

    @property
    def tok_per_s(self) -> float | None:
        """Decode speed, without the prefill and the first token that it yields."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "setup_s": self.setup_s,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "tok_per_s": self.tok_per_s,
            "chat_template": self.chat_template,
            "report": self.report.to_dict(),
        }


def generate_text(
    loaded: LoadedModel,
    session: SkipSession,
    prompt: str,
    *,
    new_tokens: int,
    chat_template: bool = True,
    seed: int | None = None,
    stream: TextIO | None = None,
) -> Generation:
    """Generate at most `new_tokens` tokens after `prompt`.

    session:       what `skipping` returned for the model; it is entered here.
    chat_template: wrap the prompt by the tokenizer's template, where it has one.
    seed:          sample with this seed, by what the model's own settings say of the distribution; None is
                   greedy decoding. Its other settings, as beams, are not used, which a warning says.
    stream:        where the text goes as it is made.
    Raises ConfigError for a text that does not fit the model, and for a template that refuses it.
    """
    tokenizer: Any = loaded.tokenizer
    model: Any = loaded.model
    wrapped = chat_template and bool(getattr(tokenizer, "chat_template", None))
    inputs = _inputs(loaded, prompt, new_tokens, wrapped=wrapped)
    length = inputs["input_ids"].shape[1]
    warn_of_overruled(model, sampled=seed is not None)
    decoding = greedy_decoding if seed is None else sampled_decoding
    if seed is not None:
        set_seed(seed)
    begin = time.perf_counter()
    with session as run, decoding(model):
        start = time.perf_counter()
        # A step may be prepared before the token of the step before it is handed over.
        clock = _TimedStreamer(tokenizer, stream, lambda: time.perf_counter() - run.setup_s)
        output = model.generate(**inputs, max_new_tokens=new_tokens, streamer=clock)
    return Generation(
        prompt_tokens=length,
        new_tokens=output.shape[1] - length,
        text=tokenizer.decode(output[0, length:], skip_special_tokens=True),
        setup_s=start - begin + run.setup_s,
        prefill_s=clock.times[0] - start,
        decode_s=clock.times[-1] - clock.times[0],
        chat_template=wrapped,
        report=run.report,
    )


def _inputs(loaded: LoadedModel, prompt: str, new_tokens: int, *, wrapped: bool) -> BatchEncoding:
    """The prompt's tokens, in its template or as plain text, where the model is."""
    tokenizer: Any = loaded.tokenizer
    if wrapped:
        inputs = templated(
            tokenizer,
            [{"role": "user", "content": prompt}],
            instead=WITHOUT,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        ids = torch.tensor([row_ids(tokenizer, prompt)], dtype=torch.long)
        inputs = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    length = inputs["input_ids"].shape[1]
    check_length(
        loaded.model,
        length + new_tokens,
        f"a prompt of {length} tokens and {new_tokens} new ones do",
        lower="--new-tokens, or shorten the prompt",
    )
    check_ids(loaded.model, inputs["input_ids"].tolist())
    found: BatchEncoding = inputs.to(input_device(loaded.model))
    return found


class _TimedStreamer(TextStreamer):
    """Writes text as it is finished and keeps the time of every generated token, by a clock that may stop."""

    def __init__(self, tokenizer: Any, stream: TextIO | None, now: Callable[[], float]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self._now = now
        self._stream = stream
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(self._now())
        self._prompt_seen = True
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._stream is not None:
            self._stream.write(text + ("\n" if stream_end else ""))
            self._stream.flush()
