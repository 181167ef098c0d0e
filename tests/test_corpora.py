"""Real corpora: every format and door gives the same documents, a kill costs seconds, memory does not grow,
splits are nanoGPT's.
"""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from nanomoe import corpora, data
from nanomoe.config import BadInput
from nanomoe.corpora import (
    Document,
    HUB,
    Source,
    domain_of,
    file_documents,
    hub_documents,
    hub_source,
    in_val_split,
    nanogpts_split,
    numbers_documents,
)
from nanomoe.dataset import ShardWriter, TokenDataset, open_shard, mixture_schedule, verify
from nanomoe.tokenizer import (
    EOT,
    PRETOKENIZER_PATTERN,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    tiktoken_encoding,
    tiktokens_own,
)


@pytest.fixture(scope='module')
def texts() -> list[str]:
    "Pages of several kinds: short, long, of many scripts, with lines that look like marks."
    pages = [d.text for d in numbers_documents(60_000, lines=20)]
    return pages + ['ẞ\u0301 漢字 🦉\u2028', 'x', '\n\n  indented\t', '{"text": "json"}', ' ' * 300] * 3


@pytest.fixture(scope='module')
def corpus(texts, tmp_path_factory):
    """The same pages as .txt, .jsonl, .jsonl.gz and .parquet, as a saved dataset and as a folder for
    `load_dataset`.
    """
    folder = tmp_path_factory.mktemp('corpus')
    rows = [dict(text=text, kind=f'kind {i % 3}', number=i) for i, text in enumerate(texts)]
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    (folder / 'pages.txt').write_text(EOT.join(texts))
    (folder / 'pages.jsonl').write_text(lines)
    (folder / 'pages.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, folder / 'pages.parquet', row_group_size=7)
    (folder / 'org' / 'pages').mkdir(parents=True)
    for i in range(2):
        parquet.write_table(
            table[i * 20 : (i + 1) * 20 if i == 0 else None], folder / 'org' / 'pages' / f'train-{i}.parquet'
        )
    datasets.Dataset(table).save_to_disk(folder / 'saved')
    datasets.DatasetDict(train=datasets.Dataset(table)).save_to_disk(folder / 'splits')
    return folder


def tokens(folder, split: str) -> list[int]:
    found = TokenDataset(folder, split)
    return found.read(0, len(found)).tolist()


@pytest.mark.parametrize('name', ['pages.txt', 'pages.jsonl', 'pages.jsonl.gz', 'pages.parquet'])
def test_every_format_gives_the_same_documents(name, corpus, texts):
    found = list(file_documents(corpus / name))
    assert [d.text for d in found] == texts and {d.domain for d in found} == {'pages'}
    assert [d.name for d in found] == [f'{name}:{i}' for i in range(len(texts))]


@pytest.mark.parametrize('name', ['org/pages', 'saved', 'splits'])
def test_every_door_of_datasets_gives_the_same_documents(name, corpus, texts):
    source = hub_source(str(corpus / name), None, ('text', 'kind'), 0.1, None)
    for skip in (0, 1, 19, 20, 21, len(texts)):
        found = list(source.documents(skip))
        assert [d.text for d in found] == texts[skip:] and [d.domain for d in found] == [
            f'kind {i % 3}' for i in range(skip, len(texts))
        ]
    with pytest.raises(BadInput, match='has no column of strings named words; it has: text, kind, number'):
        next(hub_source(str(corpus / name), None, ('words',), 0.1, None).documents(0))
    with pytest.raises(BadInput, match='no column of strings named number'):
        next(hub_source(str(corpus / name), None, ('number',), 0.1, None).documents(0))


def test_domains_of_rows_and_of_sources(corpus, tmp_path):
    data.prepare(str(corpus / 'pages.parquet'), tmp_path / 'rows', 'bytes', domain_column='kind')
    found = TokenDataset(tmp_path / 'rows', 'train')
    assert list(found.domains) == ['kind 0', 'kind 1', 'kind 2'] and all(
        stop > start for start, stop in found.domains.values()
    )
    files = [s['file'] for s in found.manifest['splits']['train']['shards']]
    assert len(set(files)) == 3 and all(file.startswith(f'kind-{i}-') for i, file in enumerate(files))
    (tmp_path / 'code.txt').write_text(EOT.join(f'def f{i}(): return {i}' for i in range(200)))
    data.prepare(
        [str(corpus / 'pages.jsonl'), str(tmp_path / 'code.txt')], tmp_path / 'two', 'bytes', weights='1,3'
    )
    assert (
        TokenDataset(tmp_path / 'two', 'train').weights == {'pages': 1, 'code': 3}
        and TokenDataset(tmp_path / 'two', 'val').weights is None
    )


def test_tokens_are_those_of_tiktoken_document_by_document(corpus, texts, tmp_path):
    data.prepare(str(corpus / 'pages.jsonl'), tmp_path / 'made', 'bpe', vocab_size=400)
    tokenizer = load_tokenizer(tmp_path / 'made')
    for split in ('train', 'val'):
        wanted = []
        for i, text in enumerate(texts):
            if in_val_split(text) == (split == 'val'):
                wanted += [tokenizer.eot_token, *tokenizer.encode_ordinary(text)]
        assert tokens(tmp_path / 'made', split) == wanted


def test_a_vocabulary_that_cannot_be_downloaded_says_where_to_put_it(monkeypatch):
    def unreachable(name):
        raise ConnectionError

    monkeypatch.setattr('tiktoken.get_encoding', unreachable)
    with pytest.raises(BadInput, match='vocab.bpe as .* name that in TIKTOKEN_CACHE_DIR$'):
        tiktokens_own('gpt2')


def test_a_vocabulary_with_an_id_left_out_survives_its_file(tmp_path):
    "As p50k_base: the special token lies among the others."
    ranks = {bytes([i]): i + (i >= 7) for i in range(256)}
    save_tokenizer(tiktoken_encoding('gap', PRETOKENIZER_PATTERN, ranks, {EOT: 7}), tmp_path)
    gap = load_tokenizer(tmp_path)
    assert gap.encode('a\x07') == [98, 8] and gap.eot_token == 7


def test_gpt2s_vocabulary_without_a_network(corpus, texts, tmp_path, gpt2_vocabulary):
    "tiktoken's own encoding goes into the dataset whole: whoever reads it fetches nothing."
    data.prepare(str(corpus / 'pages.parquet'), tmp_path / 'gpt2', 'gpt2')
    own, saved = tiktokens_own('gpt2'), load_tokenizer(tmp_path / 'gpt2')
    assert saved is not own and saved.n_vocab == 50257 and saved.eot_token == 50256
    for text in [*texts, 'hello world', "it's 1234\n\n  x", EOT]:
        assert saved.encode_ordinary(text) == own.encode_ordinary(text)
    assert (
        saved.encode('hello world') == [31373, 995]
        and open_shard(next((tmp_path / 'gpt2').glob('*.bin'))).dtype == np.uint16
    )


def test_nanogpts_own_files_in_gpt2s_tokens(tmp_path, gpt2_vocabulary):
    "Bare 16-bit ids up to 50,256, found in a folder and taken for GPT-2's; each document's end is counted."
    (tmp_path / 'owt').mkdir()
    ids = [31373, 995, 50256] * 40
    for split in ('train', 'val'):
        np.array(ids, np.uint16).tofile(tmp_path / 'owt' / f'{split}.bin')
    made = data.prepare(str(tmp_path / 'owt'), tmp_path / 'made')['splits']['train']
    assert tokens(tmp_path / 'made', 'train') == ids and (made['documents'], made['bytes']) == (
        40,
        40 * len('hello world'),
    )


def test_large_vocabularies_take_four_bytes(tmp_path):
    pairs = {bytes([a, b]): 256 + 256 * a + b for a in range(256) for b in range(256)}
    tokenizer = tiktoken_encoding('pairs', r'[\s\S]{2}|[\s\S]', {bytes([i]): i for i in range(256)} | pairs)
    for writer in [ShardWriter(tmp_path, 'wide', tokenizer.n_vocab)]:
        writer.add(np.array(tokenizer.encode_ordinary('zz~~') + [65_791]))
        (entry,) = writer.close()
    ids = open_shard(tmp_path / entry['file'])
    assert ids.dtype == np.uint32 and tokenizer.decode(ids[:2].tolist()) == 'zz~~' and ids[2] == 65_791


def test_max_tokens_are_shared_out(corpus, tmp_path):
    (tmp_path / 'more.txt').write_text((corpus / 'pages.txt').read_text())
    data.prepare(
        [str(corpus / 'pages.txt'), str(tmp_path / 'more.txt')],
        tmp_path / 'few',
        'bytes',
        max_tokens=12_000,
        weights='1,2',
    )
    manifest = TokenDataset(tmp_path / 'few', 'train').manifest['splits']
    per_source = {
        name: sum(
            manifest[s]['domains'].get(name, [0, 0])[1] - manifest[s]['domains'].get(name, [0, 0])[0]
            for s in manifest
        )
        for name in ('pages', 'more')
    }
    assert 4000 <= per_source['pages'] < 5500 and 8000 <= per_source['more'] < 9500


KILLED = """
import functools, sys, nanomoe.data as data
data.NOTED_EVERY, data.BPE_TRAIN_CHARS = 0.0, 20_000          # a note after every document
data.tokenize = functools.partial(data.tokenize, batch=1000)
data.prepare(sys.argv[2:], sys.argv[1], 'bpe', vocab_size=300)
"""


def test_a_killed_preparation_goes_on(corpus, tmp_path, seed, soak):
    "kill -9 at random moments; what comes out in the end is equal to the last byte."
    rng, sources = random.Random(seed), [str(corpus / 'pages.parquet'), str(corpus / 'pages.jsonl.gz')]
    words = [sys.executable, '-c', KILLED]
    subprocess.run([*words, tmp_path / 'whole', *sources], check=True)
    kills = noted = 0
    for number in range(10 if soak else 2):
        out, tries = tmp_path / f'killed {number}', 0
        notes = tmp_path / f'.{out.name}.part' / 'progress.json'
        while not out.exists():
            process, tries, known = (
                subprocess.Popen([*words, out, *sources]),
                tries + 1,
                notes.read_bytes() if notes.exists() else b'',
            )
            while tries < 4 and process.poll() is None:
                if not notes.exists() or notes.read_bytes() == known:
                    time.sleep(0.01)
                    continue
                time.sleep(rng.uniform(0, 0.2))  # somewhere between, or within, the notes that follow
                process.send_signal(signal.SIGKILL)
                kills += process.wait() != 0
                noted += notes.exists()
            process.wait()
        for path in (tmp_path / 'whole').iterdir():
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    print(f'{kills} kills, after {noted} of them there were notes to go on from; seed {seed}')
    assert noted


@pytest.fixture
def noting(monkeypatch):
    "Notes of progress after every document, and few documents in flight."
    monkeypatch.setattr(data, 'NOTED_EVERY', 0.0)
    monkeypatch.setattr(data, 'tokenize', partial(data.tokenize, batch=100))


def test_another_job_does_not_go_on_from_the_notes_of_one(corpus, tmp_path, noting):
    half = Source(
        'half',
        lambda skip: (
            d if i < 30 else 1 / 0 for i, d in enumerate(file_documents(corpus / 'pages.txt')) if i >= skip
        ),
    )
    with pytest.raises(ZeroDivisionError):
        data.write_dataset([half], tmp_path / 'out', 'bytes')
    assert (tmp_path / '.out.part' / 'progress.json').exists()
    data.prepare(str(corpus / 'pages.txt'), tmp_path / 'out', 'bytes')
    data.prepare(str(corpus / 'pages.txt'), tmp_path / 'alone', 'bytes')
    assert tokens(tmp_path / 'out', 'train') == tokens(tmp_path / 'alone', 'train')
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {p.name for p in (tmp_path / 'alone').iterdir()}


PEAK = """
import resource, sys, nanomoe.data as data
data.compressed = lambda *args: {}                  # gzip and xz hold the validation text
data.prepare(sys.argv[1], sys.argv[2], 'bytes')
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    page, peaks = '\n'.join(d.text for d in numbers_documents(200_000)), []
    for size in (20, 200):
        with gzip.open(tmp_path / f'{size}.jsonl.gz', 'wt', compresslevel=1) as f:
            for i in range(size):
                f.write(json.dumps({'text': f'{i} {page}'}) + '\n')
        run = subprocess.run(
            [sys.executable, '-c', PEAK, tmp_path / f'{size}.jsonl.gz', tmp_path / f'{size}'],
            check=True,
            capture_output=True,
            text=True,
        )
        peaks.append(int(run.stdout) / 1024)
    print(f'peak of 4 MB of text {peaks[0]:.0f} MiB, of 40 MB {peaks[1]:.0f} MiB')
    assert peaks[1] - peaks[0] < 25


def test_openwebtexts_split_is_nanogpts():
    "Against the call with which nanoGPT draws it, on as many rows."
    rows = datasets.Dataset.from_dict({'i': np.arange(8_013_769)})
    drawn = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)['test']['i']
    held_out = nanogpts_split()
    assert len(drawn) == 4007 and all(held_out(Document('', '', f'x:{i}')) for i in drawn)
    others = set(range(0, 8_013_769, 1001)) - set(drawn)
    assert not any(held_out(Document('', '', f'x:{i}')) for i in others)


def test_a_part_of_a_known_corpus_is_refused(corpus, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(HUB, 'openwebtext', (str(corpus / 'org' / 'pages'), None, len(texts) + 1))
    monkeypatch.setattr(corpora, 'nanogpts_split', lambda: lambda d: d.name.endswith('7'))
    with pytest.raises(BadInput, match=f'must hold {len(texts) + 1} documents, got {len(texts)}'):
        data.prepare('openwebtext', tmp_path / 'owt', 'bytes')
    assert not (tmp_path / 'owt').exists()
    monkeypatch.setitem(HUB, 'openwebtext', (str(corpus / 'org' / 'pages'), None, len(texts)))
    made = data.prepare('openwebtext', tmp_path / 'owt', 'bytes')['splits']
    assert made['val']['documents'] == sum(str(i).endswith('7') for i in range(len(texts)))
    with pytest.raises(BadInput, match="whole, but not nanoGPT's"):
        data.compare_with_nanogpt({'splits': made}, 'gpt2')


def test_a_network_that_breaks_off(corpus, tmp_path, monkeypatch, noting):
    "What was noted stays, and the same command resumes."
    fail = [True]

    class Rows:
        column_names = None

        def skip(self, n):
            for i, row in enumerate(datasets.load_from_disk(str(corpus / 'saved')).select(range(n, 40))):
                if fail[0] and n + i == 33:
                    raise ConnectionError('reset by peer')
                yield row

    monkeypatch.setattr(corpora, 'saved_rows', lambda path: (Rows(), 'version'))
    with pytest.raises(
        BadInput, match=r'broke off after 33 documents \(ConnectionError\); the same command resumes'
    ):
        data.prepare(str(corpus / 'saved'), tmp_path / 'out', 'bytes', val_fraction=0.2)
    assert (tmp_path / '.out.part' / 'progress.json').exists()
    fail[0] = False
    assert (
        sum(
            e['documents']
            for e in data.prepare(str(corpus / 'saved'), tmp_path / 'out', 'bytes', val_fraction=0.2)[
                'splits'
            ].values()
        )
        == 40
    )


def test_token_files_of_others_are_read_as_they_are(corpus, tmp_path):
    """nanoGPT's bare uint16 and llm.c's files, linked to and not copied, with digests, bytes and documents
    counted.
    """
    data.prepare(str(corpus / 'pages.jsonl'), tmp_path / 'ours', 'bytes')
    (tmp_path / 'nanogpt').mkdir()
    (tmp_path / 'llmc').mkdir()
    for split in ('train', 'val'):
        np.array(tokens(tmp_path / 'ours', split), np.uint16).tofile(tmp_path / 'nanogpt' / f'{split}.bin')
        (tmp_path / 'llmc' / f'pages_{split}_000000.bin').write_bytes(
            (tmp_path / 'ours' / f'pages_{split}_000000.bin').read_bytes()
        )
    for name in ('nanogpt', 'llmc'):
        data.prepare(str(tmp_path / name), tmp_path / f'{name} read', 'bytes')
        for split in ('train', 'val'):
            ours, theirs = (
                TokenDataset(folder, split) for folder in (tmp_path / 'ours', tmp_path / f'{name} read')
            )
            assert (
                tokens(tmp_path / 'ours', split) == tokens(tmp_path / f'{name} read', split)
                and ours.n_bytes == theirs.n_bytes
            )
            assert (
                ours.manifest['splits'][split]['documents'] == theirs.manifest['splits'][split]['documents']
            )
        assert all(p.is_symlink() for p in (tmp_path / f'{name} read').glob('*.bin'))
        assert verify(tmp_path / f'{name} read').endswith('all checksums match')
    assert list(TokenDataset(tmp_path / 'llmc read', 'train').domains) == ['pages'] and list(
        TokenDataset(tmp_path / 'nanogpt read', 'train').domains
    ) == ['nanogpt']
    with open(tmp_path / 'nanogpt' / 'val.bin', 'ab') as f:
        f.write(b'\0\0')
    with pytest.raises(BadInput, match='its manifest says'):
        TokenDataset(tmp_path / 'nanogpt read', 'val')
    (tmp_path / 'nanogpt' / 'meta.pkl').write_bytes(b'')
    with pytest.raises(BadInput, match='holds a vocabulary as a pickle, which is not read'):
        data.prepare(str(tmp_path / 'nanogpt'), tmp_path / 'x', 'bytes')
    (tmp_path / 'nanogpt' / 'meta.pkl').unlink()
    with pytest.raises(BadInput, match='must have train or val in their names'):
        data.prepare(str(tmp_path / 'llmc' / 'pages_train_000000.bin'), tmp_path / 'x', 'bytes')
    np.arange(100, dtype=np.uint32).tofile(tmp_path / 'nanogpt' / 'train.bin')
    with pytest.raises(BadInput, match='seems to hold ids of 32 bits'):
        data.prepare(str(tmp_path / 'nanogpt'), tmp_path / 'x', 'bytes')
    (tmp_path / 'nanogpt' / 'train.bin').write_bytes(b'a')
    with pytest.raises(BadInput, match='holds no 16-bit ids'):
        data.prepare(str(tmp_path / 'nanogpt'), tmp_path / 'x', 'bytes')
    with pytest.raises(BadInput, match='weights does not belong to token files'):
        data.prepare(str(tmp_path / 'llmc'), tmp_path / 'x', 'bytes', weights='1')
    with pytest.raises(BadInput, match='need the tokenizer that made them'):
        data.prepare(str(tmp_path / 'llmc'), tmp_path / 'x', 'bpe')
    assert not (tmp_path / 'x').exists() and not list(tmp_path.glob('.*'))


def test_fineweb_in_tokens(corpus, tmp_path, monkeypatch):
    "Through the function that fetches from the hub, with local files in the place of the hub's."
    data.prepare(str(corpus / 'pages.jsonl'), tmp_path / 'ours', 'bytes')
    asked = []

    def fetch(repo, name, repo_type):
        asked.append((repo, name, repo_type))
        path = tmp_path / name
        path.write_bytes(
            (tmp_path / 'ours' / f'pages_{"val" if "val" in name else "train"}_000000.bin').read_bytes()
        )
        return str(path)

    monkeypatch.setattr('huggingface_hub.hf_hub_download', fetch)
    made = data.prepare('fineweb10B-gpt2', tmp_path / 'fineweb', 'bytes', max_tokens=150_000_000)
    assert [name for _, name, _ in asked] == [
        'fineweb_val_000000.bin',
        'fineweb_train_000001.bin',
        'fineweb_train_000002.bin',
    ]
    assert {(repo, kind) for repo, _, kind in asked} == {('kjj0/fineweb10B-gpt2', 'dataset')}
    assert (
        list(made['splits']['train']['domains']) == ['fineweb']
        and len(made['splits']['train']['shards']) == 2
    )
    assert tokens(tmp_path / 'fineweb', 'train') == 2 * tokens(tmp_path / 'ours', 'train')


@pytest.mark.parametrize(
    'name, content, sentence',
    [
        ('cut.jsonl.gz', gzip.compress(b'{"text": "a"}\n' * 1000)[:-20], 'is damaged'),
        ('plain.jsonl.gz', b'{"text": "a"}\n', 'is damaged: Not a gzipped file'),
        ('cut.parquet', b'PAR1 and no end', 'is damaged'),
        ('deep.jsonl', b'[' * 100_000, 'line 1 must be a JSON object with a string under "text"'),
        ('late.txt', b'a' * 2**20 + b'\xc3', f'is not UTF-8 text: byte {2**20} cannot be decoded'),
        (
            'between.txt',
            b'a' * (2**20 - 1) + b'\xc3(',
            f'is not UTF-8 text: byte {2**20 - 1} cannot be decoded',
        ),
    ],
)
def test_damaged_files_are_told_by_their_place(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as stop:
        list(file_documents(tmp_path / name))
    assert sentence in str(stop.value) and name in str(stop.value) and '\n' not in str(stop.value)


def test_nulls_and_empty_texts_are_left_out(tmp_path):
    parquet.write_table(pyarrow.table({'text': ['a', None, '', 'b']}), tmp_path / 'x.parquet')
    assert [d.text for d in file_documents(tmp_path / 'x.parquet')] == ['a', 'b']


def test_two_at_once_do_not_write_one_dataset(corpus, tmp_path):
    with data.at_work(tmp_path / '.x.part'):
        with pytest.raises(BadInput, match='another process is preparing'):
            data.prepare(str(corpus / 'pages.txt'), tmp_path / 'x', 'bytes')
        assert (tmp_path / '.x.part').exists()
    assert not (tmp_path / '.x.part').exists()


def test_a_million_blanks_do_not_end_a_preparation():
    """More in a row than tiktoken's pattern takes at once, or a BPE learns from in seconds: every byte is
    there.
    """
    texts = ['a page', 'before' + ' ' * 1_200_000 + 'after', 'another page']
    for kind in ('bytes', 'bpe'):
        tokenizer = make_tokenizer(kind, texts, 300)
        with pytest.raises(ValueError, match='Max stack size'):
            tokenizer.encode(texts[1])
        found = data.tokenize(
            (data.Part(text, 'pages', 'train', i) for i, text in enumerate(texts)), tokenizer
        )
        assert [tokenizer.decode(e.ids[1:].tolist()) for e in found] == texts


def test_characters_that_a_runs_vocabulary_lacks_are_named(corpus, tmp_path):
    (tmp_path / 'ab.txt').write_text('abba ' * 100)
    (tmp_path / 'abc.txt').write_text('abba ' * 99 + 'c')
    data.prepare(str(tmp_path / 'ab.txt'), tmp_path / 'letters', 'chars')
    with pytest.raises(BadInput, match="the vocabulary has no 'c', which abc holds"):
        data.prepare(str(tmp_path / 'abc.txt'), tmp_path / 'out', str(tmp_path / 'letters'))
    assert not (tmp_path / 'out').exists()


def test_no_file_is_both_learnt_and_held_out(corpus, tmp_path, monkeypatch):
    """A file that two sources name, be it by a folder, a pattern, a link or twice by itself, is refused
    before anything is read.
    """
    (tmp_path / 'link.txt').symlink_to(corpus / 'pages.txt')
    monkeypatch.setattr(data, 'write_dataset', lambda *words: pytest.fail('it was read'))
    for other in (corpus, f'{corpus}/*.txt', tmp_path / 'link.txt', corpus / 'pages.txt'):
        with pytest.raises(BadInput, match=f'both name {corpus / "pages.txt"}'):
            data.prepare([str(corpus / 'pages.txt'), str(other)], tmp_path / 'x', 'bytes')
    assert not (tmp_path / 'x').exists()


def test_nothing_of_the_users_is_replaced(corpus, tmp_path):
    """A prepared folder as its own source, a source inside the folder, other files beside a dataset: refused,
    all still there.
    """
    data.prepare(str(corpus / 'pages.txt'), tmp_path / 'made', 'bytes')
    before = {p.name: p.read_bytes() for p in (tmp_path / 'made').iterdir()}
    with pytest.raises(BadInput, match='is a prepared dataset already'):
        data.prepare(str(tmp_path / 'made'), tmp_path / 'made')
    (tmp_path / 'made' / 'notes.txt').write_text('mine')
    with pytest.raises(BadInput, match='contains something other'):
        data.prepare(str(corpus / 'pages.txt'), tmp_path / 'made', 'bytes')
    with pytest.raises(BadInput, match='lies in .* which will be replaced'):
        data.prepare(str(tmp_path / 'made' / 'notes.txt'), tmp_path / 'made', 'bytes')
    assert {p.name: p.read_bytes() for p in (tmp_path / 'made').iterdir()} == before | {'notes.txt': b'mine'}
    (tmp_path / '.other.part').mkdir()
    (tmp_path / '.other.part' / 'mine.txt').write_text('mine')
    with pytest.raises(BadInput, match='contains something other than an unfinished dataset'):
        data.prepare(str(corpus / 'pages.txt'), tmp_path / 'other', 'bytes')
    assert (tmp_path / '.other.part' / 'mine.txt').exists()


def test_domains_of_like_names_do_not_share_a_file(tmp_path):
    rows = [
        {'text': f'{kind} {i} ' * 20, 'kind': kind}
        for i in range(60)
        for kind in ('C++', 'C#', 'C', 'my corpus', 'my-corpus', 'x' * 300)
    ]
    (tmp_path / 'd.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    data.prepare(str(tmp_path / 'd.jsonl'), tmp_path / 'made', 'bytes', domain_column='kind')
    found = TokenDataset(tmp_path / 'made', 'train')
    for domain, (start, stop) in found.domains.items():
        texts = bytes(i if i < 256 else 0 for i in found.read(start, stop)).decode().split('\0')[1:]
        assert texts and all(text in {row['text'] for row in rows if row['kind'] == domain} for text in texts)


def test_a_single_book_beside_many_pages_is_trained_on(corpus, tmp_path):
    """Whatever its name decides: a source of which nothing would be trained on, or held out, has its last
    tenth held out.
    """
    for i in range(12):
        (tmp_path / f'book{i}.txt').write_text(''.join(f'Line {j} of book {i}.\n' for j in range(60)))
    made = data.prepare(
        [*(str(tmp_path / f'book{i}.txt') for i in range(12)), str(corpus / 'pages.txt')],
        tmp_path / 'made',
        'bytes',
    )['splits']
    assert (
        made['train']['domains'].keys()
        == made['val']['domains'].keys()
        == {*(f'book{i}' for i in range(12)), 'pages'}
    )
    (tmp_path / 'empty.txt').write_text('')
    for share in (None, 0.3, 0.0001):  # of the one document; a character at least
        split = data.prepare(str(tmp_path / 'book7.txt'), tmp_path / 'one', 'bytes', val_fraction=share)[
            'splits'
        ]
        size = (tmp_path / 'book7.txt').stat().st_size
        assert (
            split['train']['bytes'] == min(int(size * (1 - (share or 0.1))), size - 1)
            and split['val']['bytes'] == size - split['train']['bytes']
        )
    with pytest.raises(BadInput, match='empty.txt must hold some text'):
        data.prepare([str(corpus / 'pages.txt'), str(tmp_path / 'empty.txt')], tmp_path / 'x', 'bytes')


def test_links_and_patterns(corpus, tmp_path):
    "Linked folders are read, circles once, folders that a pattern fits too; a broken link is named."
    (tmp_path / 'a').mkdir()
    (tmp_path / 'far').mkdir()
    for folder in ('a', 'far'):
        (tmp_path / folder / 'x [1].txt').write_text(folder)
    (tmp_path / 'a' / 'linked').symlink_to(tmp_path / 'far')
    (tmp_path / 'a' / 'circle').symlink_to(tmp_path / 'a')
    for source in (str(tmp_path / 'a'), f'{tmp_path}/a/**/*.txt', f'{tmp_path}/a*'):
        assert sorted(d.text for d in file_documents(source)) == ['a', 'far'], source
    assert (
        next(file_documents(tmp_path / 'a' / 'x [1].txt')).domain == 'x [1]'
        and domain_of(tmp_path / 'a') == 'a'
    )
    (tmp_path / 'a' / 'gone.txt').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(BadInput, match='gone.txt is not a readable file'):
        list(file_documents(tmp_path / 'a'))


def test_a_changed_dataset_is_not_mixed_with_the_old(texts, tmp_path, noting):
    "Half prepared, then saved anew with other rows: the same command begins anew."
    datasets.Dataset.from_dict({'text': texts}).save_to_disk(tmp_path / 'saved')
    source = hub_source(str(tmp_path / 'saved'), None, ('text',), 0.1, None)
    broken = source._replace(
        documents=lambda skip: (
            d if i < 40 else 1 / 0 for i, d in enumerate(source.documents(0)) if i >= skip
        )
    )
    with pytest.raises(ZeroDivisionError):
        data.write_dataset([broken], tmp_path / 'out', 'bytes', 4096, str(tmp_path / 'saved'))
    assert (tmp_path / '.out.part' / 'progress.json').exists()
    shutil.rmtree(tmp_path / 'saved')
    datasets.Dataset.from_dict({'text': ['new ' + text for text in texts]}).save_to_disk(tmp_path / 'saved')
    data.prepare(str(tmp_path / 'saved'), tmp_path / 'out', 'bytes', val_fraction=0.1)
    whole = (
        bytes(i if i < 256 else 0 for split in ('train', 'val') for i in tokens(tmp_path / 'out', split))
        .decode()
        .split('\0')[1:]
    )
    assert sorted(whole) == sorted('new ' + text for text in texts)


@pytest.mark.parametrize('at', [21, 24])
def test_a_document_is_noted_with_both_its_parts_or_not_at_all(at, texts, tmp_path, monkeypatch, noting):
    """Of documents that are cut into what is trained on and what is held out, whichever part was the last to
    be written.
    """
    stops = [None, at]  # the first round finds nothing to hold out

    def documents(skip):
        stop = stops.pop(0) if stops else None
        for i, text in enumerate(texts):
            if i == stop:
                raise KeyboardInterrupt
            if i >= skip:
                yield Document(text, 'pages', str(i))

    # `bytes` learns nothing and reads nothing
    monkeypatch.setattr(data, 'take_chars', lambda pieces, limit: iter(()))
    source = Source('pages', documents, is_val=lambda name: False)
    with pytest.raises(KeyboardInterrupt):
        data.write_dataset([source], tmp_path / 'out', 'bytes')
    data.write_dataset([source], tmp_path / 'out', 'bytes')
    data.write_dataset([source], tmp_path / 'alone', 'bytes')
    for split in ('train', 'val'):
        assert tokens(tmp_path / 'out', split) == tokens(tmp_path / 'alone', split)


@pytest.mark.parametrize('damage', ['tokenizer.json', 'shard', 'progress.json'])
def test_damaged_notes_are_begun_anew(damage, corpus, tmp_path, noting):
    half = Source(
        'half',
        lambda skip: (
            d if i < 40 else 1 / 0 for i, d in enumerate(file_documents(corpus / 'pages.txt')) if i >= skip
        ),
    )
    whole = half._replace(
        documents=lambda skip: (d for i, d in enumerate(file_documents(corpus / 'pages.txt')) if i >= skip)
    )
    with pytest.raises(ZeroDivisionError):
        data.write_dataset([half], tmp_path / 'out', 'bytes')
    path = (
        next((tmp_path / '.out.part').glob('*train*.bin'))
        if damage == 'shard'
        else tmp_path / '.out.part' / damage
    )
    path.write_bytes(path.read_bytes()[: -3000 if damage == 'shard' else -9])
    data.write_dataset([whole], tmp_path / 'out', 'bytes')
    data.write_dataset([whole], tmp_path / 'alone', 'bytes')
    for split in ('train', 'val'):
        assert tokens(tmp_path / 'out', split) == tokens(tmp_path / 'alone', split)


@pytest.mark.parametrize('weights', [[999, 2, 999], [1, 998, 1], [1] * 7, [0.001, 0.999]])
def test_every_domain_with_a_weight_has_its_turn(weights):
    domain, number = mixture_schedule(np.arange(3000), weights, seed=1)
    for block in domain.reshape(3, 1000):
        counts = np.bincount(block, minlength=len(weights))
        assert (counts >= 1).all() and np.abs(counts - 1000 * np.array(weights) / sum(weights)).max() <= 1


@pytest.mark.parametrize(
    'error',
    [
        RuntimeError('Dataset scripts are no longer supported'),
        EOFError(),
        ValueError('no config'),
        UnicodeDecodeError('utf-8', b'x', 0, 1, 'y'),
    ],
)
def test_whatever_the_hub_raises_is_one_sentence(error, tmp_path, monkeypatch):
    def fail(*args, **kw):
        raise error

    monkeypatch.setattr('huggingface_hub.HfApi.dataset_info', fail)
    with pytest.raises(
        BadInput,
        match='someone/pages is no file or folder here, and the Hugging Face hub does not give it: .',
    ):
        data.prepare('someone/pages', tmp_path / 'x', 'bytes')

    class Rows:
        def skip(self, n):
            yield {'text': 'a'}
            raise error

    with pytest.raises(BadInput, match='broke off after 1 documents'):
        list(hub_documents(Rows(), ('text',), 'someone/pages', 0))


def test_what_lies_in_a_folder_of_texts(tmp_path, monkeypatch):
    """Upper-case endings are read, hidden copies are not, a byte order mark is no text, and a folder that
    cannot be listed is told.
    """
    texts = tmp_path / 'texts'
    for name in (
        'ONE.TXT',
        'two.Md',
        '.ipynb_checkpoints/two-checkpoint.md',
        '.git/three.txt',
        '.four.txt',
        'deep/five.py',
        'six.JSONL',
    ):
        (texts / name).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({'text': f'text of {name}'}) if name.endswith('JSONL') else f'text of {name}'
        (texts / name).write_text('\ufeff' + text, encoding='utf-8')
    found = {d.text for d in file_documents(texts)}
    assert found == {f'text of {name}' for name in ('ONE.TXT', 'two.Md', 'deep/five.py', 'six.JSONL')}
    assert domain_of(texts / 'ONE.TXT') == 'ONE' and domain_of('caf\udce9.txt') == 'caf\ufffd'
    real = os.scandir

    def closed(path):
        if str(path).endswith('deep'):
            raise PermissionError(13, 'Permission denied', str(path))
        return real(path)

    monkeypatch.setattr(os, 'scandir', closed)
    with pytest.raises(BadInput, match='deep cannot be read: Permission denied'):
        list(file_documents(texts))


def test_token_files_beside_the_program_that_made_them(tmp_path, capsys):
    """nanoGPT's folder as it is.

    A .bin among texts makes no token files of them; the command says where it wrote.
    """
    theirs, texts = tmp_path / 'openwebtext', tmp_path / 'texts'
    theirs.mkdir(), texts.mkdir()
    for name, count in (('train.bin', 5000), ('val.bin', 900)):
        np.random.default_rng(0).integers(0, 256, count).astype(np.uint16).tofile(theirs / name)
    (theirs / 'prepare.py').write_text('import os'), (theirs / 'readme.md').write_text('# openwebtext')
    data.main([str(theirs), '--tokenizer=bytes', f'--out={tmp_path}/ds'])
    assert (
        f'written to {tmp_path}/ds; train on it: python -m nanomoe.train PRESET --dataset {tmp_path}/ds'
        in capsys.readouterr().out
    )
    assert len(TokenDataset(tmp_path / 'ds', 'train')) == 5000
    (texts / 'weights.bin').write_bytes(b'12345678'), (texts / 'a.txt').write_text('some text\n' * 200)
    assert data.prepare(texts, tmp_path / 'mine', 'bytes')['splits']['train']['documents'] == 1


def test_more_names_than_domains_says_what_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'NOTED_EVERY', 0.0)
    for i in range(70):
        (tmp_path / f'f{i}.txt').write_text(f'file {i} says hello\n' * 20)
    with pytest.raises(BadInput, match='at most 64 domains.*name a folder, or quote a pattern'):
        data.prepare(sorted(tmp_path.glob('*.txt')), tmp_path / 'out', 'bytes')
    assert all(path.suffix == '.txt' for path in tmp_path.iterdir())  # no part of it is left
    data.prepare(tmp_path, tmp_path / 'out', 'bytes')


def test_exact_copies_stay_on_one_side_of_the_split(tmp_path):
    (tmp_path / 'texts').mkdir()
    texts = [f'page {i % 30} of many\n' * 20 for i in range(300)]  # each ten times, under ten names
    for i, text in enumerate(texts):
        (tmp_path / 'texts' / f'{i}.md').write_text(text)
    data.prepare(str(tmp_path / 'texts'), tmp_path / 'made', 'bytes', val_fraction=0.3)
    learned, held_out = (pages_of(tmp_path / 'made', split) for split in ('train', 'val'))
    assert learned and held_out and not learned & held_out and len(learned | held_out) == 30


def pages_of(folder, split) -> set[str]:
    "The documents of a dataset of bytes."
    return {page for page in ''.join(map(chr, tokens(folder, split))).split(chr(256)) if page}


def test_what_a_folder_holds_besides_is_told_and_can_be_asked_for(tmp_path, capsys):
    (tmp_path / 'texts').mkdir()
    for name, content in (
        ('a.txt', b'alpha ' * 99),
        ('b.TXT', b'beta ' * 99),
        ('c.rst', b'gamma ' * 99),
        ('d.rst', b'delta ' * 99),
        ('e.c', b'int x;' * 99),
        ('f.txt', 'naïve '.encode('latin-1') * 99),
    ):
        (tmp_path / 'texts' / name).write_bytes(content)

    def read(**options) -> str:
        data.prepare(str(tmp_path / 'texts'), tmp_path / 'made', 'bytes', **options)
        return ''.join(
            chr(i) if i < 256 else ' ' for split in ('train', 'val') for i in tokens(tmp_path / 'made', split)
        )

    with pytest.raises(
        BadInput, match='f.txt is not UTF-8 text: byte 2 .* use --errors replace or --errors skip'
    ):
        read()
    text = read(errors='skip')
    assert 'alpha' in text and 'beta' in text and 'gamma' not in text and 'na' not in text
    said = capsys.readouterr().err
    assert '3 files of other endings are not read (.rst 2, .c 1); --endings chooses which are' in said
    assert f'1 files that are not UTF-8 are left out: {tmp_path}/texts/f.txt' in said
    assert (
        '\xef\xbf\xbd' in read(errors='replace')
        and '1 files that are not UTF-8 are read with U+FFFD' in capsys.readouterr().err
    )
    text = read(endings='rst, .C')
    assert 'gamma' in text and 'delta' in text and 'int x' in text and 'alpha' not in text


def test_rows_of_json_with_nulls_long_lines_and_other_columns(tmp_path, monkeypatch):
    path = tmp_path / 'rows.jsonl'
    path.write_text('{"text": null}\n{"text": "one", "kind": null}\n{"words": 1, "id": 2}\n')
    rows = file_documents(path, ('text',))
    assert next(rows).text == 'one'
    with pytest.raises(
        BadInput,
        match=r'line 3 must be a JSON object with a string under "text" \(it has words, id; choose one with '
        r'--text_column\)',
    ):
        next(rows)
    monkeypatch.setattr(corpora, 'LONGEST', 100)
    path.write_text('{"text": "' + 'x' * 100 + '"}\n')
    with pytest.raises(BadInput, match='line 1 must be at most 100 bytes long'):
        list(file_documents(path))


def test_every_domain_has_files_of_its_own_on_any_file_system():
    names = ['news 2024', 'news-2024', 'C', 'c', 'é', 'e\u0301', 'x' * 90, 'x' * 91, '..', 'a/b', 'a-b']
    names += [data.file_name(name) for name in names]
    made = [data.file_name(name) for name in names]
    assert len({name.lower() for name in made}) == len({*names}) and all(
        '/' not in name and len(name.encode()) < 200 for name in made
    )


def test_a_kill_while_a_dataset_replaces_another_loses_neither(corpus, tmp_path, monkeypatch):
    "Stopped at each of the calls that move and remove folders; the same call ends it."
    source, folder = str(corpus / 'pages.txt'), tmp_path / 'made'

    class Killed(BaseException):
        pass

    data.prepare(source, folder, 'bytes')
    for n in range(8):
        with monkeypatch.context() as patched:
            calls = iter(range(99))
            for module, name in ((os, 'replace'), (shutil, 'rmtree')):

                def one(*args, call=getattr(module, name), **kw):
                    if next(calls) == n:  # a removal is half done by then
                        if args[1:] == ():
                            (Path(args[0]) / 'manifest.json').unlink(missing_ok=True)
                        raise Killed
                    return call(*args, **kw)

                patched.setattr(module, name, one)
            try:
                data.prepare(source, folder, 'bytes', val_fraction=0.1 + n / 100)
            except Killed:
                pass
        data.prepare(source, folder, 'bytes', val_fraction=0.1 + n / 100)
        assert 'all checksums match' in verify(folder) and [p.name for p in tmp_path.iterdir()] == ['made'], n


def test_a_bit_that_flips_in_an_unfinished_dataset_is_found(tmp_path):
    writer = ShardWriter(tmp_path, 'open', 257)
    writer.add(np.arange(200, dtype=np.uint32))
    mark = writer.mark()
    writer.file.close()
    content = bytearray((tmp_path / 'open_000000.bin').read_bytes())
    content[1100] ^= 1
    (tmp_path / 'open_000000.bin').write_bytes(content)
    with pytest.raises(BadInput, match='is not what was written'):
        ShardWriter(tmp_path, 'open', 257, mark=mark)
    content[1100] ^= 1
    (tmp_path / 'open_000000.bin').write_bytes(content)
    writer = ShardWriter(tmp_path, 'open', 257, mark=mark)
    with open(tmp_path / 'open_000000.bin', 'r+b') as f:
        f.seek(1100)
        f.write(b'\xff')
    with pytest.raises(BadInput, match='is not what was written'):
        writer.close()


def test_columns_that_nobody_asked_for_are_not_decoded(tmp_path):
    import pyarrow

    broken = pyarrow.array(
        [{'bytes': b'no image', 'path': None}] * 20,
        type=pyarrow.struct({'bytes': pyarrow.binary(), 'path': pyarrow.string()}),
    )
    table = pyarrow.table({'text': [f'row {i}' for i in range(20)], 'picture': broken})
    datasets.Dataset(table).cast(
        datasets.Features({'text': datasets.Value('string'), 'picture': datasets.Image()})
    ).save_to_disk(tmp_path / 'saved')
    assert [
        d.text for d in hub_source(str(tmp_path / 'saved'), None, ('text',), 0.1, None).documents(17)
    ] == ['row 17', 'row 18', 'row 19']
