"""Build the course as a static site: a page for each notebook of nbs/, and an API reference from docstrings.

    python tools/site/build.py [FOLDER [NOTEBOOK...]]     # _site if no folder is named

Explorers work in the pages: some are calculated there, and for the others the notebooks are run and
what they show is recorded. With NOTEBOOK, such as 11_parallel, only those are recorded; explorers of the rest
stay still pictures.

Sphinx, MyST-NB and Furo: notebooks are rendered as CommonMark with their stored outputs, and all scripts
and styles are in the wheels, so neither building nor reading needs a network (MyST's own builder downloads
its theme, and mkdocs parses another Markdown). SITE_URL and SITE_REPOSITORY, such as
https://github.com/NAME/nanomoe, make links absolute.
"""

import base64
import io
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from check import problems_of
from record import EXPLORER, source

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))


class Group(NamedTuple):
    "A part of the course, and its pages: (notebook, label)."

    title: str
    pages: list[tuple[str, str]]


def read_notebooks(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob('*.ipynb'))}


def title_of(notebook: dict) -> tuple[str, str]:
    "Its title, and the sentence below it."
    title, sentence = re.match(r'# (.+)\n+> (.+)', source(notebook['cells'][0])).groups()
    return title, sentence


def course_map(notebooks: dict[str, dict]) -> list[Group]:
    """The groups of the navigation: the rows of the index's course table, the list below it, and any notebook
    that neither of them names.
    """
    groups, part, text = [], '', '\n'.join(source(cell) for cell in notebooks['index']['cells'])
    for first, lessons in re.findall(r'^\| (.*?)\s?\| (.*\.ipynb\).*) \|$', text, re.M):
        part = re.sub(r'^\d · ', '', first).split(',')[0] or part
        subject = re.match(r'\*\*(\w+):\*\*', lessons)
        title = f'{part}: {subject[1]}' if subject else part
        links = re.findall(r'\[(\d\d .*?)\]\((\w+)\.ipynb\)', lessons)
        if links:
            groups.append(Group(title.capitalize(), [(name, label) for label, name in links]))
    more = [(name, label) for label, name in re.findall(r'^- \[(.*?)\]\((\w+)\.ipynb\)', text, re.M)]
    named = {'index', *(name for name, _ in more), *(name for group in groups for name, _ in group.pages)}
    rest = [(name, title_of(nb)[0]) for name, nb in notebooks.items() if name not in named]
    return [*groups, Group('More', more + rest)]


def as_page(cell: dict, section: str, explorer: str | None) -> dict | None:
    """A cell as the site shows it, None for a cell that only the notebook needs.

    The HTML of an `explorer` takes the place of its still picture, or stands below another cell's output.

    Lines of directives go, and so does hidden code; what it printed or drew stays. Imports and code that
    JupyterLab shows folded are folded. A picture's alternative text names the section and the cell; what it
    shows is in the text below it.
    """
    text, tags = source(cell), []
    if cell['cell_type'] == 'markdown':
        return cell | {'source': page_links(text)}
    directives = re.findall(r'^#\s*\|\s*(\w+)', text, re.M)
    text = re.sub(r'^#\s*\|.*\n?', '', text, flags=re.M).strip('\n')
    hidden = 'hide' in directives or not text
    if hidden and not cell['outputs']:
        return None
    if hidden:
        tags.append('remove-input')
    elif cell['id'].endswith('imports') or cell['metadata'].get('jupyter', {}).get('source_hidden'):
        tags.append('hide-input')
    if {'export', 'exporti'} & set(directives):
        tags.append('export')
    if explorer:
        kept = [o for o in cell['outputs'] if o['output_type'] == 'stream' or not EXPLORER.search(text)]
        html = {'output_type': 'display_data', 'metadata': {}, 'data': {'text/html': explorer}}
        cell = cell | {'outputs': [*kept, html]}
    described = {'mystnb': {'image': {'alt': f'{section}: {cell["id"].replace("-", " ")}'}}}
    return cell | {'source': text, 'metadata': {'tags': tags} | described}


def page_links(text: str) -> str:
    """Text of a notebook with links as they lead from its page.

    Pictures are copied, and the rest of the repository is linked where its address is known. Anchors are
    spelled as Sphinx spells them. Code in a summary, which is HTML, becomes HTML.
    """
    text = text.replace('](../assets/', '](assets/')
    text = re.sub(r'<summary>.*', lambda line: re.sub(r'`(.*?)`', r'<code>\1</code>', line[0]), text)
    text = re.sub(r'(?<=\]\()([\w.]*#)([^)\s]+)', lambda m: m[1] + re.sub(r'[^\w-]', '', m[2].lower()), text)
    repository = os.environ.get('SITE_REPOSITORY', '')
    linked = rf'[\1]({repository}/blob/HEAD/\2)' if repository else r'\1'
    return re.sub(r'\[([^\]]*)\]\(\.\./([^)]*)\)', linked, text)


def as_sources(notebooks: dict[str, dict], live: dict[tuple[str, str], str], folder: Path) -> dict[str, str]:
    """Write what Sphinx reads: the notebooks, with the course map in the front page, and pages of the API.

    `live` is the HTML of explorers by notebook and cell. Returns the labels of the notebooks.
    """
    groups = course_map(notebooks)
    modules = {}
    for name, notebook in notebooks.items():
        exported = re.search(r'^#\| default_exp (\w+)$', '\n'.join(map(source, notebook['cells'])), re.M)
        if exported and not exported[1].startswith('_'):
            modules[exported[1]] = name
    for name, notebook in notebooks.items():
        section, cells = '', []
        for cell in notebook['cells']:
            if cell['cell_type'] == 'markdown':
                section = re.findall(r'^#+ (.+)', f'# {section}\n{source(cell)}', re.M)[-1].replace('`', '')
            cells.append(as_page(cell, section, live.get((name, cell['id']))))
        page = notebook | {'cells': [cell for cell in cells if cell]}
        if name == 'index':
            (shown,) = [cell for cell in page['cells'] if 'film.gif' in cell['source']]
            shown['source'] = re.sub(r'!\[.*\]\(assets/film.gif\)', lambda _: film(), shown['source'])
            trees = [toctree(group.title, group.pages) for group in groups]
            trees.append(toctree('Reference', [('api/index', 'API reference')]))
            page['cells'].append(
                {'cell_type': 'markdown', 'id': 'map', 'metadata': {}, 'source': ''.join(trees)}
            )
        (folder / f'{name}.ipynb').write_text(json.dumps(page))
    labels = dict(page for group in groups for page in group.pages)
    sentences = {module: title_of(notebooks[name])[1] for module, name in modules.items()}
    (folder / 'api').mkdir()
    (folder / 'api' / 'index.md').write_text(api_index(sentences))
    for module, name in modules.items():
        text = module_page(module, name, labels[name], sentences[module])
        (folder / 'api' / f'{module}.md').write_text(text)
    shutil.copytree(ROOT / 'assets', folder / 'assets', ignore=shutil.ignore_patterns('runs', 'bench'))
    return labels


def film() -> str:
    "The film that README shows as an animation, to play."
    from nanomoe.report import film_of_run

    return f'`````{{raw}} html\n{film_of_run(ROOT / "assets")}\n`````'


def toctree(caption: str, pages: list[tuple[str, str]]) -> str:
    lines = '\n'.join(f'{label} <{name}>' for name, label in pages)
    return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n\n'


def module_page(module: str, notebook: str, label: str, sentence: str) -> str:
    return f"""# nanomoe.{module}

> {sentence}

Exported by [{label}](../{notebook}.ipynb)

```{{eval-rst}}
.. automodule:: nanomoe.{module}
   :members:
```
"""


def api_index(sentences: dict[str, str]) -> str:
    "The names that `import nanomoe` offers, then every module."
    import nanomoe

    names = [
        f'| {{py:obj}}`{name} <nanomoe.{module}.{name}>` | {{py:mod}}`nanomoe.{module}` |'
        for name, module in nanomoe._MODULE.items()
    ]
    modules = [f'| [{module}]({module}.md) | {sentence} |' for module, sentence in sentences.items()]
    return '\n'.join(
        [
            '# API reference',
            '> The public names of the package, from its docstrings.',
            '',
            '`import nanomoe` offers ten names; each module is loaded when a name of it is first used.',
            '',
            '| name | defined in |',
            '|---|---|',
            *names,
            '',
            '## Modules',
            '',
            '| module | what it holds |',
            '|---|---|',
            *modules,
            '',
            toctree('Modules', [(module, module) for module in sentences]),
        ]
    )


def draw_icon() -> bytes:
    "The favicon, a PNG: four experts, two of them chosen."
    from nanomoe.viz import expert_color, new_figure

    figure = new_figure(1, 1)
    figure.set_layout_engine('none')
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 2), ylim=(0, 2))
    ax.axis('off')
    for expert, (x, y) in enumerate([(0.5, 1.5), (1.5, 1.5), (0.5, 0.5), (1.5, 0.5)]):
        ax.scatter(x, y, s=520, color=expert_color(expert), alpha=1 if expert in (0, 3) else 0.3, lw=0)
    return png(figure, 64)


def draw_card(title: str, sentence: str, picture: bytes) -> bytes:
    "What a link to the site shows on other sites: the front page's title, sentence and figure, 1200 by 630."
    import textwrap

    from matplotlib.image import imread

    from nanomoe.viz import new_figure

    figure = new_figure(12, 6.3)
    figure.set_layout_engine('none')
    figure.text(0.06, 0.8, title, size=54, weight='bold', va='center')
    figure.text(0.06, 0.62, textwrap.fill(sentence, 62), size=24, va='center', linespacing=1.5)
    ax = figure.add_axes((0.05, 0.04, 0.9, 0.46))
    ax.imshow(imread(io.BytesIO(picture)), interpolation='lanczos')
    ax.axis('off')
    return png(figure, 100)


def png(figure, dpi: int) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, dpi=dpi, format='png', metadata={'Software': None})
    return out.getvalue()


def build(out: Path, recorded: list[str]) -> list[str]:
    """Build the site into a folder, replacing what is there, with explorers of the `recorded` notebooks.

    Returns what is wrong with its links and requests.
    """
    from explorers import explorers
    from sphinx.application import Sphinx

    if out.exists() and not (out / '.buildinfo').exists():
        sys.exit(f'{out} exists and is not a site; name another folder')
    notebooks = read_notebooks(ROOT / 'nbs')
    title, sentence = title_of(notebooks['index'])
    drawn = [
        o['data'] for cell in notebooks['index']['cells'] for o in cell.get('outputs', []) if 'data' in o
    ]
    picture = base64.b64decode(next(data['image/png'] for data in drawn if 'image/png' in data))
    with tempfile.TemporaryDirectory() as folder:
        sources, made, extra = (Path(folder, name) for name in ('sources', 'made', 'extra'))
        for path in (sources, extra / 'notebooks'):
            path.mkdir(parents=True)
        live = explorers(notebooks, recorded or list(notebooks), extra / 'explorers')
        every = as_sources(notebooks, live, sources)
        labels = {name: label for name, label in every.items() if label[0].isdigit()}
        for path in (ROOT / 'nbs').glob('*.ipynb'):
            shutil.copy(path, extra / 'notebooks')
        (extra / 'favicon.png').write_bytes(draw_icon())
        (extra / 'card.png').write_bytes(draw_card(title, sentence, picture))
        sentences = {name: title_of(notebook)[1] for name, notebook in notebooks.items()}
        address = os.environ.get('SITE_URL', '')
        settings = {
            'project': title,
            'html_title': title,
            'html_extra_path': [str(extra)],
            'html_baseurl': address,
            'html_context': {'address': address, 'sentences': sentences, 'labels': labels},
        }
        app = Sphinx(
            sources, HERE, made, Path(folder, 'doctrees'), 'html', settings, warningiserror=True, status=None
        )
        app.build()
        if app.statuscode:
            sys.exit('the site has warnings, see above')
        problems = problems_of(made)
        if out.exists():
            shutil.rmtree(out)
        shutil.move(made, out)
    return problems


if __name__ == '__main__':
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / '_site'
    problems = build(out, sys.argv[2:])
    print(f'{os.path.relpath(out)}: {len(list(out.rglob("*.html")))} pages, {len(problems)} problems')
    sys.exit('\n'.join(problems) or None)
