"""Runs the studio as a process, and controls a real browser."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE = 180  # seconds


@contextmanager
def studio(*options: object):
    """Run `lora-adapters studio` with these options; yields the address of its page."""
    words = [sys.executable, "-m", "lora_adapters", "studio", *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)  # fmt: skip
    said = ""
    try:
        for line in process.stdout:
            said += line
            if found := re.search(r"The studio is at (\S+)", line):
                yield found[1]
                break
        else:
            raise AssertionError(said)
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


class Browser:
    """Headless Chromium. Fields are found by their element ids."""

    def __init__(self, address: str):
        if not CHROMIUM or not DRIVER:
            pytest.skip("chromium and chromedriver are not installed")
        webdriver = pytest.importorskip("selenium.webdriver")
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.add_argument("--window-size=1400,1500")
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.driver.get(address)
        self.until(lambda: self.all("#prompt textarea"))

    def close(self) -> None:
        self.driver.quit()

    def all(self, css: str):
        return self.driver.find_elements("css selector", css)

    def one(self, css: str):
        return self.until(lambda: next((found for found in self.all(css) if found.is_displayed()), None), css)

    def until(self, condition, what: object = "", seconds: float = PATIENCE):
        """Wait until the condition is true, and return its value."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while True:
            try:
                if value := condition():
                    return value
            except WebDriverException:  # the element was redrawn or is temporarily covered
                pass
            if time.monotonic() > end:
                self.shot(Path(os.environ.get("STUDIO_SHOTS", tempfile.gettempdir())) / "studio-failed.png")
                raise AssertionError(f"not seen in {seconds} s: {what or condition}")
            time.sleep(0.2)

    def click(self, css: str) -> None:
        self.until(lambda: self._clicked(self.one(css)), css)

    def _clicked(self, element) -> bool:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()
        return True

    def tab(self, title: str) -> None:
        """Open the tab."""
        self._of("button[role=tab]", lambda text: text == title)
        time.sleep(1)

    def open(self, title: str) -> None:
        """Open the accordion."""
        self._of("button.label-wrap", lambda text: text.startswith(title))
        time.sleep(1)

    def _of(self, css: str, wanted) -> None:
        """Click the element whose text matches."""
        self.until(
            lambda: any(self._clicked(one) for one in self.all(css) if one.is_displayed() and wanted(one.text.strip())),
            css,
        )

    def fill(self, name: str, text: object) -> None:
        """Put text into a field or a slider's number."""
        from selenium.webdriver.common.keys import Keys

        field = self.one(f"#{name} textarea, #{name} input[type=number], #{name} input")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(text))
        field.send_keys(Keys.TAB)

    def choose(self, name: str, text: str) -> None:
        """Choose the entry of a dropdown whose text ends with `text`."""
        self.click(f"#{name} input")
        self._of("ul[role=listbox] li", lambda shown: shown.endswith(text))
        self.driver.execute_script("document.activeElement.blur()")  # closes the list

    def slide(self, name: str, key: str, times: int) -> None:
        """Move a slider with a key."""
        handle = self.one(f"#{name} input[type=range]")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
        handle.send_keys(key * times)

    def value(self, name: str) -> str:
        return self.one(f"#{name} textarea, #{name} input[type=number], #{name} input").get_attribute("value")

    def job(self) -> str:
        return self.one("#job .job").text

    def shot(self, file: Path) -> None:
        """Save a screenshot of the top of the page."""
        self.driver.execute_script("window.scrollTo(0, 0)")
        time.sleep(1)
        file.parent.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(file))
