"""Look at the built site in a real browser: ``python docs/check_site.py [--shots DIR] [--browser PATH]``.

Every page at the width of a desktop and of a phone: no error in the console, no request that fails or leaves the
site, nothing wider than the screen; and a search that finds. Needs playwright (``pip install playwright``) and a
Chromium, its own (``playwright install chromium``) or the one that ``--browser`` names.
"""

from __future__ import annotations

import argparse
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SITE = Path(__file__).parent / "_build" / "html"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
SEARCHES = {"Woodbury": "woodbury", "KFAC": "solvers", "explain": "explain"}
"""Terms, and what must be in the address of one of their results."""

_WIDER = """() => {
  const width = document.documentElement.clientWidth;
  const scrolls = e => e && (/(auto|scroll|hidden)/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  return [...document.querySelectorAll('main *, article *')]
    .filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement))
    .map(e => `${e.tagName.toLowerCase()}.${e.className}: ${e.textContent.trim().slice(0, 60)}`).slice(0, 3);
}"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


def pages(site: Path) -> list[str]:
    """Addresses of all pages of Sphinx's."""
    every = [path.relative_to(site).as_posix() for path in site.rglob("*.html")]
    return sorted(page for page in every if not page.startswith(("asv/", "_static/")))


def look(browser: Any, address: str, site: Path, shots: Path | None) -> list[str]:
    """Return what is wrong."""
    problems: list[str] = []
    for screen, (width, height) in WIDTHS.items():
        page = browser.new_page(viewport={"width": width, "height": height})
        where = {"page": "", "screen": screen}

        def note(what: str, where: dict[str, str] = where) -> None:
            problems.append(f"{where['page']} ({where['screen']}): {what}")

        page.on("console", lambda message: note(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: note(str(error)))
        page.on("requestfailed", lambda request: note(f"failed: {request.url}") if not left(request) else None)
        page.on("response", lambda answer: note(f"{answer.status}: {answer.url}") if answer.status >= 400 else None)
        page.on("request", lambda request: note(f"outside: {request.url}") if not inside(request, address) else None)
        for here in pages(site):
            where["page"] = here
            page.goto(f"{address}/{here}", wait_until="load")
            for wide in page.evaluate(_WIDER):
                note(f"wider than the screen: {wide}")
            if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
                note("scrolls sideways")
            if shots is not None:
                name = here.removesuffix(".html").replace("/", "-")
                page.screenshot(path=shots / f"{name}-{screen}.png", full_page=screen == "desktop")
        for term, expected in SEARCHES.items():
            where["page"] = f"search for {term}"
            page.goto(f"{address}/index.html")
            if screen == "phone":
                page.click("header label[for=__navigation]")
            box = page.locator("input.sidebar-search")
            box.fill(term)
            box.press("Enter")
            page.wait_for_selector("#search-results li a", timeout=20_000)
            found = page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.href)")
            page.wait_for_load_state("networkidle")
            if not any(expected in link for link in found):
                note(f"no result whose address has {expected!r} among {len(found)}")
            if shots is not None:
                page.screenshot(path=shots / f"search-{term}-{screen}.png")
        page.close()
    return problems


def inside(request: Any, address: str) -> bool:
    """Whether a request stays on the site."""
    return request.url.startswith((address, "data:", "blob:", "about:"))


def left(request: Any) -> bool:
    """Whether the page was left before the answer came."""
    return "ERR_ABORTED" in (request.failure or "")


def main() -> int:
    """Check the site that was built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=SITE)
    parser.add_argument("--shots", type=Path, help="folder for a picture of every page at every width")
    parser.add_argument("--browser", help="path of a Chromium; playwright's own by default")
    args = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.stderr.write(
            "playwright is missing: pip install playwright, then `playwright install chromium` or --browser\n"
        )
        return 2
    if args.shots is not None:
        args.shots.mkdir(parents=True, exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(args.site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with sync_playwright() as playwright:
            # A container's root user has no sandbox to be in.
            browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
            problems = look(browser, f"http://127.0.0.1:{server.server_port}", args.site, args.shots)
            browser.close()
    finally:
        server.shutdown()
    for problem in problems:
        sys.stdout.write(f"{problem}\n")
    looked = f"{len(pages(args.site))} pages at {len(WIDTHS)} widths, {len(SEARCHES)} searches"
    sys.stdout.write(f"{looked}: {len(problems)} problems\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
