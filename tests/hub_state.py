"""What the small Hub of hub_server.py stores, has seen, and is told to get wrong."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Blob:
    path: Path
    size: int
    sha256: str
    git_oid: str
    lfs: bool


@dataclass
class Repo:
    """One model repository: branches point to commits, commits to whole trees."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: dict[str, Blob], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = tree, oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Content by name, .gitattributes aside."""
        tree = self.commits[self.branches[revision]]
        return {n: blob.path.read_bytes() for n, blob in tree.items() if n != ".gitattributes"}


@dataclass
class Faults:
    """Ways to fail; all off."""

    lfs_uploads: int | None = None  # uploads of large files that succeed; later ones get 403
    cut_uploads: bool = False  # the connection breaks in the middle of every large file
    lose: str = ""  # a file that a commit silently leaves out
    damage: str = ""  # a file that a commit silently stores with its last byte changed
    move: bool = False  # somebody else commits just before every commit


@dataclass(frozen=True)
class Hub:
    url: str
    token: str  # may write
    read_token: str  # may only read
    folder: Path
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, status
    faults: Faults = field(default_factory=Faults)
    uploads: list[str] = field(default_factory=list)  # sha256 of each large file received

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to take this for the Hub, with its caches below `home`."""
        return os.environ | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
        }

    def store(self, content: bytes, lfs: bool) -> Blob:
        sha256 = hashlib.sha256(content).hexdigest()
        path = self.folder / sha256
        path.write_bytes(content)
        git_oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return Blob(path, len(content), sha256, git_oid, lfs)
