"""What holds the project together: one source, imports that go forward, a light core, notebooks in form."""

import ast
import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exercises import exercises

from nanomoe import files
from nanomoe.command_line import EXTRAS, what_to_install

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
LESSONS = [path for path in NOTEBOOKS if re.match(r'\d\d_', path.name)]
MODULES = {path.stem[3:]: path for path in LESSONS if '#| default_exp' in path.read_text()}


def cells(path: Path, kind: str = 'code') -> list[dict]:
    return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def source(cell: dict) -> str:
    return ''.join(cell['source'])


def test_the_modules_are_what_the_notebooks_export(tmp_path):
    for name in ('nbs', 'nanomoe', 'settings.ini'):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    for path in (tmp_path / 'nanomoe').glob('*.py'):
        if path.name != '__init__.py':
            path.unlink()
    (tmp_path / 'nanomoe' / '_modidx.py').unlink(missing_ok=True)
    subprocess.run([Path(sys.executable).parent / 'nbdev_export'], cwd=tmp_path, check=True)
    made = {path.name: path.read_text() for path in (tmp_path / 'nanomoe').glob('*.py')}
    assert made == {path.name: path.read_text() for path in (ROOT / 'nanomoe').glob('*.py')}
    assert {name + '.py' for name in MODULES} | {'__init__.py', '__main__.py', '_modidx.py'} == made.keys()


def imported(tree: ast.AST, top_only: bool = False) -> set[str]:
    """Modules that a tree imports: `package` or `nanomoe.module`; what only a program imports, once it runs,
    is left out.
    """
    found = set()
    if not top_only:
        tree.body = [
            node
            for node in tree.body
            if not (isinstance(node, ast.If) and '__main__' in ast.unparse(node.test))
        ]
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split('.')[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split('.')[0])
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {f'nanomoe.{name}' for name in names}
    return found


def imports_of(name: str) -> set[str]:
    "Our modules that a module imports, at its top or in its functions."
    tree = ast.parse((ROOT / 'nanomoe' / f'{name}.py').read_text())
    return {module.split('.')[1] for module in imported(tree) if module.startswith('nanomoe.')}


# said in a line of the lesson
LATER = {
    'experts': {'capacity'},
    'optim': {'parallel', 'sharding'},
    'train': {'parallel', 'expert_parallel', 'sharding', 'sizing'},
    'expert_parallel': {'sharding'},
    'sample': {'film', 'parallel'},
}


@pytest.mark.parametrize('name', MODULES)
def test_a_notebook_imports_what_comes_before_it(name):
    """A lesson imports earlier lessons and what is under the hood (30 and up).

    Those import lessons and earlier ones of theirs.
    """
    place = {module: path.name for module, path in MODULES.items()}
    allowed = {
        other for other in place if place[other] < place[name] or place[name] < '30' <= place[other]
    } | LATER.get(name, set())
    assert imports_of(name) <= allowed, imports_of(name) - allowed
    assert name not in LATER or all(f'({place[other]})' in MODULES[name].read_text() for other in LATER[name])


def test_modules_form_no_circle():
    graphlib.TopologicalSorter({name: imports_of(name) for name in MODULES}).prepare()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_exports_to_its_own_module(path):
    exported = re.findall(r'^#\s*\|\s*exporti?\b(.*)$', '\n'.join(map(source, cells(path))), re.M)
    defaults = [m[1] for m in (re.match(r'#\s*\|\s*default_exp (\S+)', source(c)) for c in cells(path)) if m]
    assert not any(rest.strip() for rest in exported) and bool(exported) == bool(defaults)
    assert defaults in ([], [path.stem[3:]], ['__main__'])


def test_no_module_is_a_tenth_of_the_package():
    lines = {name: len((ROOT / 'nanomoe' / f'{name}.py').read_text().splitlines()) for name in MODULES}
    assert max(lines.values()) <= 0.1 * sum(lines.values()), max(lines, key=lines.get)


@pytest.mark.parametrize('name', MODULES)
def test_the_core_imports_little(name):
    tree = ast.parse((ROOT / 'nanomoe' / f'{name}.py').read_text())
    top = {m for m in imported(tree, top_only=True) if not m.startswith('nanomoe')}
    extra = top - set(sys.stdlib_module_names) - {'torch', 'numpy'}
    assert extra <= {'checkpoint': {'safetensors'}, 'viz': {'matplotlib', 'PIL'}}.get(name, set())


CORE = """
import contextlib, io, json, runpy, sys
class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.split('.')[0] in blocked else self.finder.find_spec(name, *rest)
class Terminal(io.StringIO):
    def isatty(self): return True
blocked, lines = map(json.loads, sys.argv[1:])
sys.meta_path[:] = map(Without, sys.meta_path)
ended = []
for words in lines:
    sys.argv[:], code, said = words, 0, Terminal()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try: runpy.run_module(words[0], run_name='__main__')
        except SystemExit as e: code = e.code or 0
    ended.append((code, said.getvalue().strip()))
print(json.dumps(ended))
"""


def test_the_core_install_works_or_says_what_it_lacks(tmp_path):
    """Every program without any extra: what needs none runs, and the rest says in one sentence what to
    install.
    """
    (tmp_path / 'text.txt').write_text('Experts read what routers send.\n' * 300)
    (tmp_path / 'rows.jsonl').write_text(
        '{"text": "To be, or not to be"}\n{"text": "that is the question"}\n' * 30
    )
    (tmp_path / 'rows.parquet').touch()
    (tmp_path / 'theirs').mkdir()
    (tmp_path / 'theirs' / 'config.json').write_text('{"model_type": "gpt2"}')
    run, quick = tmp_path / 'run', '--max_iters=2 --eval_iters=1 --out_dir'
    cases = {
        'data numbers --out {}/n': '',
        'data {}/text.txt --tokenizer=bytes --out {}/t': '',
        'data check {}/n': '',
        'data {}/rows.jsonl --tokenizer=chars --out {}/j': '',
        f'train tiny {quick} {{}}/run --dataset {{}}/n': '',
        'sample {}/run --max_new_tokens=3': '',
        'prune {}/run --keep=3 --n=2 --out_dir {}/pruned': '',
        'bench write --preset=tiny --repeats=1': '',
        'pretrained --help': '',
        'data onboard --out {}/o': 'tokenizers data',
        'data {}/text.txt --out {}/b': 'tokenizers data',
        'data {}/rows.parquet --tokenizer=bytes --out {}/p': 'pyarrow data',
        'data openwebtext --out {}/w': 'datasets data',
        'data fineweb10B-gpt2 --out {}/f': 'huggingface_hub data',
        'sample gpt2': 'transformers hf',
        'sample {}/theirs': 'transformers hf',
        f'train tiny --init_from=gpt2 {quick} {{}}/g --dataset {{}}/n': 'transformers hf',
        'viz report {}/run': 'matplotlib lab',
        f'train tiny --tracker=wandb {quick} {{}}/k --dataset {{}}/n': 'wandb wandb',
        'viz watch {}/run': 'matplotlib lab',
    }
    words = [('nanomoe.' + line.replace('{}', str(tmp_path))).split() for line in cases]
    blocked = [*' '.join(EXTRAS.values()).split(), 'nbdev', 'fastcore']
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', CORE, json.dumps(blocked), json.dumps(words)],
        cwd=ROOT,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for (line, lacking), (code, said) in zip(cases.items(), json.loads(done.stdout)):
        package, _, extra = lacking.partition(' ')
        assert code == (2 if lacking else 0), (line, said)
        if lacking:
            assert (
                said.endswith(f"requires the package {package}; install it with: pip install -e '.[{extra}]'")
                and '\n' not in said
            ), (line, said)
    assert run.exists() and not {path.name for path in tmp_path.iterdir()} & {
        'o',
        'b',
        'p',
        'w',
        'f',
        'g',
        '.o.part',
        '.b.part',
    }


def test_what_an_extra_brings_is_what_settings_say(tmp_path, monkeypatch):
    wanted = dict(re.findall(r'^(\w+)_requirements = (.*)$', (ROOT / 'settings.ini').read_text(), re.M))
    beside = {'huggingface_hub', 'PIL', 'IPython'}  # what those bring that are named
    for extra, packages in EXTRAS.items():
        assert set(packages.split()) - beside <= set(wanted[extra].split())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, '__file__', str(tmp_path / 'files.py'))  # as if installed from a wheel
    assert (
        what_to_install('PIL.Image')
        == "this command requires the package PIL; install it with: pip install 'nanomoe[lab]'"
    )
    assert what_to_install('quux') is None


def test_no_code_is_run_from_files():
    "No pickle, no exec in exported code, and torch.load of nothing but tensors."
    for path in (ROOT / 'nanomoe').glob('*.py'):
        tree = ast.parse(path.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {'exec', 'eval', 'np.load', '__import__'}, path.name
        assert 'pickle' not in imported(tree), path.name


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_executed_and_clean(path):
    notebook = json.loads(path.read_text())
    ids = [c['id'] for c in notebook['cells']]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r'[a-z0-9]+(-[a-z0-9]+)*', i) for i in ids)
    for cell in cells(path):
        kinds = {o['output_type'] for o in cell['outputs']}
        assert 'error' not in kinds, cell['id']
        assert not any(o.get('name') == 'stderr' for o in cell['outputs']), cell['id']
        for words in ('/work/', '/root/', 'application/vnd.jupyter.widget-view+json'):
            assert words not in json.dumps(cell['outputs']), cell['id']
    assert 'widgets' not in notebook['metadata']
    assert path.stat().st_size <= 160 * 1024


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_lessons_have_their_form(path):
    code = [
        source(c)
        for c in cells(path)
        if not c['id'].endswith('imports') and c['id'] not in ('install', 'default-exp')
    ]
    prose = [source(c) for c in cells(path, 'markdown')]
    asserting = sum(bool(re.search(r'\bassert|assert_close|raises', c)) for c in code)
    pictures = sum('image/png' in o.get('data', {}) for c in cells(path) for o in c['outputs'])
    assert re.match(r'# .+\?\n+> .+', prose[0]), 'the title is a question, then one sentence'
    assert asserting >= 0.4 * len(code), f'{asserting} of {len(code)} code cells assert'
    found, lesson = exercises(path), path.name < '30'  # under the hood there may be fewer
    assert not lesson or pictures >= 3 and len(found) >= 3
    assert all(len(e.wrong) >= 2 for e in found), 'each exercise has two wrong answers in tests/wrong_answers'
    line = prose[1].splitlines()[2]
    assert re.match(r'\*\*(You need:|Read this when)\*\* .*\*\*\d+ minutes\*\*$', line), line
    questions = [c for c in prose if c.startswith('## Check yourself')]
    assert not lesson or questions[0].count('<summary>') == questions[0].count('</details>') == 5
    assert not any(re.search(r'from \S+ import \*', c) for c in code)
    assert (
        path.name >= '30'
        or sum(len(re.findall(r'\bexplore\(', c)) - len(re.findall(r'def explore\(', c)) for c in code) >= 1
    )


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_says_what_to_install_where_the_package_is_absent(path):
    code = cells(path)
    if not code or path.stem == 'main':
        return
    absent = source(code[0]).replace("find_spec('nanomoe')", "find_spec('nanomoe_is_absent')")
    done = subprocess.run([sys.executable, '-c', absent], capture_output=True, text=True)
    assert '%pip install' in done.stdout and not code[0]['outputs']


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_lessons_lead_on(path):
    """Where a lesson stands is said below its title, with links to its neighbors, and the last words lead to
    the next.
    """
    prose = [source(c) for c in cells(path, 'markdown')]
    place = LESSONS.index(path)
    assert source(json.loads(path.read_text())['cells'][1]) == prose[1] and prose[1].startswith('*')
    line = prose[1].splitlines()[0]
    around = [LESSONS[i].name for i in (place - 1, place + 1) if 0 <= i < len(LESSONS)]
    assert all(name in line for name in around), line
    assert place + 1 == len(LESSONS) or LESSONS[place + 1].name in prose[-1]


def test_readme_is_made_from_the_index(tmp_path):
    subprocess.run([sys.executable, ROOT / 'tools' / 'make_readme.py', tmp_path], check=True)
    for made in [path for path in tmp_path.rglob('*') if path.is_file()]:
        assert made.read_bytes() == (ROOT / made.relative_to(tmp_path)).read_bytes(), made.name


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_main_is_the_last_that_a_notebook_exports(path):
    exported = [source(cell) for cell in cells(path) if re.search(r'^#\s*\|\s*export', source(cell), re.M)]
    mains = [i for i, text in enumerate(exported) if re.search(r'^def main\(', text, re.M)]
    if mains:
        assert mains == [len(exported) - 1] and re.findall(r'^def (\w+)', exported[-1], re.M)[-1] == 'main'


# Lines of exported cells with no cell between that runs them, where one definition has more than 60
STRETCHES = {
    '33_command_line': 82,  # the help of each program
    '30_config': 72,  # a dataclass
    '35_dataset': 63,  # a class
    '37_data': 65,  # a function, twice
}


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_what_is_exported_is_soon_run(path):
    stretch = longest = 0
    for cell in cells(path):
        if cell['id'] in ('imports', 'default-exp'):
            continue
        exported = re.search(r'^#\s*\|\s*export', source(cell), re.M)
        stretch = stretch + source(cell).count('\n') if exported else 0
        longest = max(longest, stretch)
    assert longest <= STRETCHES.get(path.stem, 60)


def test_code_is_formatted():
    """One statement a line, 110 columns, no unused names: `ruff format` and `ruff check` have nothing to
    change.
    """
    ruff = [Path(sys.executable).with_name('ruff')]
    for words in (['format', '--check'], ['check']):
        done = subprocess.run([*ruff, *words, '.'], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_readme_is_one_page():
    text = (ROOT / 'README.md').read_text()
    assert len(re.sub(r'\]\([^)]*\)', ']', text).split()) <= 1200


def test_the_first_lesson_has_as_many_lines_as_it_claims():
    path = ROOT / 'nbs' / '00_first_mixture.ipynb'
    code = [source(c) for c in cells(path) if c['id'] in ('dense-blocks', 'gpt', 'loop', 'mixture')]
    lines = [line for text in code for line in text.splitlines() if line.strip()]
    claims = re.findall(r'(\d+) lines of plain PyTorch', '\n'.join(map(source, cells(path, 'markdown'))))
    assert claims == [str(len(lines))] and len(lines) <= 80
    own = {name for c in cells(path) for name in re.findall(r'from nanomoe\.(\w+)', source(c))}
    assert own == {'corpora', 'viz'}  # text and pictures


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_links_between_notebooks_lead_somewhere(path):
    text = '\n'.join(map(source, cells(path, 'markdown')))
    assert all((path.parent / t).exists() for t in re.findall(r'\]\(([^)#:\s]+)\)', text))


def test_readme_links_lead_somewhere():
    text = (ROOT / 'README.md').read_text()
    targets = re.findall(r'\]\(([^)#\s]+)\)', text)
    assert targets and all((ROOT / t).exists() for t in targets if not re.match(r'https?:', t))


def test_the_course_table_is_complete():
    text = (ROOT / 'nbs' / 'index.ipynb').read_text()
    assert all(path.name in text for path in LESSONS)
