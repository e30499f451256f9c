"""The page in a real browser: it draws what it is given, without an error, at a desk and on a phone.

Chromium is asked for the document that the page has made of itself; what its script complains of it writes to standard
error. Screenshots are left in the test's directory, for people.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from e2e.harness import free_port, until
from watch.browser import Tab, tab
from watch.long_run import status_at

from hetero_async.core.records import Stepped
from hetero_async.shell.telemetry import NullObserver
from hetero_async.watch import dashboard
from hetero_async.watch.chronicle import Chronicle, open_chronicle
from hetero_async.watch.dashboard import pictured
from hetero_async.watch.document import document
from hetero_async.watch.history import History
from hetero_async.watch.looks import Looks

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome") or ""
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--enable-logging=stderr", "--virtual-time-budget=2000",
]  # fmt: skip
SECONDS_MAX = 120
BEGAN = 1_790_000_000.0
# What the page came to, left where the dumped document shows it. The page's own policy lets no other script in.
MEASURE = """<script>addEventListener("load", () => setTimeout(() => {
  document.documentElement.dataset.overflow = document.documentElement.scrollWidth - innerWidth;
  document.documentElement.dataset.clipped = [...document.querySelectorAll("svg text, dd, h1, h2")]
    .filter((one) => one.getBoundingClientRect().right > innerWidth + 1 || one.getBoundingClientRect().left < -1)
    .map((one) => one.textContent).join("|");
}, 300));</script>"""

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium (apt-get install chromium)")


def browse(page: Path, tmp_path: Path, *, width: int, height: int, dark: bool = False, shot: str = "") -> str:
    """The document as the browser has it in the end. Fails where its script or its policy complains."""
    wanted = [f"--screenshot={tmp_path / shot}"] if shot else ["--dump-dom"]
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *FLAGS, *scheme, profile, f"--window-size={width},{height}", *wanted, page.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=True)
    complaints = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints, complaints
    return ended.stdout


def a_day(workers: int) -> Looks:
    """With a site that dies and comes back, an absence of the server, and a takeover."""
    looks = Looks(History())
    for second in range(0, 86_400, 120):
        if 40_000 <= second < 43_000:
            continue
        is_night = 20_000 < second < 26_000
        dead = frozenset(f"shanghai-{number}" for number in range(workers)) if is_night else frozenset()
        looks.delta(second, second // 20)
        looks.stepped(Stepped(version=second // 20 + 1 + second % 3, deltas=(second,), weights=(1.0,), gain=1.0))
        looks.look(BEGAN + second, status_at(second, workers=workers, term=1 if second < 44_000 else 2, dead=dead))
    return looks


@pytest.mark.parametrize(
    ("workers", "width", "height"), [(200, 1320, 1900), (4, 390, 3200)], ids=["200 at a desk", "4 on a phone"]
)
def test_it_is_drawn_whole(tmp_path: Path, workers: int, width: int, height: int) -> None:
    day = a_day(workers)
    page = tmp_path / "page.html"
    html = document({**pictured(day), "is_live": True})
    page.write_text(re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", f"{MEASURE}</body>"))
    dom = browse(page, tmp_path, width=width, height=height)
    assert 'data-overflow="0"' in dom, "nothing is wider than the window"
    assert 'data-clipped=""' in dom, re.search(r'data-clipped="[^"]*"', dom)
    assert dom.count('class="line"') == 2 + 1 + 2 + 2, "losses, speed, two ways of the network, two lags"
    assert dom.count("<canvas") == 4, "a lane for each site"
    assert "took over" in dom
    assert ("50 workers of shanghai died" if workers == 200 else "shanghai-0 died") in dom
    assert "no server" in dom, "its absence is in the legend"


def test_its_policy_lets_its_own_script_and_style_in(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(document({**pictured(a_day(4)), "is_live": False, "made_seconds": BEGAN}))
    assert "took over" in browse(page, tmp_path, width=1320, height=1900)
    browse(page, tmp_path, width=1320, height=1900, dark=True, shot="page.png")
    shot = (tmp_path / "page.png").read_bytes()
    assert shot[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(shot) > 50_000, "and there is something on it"


def test_it_follows_a_server(tmp_path: Path) -> None:
    port = free_port()

    async def show(chronicle: Chronicle) -> None:
        await dashboard.show(f"http://127.0.0.1:{port}", chronicle)

    with open_chronicle(tmp_path, NullObserver(), show) as chronicle:
        chronicle.hand(status_at(60))
        until(lambda: chronicle.address, "it is shown", SECONDS_MAX, str)
        flags = [flag for flag in FLAGS if "virtual-time" not in flag]
        complaints = tmp_path / "complaints"
        with complaints.open("wb") as file:
            command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}"]
            with tab(command, file.fileno()) as page:
                page.open(chronicle.address)
                for second, shown in ((60, "4.80 k of 400 M"), (600, "48.0 k of 400 M")):
                    chronicle.hand(status_at(second))
                    until(lambda shown=shown: trained_in(page) == shown, shown, SECONDS_MAX, complaints.read_text)
    assert "CONSOLE" not in complaints.read_text()


def trained_in(page: Tab) -> str | None:
    """How much is trained, as the page says it; None before it does."""
    tiles = "[...document.querySelectorAll('#tiles dt')].find((one) => one.textContent === 'trained')"
    return page.value(f"{tiles}?.parentElement.querySelector('.small')?.textContent ?? null")


def test_what_peers_wrote_stays_text(tmp_path: Path) -> None:
    status = status_at(100)
    evil = "</script><img src=x onerror=\"document.title='owned'\">"
    status["run"] = status["workers"][0]["worker"] = status["workers"][0]["site"] = evil
    status["refusals"] = {evil: 1}
    looks = Looks(History())
    looks.look(BEGAN, status_at(99))
    looks.look(BEGAN + 1, status)
    page = tmp_path / "page.html"
    page.write_text(re.sub(r"<meta http-equiv[^>]*>", "", document(pictured(looks))))
    dom = browse(page, tmp_path, width=1320, height=1900)
    assert "<img" not in dom
    assert "owned · hetero" not in dom
    assert "&lt;img src=x" in dom
