"What is wrong with a built site: links and anchors that lead nowhere, and requests to other hosts."

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {'src', 'poster', 'data'}  # of any element
LOADED_LINKS = {'stylesheet', 'icon', 'preload', 'prefetch', 'modulepreload', 'preconnect', 'dns-prefetch'}
IN_STYLES = r'(?:url\(|@import\s)\s*["\']?([^"\')\s]+)'
IN_SCRIPTS = r'(?:fetch|import|Worker|\.src)[\s(=]{1,4}["\'`](https?:)?(//[^"\'`]+)'


class Page(HTMLParser):
    "The anchors of a page, where its links lead, and what a browser loads with it."

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.loaded, self.inside = {''}, set(), set(), ''
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        attributes = {name: value or '' for name, value in attrs}
        self.anchors |= {attributes[name] for name in ('id', 'name') if name in attributes}
        rel, link = set(attributes.get('rel', '').split()), attributes.get('href')
        self.loaded |= {attributes[name] for name in LOADED & attributes.keys()}
        self.loaded |= set(re.findall(r'(?:^|,)\s+(\S+)', ' ' + attributes.get('srcset', '')))
        if link and (tag in ('use', 'image') or tag == 'link' and rel & LOADED_LINKS):
            self.loaded.add(link)
        elif link is not None and tag in ('a', 'link'):
            self.links.add(link)
        self.loaded |= set(re.findall(IN_STYLES, attributes.get('style', '')))
        self.inside = tag

    def handle_data(self, text: str):
        if self.inside == 'style':
            self.loaded |= set(re.findall(IN_STYLES, text))
        elif self.inside == 'script':
            self.loaded |= {address for _, address in re.findall(IN_SCRIPTS, text)}


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
        loaded = re.findall(IN_STYLES, path.read_text())
        problems += [f'{path.name}: loads {address}' for address in loaded if is_foreign(address)]
    for path in sorted(site.rglob('*.js')):
        loaded = re.findall(IN_SCRIPTS, path.read_text())
        problems += [f'{path.name}: loads {address}' for _, address in loaded]
    return problems
