"""Pages in a headless browser: a question to the document after layout, and its width on a phone."""

import base64
import hashlib
import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")

PHONE = 360
"""Pixels."""
_FRAME = """<!DOCTYPE html><title></title><body><script>
addEventListener("message", event => { document.title = event.data; });
</script><iframe src="PAGE" style="width: WIDTHpx; height: 800px; border: 0"></iframe></body>"""


def ask_page(path, question, tmp_path):
    """Return the answer of a page to a question, under the policy of the page.

    Args:
        question: the body of a JavaScript function; what it returns must be JSON.
    """
    probed = _with_probe(path, f"document.title = JSON.stringify((() => {{ {question} }})());", tmp_path)
    return _title(probed, tmp_path)


def widths_on_a_phone(path, tmp_path):
    """Return the width of the window and that of the content, which is wider where one must scroll sideways."""
    probe = "parent.postMessage(JSON.stringify([innerWidth, document.documentElement.scrollWidth]), '*');"
    # The browser's own window is never as narrow as a phone.
    frame = tmp_path / "frame.html"
    page = _with_probe(path, probe, tmp_path).as_uri()
    frame.write_text(_FRAME.replace("PAGE", page).replace("WIDTH", str(PHONE)), encoding="utf-8")
    return tuple(_title(frame, tmp_path))


def _with_probe(path, script, tmp_path):
    """Return a copy of a page with one more script, which its policy is told about."""
    script = f'addEventListener("load", () => {{ {script} }});'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    source = path.read_text(encoding="utf-8")
    policy = re.search(r"http-equiv=\"Content-Security-Policy\" content=\"([^\"]*)\"", source).group(1)
    allowed = f"{policy} 'sha256-{digest}'" if "script-src" in policy else f"{policy}; script-src 'sha256-{digest}'"
    probed = tmp_path / "probed.html"
    source = source.replace(policy, allowed, 1).replace("</body>", f"<script>{script}</script></body>")
    probed.write_text(source, encoding="utf-8")
    return probed


def _title(page, tmp_path):
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    document = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    title = re.search(r"<title>(.*?)</title>", document, re.DOTALL).group(1)
    for mark, character in (("&lt;", "<"), ("&gt;", ">"), ("&nbsp;", "\u00a0"), ("&amp;", "&")):
        title = title.replace(mark, character)
    return json.loads(title)
