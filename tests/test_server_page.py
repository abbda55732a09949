"""The page at /: what it may load and do; in the slow tier typed into and looked at in a real browser.

The browser is Debian's chromium, driven over its debugging pipe. With NANODRIFT_SCREENSHOTS set to a folder the
screenshots stay there.
"""

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from running_server import PATIENCE_S, ROOT, program, running

PAGE = (ROOT / "nanodrift" / "server" / "page.html").read_text()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe""".split()


def test_the_page_is_small_and_needs_nothing_else():
    assert len(PAGE.encode()) < 20_000
    assert re.findall(r"(?:src|href|action)\s*=|url\(|@import|\bimport\b", PAGE) == ["href="]
    assert '<link rel="icon" href="data:,">' in PAGE and "http://" not in PAGE and "https://" not in PAGE
    assert "innerHTML" not in PAGE and "document.write" not in PAGE


def test_the_page_is_served_to_everyone_under_a_policy_of_its_own():
    with running(api_keys=("secret",)) as server:
        answer = httpx.get(server.url)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
        assert answer.text == PAGE and "secret" not in answer.text
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-") and "frame-ancestors 'none'" in policy
        assert httpx.get(f"{server.url}/load").status_code == 401


def test_what_the_page_asks_for_is_there():
    with running() as server, httpx.Client(base_url=server.url) as http:
        load = http.get("/load").json()
        assert load["device"] == "none" and load["sharing"]
        for name in re.findall(r'(?:get|fetch)\("(\S+?)"', PAGE):
            assert http.get(f"/{name}").status_code in (200, 405)


class Browser:
    """One page in chromium; commands go over two pipes, as JSON that ends in a zero byte."""

    def __init__(self, folder: Path):
        here_in, there_out = os.pipe()
        there_in, here_out = os.pipe()
        wiring = f"exec {CHROMIUM} {' '.join(FLAGS)} --user-data-dir={folder} 3<&{there_in} 4>&{there_out}"
        self._process = subprocess.Popen(
            ["bash", "-c", wiring], pass_fds=(there_in, there_out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(there_in)
        os.close(there_out)
        self._out, self._in, self._numbers, self._session = here_out, here_in, itertools.count(1), None
        self._rest = b""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self("Page.enable")

    def __call__(self, method: str, **params) -> dict:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._in, 1 << 20)
                assert part, "the browser has ended"
                self._rest += part
            text, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression: str):
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not self.value(expression):
            assert time.monotonic() < deadline_s, f"{expression} never held"
            time.sleep(0.05)

    def size(self, width: int, height: int, is_phone: bool) -> None:
        self(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )  # fmt: skip

    def type(self, text: str) -> None:
        self.value("document.getElementById('prompt').focus()")
        self("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    one = Browser(tmp_path / "profile")
    yield one
    one.close()


IS_IDLE = "document.getElementById('send').textContent === 'Send'"
LAST = "[...document.querySelectorAll('.assistant')].at(-1).textContent"


@pytest.mark.slow
def test_a_person_chats_on_a_desk_and_on_a_phone(browser, tmp_path):
    folder = Path(os.environ.get("NANODRIFT_SCREENSHOTS", tmp_path))
    with program("--port", "0", "--device", "cpu") as one:
        browser.size(1100, 800, False)
        browser("Page.navigate", url=one.wait_url())
        browser.wait("document.getElementById('model').textContent === 'nanodrift-storyteller'")
        browser.type("Tell me a story about a fox.")
        browser.wait(f"!({IS_IDLE}) && {LAST}.length > 40")  # it streams: text is there before the end
        early = browser.value(LAST)
        browser.wait("parseFloat(document.getElementById('rate').textContent) > 0")
        browser.wait("parseInt(document.getElementById('decode').textContent) > 0")
        browser.screenshot(folder / "page-streaming.png")
        browser.wait(IS_IDLE)
        whole = browser.value(LAST)
        assert whole.startswith(early) and len(whole) > len(early) and len(whole.split()) > 20
        for name in ("ttft", "tbt", "worst"):
            assert re.fullmatch(r"[\d.]+ m?s", browser.value(f"document.getElementById('{name}').textContent"))
        assert "no partitions" in browser.value("document.getElementById('device').textContent")
        browser.screenshot(folder / "page-desk.png")

        browser.size(390, 780, True)
        browser.type("And a bear?")
        browser.wait(f"document.querySelectorAll('.assistant').length === 2 && {IS_IDLE}")
        assert browser.value("document.documentElement.scrollWidth") <= 390
        browser.screenshot(folder / "page-phone.png")
        browser.value("document.getElementById('fresh').click()")
        assert browser.value("document.querySelectorAll('.message').length") == 0


@pytest.mark.slow
def test_the_page_asks_for_the_key(browser, tmp_path):
    with running("--step-ms", "5", api_keys=("secret",)) as server:
        browser("Page.navigate", url=server.url)
        browser.wait("getComputedStyle(document.getElementById('key')).display === 'block'")
        browser.type("the fox")
        browser.wait("document.querySelector('.error')?.textContent.includes('API key')")
        browser.value(
            "const key = document.getElementById('key'); key.value = 'secret'; key.dispatchEvent(new Event('change'))"
        )
        browser.wait("document.getElementById('model').textContent === 'echo'")
        browser.type("<img src=x onerror=alert(1)>")
        browser.wait(f"document.querySelectorAll('.assistant').length === 2 && {IS_IDLE}")
        assert (
            browser.value(f"{LAST}.length") > 0 and browser.value("document.querySelectorAll('#chat img').length") == 0
        )


@pytest.mark.slow
def test_the_bar_follows_how_the_device_is_shared(browser, tmp_path):
    """The null engine pretends to be a GPU whose lanes take turns, split it two ways and fuse, two seconds each."""
    folder = Path(os.environ.get("NANODRIFT_SCREENSHOTS", tmp_path))
    widths = "[...document.querySelectorAll('#bar span')].map(span => parseFloat(span.style.width) || 0)"
    with running("--step-ms", "20", "--sms", "132") as server:
        browser.size(390, 780, True)
        browser("Page.navigate", url=server.url)
        browser.wait("document.getElementById('model').textContent === 'echo'")
        seen, steady = [], time.monotonic()
        browser.type("Tell me about the fox, the owl and the frog. " * 40)
        while time.monotonic() < steady + 10:
            seen.append(tuple(browser.value(widths)))
            if (
                "split now" in browser.value("document.getElementById('device').textContent")
                and seen[-1][0] * seen[-1][2]
            ):
                browser.screenshot(folder / "page-split-phone.png")
                browser.size(1100, 800, False)
                browser.screenshot(folder / "page-split-desk.png")
                browser.size(390, 780, True)
            time.sleep(0.5)
        assert all(sum(one) <= 100.5 for one in seen)
        assert max(one[0] for one in seen) > 60  # exclusive: it decoded alone
        assert max(one[1] for one in seen) > 60 and min(one[1] for one in seen) < 30  # fused, and then not
        assert max(one[2] for one in seen) > 40  # split, three quarters of it for prefill
        text = browser.value("document.getElementById('lanes').textContent")
        assert "of 132 SMs" in text and "512 W" in text and "a device of the script" in text
        assert browser.value("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_the_bar_replays_a_recorded_run(browser, tmp_path):
    """What an H200 said of itself under mixed load, shown as the page shows it live."""
    trace = ROOT / "results" / "h200" / "load-trace.json"
    if not trace.exists():
        pytest.skip("results/h200/load-trace.json comes from tests/test_server_gpu.py on a GPU")
    folder = Path(os.environ.get("NANODRIFT_SCREENSHOTS", tmp_path))
    widths = "[...document.querySelectorAll('#bar span')].map(span => parseFloat(span.style.width) || 0)"
    with running("--step-ms", "20", "--trace", str(trace)) as server:
        browser.size(1100, 800, False)
        browser("Page.navigate", url=server.url)
        browser.wait("document.getElementById('model').textContent === 'echo'")
        browser.type("Tell me about the fox, the owl and the frog. " * 40)
        browser.wait(f"{widths}.some(width => width > 0)")
        seen, ends_s = set(), time.monotonic() + 10
        while time.monotonic() < ends_s:
            seen.add(tuple(browser.value(widths)))
            time.sleep(0.5)
        browser.screenshot(folder / "page-replay-desk.png")
        assert len(seen) > 3 and all(sum(one) <= 100.5 for one in seen)  # it moves
