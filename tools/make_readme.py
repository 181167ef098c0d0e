"Make README.md and its pictures (assets/index-…) from nbs/index.ipynb; another folder may be named."

import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def readme(notebook: dict) -> tuple[str, dict[str, bytes]]:
    "The index as Markdown, code with its output, and the pictures in it by path; links lead from the root."
    parts, pictures = ['<!-- made from nbs/index.ipynb by tools/make_readme.py: edit that notebook -->'], {}
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if cell['id'].startswith('page-'):
            continue  # for the notebook alone: README shows no HTML
        if cell['cell_type'] == 'markdown':
            parts.append(re.sub(r'\]\((\w+\.ipynb)\)', r'](nbs/\1)', source.replace('](../', '](')))
        if cell['cell_type'] != 'code':
            continue
        if not re.match(r'#\s*\|\s*hide', source):
            parts.append(f'```python\n{source}\n```')
        for output in cell['outputs']:
            if output['output_type'] == 'stream':
                parts.append('```\n' + ''.join(output['text']).rstrip() + '\n```')
            for kind, end in (('image/png', 'png'), ('image/svg+xml', 'svg')):
                if not (picture := ''.join(output.get('data', {}).get(kind, ''))):
                    continue
                path = f'assets/index-{cell["id"]}.{end}'
                pictures[path] = base64.b64decode(picture) if end == 'png' else picture.encode()
                parts.append(f'![{cell["id"].replace("-", " ")}]({path})')
    return '\n\n'.join(part.strip() for part in parts) + '\n', pictures


if __name__ == '__main__':
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    text, pictures = readme(json.loads((ROOT / 'nbs' / 'index.ipynb').read_text()))
    (folder / 'README.md').write_text(text)
    for path, content in pictures.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
