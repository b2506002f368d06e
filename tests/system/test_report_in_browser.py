"""The report in a real browser (Debian: chromium): it asks for nothing, complains of nothing, and can be read."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.system.conftest import LONG_NAME, Run

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

# Measures the page when it has loaded, and replaces its content by what was found. Contrast is that of WCAG 2.1:
# 4.5 for text, 3 for large text (24 px, or 18.66 px and bold), against the backgrounds that lie below it.
PROBE = """<script>
addEventListener("load", () => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const linear = x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const luminance = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const ground = e => e === null ? [255, 255, 255, 1]
    : over(parse(getComputedStyle(e).backgroundColor), ground(e.parentElement));
  const shown = e => e.getClientRects().length && getComputedStyle(e).visibility !== "hidden";
  const scrolls = e => e !== null && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const faint = [], outside = [];
  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const e = node.parentElement, style = getComputedStyle(e);
    if (!node.data.trim() || ["SCRIPT", "STYLE"].includes(e.tagName) || !shown(e)) continue;
    texts++;
    const under = ground(e);
    const ink = over(parse(e instanceof SVGElement ? style.fill : style.color), under);
    const [light, dark] = [luminance(ink), luminance(under)].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05), size = parseFloat(style.fontSize);
    const needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    if (ratio < needed) faint.push([node.data.trim().slice(0, 40), Number(ratio.toFixed(2))]);
    if (e.getBoundingClientRect().right > innerWidth && !scrolls(e)) outside.push(node.data.trim().slice(0, 40));
  }
  const found = {
    width: innerWidth, content: document.documentElement.scrollWidth, texts, faint, outside,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    background: getComputedStyle(document.body).backgroundColor,
    requests: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !/^data:/.test(name)),
  };
  document.body.textContent = "PROBE" + JSON.stringify(found);
});
</script>"""


@dataclass(frozen=True)
class Page:
    """What the browser made of a page: its document in the end, and what it wrote to the console."""

    document: str
    console: list[str]

    @property
    def found(self) -> dict[str, Any]:
        """What the probe measured."""
        match = re.search(r"PROBE(.*?)</body>", self.document, re.DOTALL)
        assert match, f"the probe did not run: {self.console}"
        found: dict[str, Any] = json.loads(html.unescape(match.group(1)))
        return found


def browse(content: str, folder: Path, *, width: int = 500, scheme: Literal["light", "dark"] = "light") -> Page:
    program = shutil.which("chromium")
    assert program, "the browser is missing: apt-get install chromium"
    page = folder / "page.html"
    page.write_text(content)
    done = subprocess.run(
        [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--host-resolver-rules=MAP * ~NOTFOUND",  # the browser itself would call home
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},900",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return Page(done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE:" in line])


def probed(report: str) -> str:
    """The report with the probe in it, and without the policy that would forbid it (and any request)."""
    open_to_all = re.sub(r'<meta[^>]*http-equiv="Content-Security-Policy"[^>]*>', "", report, flags=re.IGNORECASE)
    assert open_to_all != report, "the report has a policy"
    return open_to_all.replace("</body>", f"{PROBE}</body>")


@pytest.fixture(scope="session")
def report(finished_run: Run) -> str:
    return (finished_run.folder / "evaluate" / "report.html").read_text()


def test_the_page_renders_and_the_console_stays_empty(report: str, tmp_path: Path) -> None:
    """Under the report's own policy every request, and every script, would be a line on the console."""
    page = browse(report, tmp_path)
    assert page.console == []
    assert "<svg" in page.document
    assert LONG_NAME in page.document


@pytest.mark.parametrize(
    "intruder", ['<img src="https://example.invalid/x.png">', "<script>1</script>"], ids=["request", "script"]
)
def test_the_reports_policy_lets_nothing_else_in(report: str, tmp_path: Path, intruder: str) -> None:
    page = browse(report.replace("</body>", f"{intruder}</body>"), tmp_path)
    assert len(page.console) == 1
    assert "Content Security Policy" in page.console[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [500, 1200])
def test_it_asks_for_nothing_fits_its_window_and_can_be_read(
    report: str, tmp_path: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    found = browse(probed(report), tmp_path, width=width, scheme=scheme).found
    assert found["width"] == width
    assert found["dark"] == (scheme == "dark")
    assert found["requests"] == []
    assert found["content"] <= width
    assert found["outside"] == []
    assert found["texts"] > 100
    assert found["faint"] == []


def test_dark_is_dark(report: str, tmp_path: Path) -> None:
    backgrounds = {}
    for scheme in ("light", "dark"):
        (tmp_path / scheme).mkdir()
        found = browse(probed(report), tmp_path / scheme, scheme=scheme).found  # type: ignore[arg-type]
        backgrounds[scheme] = [int(part) for part in re.findall(r"\d+", found["background"])[:3]]
    assert max(backgrounds["dark"]) < 80 < 200 < min(backgrounds["light"])


def test_the_probe_finds_what_it_looks_for(report: str, tmp_path: Path) -> None:
    faults = (
        '<div style="width:2000px;text-align:right"><span>far out</span></div>'
        '<p style="background:#fff;color:#bbb">faint text</p>'
        '<img src="https://example.invalid/x.png">'
    )
    found = browse(probed(report.replace("</body>", f"{faults}</body>")), tmp_path).found
    assert found["content"] == 2000
    assert found["outside"] == ["far out"]
    assert [text for text, _ in found["faint"]] == ["faint text"]
    assert found["requests"] == ["https://example.invalid/x.png"]
