"""Opens a page in Chromium, which PySide6-WebEngine brings, and prints what it found as JSON.

python tests/browser.py PAGE WIDTH [light|dark] [PICTURE.png]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

CANNOT_START = 3
_LOOK = """(() => {
    const shut = [...document.querySelectorAll('details:not([open])')];
    shut.forEach(part => part.open = true);
    const page = document.documentElement;
    return JSON.stringify({
        wide: page.scrollWidth, room: page.clientWidth, tall: page.scrollHeight,
        ground: getComputedStyle(document.body).backgroundColor,
        ink: getComputedStyle(document.body).color,
        small: Math.min(...[...document.querySelectorAll('p, td, dd, a, figcaption, svg text')]
            .filter(part => part.getClientRects().length)
            .map(part => {
                const svg = part.closest('svg');
                const scale = svg ? svg.getScreenCTM().a : 1;
                return parseFloat(getComputedStyle(part).fontSize) * scale;
            })),
        pictures: [...document.images].map(picture => picture.naturalWidth),
    });
})()"""


def main(page: str, width: str, scheme: str = "light", picture: str = "") -> None:
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"  # which root has not; the page is our own
    preferred = {"dark": 0, "light": 1}[scheme]
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = (
        f"--disable-gpu --blink-settings=preferredColorScheme={preferred}"
    )
    try:
        from PySide6.QtCore import QTimer, QUrl
        from PySide6.QtWebEngineCore import QWebEnginePage
        from PySide6.QtWebEngineWidgets import QWebEngineView
        from PySide6.QtWidgets import QApplication
    except ImportError as error:
        print(error)
        sys.exit(CANNOT_START)

    said: list[str] = []

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):  # type: ignore[no-untyped-def]
            said.append(f"{level.name} in line {line}: {message}")

    app = QApplication([sys.argv[0]])
    view = QWebEngineView()
    shown = Page(view)
    view.setPage(shown)
    view.resize(int(width), 900)
    view.show()

    def look(is_loaded: bool) -> None:
        if not is_loaded:
            said.append("the page was not loaded")
        QTimer.singleShot(500, lambda: shown.runJavaScript(_LOOK, 0, tell))

    def tell(found: str) -> None:
        print(json.dumps({**json.loads(found), "said": said}))
        if picture:
            view.resize(int(width), 3000)
            QTimer.singleShot(1000, lambda: (view.grab().save(picture), app.quit()))
        else:
            app.quit()

    shown.loadFinished.connect(look)
    view.load(QUrl.fromLocalFile(str(Path(page).resolve())))
    app.exec()
    view.setPage(None)  # type: ignore[arg-type]  # a page must not outlive its profile


if __name__ == "__main__":
    main(*sys.argv[1:])
