"""`slablm chat` and `slablm generate` as one types them: through a pipe, and in a terminal."""

import io
import re
import signal
import sys
from functools import partial

import pytest

from tests.cli.test_cli import refused, slablm
from tests.serving.folders import with_template


@pytest.fixture(scope="module")
def talking(compressed_folder, tmp_path_factory):
    return with_template(compressed_folder, tmp_path_factory.mktemp("chat") / "out")


@pytest.fixture
def typed(monkeypatch):
    """Puts a text on stdin."""

    def put(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape"))))

    return put


def test_a_conversation_through_a_pipe(talking, typed):
    typed(
        'One\n\n/system Be brief\nTwo \\\nlines\n/reset\n"""a\n\nb"""\n/nonsense\n/help\n' + "x" * 200 + "\n/exit\nno\n"
    )
    done = slablm("chat", talking, "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    said = done.stderr
    assert said.count("tokens read and the first written") == 3
    assert "the conversation begins anew, with this instruction" in said
    assert "error: /nonsense is no command: /help lists them" in said
    assert "/system TEXT" in said
    assert re.search(r"error: the text has \d+ tokens, and the model reads at most 128", said)
    assert re.fullmatch(r"3 answers, 12 tokens, [\d.]+ tokens/s, memory .*B, at most .*B", said.splitlines()[-1])
    assert ">" not in done.stdout.splitlines()[0][:1]  # no prompts where nobody sees them


def test_a_terminal(talking):
    """Ctrl-C ends an answer, Ctrl-D the conversation."""
    pexpect = pytest.importorskip("pexpect")
    command = ["-m", "slablm", "chat", str(talking), "--max-new-tokens", "90"]
    # In the background a shell starts tests with Ctrl-C ignored, which programs inherit.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    child = pexpect.spawn(
        sys.executable, command, encoding="utf-8", codec_errors="replace", timeout=120, preexec_fn=heeding
    )
    child.expect("/help for help, Ctrl-D to leave")
    child.expect_exact("> ")
    child.sendline('"""first')
    child.expect_exact("... ")
    child.sendline('second"""')
    child.expect("tokens read and the first written")
    child.expect_exact("> ")
    child.sendintr()
    child.expect_exact("> ")
    child.sendeof()
    child.expect("1 answers, .* tokens/s, memory")
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)


def test_generate_reads_stdin_and_says_the_time(compressed_folder, typed):
    direct = slablm("generate", compressed_folder, "Hello", "--max-new-tokens", 5)
    assert direct.stdout.startswith("Hello")
    assert re.search(
        r"tokens read and the first written in [\d.]+ s, 5 written at [\d.]+ tokens/s$", direct.stderr.strip()
    )
    typed("Hello\n")
    assert slablm("generate", compressed_folder, "--max-new-tokens", 5).stdout == direct.stdout
    quantised = slablm("generate", compressed_folder, "Hello", "--max-new-tokens", 5, "--kv-cache", "fp8")
    assert (quantised.returncode, quantised.stdout[:5]) == (0, "Hello")
    word = direct.stdout[7]
    stopped = slablm("generate", compressed_folder, "Hello", "--max-new-tokens", 5, "--stop", word)
    assert stopped.stdout == direct.stdout[: direct.stdout.index(word, 5)] + "\n"
    drawn = [slablm("generate", compressed_folder, "Hello", "--temp", 2, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_bad_input(compressed_folder, typed):
    refused(slablm("generate", compressed_folder, "Hi", "--temp", -1), "temperature must be 0 or more")
    refused(slablm("generate", compressed_folder, "Hi", "--stop", ""), "a stop word is empty")
    refused(
        slablm("generate", compressed_folder, "Hi", "--kv-cache", "int3"), "kv_cache must be one of fp8, quanto, hqq"
    )
    refused(slablm("chat", compressed_folder, "--kv-cache", "int3"), "kv_cache must be one of fp8, quanto, hqq")
    refused(slablm("chat", "./nowhere"), "model folder './nowhere' does not exist")
    typed("")
    refused(slablm("generate", compressed_folder), "the prompt is empty")
    typed("\udcff")
    refused(slablm("generate", compressed_folder), "no UTF-8")
    typed("Hi\n")
    done = slablm("chat", compressed_folder)
    assert "error: the tokenizer has no chat template" in done.stderr
