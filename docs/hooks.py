"""Files of the repository that pages link to become part of the site.

A page links to them as on a forge, by a path from its own place: ``../results/claims.md``. In the
site they lie under ``repository/``: figures and tables as they are, Markdown as pages, code as
files.
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).resolve().parents[1]
ROOM = "repository"
# Linked from what is linked itself.
ALWAYS = ("results/*.md", "results/figures/*.png")
_LINK = re.compile(r"(\]\()((?:\.\./)+)([^)#\s]+)")
_CODE = re.compile(r"(<pre.*?</pre>|<code.*?</code>)", flags=re.DOTALL)
_FIGURE = re.compile(r"^(!\[[^]]*\]\(([^)\s]+)\))$", flags=re.MULTILINE)


def on_files(files, config):
    pages = sorted(Path(config.docs_dir).rglob("*.md"))
    wanted = {
        str(path.relative_to(REPOSITORY)) for each in ALWAYS for path in REPOSITORY.glob(each)
    }
    for page in [*pages, *(REPOSITORY / each for each in wanted if each.endswith(".md"))]:
        for target in _targets(page):
            if target.is_file() and not target.is_relative_to(config.docs_dir):
                wanted.add(str(target.relative_to(REPOSITORY)))
    for path in sorted(wanted):
        source = str(REPOSITORY / path)
        files.append(File.generated(config, f"{ROOM}/{path}", abs_src_path=source))
    return files


def _targets(page: Path):
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            yield (page.parent / link).resolve()


def on_page_markdown(markdown, page, config, files):
    """Links that leave the folder of the pages lead into the site's copy, and back.

    A figure is a link to itself, so that it can be read at its full size.
    """
    markdown = _FIGURE.sub(r"[\1](\2)", markdown)
    here = PurePosixPath(page.file.src_uri)
    depth = len(here.parts) - 1  # folders below docs/
    if here.parts[0] == ROOM:
        return re.sub(r"\]\((?:\.\./)+docs/", f"]({'../' * depth}", markdown)

    def rewritten(match: re.Match) -> str:
        ups, path = match[2].count("../"), match[3]
        if ups != depth + 1:  # within the pages
            return match[0]
        return f"{match[1]}{'../' * depth}{ROOM}/{path}"

    return _LINK.sub(rewritten, markdown)


def on_page_content(html, page, config, files):
    """A number and its per cent sign stay on one line; code is left as it is."""
    parts = _CODE.split(html)
    parts[::2] = [re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", part) for part in parts[::2]]
    return "".join(parts)
