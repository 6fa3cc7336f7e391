from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rival:
    name: str
    path: Path
