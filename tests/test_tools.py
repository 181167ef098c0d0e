"""Tests tools/cuda.py on a CPU (`--dry`)."""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = 'tests data layer step target pretrain muon memory ladder write'.split()


def cuda(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT/'tools'/'cuda.py', *map(str, words)], capture_output=True, text=True, cwd=ROOT)


def test_every_section_runs(tmp_path):
    done = cuda('--dry', '--out', tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path/'dry-cpu.json').read_text())
    assert list(found['sections']) == SECTIONS and {'torch', 'commit', 'date', 'command'} <= found['machine'].keys()
    for name, section in found['sections'].items():
        assert section['result'] == 'passed' and section['headline'] in done.stdout and section['command'], name
        assert section['rows'] or name in ('tests', 'pretrain')
    assert '<h2>Experts</h2>' in (tmp_path/'report.html').read_text()
    assert done.stdout.splitlines()[-len(SECTIONS) - 2].split() == ['section', 'result', 'seconds', 'headline']


def test_a_failure_costs_one_section(tmp_path):
    "A failed section reports its error; later sections run, earlier results are kept."
    (tmp_path/'dry-cpu.json').write_text(json.dumps({'sections': {'step': {'result': 'passed'}}}))
    done = cuda('--dry', '--out', tmp_path, '--only=layer,memory', '--against=nowhere')
    found = json.loads((tmp_path/'dry-cpu.json').read_text())['sections']
    assert done.returncode == 1 and {name: section['result'] for name, section in found.items()} == {
        'step': 'passed', 'layer': 'failed', 'memory': 'passed'}
    assert 'against must be a folder with the model.py and manager.py of nanoMoE, got nowhere' in found['layer']['headline']


def test_bad_input_is_one_sentence(tmp_path):
    for words, sentence in ((['--only=layers'], 'there is no section layers'), (['--dry', f'--wheels={tmp_path}'], 'holds no wheels')):
        done = cuda(*words)
        assert done.returncode == 2 and sentence in done.stderr.splitlines()[-1]
