import pytest

from slablm.evaluation import energy
from slablm.evaluation.energy import RaplMeter, find_meter


def add_counter(powercap, folder, name, energy, span=1000):
    place = powercap / folder
    place.mkdir()
    (place / "name").write_text(name + "\n")
    (place / "energy_uj").write_text(f"{energy}\n")
    (place / "max_energy_range_uj").write_text(f"{span}\n")


def test_without_a_counter_there_is_a_reason(tmp_path):
    assert find_meter(tmp_path) == "not measurable here: the machine shows no energy counter (RAPL)"


def test_packages_are_added_up_and_their_parts_are_not_counted_twice(tmp_path):
    add_counter(tmp_path, "intel-rapl:0", "package-0", 100)
    add_counter(tmp_path, "intel-rapl:0:0", "core", 50)
    add_counter(tmp_path, "intel-rapl:1", "package-1", 200)
    add_counter(tmp_path, "intel-rapl:2", "psys", 900)
    meter = find_meter(tmp_path)
    assert isinstance(meter, RaplMeter)
    joules = meter.start()
    assert joules() == 0
    for folder, count in (("intel-rapl:0", 130), ("intel-rapl:0:0", 77), ("intel-rapl:1", 205), ("intel-rapl:2", 999)):
        (tmp_path / folder / "energy_uj").write_text(str(count))
    assert joules() == pytest.approx(35e-6)


def test_a_counter_that_wraps_around(tmp_path):
    add_counter(tmp_path, "intel-rapl:0", "package-0", 990, span=999)
    joules = find_meter(tmp_path).start()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("15")
    assert joules() == pytest.approx(25e-6)


def test_a_counter_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(file):
        raise PermissionError(13, "Permission denied", str(file))

    add_counter(tmp_path, "intel-rapl:0", "package-0", 1)
    monkeypatch.setattr(energy, "_integer", refuse)
    assert find_meter(tmp_path).endswith("_uj may not be read by this user")


def test_a_counter_that_is_damaged(tmp_path):
    add_counter(tmp_path, "intel-rapl:0", "package-0", "many")
    assert find_meter(tmp_path).startswith("not measurable here: the energy counter cannot be read")
