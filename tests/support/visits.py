"""A report in a headless Chromium, with everything that the page did wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)


class Visit:
    """One page with everything that it did wrong."""

    def __init__(self, browser: Any, report: Path, *, width: int, dark: bool = False) -> None:
        self.trouble: list[str] = []
        context = browser.new_context(
            viewport={"width": width, "height": 844},
            color_scheme="dark" if dark else "light",
            has_touch=width < 600,
            offline=True,
        )
        context.set_default_timeout(180_000)  # of a busy machine
        self.page = context.new_page()
        self.page.on("console", lambda message: self.trouble.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        self.page.on("dialog", self._dismiss)
        self.page.route("**/*", self._watch)
        self.address = report.as_uri()
        self.page.goto(self.address)
        self.page.wait_for_selector(".tokens span")

    def _watch(self, route: Any) -> None:
        if route.request.url != self.address:
            self.trouble.append(f"request: {route.request.url}")
        route.continue_()

    def _dismiss(self, dialog: Any) -> None:
        self.trouble.append("a dialog opened: text of a run was executed")
        dialog.dismiss()
