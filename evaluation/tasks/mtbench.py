"""MT-Bench: questions in two turns and eight categories (Zheng et al., arXiv 2306.05685).

Decoding is greedy for all categories, as everywhere in skipcal; MT-Bench's own runs sample in some.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcal.arch.limits import check_ids, check_length
from skipcal.configs.sweep import BenchSettings
from skipcal.core.policy import Policy
from skipcal.core.report import SkipReport
from skipcal.errors import Unavailable
from skipcal.evaluation.tasks.answers import Subject, answers
from skipcal.evaluation.tasks.task import AnsweredTask, Record, drawn
from skipcal.text.corpora import file_sha256
from skipcal.text.question_sets import hub_commit, hub_records, read_records, text_field, unique

HUB, HUB_SPLIT = "HuggingFaceH4/mt_bench_prompts", "train"


@dataclass(frozen=True)
class BenchQuestion:
    """Two turns of a user, and reference answers where the benchmark has some."""

    category: str
    turns: tuple[str, str]
    references: tuple[str, str] | None


class MTBench(AnsweredTask[BenchQuestion]):
    """Questions by id."""

    name = "mtbench"

    def prompt(self, item: BenchQuestion, subject: Subject) -> list[int]:
        """The first turn; what the second goes on from is known only when the first is answered."""
        return subject.encode([{"role": "user", "content": item.turns[0]}])

    def subset(self, key: str) -> str | None:
        """The category."""
        return self.items[key].category

    def run(
        self, subject: Subject, policy: Policy, ids: Sequence[str], batch_size: int
    ) -> Iterator[tuple[list[Record], SkipReport]]:
        """One record a question; the second turn follows the method's own first answer."""
        ordered = sorted(ids, key=lambda key: (-len(self.items[key].turns[0]), key))
        for keys in subject.groups(ordered, batch_size):
            talks = {key: [{"role": "user", "content": self.items[key].turns[0]}] for key in keys}
            said: dict[str, list[Any]] = {key: [] for key in keys}
            reports = []
            for turn in range(2):
                prompts = {key: subject.encode(talk) for key, talk in talks.items()}
                for group, report in answers(
                    subject, policy, prompts, new_tokens=self.new_tokens, batch_size=batch_size
                ):
                    reports.append(report)
                    for answer in group:
                        said[answer.id].append(answer)
                        talks[answer.id].append({"role": "assistant", "content": answer.text})
                if turn == 0:
                    for key, talk in talks.items():
                        talk.append({"role": "user", "content": self.items[key].turns[1]})
            records = [
                {
                    "id": key,
                    "tokens": [token for answer in turns for token in answer.tokens],
                    "answers": [answer.text for answer in turns],
                }
                for key, turns in said.items()
            ]
            yield records, SkipReport.merged(reports)


def load_mtbench(settings: BenchSettings, subject: Subject, seed: int) -> MTBench:
    """Read the questions and their references. Raises Unavailable for files that cannot be used."""
    source: dict[str, Any]
    if settings.data_file is None:
        commit = hub_commit(HUB)
        rows: Iterable[tuple[str, dict[str, Any]]] = (
            (
                HUB,
                {"question_id": r.get("prompt_id"), "category": r.get("category"), "turns": r.get("prompt")},
            )
            for r in hub_records(HUB, None, HUB_SPLIT, commit)
        )
        source = {"file": HUB, "split": HUB_SPLIT, "revision": commit}
    else:
        path = Path(settings.data_file)
        rows = read_records(path)
        source = {"file": path.name, "sha256": file_sha256(path)}
    references = _references(settings.reference_file)
    questions: dict[str, BenchQuestion] = {}
    for where, record in rows:
        key = unique(questions, str(record.get("question_id", where)), where)
        questions[key] = BenchQuestion(
            text_field(record, "category", where), _two(record.get("turns"), where), references.get(key)
        )
    if not questions:
        raise Unavailable(f"{source['file']} holds no question")
    chosen = drawn(questions, settings.items, seed, str(source["file"]))
    _check_context(chosen, settings.new_tokens, subject)
    return MTBench(
        items=chosen,
        new_tokens=settings.new_tokens,
        warm_up_tokens=settings.warm_up,
        source={**source, "items": settings.items, "seed": seed},
    )


def _check_context(questions: dict[str, BenchQuestion], new_tokens: int, subject: Subject) -> None:
    """Raise ConfigError now when two turns and two answers would not fit, not after hours."""
    for key, question in questions.items():
        talk = [{"role": "user", "content": turn} for turn in question.turns]
        turns = [subject.encode([message]) for message in talk]
        longest = sum(map(len, turns)) + 2 * new_tokens
        what = f"question {key} may take {longest} tokens in two turns, which do"
        check_length(subject.loaded.model, longest, what, lower="--new-tokens")
        subject.host.reserve(longest)
        check_ids(subject.loaded.model, turns)


def _references(file: str | None) -> dict[str, tuple[str, str]]:
    if file is None:
        return {}
    found: dict[str, tuple[str, str]] = {}
    for where, record in read_records(Path(file)):
        try:
            turns = record["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError) as error:
            raise Unavailable(f"{where}: expected choices[0].turns, as in FastChat's answer files") from error
        found[unique(found, str(record.get("question_id", where)), where)] = _two(turns, where)
    return found


def _two(turns: Any, where: str) -> tuple[str, str]:
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(t, str) and t for t in turns):
        raise Unavailable(f"{where}: expected two turns of text, got {turns!r:.80}")
    return turns[0], turns[1]
