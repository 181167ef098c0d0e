"""Files that are damaged, foreign, nonsense or malicious: each is refused by name, none is executed, nothing
is lost.
"""

import ast
import io
import json
import pickle
import random
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed as seeded, settings
from hypothesis import strategies as st

from nanomoe import checkpoint, data, pretrained, sample, train
from nanomoe.corpora import numbers_documents
from nanomoe.metrics import log_numbers, read_log
from nanomoe.tokenizer import load_tokenizer
from nanomoe.command_line import one_sentence, parse
from nanomoe.config import BadInput, ModelConfig, check, field_names, from_dict
from nanomoe.presets import PRESETS
from nanomoe.dataset import TokenDataset, all_sequences, batch_at, target_domains, verify
from nanomoe.files import Lines, Tail, cut_log, log_lines, read_with_checksum, sha256, with_checksum
from nanomoe.model import GPT

HERE = Path(__file__).parent


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('data') / 'small'
    data.write_dataset(numbers_documents(12_000, lines=20), folder, 'bytes')
    return folder


def saved(root: Path, steps=(10, 20)) -> Path:
    tensors = {
        'model': {'w': torch.arange(300.0)},
        'optim': {'w|exp_avg': torch.ones(300), 'w|step': torch.tensor(3.0)},
    }
    for step in steps:
        checkpoint.save(root, step, tensors, {'config': {}, 'data': ['0123'], 'skipped': 0})
    return root


def read_all(folder: Path):
    "What training reads of a dataset."
    for split in ('train', 'val'):
        tokens = TokenDataset(folder, split)
        starts = all_sequences(tokens, 32)[:4]
        batch_at(tokens, starts, 32), target_domains(tokens, starts, 32)
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(range(min(3, tokenizer.n_vocab)))


def test_every_flipped_bit_is_found(dataset, tmp_path, seed, soak):
    dice, flips = random.Random(seed), 2000 if soak else 300
    for i in range(flips):
        copy = tmp_path / 'copy'
        source = saved(tmp_path / 'run') if i == 0 else tmp_path / 'run'
        original = dice.choice([p for p in [*dataset.iterdir(), *source.glob('step-00000020/*')]])
        shutil.copytree(source if original.parent.parent == source else dataset, copy)
        damaged = (
            copy / original.relative_to(source) if original.parent.parent == source else copy / original.name
        )
        content = bytearray(original.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        damaged.write_bytes(content)
        if original.parent == dataset:
            with pytest.raises(BadInput, match=original.name):
                read_all(copy)
            with pytest.raises(BadInput, match=original.name):
                verify(copy)
        else:
            with pytest.raises(ValueError, match=original.name):
                checkpoint.load(damaged.parent)
            with redirect_stderr(io.StringIO()) as said:
                assert checkpoint.load_latest(copy).step == 10
            assert 'trying the checkpoint before' in said.getvalue()
        shutil.rmtree(copy)
    print(f'\n{flips} flipped bits in datasets and checkpoints, all found and named; seed {seed}')


class Bomb:
    "What unpickling this does, anything could do."

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_no_file_executes_anything(dataset, tmp_path, capsys):
    marker, code = (
        tmp_path / 'executed',
        f'__import__("pathlib").Path({str(tmp_path / "executed")!r}).touch()',
    )
    bomb = pickle.dumps({'w': Bomb(marker)})
    pickle.loads(bomb)
    assert marker.exists()
    marker.unlink()  # it works where somebody lets it
    copy = shutil.copytree(dataset, tmp_path / 'copy')
    for name in ('manifest.json', 'tokenizer.json', 'numbers_train_000000.bin'):
        (copy / name).write_bytes(bomb)
        with pytest.raises(BadInput, match=name):
            read_all(copy)
        shutil.copy(dataset / name, copy / name)
    np.save(copy / 'numbers_train_000000.npy', np.array([Bomb(marker)]), allow_pickle=True)
    (copy / 'numbers_train_000000.npy').rename(copy / 'numbers_train_000000.bin')
    with pytest.raises(BadInput, match='is not a token file'):
        read_all(copy)
    run = saved(tmp_path / 'run')  # digests and seal in order
    torch.save({'w': Bomb(marker)}, run / 'step-00000020' / 'model.safetensors')
    meta = json.loads((run / 'step-00000020' / 'meta.json').read_text())
    meta['sha256']['model.safetensors'] = sha256(run / 'step-00000020' / 'model.safetensors')
    (run / 'step-00000020' / 'meta.json').write_text(json.dumps(with_checksum(meta)))
    assert checkpoint.load_latest(run).step == 10 and 'holds no checkpoint' in capsys.readouterr().err
    torch.save({'model': {'w': Bomb(marker)}}, tmp_path / 'ckpt.pt')
    for call in (pretrained.load_run, sample.load):
        with pytest.raises(BadInput, match='holds no checkpoint|arrays and plain values alone'):
            call(tmp_path / 'ckpt.pt')
    for name, text in (
        ('run.toml', f'n_layer = {code}'),
        ('run.json', json.dumps({'n_layer': code})),
        ('run.py', code),
        ('other.toml', f'out_dir = "$(touch {marker})"\nn_layer = 1'),
        ('preset.json', json.dumps({'preset': code})),
    ):
        (tmp_path / name).write_text(text)
        try:
            parse([str(tmp_path / name)])
        except BadInput:
            pass
    (tmp_path / 'source.py').write_text(code + '\n' * 300)  # text to learn from, not a program
    (tmp_path / 'source.jsonl').write_text(json.dumps({'text': code * 9}) + '\n')
    data.prepare(
        [str(tmp_path / 'source.py'), str(tmp_path / 'source.jsonl')], tmp_path / 'prepared', 'bytes'
    )
    (tmp_path / 'source.txt').write_bytes(bomb)
    with pytest.raises(BadInput, match='not UTF-8 text: byte 0'):
        data.prepare(str(tmp_path / 'source.txt'), tmp_path / 'x', 'bytes')
    assert not marker.exists()


def test_the_package_cannot_execute_what_it_reads():
    "No pickle, no exec, no eval, no shell, in any module; torch.load reads nothing but tensors."
    for path in (HERE.parent / 'nanomoe').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {'pickle', 'marshal', 'shelve', 'dill', 'joblib', 'runpy'} & set(names), path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in (
                'exec',
                'eval',
                'compile',
                '__import__',
                'os.system',
                'os.popen',
                'np.load',
            ), path
            assert called != 'torch.load' or 'weights_only=True' in ast.unparse(node), path
            assert not {
                ast.unparse(k)
                for k in node.keywords
                if k.arg in ('shell', 'allow_pickle', 'trust_remote_code')
            } - {'trust_remote_code=False'}, path


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    "A file as a bad disk, a bad copy or a bad program leaves it."
    at = draw(st.integers(0, len(content)))
    some = draw(st.binary(max_size=40))
    return draw(
        st.sampled_from(
            [
                content[:at],
                content[at:],
                content[:at] + some + content[at + len(some) :],
                content[:at] + some + content[at:],
                some,
                content[:at] * 2,
            ]
        )
    )


@st.composite
def rewritten(draw, tree):
    "A JSON value in which one place holds something else, or is missing."
    if isinstance(tree, (dict, list)) and tree and draw(st.integers(0, 9)):
        key = (
            draw(st.sampled_from(sorted(tree)))
            if isinstance(tree, dict)
            else draw(st.integers(0, len(tree) - 1))
        )
        copy = tree.copy()
        if draw(st.integers(0, 4)):
            copy[key] = draw(rewritten(tree[key]))
        else:
            del copy[key]
        return copy
    return draw(anything)


def fuzz(cases: st.SearchStrategy, check, seed: int, examples: int):
    "Give `check` many cases: it may refuse with `BadInput` or `ValueError`, and nothing else may come of it."
    refused = []

    @seeded(seed)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def run(case):
        try:
            check(case)
        except BadInput if check.__name__ != 'checkpoints' else ValueError as e:
            refused.append(e)
            assert str(e) and len(str(e)) < 3000

    run()
    print(f'\n{examples} {check.__name__}, {len(refused)} refused, no other error; seed {seed}')
    assert len(refused) > examples / 4


KNOBS = {
    'preset': 'tiny',
    'max_iters': 7,
    'bias': True,
    'capacity_factor': 1.5,
    'balance': 'none',
    'seed': 3,
    'dataset': 'numbers',
}


def test_fuzzed_configurations(tmp_path, seed, soak):
    def configurations(case):
        name, content = case
        (tmp_path / name).write_bytes(content)
        parse([str(tmp_path / name)])

    as_json = st.builds(lambda tree: json.dumps(tree).encode(), rewritten(KNOBS))
    option = st.dictionaries(st.sampled_from(field_names()), anything, min_size=1, max_size=2).map(
        lambda flat: json.dumps(flat).encode()
    )
    toml = '\n'.join(f'{name} = {json.dumps(value)}' for name, value in KNOBS.items()).encode()
    cases = st.tuples(
        st.just('run.json'), as_json | option | damaged(json.dumps(KNOBS).encode())
    ) | st.tuples(st.just('run.toml'), damaged(toml))
    fuzz(cases, configurations, seed, 1000 if soak else 100)


def test_fuzzed_manifests(dataset, tmp_path, seed, soak):
    folder, content = shutil.copytree(dataset, tmp_path / 'copy'), (dataset / 'manifest.json').read_bytes()

    def manifests(case):
        (folder / 'manifest.json').write_bytes(case)
        read_all(folder)

    def reseal(tree):
        return json.dumps(with_checksum(tree) if isinstance(tree, dict) else tree).encode()

    flat = {key: value for key, value in json.loads(content).items() if key != 'seal'}
    fuzz(damaged(content) | rewritten(flat).map(reseal), manifests, seed, 1000 if soak else 100)


def test_fuzzed_tokenizers(dataset, tmp_path, seed, soak):
    folder, content = shutil.copytree(dataset, tmp_path / 'copy'), (dataset / 'tokenizer.json').read_bytes()

    def tokenizers(case):
        (folder / 'tokenizer.json').write_bytes(case)
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(range(min(3, tokenizer.n_vocab)))

    flat = {key: value for key, value in json.loads(content).items() if key != 'seal'}
    fuzz(
        damaged(content)
        | rewritten(flat).map(
            lambda tree: json.dumps(with_checksum(tree) if isinstance(tree, dict) else tree).encode()
        ),
        tokenizers,
        seed,
        1000 if soak else 100,
    )


def test_fuzzed_shards(dataset, tmp_path, seed, soak):
    "With a manifest that knows their digests, so that what is in them decides."
    folder, content = (
        shutil.copytree(dataset, tmp_path / 'copy'),
        (dataset / 'numbers_val_000000.bin').read_bytes(),
    )
    flat = json.loads((dataset / 'manifest.json').read_text())

    def shards(case):
        (folder / 'numbers_val_000000.bin').write_bytes(case)
        flat['splits']['val']['shards'][0]['sha256'] = sha256(folder / 'numbers_val_000000.bin')
        (folder / 'manifest.json').write_text(json.dumps(with_checksum(flat)))
        read_all(folder)

    fuzz(
        damaged(content) | damaged(content[:1024]).map(lambda head: head + content[1024:]),
        shards,
        seed,
        1000 if soak else 100,
    )


def test_fuzzed_checkpoints(tmp_path, seed, soak):
    "With digests and seal in order."
    step = saved(tmp_path / 'run', steps=(10,)) / 'step-00000010'
    flat, weights = json.loads((step / 'meta.json').read_text()), (step / 'model.safetensors').read_bytes()

    def checkpoints(case):
        tree, content = case
        (step / 'model.safetensors').write_bytes(content)
        if tree is flat:
            flat['sha256']['model.safetensors'] = sha256(step / 'model.safetensors')
        (step / 'meta.json').write_text(json.dumps(with_checksum(tree) if isinstance(tree, dict) else tree))
        checkpoint.load(step)

    fuzz(
        st.tuples(rewritten(flat), st.just(weights)) | st.tuples(st.just(flat), damaged(weights)),
        checkpoints,
        seed,
        1000 if soak else 100,
    )


@pytest.mark.parametrize('name', ['', '.', '..', 'x' * 300, '/etc/passwd', 'folder'])
def test_a_shard_that_is_no_file(dataset, tmp_path, name):
    folder = shutil.copytree(dataset, tmp_path / 'copy')
    (folder / 'folder').mkdir()
    flat = json.loads((folder / 'manifest.json').read_text())
    flat['splits']['train']['shards'][0]['file'] = name
    (folder / 'manifest.json').write_text(json.dumps(with_checksum(flat)))
    for call in (read_all, verify):
        with pytest.raises(BadInput):
            call(folder)


def test_a_checkpoint_that_cannot_be_read_or_holds_no_model(tmp_path, capsys):
    root = saved(tmp_path / 'run')
    assert {path.stat().st_mode & 0o777 for path in root.glob('*/*')} == {
        (root / 'step-00000020').stat().st_mode & 0o666
    }
    (root / 'step-00000020' / 'optim.safetensors').unlink()
    (root / 'step-00000020' / 'optim.safetensors').mkdir()
    assert checkpoint.load_latest(root).step == 10 and 'is not what was written' in capsys.readouterr().err
    (root / 'step-00000010' / 'meta.json').write_text(json.dumps(with_checksum({'step': 10, 'sha256': {}})))
    with pytest.raises(BadInput, match='holds no model with its configuration'):
        pretrained.load_run(root)


def test_names_of_the_users_beside_checkpoints(tmp_path):
    root = saved(tmp_path / 'run', steps=(10,))
    shutil.copytree(root / 'step-00000010', root / 'step-00000010-good')
    (root / 'step-00000005').symlink_to(root / 'step-00000010-good')  # moved to another disk
    (root / 'log.jsonl').write_text('{"step": 10, "val_ce": 1.0, "val_tokens": 5}\n')
    assert checkpoint.best_step(root, read_log(root / 'log.jsonl')) == 10
    saved(root, steps=(20, 30))
    assert (root / 'step-00000010-good').exists() and checkpoint.load_latest(root).step == 30


def test_fuzzed_logs(tmp_path, seed, soak):
    "A log is for people and pictures: what can be read of it is read, and going on needs no more."
    lines = ''.join(
        json.dumps({'step': i, 'ce': 1.5, 'val_ce': 1.0, 'val_tokens': 9}) + '\n' for i in range(5)
    ).encode()
    path = tmp_path / 'log.jsonl'

    @seeded(seed)
    @settings(max_examples=1000 if soak else 100, deadline=None, database=None)
    @given(
        damaged(lines)
        | st.lists(anything, max_size=4).map(lambda rows: '\n'.join(map(json.dumps, rows)).encode())
    )
    def run(content):
        path.write_bytes(content)
        with redirect_stderr(io.StringIO()):
            before = read_log(path)
            checkpoint.best_step(tmp_path, checkpoint.evaluations(before))
            cut_log(path, 3)
        assert read_log(path) == [row for row in before if row['step'] <= 3]

    run()


def test_a_dataset_keeps_its_own_tokenizer(tmp_path):
    "Another of equal size is refused, by its digest in the manifest; datasets of before have none there."
    for name in 'ab':
        data.write_dataset(numbers_documents(60_000, seed=ord(name)), tmp_path / name, 'bpe', 300)
    own = (tmp_path / 'a' / 'tokenizer.json').read_bytes()
    shutil.copy(tmp_path / 'b' / 'tokenizer.json', tmp_path / 'a' / 'tokenizer.json')
    for use in (lambda: verify(tmp_path / 'a'), lambda: TokenDataset(tmp_path / 'a', 'train')):
        with pytest.raises(BadInput, match='is not the one that the tokens were made with'):
            use()
    (tmp_path / 'a' / 'tokenizer.json').write_bytes(own)
    verify(tmp_path / 'a')
    manifest = read_with_checksum(tmp_path / 'a' / 'manifest.json')
    (tmp_path / 'a' / 'manifest.json').write_text(
        json.dumps(
            with_checksum({k: v for k, v in manifest.items() if k not in ('tokenizer', 'sha256', 'seal')})
        )
    )
    TokenDataset(tmp_path / 'a', 'train')


def test_the_best_is_kept_through_another_batch_size(tmp_path):
    """It is the best of as many batches as are usual now, whether or not the last evaluation was on the whole
    text.
    """
    root = tmp_path / 'run'
    for step in (2, 4, 6, 7):
        (root / f'step-{step:08d}').mkdir(parents=True)
    lines = [(2, 3.0, 100), (3, 1.0, 999), (4, 2.5, 200), (6, 2.0, 200), (7, 1.5, 999)]
    for count, best in ((1, 2), (3, 4), (4, 6), (5, 6)):
        (root / 'log.jsonl').write_text(
            ''.join(json.dumps(dict(step=s, val_ce=ce, val_tokens=n)) + '\n' for s, ce, n in lines[:count])
        )
        assert checkpoint.best_step(root, read_log(root / 'log.jsonl')) == best


def test_a_run_keeps_to_its_mixture(tmp_path):
    "The same texts prepared again with other weights are other data, though every shard is the same."
    for i, name in enumerate('ab'):
        (tmp_path / f'{name}.txt').write_text('\n'.join(d.text for d in numbers_documents(30_000, seed=i)))

    def prepared(weights):
        data.prepare([tmp_path / 'a.txt', tmp_path / 'b.txt'], tmp_path / 'ds', 'bytes', weights=weights)

    model, run = PRESETS['tiny']
    run = replace(
        run,
        dataset=str(tmp_path / 'ds'),
        out_dir=str(tmp_path / 'run'),
        device='cpu',
        max_iters=2,
        warmup_iters=1,
        checkpoint_interval=2,
    )
    prepared('9,1')
    list(train.train(model, run))
    prepared('1,9')
    with pytest.raises(BadInput, match='holds a run on another mixture'):
        list(train.train(model, replace(run, max_iters=4)))
    prepared('9,1')
    assert list(train.train(model, replace(run, max_iters=4)))[-1].step == 4


def test_a_log_is_json_whatever_the_loss_is(tmp_path):
    lines = Lines(tmp_path / 'log.jsonl')
    lines.append(dict(step=1, ce=float('nan'), lr=1e-3, health=dict(entropy=[1.0, float('inf')])))
    lines.append(dict(step=2, ce=2.0, load=[[1, 2], [3, 4]]))

    def refuse(name):
        raise AssertionError(name)

    rows = [
        json.loads(line, parse_constant=refuse) for line in (tmp_path / 'log.jsonl').read_text().splitlines()
    ]
    assert rows[0]['ce'] is None and rows[0]['lr'] == 1e-3
    first, second = read_log(tmp_path / 'log.jsonl')
    assert (
        np.isnan(first['ce'])
        and np.isnan(first['health']['entropy'][1])
        and second['load'] == [[1, 2], [3, 4]]
    )
    whole = (tmp_path / 'log.jsonl').read_text()
    cut_log(tmp_path / 'log.jsonl', 1)
    assert (tmp_path / 'log.jsonl').read_text() == whole.splitlines(True)[0]


def test_damaged_lines_of_a_log_are_left_out_by_number(tmp_path, capsys):
    path = tmp_path / 'log.jsonl'
    path.write_bytes(b'{"step": 1}\n\x80\n{"step": 2}\nnonsense\n{"step": 3}\n{"st')
    assert [row for _, row in log_lines(path)] == [{'step': 1}, {'step': 2}, {'step': 3}]
    said = capsys.readouterr().err
    assert 'line 2 cannot be read' in said and 'line 4 cannot be read' in said
    cut_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n' and not [*tmp_path.glob('.tmp-*')]
    assert read_log(tmp_path / 'nothing') == []


def test_a_log_that_was_cut_and_has_grown_is_read_from_its_beginning(tmp_path, capsys):
    path = tmp_path / 'log.jsonl'
    path.write_text(''.join(f'{{"step": {s}}}\n' for s in (1, 2, 3, 4)))
    log = Tail(path, log_numbers)
    assert [row['step'] for row in log.read()] == [1, 2, 3, 4]
    path.write_text('{"step": 1}\n' + ''.join(f'{{"step": {s}, "ce": 2.5}}\n' for s in (2, 3, 4, 5)))
    assert [row['step'] for row in log.read()] == [1, 2, 3, 4, 5] and log.restarts == 1  # not from the middle
    with open(path, 'a') as f:
        f.write('{"step": 6, "ce": null}\n{"step": 7, "ce": "low"}\n')
        f.write('{"step": 8, "load": [[1, 2], [3]]}\nnonsense\n{"step": 9}\n')
    assert [row['step'] for row in log.read()] == [6, 9]
    assert capsys.readouterr().err.count('cannot be read') == 3


def test_steps_of_nine_digits_names_that_lie_and_files_of_the_user(tmp_path):
    root = saved(tmp_path, (99_999_998, 99_999_999, 100_000_000, 100_000_001))
    assert [checkpoint.step_of(path) for path in checkpoint.steps(root)] == [100_000_000, 100_000_001]
    assert checkpoint.load_latest(root).step == 100_000_001
    (root / 'step-100000001').rename(root / 'step-100000009')
    assert checkpoint.load_latest(root).step == 100_000_000  # not an older one under a newer name
    (root / 'step-100000009' / 'thesis.tex').write_text('mine')
    saved(root, (100_000_009,))
    assert (
        checkpoint.load_latest(root).step == 100_000_009
        and (root / 'step-100000009-moved-1' / 'thesis.tex').read_text() == 'mine'
    )


def test_data_too_large_to_compare_at_once_is_compared_while_it_trains(tmp_path, monkeypatch):
    data.write_dataset(numbers_documents(60_000, lines=20), tmp_path / 'ds', 'bytes')
    model, run = PRESETS['tiny']
    run = replace(
        run,
        dataset=str(tmp_path / 'ds'),
        out_dir=str(tmp_path / 'run'),
        device='cpu',
        max_iters=2,
        warmup_iters=1,
    )
    monkeypatch.setattr('nanomoe.dataset.MAX_TOKENS_VERIFIED_AT_START', 10)
    assert list(train.train(model, run))[-1].step == 2
    shard = (
        tmp_path
        / 'ds'
        / TokenDataset(tmp_path / 'ds', 'train').manifest['splits']['train']['shards'][0]['file']
    )
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    for options in (dict(max_iters=4), dict(max_iters=100_000, log_interval=1), dict(eval_only=True)):
        with pytest.raises(BadInput, match='is damaged: not what was written'):
            for record in train.train(model, replace(run, **options)):
                assert record.step < 1000, 'found at once, not at the end'


def test_a_folder_that_is_deleted_under_a_run_is_made_anew_or_left_to_its_new_owner(
    dataset, tmp_path, capsys
):
    model, run = PRESETS['tiny']
    run = replace(
        run,
        dataset=str(dataset),
        out_dir=str(tmp_path / 'run'),
        device='cpu',
        max_iters=6,
        warmup_iters=1,
        log_interval=1,
        checkpoint_interval=1,
    )
    records = train.train(model, run)
    next(records), next(records)
    shutil.rmtree(tmp_path / 'run', ignore_errors=True)  # a checkpoint may be on its way into it
    list(records)
    assert 'was deleted or renamed; it is recreated' in capsys.readouterr().err
    assert {'.lock', 'config.json', 'tokenizer.json', 'step-00000006'} <= {
        path.name for path in (tmp_path / 'run').iterdir()
    }
    shutil.rmtree(tmp_path / 'run')
    records = train.train(model, run)
    next(records)
    (tmp_path / 'run').rename(tmp_path / 'other')
    code = (
        'import time, pathlib; from nanomoe.checkpoint import lock_run; p = '
        f'pathlib.Path({str(tmp_path / "run")!r}); p.mkdir(exist_ok=True); l = lock_run(p); print("held", '
        'flush=True); time.sleep(60)'
    )
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == 'held\n'
        with pytest.raises(BadInput, match='another process is writing the run'):
            list(records)
        owner.kill()


@pytest.mark.parametrize(
    'change',
    [
        dict(level='x'),
        dict(level=[1, 'x', 2, 3]),
        dict(record=[1, 2]),
        dict(step='x'),
        dict(skipped=None),
        dict(sha256={}),
        dict(config=[]),
        dict(config=dict(n_layer='2')),
    ],
    ids=str,
)
def test_checkpoints_sealed_anew_are_refused(dataset, tmp_path, change):
    model, run = PRESETS['tiny']
    run = replace(
        run, dataset=str(dataset), out_dir=str(tmp_path / 'run'), device='cpu', max_iters=1, warmup_iters=0
    )
    list(train.train(model, run))
    path = tmp_path / 'run' / 'step-00000001' / 'meta.json'
    flat = json.loads(path.read_text())
    if isinstance(change.get('config'), dict):
        change = dict(config=flat['config'] | change['config'])
    path.write_text(
        json.dumps(with_checksum({key: value for key, value in (flat | change).items() if key != 'seal'}))
    )
    with pytest.raises(BadInput):
        list(train.train(model, replace(run, max_iters=2)))
    if 'config' in change:
        with pytest.raises(BadInput):
            pretrained.load_model(tmp_path / 'run')


@pytest.mark.parametrize(
    'flat',
    [
        dict(n_layer='2'),
        dict(router='evil'),
        [],
        dict(seed=True),
        dict(warmup_iters=10**400),
        dict(learning_rate=None),
    ],
    ids=lambda f: str(f)[:30],
)
def test_settings_of_a_wrong_kind(flat):
    with pytest.raises(BadInput):
        from_dict(flat)
    if flat:
        model, run = PRESETS["tiny"]
        part = {"n_layer": model, "router": model}.get(next(iter(flat)), run)
        with pytest.raises(BadInput):
            check(*(replace(part, **flat) if cfg is part else cfg for cfg in (model, run)))


def test_weights_that_only_claim_to_be_there(tmp_path):
    shape = dict(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=4, dropout=0.0, bias=False)
    whole = dict(GPT(ModelConfig(**shape, n_experts=1)).state_dict())
    cases = {
        'as it must be': (whole, {}),
        'layers': (whole, dict(n_layer=10**9)),
        'rows': (whole, dict(vocab_size=10**12)),
        'none': (whole, dict(vocab_size=None)),
        'sparse': (whole | {'wte.weight': torch.zeros(16, 4).to_sparse()}, {}),
        'meta': (whole | {'wte.weight': torch.zeros(16, 4, device='meta')}, {}),
        'expanded': (whole | {'wte.weight': torch.zeros(1).expand(10**6, 4)}, dict(vocab_size=10**6)),
    }
    for name, (weights, change) in cases.items():
        torch.save(dict(model=weights, model_args=shape | change), tmp_path / 'ckpt.pt')
        if name == 'as it must be':
            pretrained.load_model(tmp_path / 'ckpt.pt')
            continue
        with pytest.raises(BadInput):
            pretrained.load_model(tmp_path / 'ckpt.pt')


@pytest.mark.parametrize(
    'error, said',
    [
        (MemoryError(), 'not enough memory'),
        (RuntimeError("can't allocate memory: you tried"), 'not enough memory'),
        (OSError(36, 'File name too long', 'aaa'), 'File name too long: aaa'),
    ],
)
def test_what_a_machine_refuses_is_one_sentence(error, said, capsys):
    with pytest.raises(SystemExit) as stop:
        with one_sentence():
            raise error
    assert stop.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(RuntimeError, match='something else'):
        with one_sentence():
            raise RuntimeError('something else')


@pytest.mark.parametrize(
    'change',
    [dict(pattern=''), dict(pattern='a*?'), dict(pattern='(' * 30 + 'a*' + ')*' * 30 + '(?!x)b|.')],
    ids=['empty', 'nothing', 'backtracks'],
)
def test_patterns_on_which_the_library_panics(dataset, tmp_path, change, capfd):
    flat = json.loads((dataset / 'tokenizer.json').read_text()) | change
    (tmp_path / 'tokenizer.json').write_text(
        json.dumps(with_checksum({key: value for key, value in flat.items() if key != 'seal'}))
    )
    with pytest.raises(BadInput, match='holds no tokenizer'):
        load_tokenizer(tmp_path)
    assert not capfd.readouterr().err
