"""Settings of sphinx for the site. It reads the pages that `tools.docs` wrote beside this file."""

import importlib.metadata

project = "bushpc"
author = "the authors of bushpc"
release = importlib.metadata.version("bushpc")
extensions = ["myst_parser"]
myst_heading_anchors = 3
# Blocks without a language are commands, which sphinx would guess to be Python.
highlight_language = "text"
html_theme = "pydata_sphinx_theme"
html_title = "bushpc"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_use_index = False
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "bushpc"},
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "footer_start": ["footer"],
    "footer_end": [],
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "search_bar_text": "Search",
}
templates_path = ["static"]
