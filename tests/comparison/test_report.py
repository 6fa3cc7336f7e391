"""What a reader sees: plots and the page, on made-up records."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from slablm import SlabError
from slablm.comparison import plots, table
from slablm.comparison.report import write_report
from slablm.methods import METHODS
from tests.comparison.made_up import PROJECTIONS, from_file, record, small

CHROMIUM = shutil.which("chromium")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def everything():
    """Every method, several patterns and two group sizes, with accuracies."""
    records = [record("dense", 3.0, 16, accuracy=0.7)]
    pruned = [(8.6, {}), (5.4, {"ratio": 0.7}), (8.7, {"pattern": "2:4"}), (8.8, {"pattern": "4:8"})]
    quantized = [(9, {"value_bits": 8}), (4.5, {"value_bits": 4}), (4.7, {"value_bits": 4, "group_size": 64})]
    for bits, settings in (*pruned, *quantized):
        for index, method in enumerate(METHODS):
            traits = METHODS[method]
            if not traits.takes_true_bits and traits.quantizes == ("value_bits" in settings):
                loss = 3.2 + 0.15 * index + 4 / bits
                records.append(record(method, loss, bits, accuracy=0.5, **settings))
    return [*records, record("slab+", 3.2, 4, accuracy=0.5), record("slab+", 3.4, 3, accuracy=0.4, bits_per_weight=3.0)]


@pytest.fixture(scope="module")
def page(everything, tmp_path_factory):
    """The report on everything: (text, folder)."""
    folder = tmp_path_factory.mktemp("report")
    description = {"model": "tiny <model> & more", "calibration": "builtin", "calibration windows": "4 of 32 tokens"}
    path = write_report(everything, folder, description, "slablm compare 'a b' --methods <all>")
    return path.read_text(encoding="utf-8"), folder


def test_rivals_from_files_stand_beside_the_settings(tmp_path):
    records = [*small(), from_file("IQ4_NL", 3.1, 4.5), from_file("Q3_K", 3.9, 3.5)]
    assert [row.reference for row in table.rows(records)][4:] == [None, None]
    assert len(table.verdicts(records)) == 1
    assert [(a.cell.method, b.cell.method) for a, b in table.stronger_quantizers(records)] == [("slab", "IQ4_NL")]
    text = write_report(records, tmp_path, {"model": "m"}, "x").read_text(encoding="utf-8")
    assert ">IQ4_NL<" in text[text.index("<h2>All cells") :]
    assert ">IQ4_NL<" in (tmp_path / "plots/perplexity-over-size.svg").read_text(encoding="utf-8")


def test_every_text_has_its_place_in_the_report(tmp_path):
    records = small()
    text = write_report(records, tmp_path, {"model": "m"}, "x").read_text(encoding="utf-8")
    others = text[text.index("<h2>On the other texts") : text.index("<h2>Perplexity over size")]
    for entry in records:
        assert table.show_perplexity(entry, "c4@1-6") in others
    assert table.show_divergence(records[1].main) in text
    assert re.fullmatch(r"1\.\d{3} \(0\.012, 1\.23\)", table.show_divergence(records[1].main))
    assert table.show_divergence(records[0].main) == ""
    assert "On the other texts" not in write_report(
        [replace(r, texts={"one": r.main}) for r in records], tmp_path, {"model": "m"}, "x"
    ).read_text(encoding="utf-8")


def test_places_of_layers():
    assert plots.place("model.layers.3.mlp.up_proj") == (3, "mlp.up_proj")
    assert plots.place("model.layers.3.mlp.experts.17.up_proj") == (3, "mlp.experts.up_proj")


def test_every_method_has_its_own_colour_and_marker(everything):
    looks = [plots._look(method, 5) for method in METHODS]
    assert len({look["color"] for look in looks}) == len({look["marker"] for look in looks}) == len(METHODS)


def test_patterns_are_told_apart_by_their_filling():
    variants = ["unstructured", "2:4", "4:8", "group 128", "group 64"]
    assert [plots._fill(variant, variants) for variant in variants] == ["full", "none", "left", "full", "none"]
    assert plots._fill("2:4", ["2:4"]) == "none"


def test_the_report_shows_every_cell(page, everything):
    text, _ = page
    body = text[text.index("<h2>All cells") : text.index("<h2>On the other texts")]
    for entry in everything:
        assert table.show_perplexity(entry) in body
        assert f"<td>{entry.bits_per_weight:.2f}</td><td>{entry.bits_per_weight + 0.77:.2f}</td>" in body
        assert entry.cell.config is None or f">{entry.cell.setting}</th>" in body
    assert len(re.findall('<td class="text stay">', body)) == len(everything)
    assert "12.3" in body
    assert body.count("<td>0.234</td>") == len(everything) - 1


def test_the_report_needs_nothing_from_elsewhere(page):
    text, folder = page
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link rel=\"stylesheet|\bsrc=", text)
    linked = re.findall(r'<a href="([^"]*)"', text)
    assert linked
    assert all((folder / name).is_file() for name in linked)


def test_what_the_user_typed_is_escaped(page):
    text, _ = page
    assert "tiny <model>" not in text
    assert "<h1>tiny &lt;model&gt; &amp; more</h1>" in text
    assert "--methods &lt;all&gt;" in text


def test_no_plot_is_empty(page, everything):
    text, folder = page
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    settings = table.settings(everything)
    assert len(svgs) == 1 + 2 * len(settings)
    assert len(list((folder / "plots").glob("*.png"))) == len(list((folder / "plots").glob("*.svg"))) == len(svgs)
    points, accuracies, errors = svgs[0], svgs[1 : 1 + len(settings)], svgs[1 + len(settings) :]
    # One point for every cell but dense, which is a line.
    assert sum(map(len, data(points))) == len(everything) - 1
    for svg, members in zip(accuracies, settings.values(), strict=True):
        assert len(data(svg)) == 3 * (len(members) + 1)
    for svg, members in zip(errors, settings.values(), strict=True):
        assert [len(line) for line in data(svg)] == [4] * len(members) * len(PROJECTIONS)


def data(svg):
    """What is drawn for data: for each series the set of its markers' places (none for a bar)."""
    groups = [group for group in ElementTree.fromstring(svg).iter("g") if "-data_" in group.get("id", "")]
    assert all(group.find(".//path") is not None for group in groups)
    return [{(use.get("x"), use.get("y")) for use in group.iter("use")} for group in groups]


def test_ids_are_unique_on_the_page(page):
    ids = re.findall(r'\bid="([^"]*)"', page[0])
    used = re.findall(r'(?:url\(#|href="#)([^")]*)', page[0])
    assert used
    assert set(used) <= set(ids)
    assert not any(" " in name for name in ids)


def test_colours_follow_the_readers_scheme(page):
    svgs = "".join(re.findall(r"<svg.*?</svg>", page[0], flags=re.DOTALL))
    assert "var(--series-0)" in svgs
    assert "var(--ink)" in svgs
    assert plots.COLOURS[0][0] not in svgs


def test_a_report_without_tasks_or_quantizers(tmp_path):
    text = write_report(small(windows=1), tmp_path, {"model": "m"}, "slablm compare m").read_text(encoding="utf-8")
    assert "Zero-shot" not in text
    assert "No quantizer was measured" in text
    assert "a single window gives no interval" in text
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)


def test_the_report_says_where_plain_quantization_is_better(tmp_path):
    records = [*small(), record("rtn", 3.1, 8.2, value_bits=8), record("gptq", 3.9, 3.2, value_bits=3)]
    text = write_report(records, tmp_path, {"model": "m"}, "slablm compare m").read_text(encoding="utf-8")
    said = re.findall(r"<li>(rtn|gptq) .*? against (\w+) 50 % unstructured", text)
    assert said == [("rtn", "slab")]
    assert "No quantizer was measured" not in text


def test_the_same_records_give_the_same_page(tmp_path):
    pages = [write_report(small(), tmp_path / name, {"model": "m"}, "x").read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


def test_missing_matplotlib_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SlabError, match=r"pip install 'slablm\[report\]'"):
        write_report(small(), tmp_path / "out", {"model": "m"}, "x")
    assert not (tmp_path / "out").exists()


def browse(page, folder):
    """Load a page in headless Chromium; its document afterwards, and the lines of its console."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--window-size=1400,1000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


MEASURE = """
<script>
addEventListener("load", () => {
  const found = [];
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, svgs = [...page.querySelectorAll("figure svg")];
    page.querySelectorAll("details").forEach(d => d.open = true);
    found.push({
      width: frame.clientWidth,
      overflow: page.documentElement.scrollWidth - frame.clientWidth,
      plots: svgs.map(svg => [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height]),
      outside: [...page.querySelectorAll("h1, h2, p, li, figure, .scroll")]
        .filter(e => e.getBoundingClientRect().right > frame.clientWidth + 0.5).length,
    });
  }
  document.title = JSON.stringify(found);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: the report is not looked at in a browser")
def test_the_report_in_a_browser_at_both_widths(page, tmp_path):
    # Frames rather than windows: Chromium's windows have a minimum width that is wider than a phone.
    frames = "".join(
        f'<iframe width="{width}" height="800" style="border:0" srcdoc="{html.escape(page[0])}"></iframe>'
        for width in (1280, 390)
    )
    document, console = browse(f"<!doctype html><title></title>{MEASURE}{frames}", tmp_path)
    assert console == []
    measured = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", document)[1]))
    assert [frame["width"] for frame in measured] == [1280, 390]
    for frame in measured:
        assert frame["overflow"] <= 0
        assert frame["outside"] == 0
        assert len(frame["plots"]) == page[0].count("<svg")
        assert all(width > 250 and height > 100 for width, height in frame["plots"])


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_browser_test_would_notice(tmp_path):
    """What the test above relies on: errors reach the log, and wide content shows as overflow."""
    wide = html.escape('<p style="width:500px">wide</p><script>nonsense()</script>')
    frame = f'<iframe width="390" height="800" style="border:0" srcdoc="{wide}"></iframe>'
    document, console = browse(f"<!doctype html><title></title>{MEASURE}{frame}", tmp_path)
    assert len(console) == 1
    assert "nonsense is not defined" in console[0]
    measured = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", document)[1]))
    assert measured[0]["overflow"] > 100
