"""Pages in a real browser, without a window."""

import html
import os
import re
import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (1280, 390)  # a desktop and a phone
MEASURE = """<!doctype html><body>{frames}<script>
onload = () => {{ document.body.innerHTML = [...document.querySelectorAll("iframe")].map(f =>
  `size=${{f.contentDocument.documentElement.scrollWidth}}/${{f.contentWindow.innerWidth}}`).join(" ") }}
</script>"""


def assert_fits(page, folder):
    """No page is wider than the window, on a desktop and on a phone."""
    opened = html.escape(page)
    frames = "".join(f'<iframe srcdoc="{opened}" style="width:{w}px;height:800px;border:0"></iframe>' for w in WIDTHS)
    (folder / "look.html").write_text(MEASURE.format(frames=frames), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,1700", f"--user-data-dir={folder}/c"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--dump-dom", (folder / "look.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(folder)},
    )
    sizes = [(int(a), int(b)) for a, b in re.findall(r"size=(\d+)/(\d+)", done.stdout)]
    assert [inner for _, inner in sizes] == list(WIDTHS), done.stderr[-500:]
    assert all(scroll <= inner for scroll, inner in sizes), sizes
