import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from openmae.results.report import Code, Figure, Numbers, Section, Table, Text, is_final, write_report


class _Page(HTMLParser):
    """Collects every tag, every address and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def addresses(self) -> list[str]:
        names = ("src", "href", "srcset", "action", "data", "poster")
        return [str(attrs[name]) for _, attrs in self.tags for name in names if name in attrs]


@pytest.fixture
def sections(tmp_path: Path) -> list[Section]:
    Image.new("RGB", (40, 20), "#2160a6").save(tmp_path / "picture.png")
    return [
        Numbers("", {"ACC_all": "93.4 %"}),
        Text("Story", "One.\n\nTwo <b>bold</b>."),
        Table(
            "Per class",
            ["class", "images", "recall"],
            [["cat", 1200, 0.91237], ["<dog>", 30, 0.5], ["empty", 0, None]],
            "Of the validation images.",
        ),
        Table("Run", ["", ""], [["device", "CPU"], ["parameters", 5_717_416]]),
        Figure("Curves", tmp_path / "picture.png", 'Loss & "accuracy"'),
        Code("Spec", "model:\n  arch: vit\n" * 20),
    ]


def test_page_contains_all_sections(tmp_path: Path, sections: list[Section]) -> None:
    path = write_report(tmp_path / "out", "A <run>", sections, subtitle="vit · pretrain")
    assert path == tmp_path / "out" / "report.html"
    html = path.read_text(encoding="utf-8")
    page = _Page(html)
    for text in ("A <run>", "vit · pretrain", "93.4 %", "Two <b>bold</b>.", "<dog>", 'Loss & "accuracy"'):
        assert text in page.text
    assert "<b>" not in html
    assert "<dog>" not in html
    (image,) = page.all("img")
    assert image["alt"] == 'Loss & "accuracy"'
    kind, data = str(image["src"]).split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "picture.png").read_bytes()
    assert page.text.count("arch: vit") == 20
    assert "Show 40 lines" in page.text


def test_page_makes_no_requests(tmp_path: Path, sections: list[Section]) -> None:
    html = write_report(tmp_path, "Run", sections).read_text(encoding="utf-8")
    page = _Page(html)
    assert page.addresses
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe", html)
    assert "default-src 'none'" in html


def test_contents_link_to_sections(tmp_path: Path, sections: list[Section]) -> None:
    page = _Page(write_report(tmp_path, "Run", sections).read_text(encoding="utf-8"))
    links = [str(link["href"])[1:] for link in page.all("a")]
    anchors = [section["id"] for section in page.all("section")]
    assert len(links) == 5  # the figures at the top have no title
    assert set(links) < set(anchors)


def test_columns_of_numbers_are_aligned_and_share_their_decimals(tmp_path: Path) -> None:
    table = Table(
        "T",
        ["name", "images", "recall", "loss", "rate"],
        [["a", 12000, 0.91237, 12.5, 1e-3], ["b", 3, None, 3.14159, 1e-7]],
    )
    html = write_report(tmp_path, "Run", [table]).read_text(encoding="utf-8")
    cells = re.findall(r'<td class="(.*?)">(.*?)</td>', html)
    texts = ["a", "12,000", "0.9124", "12.50", "0.001", "b", "3", "—", "3.14", "1e-07"]
    assert [text for _, text in cells] == texts
    assert [kind for kind, _ in cells] == ["", "number", "number", "number", "number"] * 2


def test_shares_have_the_same_decimals_in_every_column(tmp_path: Path) -> None:
    table = Table("T", ["precision", "recall"], [[0.75, 0.15], [0.5, 1.0]])
    html = write_report(tmp_path, "Run", [table]).read_text(encoding="utf-8")
    assert re.findall(r"<td.*?>(.*?)</td>", html) == ["0.7500", "0.1500", "0.5000", "1.0000"]


def test_table_without_column_names_has_no_head(tmp_path: Path) -> None:
    html = write_report(tmp_path, "Run", [Table("T", ["", ""], [["device", "CPU"]])]).read_text()
    assert "<thead>" not in html


def test_figures_are_shown_at_the_size_of_their_resolution(tmp_path: Path) -> None:
    Image.new("RGB", (400, 200)).save(tmp_path / "fine.png", dpi=(200, 200))
    Image.new("RGB", (400, 200)).save(tmp_path / "plain.png")
    pictures = [Figure("", tmp_path / name, "") for name in ("fine.png", "plain.png")]
    page = _Page(write_report(tmp_path, "Run", pictures).read_text(encoding="utf-8"))
    assert [image["width"] for image in page.all("img")] == ["192", "400"]


def test_the_report_of_an_unfinished_run_is_marked(tmp_path: Path, sections: list[Section]) -> None:
    assert not is_final(tmp_path / "report.html"), "there is none"
    path = write_report(tmp_path, "Run", sections, unfinished="Epoch 3 of <10>.")
    assert "Epoch 3 of <10>." in _Page(path.read_text(encoding="utf-8")).text
    assert not is_final(path)
    path = write_report(tmp_path, "Run", [*sections, Text("", "openmae:unfinished")])
    assert 'class="unfinished"' not in path.read_text(encoding="utf-8")
    assert is_final(path)


def test_missing_figure_leaves_no_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path, "Run", [Figure("P", tmp_path / "absent.png", "")])
    assert not (tmp_path / "report.html").exists()


def _chromium(tmp_path: Path, report: Path, *arguments: str) -> str:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *(f"--{option}" for option in quiet),
        *(f"--user-data-dir={tmp_path / 'profile'}", *arguments, report.as_uri()),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.integration
@pytest.mark.browser
def test_browser_shows_the_page(tmp_path: Path, sections: list[Section]) -> None:
    report = write_report(tmp_path, "A run", sections)
    page = _Page(_chromium(tmp_path, report, "--dump-dom"))
    assert len(page.all("h1")) == 1
    assert len(page.all("section")) == len(sections)
    assert len(page.all("table")) == 2
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses)


@pytest.mark.integration
@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 500])
def test_browser_paints_the_figure(tmp_path: Path, sections: list[Section], width: int) -> None:
    report = write_report(tmp_path, "A run", sections)
    shot = tmp_path / "shot.png"
    _chromium(tmp_path, report, "--hide-scrollbars", f"--window-size={width},1600", f"--screenshot={shot}")
    with Image.open(shot) as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24) or []}
    assert image.width == width
    assert colours.get((0x21, 0x60, 0xA6), 0) >= 40 * 20 * 0.9
