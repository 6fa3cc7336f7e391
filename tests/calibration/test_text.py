import pytest

from slablm import SlabError
from slablm.calibration.text import _take, load_text


def test_builtin_text_is_split():
    calibration, evaluation = (load_text("builtin", split=split) for split in ("calibration", "evaluation"))
    assert len(calibration) > 300_000
    assert len(evaluation) > 50_000
    assert evaluation[:2000] not in calibration


def test_unreadable_files(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    for path, message in ((tmp_path / "binary", "cannot be read as UTF-8"), (tmp_path, "cannot be read")):
        with pytest.raises(SlabError, match=message):
            load_text(str(path), split="calibration")


def test_streams_stop_when_there_is_enough():
    stream = ({"text": "x" * 100} for _ in iter(int, 1))  # never ends
    assert len(_take(stream, 50)) == 4 * 100 + 3 * 2
    assert _take([{"text": "a"}, {"text": "b"}], None) == "a\n\nb"
