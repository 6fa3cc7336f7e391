"""llama.cpp's own benchmark as a contender: what its files do on the same machine, in the same rounds.

`llama-bench` loads a GGUF file, warms up, and tells the speed of one prompt, of new tokens behind a prompt, and of both
in turn. That is what `slablm.evaluation.speed` measures of a model, but for the time to the first token.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from slablm.errors import SlabError
from slablm.evaluation.contender import FOOTPRINT_NEW_TOKENS, Footprint
from slablm.evaluation.speed import DOCUMENT_TOKENS, SUMMARY_TOKENS, Run, Workload

# A small process between: its largest child is what it has started, and nothing of this one.
_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@dataclass(frozen=True)
class LlamaBench:
    """A GGUF file, run by llama.cpp.

    Attributes:
        file: the GGUF file.
        program: `llama-bench`, a path or a name that is found on PATH.
    """

    file: str
    program: str = "llama-bench"

    def check(self) -> None:
        """Find the program.

        Raises:
            SlabError: there is none.
        """
        if shutil.which(self.program) is None:
            raise SlabError(
                f"{self.program} is no program: {self.file} is run by llama.cpp's llama-bench, "
                "whose path --llama-bench takes"
            )

    def run(self, workload: Workload, threads: int) -> Run:
        """Measure once.

        Args:
            workload: what to do.
            threads: of llama.cpp.

        Raises:
            SlabError: the program fails, or says something else than expected.
        """
        document = ("-pg", f"{DOCUMENT_TOKENS},{SUMMARY_TOKENS}") if workload.document else ()
        read, *whole = self._speeds(threads, "-p", workload.prompt_tokens, "-n", 0, *document)
        (wrote,) = self._speeds(threads, "-p", 0, "-n", workload.new_tokens, "-d", workload.prompt_tokens)
        seconds = (DOCUMENT_TOKENS + SUMMARY_TOKENS) / whole[0] if whole else None
        return Run(prefill=read, first_token=None, decode=wrote, document=seconds, energy=None)

    def footprint(self, prompt_tokens: int) -> Footprint:
        """The largest resident set of a process that reads a prompt and writes a few tokens.

        Args:
            prompt_tokens: tokens to read.

        Raises:
            SlabError: as for `run`.
        """
        self.weight_bytes()  # says why, if it cannot
        command = self._command(1, "-p", prompt_tokens, "-n", FOOTPRINT_NEW_TOKENS)
        done = subprocess.run([sys.executable, "-c", _PEAK, *command], capture_output=True, text=True, check=False)
        if done.returncode != 0 or sys.platform == "win32":
            return Footprint(None, None, None)
        return Footprint(None, None, int(done.stdout) * (1 if sys.platform == "darwin" else 1024))

    def weight_bytes(self) -> int:
        """Bytes of all tensors of the file, as llama.cpp counts them.

        Raises:
            SlabError: as for `run`.
        """
        count: int = self._asked(1, "-p", 1, "-n", 0, "--no-warmup")[0]["model_size"]
        return count

    def _speeds(self, threads: int, *arguments: str | int) -> list[float]:
        """Tokens per second of each test."""
        return [float(test["avg_ts"]) for test in self._asked(threads, *arguments)]

    def _asked(self, threads: int, *arguments: str | int) -> list[dict[str, Any]]:
        done = subprocess.run(self._command(threads, *arguments), capture_output=True, text=True, check=False)
        try:
            done.check_returncode()
            tests: list[dict[str, Any]] = json.loads(done.stdout)
            return [{"avg_ts": test["avg_ts"], "model_size": test["model_size"]} for test in tests]
        except (subprocess.CalledProcessError, ValueError, KeyError, TypeError) as error:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}, {error!r}"])[-1]
            raise SlabError(f"{self.program} could not measure {self.file}: {said}") from error

    def _command(self, threads: int, *arguments: str | int) -> list[str]:
        command = [self.program, "-m", self.file, "-t", threads, "-r", 1, "-ngl", 0, "-o", "json", *arguments]
        return [str(part) for part in command]
