"""The formats of a report: text, JSON, JUnit XML, Markdown, HTML and a badge."""

from flowstore_conformance.rendering.badge import render_badge
from flowstore_conformance.rendering.html import render_page
from flowstore_conformance.rendering.json_document import render_json
from flowstore_conformance.rendering.junit import render_junit
from flowstore_conformance.rendering.markdown import render_markdown
from flowstore_conformance.rendering.text import render_text

__all__ = ["render_badge", "render_json", "render_junit", "render_markdown", "render_page", "render_text"]
