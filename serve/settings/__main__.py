"""``python -m serve.settings`` writes the settings file and its documentation anew."""

from __future__ import annotations

from serve.console import say
from serve.settings.generated import DOCS_FILE, YAML_FILE, docs_text, yaml_text

if __name__ == "__main__":
    for path, text in ((YAML_FILE, yaml_text()), (DOCS_FILE, docs_text())):
        path.write_text(text, encoding="utf-8")
        say(f"wrote {path}")
