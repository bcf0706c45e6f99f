"""Xet storage of the Hub on loopback: which contents have arrived that way."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class XetStore:
    files: dict[str, Any] = field(default_factory=dict)  # SHA-256 -> file

    def has(self, sha256: str) -> bool:
        return sha256 in self.files

    def size(self, sha256: str) -> int | None:
        return self.files[sha256].size if sha256 in self.files else None

    def read(self, folder: Path, sha256: str) -> bytes:
        raise KeyError(sha256)

    def connection(self, url: str, access: str) -> dict[str, str]:
        return {}
