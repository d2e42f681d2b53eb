"""A hub in memory: what is uploaded to it is recorded, and can be put where the hub's cache would have it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi

COMMIT = "c0ffee" + "0" * 34


class FakeHub:
    """Repositories by name, each its files by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: list[dict[str, Any]] = []
        self.created: list[dict[str, Any]] = []
        self.branches: list[str] = []
        self.private: dict[str, bool] = {}
        self._folder = folder
        for name in (
            "create_repo",
            "create_branch",
            "file_exists",
            "hf_hub_download",
            "create_commit",
            "repo_info",
        ):
            monkeypatch.setattr(HfApi, name, getattr(self, f"_{name}"))

    def _create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.created.append({"name": name, "private": private})
        self.repositories.setdefault(name, {})
        self.private.setdefault(name, bool(private))
        return SimpleNamespace(repo_id=name)

    def _repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.private[repo_id])

    def _create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok and repo_id in self.repositories
        self.branches.append(branch)

    def _file_exists(self, repo_id: str, filename: str, *, revision: str | None) -> bool:
        return filename in self.repositories[repo_id]

    def _hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None) -> str:
        path = self._folder / "downloaded" / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.repositories[repo_id][filename])
        return str(path)

    def _create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> Any:
        files = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
        assert len(files) == len(operations)
        self.repositories[repo_id].update(files)
        self.commits.append({"repo_id": repo_id, "files": sorted(files), **options})
        return SimpleNamespace(pr_url=None, commit_url=f"https://hub/{repo_id}/commit/1")

    def into_cache(self, repo_id: str, cache: Path, *, revision: str = "main", commit: str = COMMIT) -> Path:
        """Write a repository as the hub's cache has it: every file of a snapshot is a link to a blob."""
        home = cache / f"models--{repo_id.replace('/', '--')}"
        snapshot = home / "snapshots" / commit
        for folder in (home / "blobs", home / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        (home / "refs" / revision).write_text(commit)
        for n, (name, raw) in enumerate(self.repositories[repo_id].items()):
            blob = home / "blobs" / f"{commit[:6]}{n}"
            blob.write_bytes(raw)
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
        return snapshot
