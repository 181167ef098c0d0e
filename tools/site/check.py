"What is wrong with a built site: links and anchors that lead nowhere, and requests to other hosts."

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {'script': 'src', 'img': 'src', 'iframe': 'src', 'source': 'src', 'video': 'src', 'use': 'href'}
LOADED_LINKS = {'stylesheet', 'icon', 'shortcut icon', 'preload', 'prefetch', 'modulepreload', 'preconnect'}


class Page(HTMLParser):
    "The anchors of a page, where its links lead, and what a browser loads with it."

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.loaded = {''}, set(), set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        attributes = {name: value or '' for name, value in attrs}
        self.anchors |= {attributes[name] for name in ('id', 'name') if name in attributes}
        loaded = attributes.get(LOADED.get(tag, ''))
        if tag == 'link' and attributes.get('rel') in LOADED_LINKS:
            loaded = attributes['href']
        if loaded:
            self.loaded.add(loaded)
        elif tag in ('a', 'link') and 'href' in attributes:
            self.links.add(attributes['href'])
        self.loaded |= set(re.findall(r'url\(["\']?([^"\')]+)', attributes.get('style', '')))


def is_foreign(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def problems_of(site: Path) -> list[str]:
    "One line for each."
    pages = {path.resolve(): Page(path.read_text()) for path in sorted(site.rglob('*.html'))}
    problems = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        problems += [f'{name}: loads {address}' for address in page.loaded if is_foreign(address)]
        for address in sorted(page.links | page.loaded):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                problems.append(f'{name}: there is no {address}')
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                problems.append(f'{name}: there is no anchor {address}')
    for path in sorted(site.rglob('*.css')):
        loaded = re.findall(r'(?:url\(|@import\s)\s*["\']?([^"\')\s]+)', path.read_text())
        problems += [f'{path.name}: loads {address}' for address in loaded if is_foreign(address)]
    return problems
