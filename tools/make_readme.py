"Make README.md (or the file that is named) from nbs/index.ipynb, its pictures from assets/."
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def readme(notebook: dict) -> str:
    "The index as Markdown: prose as it is, code in fences with its text output; links lead from the root instead of nbs/."
    parts = ['<!-- made from nbs/index.ipynb by tools/make_readme.py: edit that notebook -->']
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if re.match(r'#\s*\|\s*(hide|default_exp)', source): continue
        if cell['cell_type'] == 'markdown': parts.append(source.replace('](../', '](').replace('="../', '="').replace('](index_links/', '](nbs/'))
        else: parts += [f'```python\n{source}\n```', *text_outputs(cell)]
    return '\n\n'.join(part.strip() for part in parts if part.strip()) + '\n'


def text_outputs(cell: dict) -> list[str]:
    "What a cell printed, as fences."
    return ['```\n' + ''.join(o['text']).rstrip() + '\n```' for o in cell['outputs'] if o['output_type'] == 'stream']


if __name__ == '__main__':
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT/'README.md'
    target.write_text(readme(json.loads((ROOT/'nbs'/'index.ipynb').read_text())))
