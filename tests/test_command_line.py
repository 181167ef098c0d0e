"""Bad input gets one sentence and exit code 2, before anything is started; good input does what it says."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from nanomoe import bench, checkpoint, data, evaluate, sample, sizing, train, watch
from nanomoe.corpora import Document, file_documents, numbers_documents
from nanomoe.files import with_checksum
from nanomoe.optim import make_optimizer
from nanomoe.parallel import DistContext
from nanomoe.tokenizer import make_tokenizer, save_tokenizer
from nanomoe.command_line import parse, words_and_options
from nanomoe import config
from nanomoe.config import BadInput, ModelConfig, TrainConfig, check, check_kinds, from_dict, to_dict
from nanomoe.presets import PRESETS
from nanomoe.model import GPT


def said(program, argv: list[str], capsys) -> tuple[int, str]:
    "Exit code and stderr of a program's main."
    with pytest.raises(SystemExit) as stopped:
        program.main(argv)
    return stopped.value.code, capsys.readouterr().err.strip()


BAD = {
    'more choices than experts': (train, 'tiny --top_k 9', 'top_k must be between 1 and n_experts=4, got 9'),
    'no choices': (train, 'tiny --top_k=0', 'top_k must be between 1 and n_experts=4, got 0'),
    'misspelt option': (train, 'tiny --n_embed 3', 'there is no option --n_embed; did you mean n_embd?'),
    'unknown option': (train, 'tiny --quux 3', 'there is no option --quux'),
    'renamed option': (
        train,
        'tiny --gates all',
        'there is no option --gates; it is called --norm_topk_prob now',
    ),
    'renamed value': (train, 'tiny --balance sequence', 'it is called balance_over=sequence now'),
    'removed option': (train, 'tiny --run_name x', 'a run has the name of its folder, out_dir'),
    'misspelt preset': (train, 'nanomoe', 'there is no preset nanomoe; did you mean nano_moe?'),
    'heads do not divide': (train, 'tiny --n_head 3', 'n_embd must be a multiple of n_head=3, got 32'),
    'no capacity': (
        train,
        'tiny --capacity_factor 0',
        'capacity_factor must be a finite number above 0, or None, got 0.0',
    ),
    'infinite capacity': (
        train,
        'tiny --capacity_factor inf',
        'capacity_factor must be a finite number above 0',
    ),
    'interval of zero': (train, 'tiny --eval_interval 0', 'eval_interval must be at least 1, got 0'),
    'negative interval': (train, 'tiny --log_interval=-5', 'log_interval must be at least 1, got -5'),
    'not a number': (
        train,
        'tiny --learning_rate nan',
        'learning_rate must be a finite number of at least 0, got nan',
    ),
    'word for a number': (train, 'tiny --batch_size many', 'batch_size'),
    'unknown choice': (train, 'tiny --balance evenly', 'evenly'),
    'value missing': (train, 'tiny --seed', 'seed'),
    'a seed too large': (
        train,
        f'tiny --seed {2**64}',
        f'seed must be at least 0 and below 2**64, got {2**64}',
    ),
    'a seed too large to draw': (sample, f'out/x --seed {2**64}', 'seed must be at least 0 and below 2**64'),
    'one renormalized gate': (
        train,
        'tiny --top_k 1 --norm_topk_prob True',
        'norm_topk_prob must be False when top_k=1',
    ),
    'missing dataset': (
        train,
        'tiny --dataset nowhere',
        'no prepared dataset nowhere; create it with: python -m nanomoe.data FILE_OR_FOLDER --out '
        'data/nowhere',
    ),
    'dataset not prepared yet': (
        train,
        'tiny --dataset shakespeare_gpt2',
        'create it with: python -m nanomoe.data shakespeare_gpt2',
    ),
    'small vocabulary': (
        train,
        'tiny --vocab_size 100',
        'vocab_size must be at least 257 for the dataset numbers, got 100',
    ),
    'long context': (
        train,
        'tiny --block_size 10000000',
        'must hold at least 2 * block_size=20000000 tokens',
    ),
    'missing device': (train, 'tiny --device cuda:99', 'device cuda:99 does not exist'),
    'nonsense device': (
        train,
        'tiny --device toaster',
        'device must be auto, cpu, cuda, cuda:N or mps, got toaster',
    ),
    'half precision on a CPU': (
        train,
        'tiny --device cpu --dtype float16',
        'dtype must be float32 or bfloat16 on a CPU',
    ),
    'unknown backend': (train, 'tiny --backend foo', 'backend must be auto, or one that this torch has'),
    'missing file': (train, 'nowhere.toml', 'nowhere.toml cannot be read: No such file or directory'),
    'missing weights': (train, 'tiny --init_from out/nowhere', 'out/nowhere holds no checkpoint'),
    'nothing to prepare': (data, '', 'give something to prepare'),
    'missing source': (data, 'nowhere.txt', 'nowhere.txt does not exist'),
    'unknown tokenizer': (
        data,
        'numbers --tokenizer gtp2 --out {tmp}/n',
        'there is no tokenizer gtp2; did you mean gpt2?',
    ),
    'tiny vocabulary': (
        data,
        'numbers --tokenizer bpe --vocab_size 9 --out {tmp}/n',
        'vocab_size must be at least 257',
    ),
    'size of no bpe': (
        data,
        'numbers --vocab_size 300 --out {tmp}/n',
        'vocab_size belongs to a bpe; the tokenizer bytes has a size of its own, got 300',
    ),
    'not Shakespeare': (
        data,
        'shakespeare --from_file {tmp}/other.txt --out {tmp}/s',
        'is not Tiny Shakespeare: its sha256 is',
    ),
    'empty file': (
        data,
        '{bad}/empty.txt --out {tmp}/x',
        'empty.txt must hold some text to train on and some to hold out, got none',
    ),
    'not UTF-8': (
        data,
        '{bad}/latin.txt --out {tmp}/x',
        'latin.txt is not UTF-8 text: byte 3 cannot be decoded',
    ),
    'no text in a line': (
        data,
        '{bad}/lines.jsonl --out {tmp}/x',
        'lines.jsonl line 2 must be a JSON object with a string under "text"',
    ),
    'no such dataset of the hub': (
        data,
        'nobody/nothing --out {tmp}/x',
        'nobody/nothing is no file or folder here, and the Hugging Face hub does not give it: ',
    ),
    'a pattern that fits nothing': (data, '{bad}/*.parquet --out {tmp}/x', '*.parquet does not exist'),
    'a table without text': (
        data,
        '{bad}/lines.jsonl --text_column words --out {tmp}/x',
        'line 1 must be a JSON object with a string under "words"',
    ),
    'one weight for two': (
        data,
        '{bad}/latin.txt {bad}/lines.jsonl --weights 7 --out {tmp}/x',
        'weights must be 2 numbers with commas between',
    ),
    'weights of rows': (
        data,
        '{bad}/lines.jsonl --weights 1 --domain_column kind --out {tmp}/x',
        'weights and domain_column cannot both be given',
    ),
    'all held out': (
        data,
        '{bad}/latin.txt --val_fraction 1 --out {tmp}/x',
        'val_fraction must be between 0 and 1, got 1.0',
    ),
    'a share of numbers': (
        data,
        'numbers --val_fraction 0.2 --out {tmp}/x',
        'text_column, domain_column and val_fraction belong to other text than numbers',
    ),
    'no tokens': (data, 'numbers --max_tokens 0 --out {tmp}/x', 'max_tokens must be at least 1, got 0'),
    'token files of one split': (
        data,
        '{bad}/raw/numbers_train_000000.bin --out {tmp}/x',
        'token files must have train or val in their names',
    ),
    'data folder in a file': (data, 'numbers --out {bad}/empty.txt/x', 'empty.txt/x cannot be written: '),
    'data folder of others': (
        data,
        'numbers --out {bad}',
        'contains something other than a prepared dataset',
    ),
    'short text': (
        train,
        'tiny --dataset {bad}/short',
        'split train must hold at least 2 * block_size=64 tokens, got 46',
    ),
    'flipped byte': (
        train,
        'tiny --dataset {bad}/flipped',
        'numbers_train_000000.bin is damaged: not what was written; prepare the dataset again',
    ),
    'cut off file': (
        train,
        'tiny --dataset {bad}/cut',
        'numbers_val_000000.bin is damaged: its header claims',
    ),
    'raw numbers': (
        train,
        'tiny --dataset {bad}/raw',
        'numbers_train_000000.bin is not a token file: its header is unknown',
    ),
    'changed manifest': (
        train,
        'tiny --dataset {bad}/edited',
        'manifest.json is not what was written; prepare the dataset again',
    ),
    'ids beyond the vocabulary': (
        train,
        'tiny --dataset {bad}/beyond',
        'numbers_train_000000.bin holds token id 256, but its vocabulary has 200 entries',
    ),
    'tokenizer of others': (
        train,
        'tiny --dataset {bad}/swapped',
        'is not the one that the tokens were made with',
    ),
    'check finds it': (data, 'check {bad}/flipped', 'numbers_train_000000.bin is damaged'),
    'nothing to check': (data, 'check {bad}', 'there is no prepared dataset'),
    'folder in a file': (
        train,
        'tiny --out_dir {bad}/empty.txt/run',
        'run cannot be written: {bad}/empty.txt is a file',
    ),
    'folder of others': (
        train,
        'tiny --out_dir {bad}/theirs',
        'theirs holds the config.json of another program',
    ),
    'no such way to change': (train, 'tiny --allow_changed n_embd', 'allow_changed must name some of top_k'),
    'weights of another shape': (train, 'tiny --init_from {bad}/flipped', 'flipped holds no checkpoint'),
    'a character it never saw': (sample, '{bad}/chars --start X', "the vocabulary has no 'X'"),
    'no run': (sample, 'out/nowhere', 'out/nowhere holds no checkpoint'),
    'old file prefix': (sample, 'out/x --start FILE:prompt.txt', 'use --start_file=prompt.txt'),
    'cold below zero': (
        sample,
        'out/x --temperature=-1',
        'temperature must be a finite number of at least 0, got -1.0',
    ),
    'an empty stop': (sample, 'out/x --stop=', 'stop must be texts that are not empty, got an empty one'),
    'nothing to time': (
        bench,
        'steps',
        'there is no bench steps; did you mean step? (layer, step, scale, write, data, parallel; ',
    ),
    'nothing to draw': (watch, 'experts', 'name the run to show'),
    'nowhere to watch at': (watch, 'watch out/nowhere --port=-1', 'port -1 of 127.0.0.1 cannot be used'),
    'nothing to report': (watch, 'report out/nowhere', 'log.jsonl does not exist; give the folder of a run'),
    'a home of nobody': (watch, 'report ~nobody_at_all/run', 'log.jsonl does not exist'),
    'an unknown host': (
        watch,
        'watch {bad} --host no.such.host.invalid',
        'host must be an address or a name',
    ),
    'a host that is no name': (watch, 'watch {bad} --host ' + 70 * 'é', 'host must be an address or a name'),
    'a task it cannot spell': (evaluate, '{bad}/chars', "the vocabulary has no"),
    'figures nowhere': (evaluate, '{bad}/chars --json {bad}/no/e.json', 'e.json cannot be written: No such'),
    'figures that nothing makes': (evaluate, '{bad}/no --json {bad}/e.json', 'holds no checkpoint'),
    'figures in a folder': (evaluate, '{bad}/chars --json {bad}', 'cannot be written: Is a directory'),
    'tasks in a file': (evaluate, '--tasks_out {bad}/empty.txt', 'empty.txt cannot be written: File exists'),
    'no log': (watch, 'experts out/nowhere', 'log.jsonl does not exist; give the folder of a run'),
}


@pytest.fixture(scope='module')
def bad(tmp_path_factory) -> Path:
    "A folder of things that are not as they should be."
    folder = tmp_path_factory.mktemp('bad')
    (folder / 'empty.txt').touch()
    (folder / 'latin.txt').write_bytes('Caf\xe9'.encode('latin-1'))
    (folder / 'lines.jsonl').write_text('{"text": "one"}\n{"text": 2}\n')
    data.write_dataset(
        [Document('To be, or not to be, that is the question: whether', 'play', '1')],
        folder / 'short',
        'bytes',
    )
    for name in ('flipped', 'cut', 'raw', 'edited', 'beyond', 'swapped'):
        data.write_dataset(numbers_documents(12_000, lines=20), folder / name, 'bytes')
    train_bytes = (folder / 'raw' / 'numbers_train_000000.bin').read_bytes()
    (folder / 'flipped' / 'numbers_train_000000.bin').write_bytes(
        train_bytes[:5000] + b'~' + train_bytes[5001:]
    )
    (folder / 'raw' / 'numbers_train_000000.bin').write_bytes(train_bytes[1024:])  # as nanoGPT writes them
    (folder / 'cut' / 'numbers_val_000000.bin').write_bytes(
        (folder / 'cut' / 'numbers_val_000000.bin').read_bytes()[:-100]
    )
    manifest = json.loads((folder / 'beyond' / 'manifest.json').read_text())
    (folder / 'edited' / 'manifest.json').write_text(json.dumps(manifest | {'vocab_size': 200}))
    (folder / 'beyond' / 'manifest.json').write_text(
        json.dumps(with_checksum(manifest | {'vocab_size': 200}))
    )
    save_tokenizer(make_tokenizer('chars', ['abc'], 0), folder / 'swapped')
    model = PRESETS['tiny'][0]
    model = replace(model, vocab_size=4)
    checkpoint.save(
        folder / 'chars', 1, {'model': GPT(model).state_dict()}, {'config': to_dict(model, TrainConfig())}
    )
    save_tokenizer(make_tokenizer('chars', ['abc'], 0), folder / 'chars')
    (folder / 'theirs').mkdir()
    (folder / 'theirs' / 'config.json').write_text('{"model_type": "mixtral"}')
    return folder


@pytest.mark.parametrize('case', BAD)
def test_one_sentence_and_exit_code_2(case, capsys, tmp_path, bad, monkeypatch):
    program, words, sentence = BAD[case]
    monkeypatch.setattr('torch.distributed.init_process_group', None)  # nothing may have begun
    (tmp_path / 'other.txt').write_text('To be or not to be')
    before = {path: path.read_bytes() for path in bad.rglob('*') if path.is_file()}
    words, sentence = words.format(tmp=tmp_path, bad=bad).split(), sentence.format(bad=bad)
    if program is train and '--out_dir' not in words:
        words += [f'--out_dir={tmp_path}/run']
    code, message = said(program, words, capsys)
    print(f'{case}: {message}')
    assert before == {path: path.read_bytes() for path in bad.rglob('*') if path.is_file()}  # nothing is lost
    assert code == 2 and sentence in message
    assert len(message.splitlines()) == 1 and 'Traceback' not in message
    assert not (tmp_path / 'run').exists()


def test_names_are_compared_by_parts_and_letters():
    names = config.field_names()
    assert config.likeness('n_expert', 'n_experts') > config.likeness('expert', 'n_experts')
    part = config.likeness('grad_accum', 'gradient_accumulation_steps')
    assert part == 0.95 > config.likeness('grad_accum', 'grad_clip')
    assert config.nearest('zzz', names) == ''
    removed = config.no_option('run_name', names, '--')
    assert removed == 'there is no option --run_name; a run has the name of its folder, out_dir'


def test_kinds_of_values_that_a_file_may_hold():
    for wrong, sentence in (
        (dict(top_k=2.0), 'top_k must be an integer, got 2.0'),
        (dict(balance='sequence'), 'it is called balance_over=sequence now'),
        (dict(n_embd=2**63), 'n_embd must be below 2**63'),
    ):
        with pytest.raises(BadInput) as e:
            check_kinds(replace(ModelConfig(), **wrong))
        assert sentence in str(e.value)
    with pytest.raises(BadInput, match='did you mean n_head'):
        from_dict({'n_heads': 4})


def test_settings_of_earlier_versions_get_their_present_names():
    old = dict(n_experts=1, gates='chosen', z_weight=0.1, balance='sequence', expert_width=9, run_name=None)
    now = dict(norm_topk_prob=True, router_z_loss_weight=0.1, balance='switch', balance_over='sequence')
    now |= dict(n_experts=1, mlp_width=9, expert_width=None)
    assert config.of_earlier(old) == config.of_earlier(now) == now
    assert not hasattr(config, 'PRESET')  # PRESETS moved; this name never existed


def test_every_broken_rule_is_named_at_once():
    with pytest.raises(BadInput) as e:
        check(ModelConfig(n_head=5, n_embd=32, top_k=3, n_experts=2), TrainConfig(batch_size=0))
    assert len(str(e.value).splitlines()) == 3


def test_the_process_itself_exits_with_2():
    run = subprocess.run(
        [sys.executable, '-m', 'nanomoe.train', 'tiny', '--top_k', '9'], capture_output=True, text=True
    )
    sentence = 'top_k must be between 1 and n_experts=4, got 9\n'
    assert (run.returncode, run.stderr, run.stdout) == (2, sentence, '')


def test_under_torchrun_the_sentence_comes_once_and_last():
    "From the first process, and at the end of torchrun's own report."
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    options = ['tiny', '--gradient_accumulation_steps', '3', '--out_dir', '/nonexistent']
    run = subprocess.run(
        [*torchrun, '-m', 'nanomoe.train', *options],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    sentence = 'gradient_accumulation_steps must be a multiple of the 2 processes, such as 2 or 4, got 3'
    said = run.stderr.splitlines()
    assert run.returncode == 1 and said.count(sentence) == 1 and run.stderr.count(sentence) == 2
    assert [line for line in said if line.strip(' =')][-1].endswith(f'traceback : {sentence}')


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = subprocess.run(
            [sys.executable, '-m', 'nanomoe.train', 'tiny', f'--out_dir={tmp_path}/run'],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                'RANK': '0',
                'WORLD_SIZE': '2',
                'MASTER_ADDR': '127.0.0.1',
                'MASTER_PORT': str(port),
            },
        )
    assert run.returncode == 2 and 'Traceback' not in run.stderr
    assert (
        f'the processes cannot meet at 127.0.0.1:{port} (' in run.stderr
        and 'address already in use' in run.stderr
    )
    assert 'torchrun --standalone finds a free port' in run.stderr and not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def small_run(tmp_path_factory) -> Path:
    "A run of two steps on characters, some of which no ASCII terminal can show."
    folder = tmp_path_factory.mktemp('small')
    documents = [Document('Größe ≈ 5 µm — naïve 日本 ' * 40, 'text', f'{i}') for i in range(40)]
    data.write_dataset(documents, folder / 'data', 'chars')
    model, run = PRESETS['tiny']
    run = replace(
        run,
        dataset=str(folder / 'data'),
        out_dir=str(folder / 'run'),
        device='cpu',
        max_iters=2,
        warmup_iters=1,
        eval_interval=2,
        checkpoint_interval=2,
    )
    for _ in train.train(replace(model, block_size=16), run):
        pass
    return folder / 'run'


def as_program(*words, before: str = '', after: str = '', **environment) -> subprocess.CompletedProcess:
    "`python -m nanomoe.…` in a shell."
    command = ' '.join([before, sys.executable, '-m', *map(shlex.quote, map(str, words)), after])
    return subprocess.run(
        ['bash', '-c', command],
        capture_output=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
    )


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_a_terminal_that_lacks_characters_gets_others(small_run, encoding, tmp_path):
    for words in (
        ['nanomoe.sample', small_run, '--max_new_tokens=60', '--temperature=9'],
        ['nanomoe.train', 'tiny', '--device=cpu', '--max_iters=1', f'--out_dir={tmp_path}/gr≈ße'],
    ):
        done = as_program(*words, PYTHONIOENCODING=encoding)
        assert done.returncode == 0 and b'Traceback' not in done.stderr and b'?' in done.stdout


def test_an_output_that_is_closed_or_goes_away_is_no_traceback(small_run, tmp_path):
    done = as_program(
        'nanomoe.train',
        'tiny',
        '--device=cpu',
        '--max_iters=2',
        f'--out_dir={tmp_path}/run',
        after='>&- 2>&- <&-',
    )
    assert done.returncode == 0 and checkpoint.load_latest(tmp_path / 'run').step == 2
    done = as_program(
        'nanomoe.sample', small_run, '--max_new_tokens=3000', after='| head -c 5; exit ${PIPESTATUS[0]}'
    )
    assert done.returncode == 141 and done.stderr == b'' and len(done.stdout) == 5


def test_ctrl_c_in_sampling_is_no_traceback(small_run):
    with subprocess.Popen(
        [sys.executable, '-m', 'nanomoe.sample', small_run, '--max_new_tokens=1000000'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    ) as process:
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(30) == 130 and process.stderr.read() == b''


def test_what_a_cluster_leaves_in_the_environment(tmp_path):
    "Half of torchrun's variables is one process, or a sentence."
    for i, (left, code) in enumerate(
        (
            (dict(WORLD_SIZE='2'), 0),
            (dict(RANK='', WORLD_SIZE=''), 0),
            (dict(RANK='0'), 2),
            (dict(RANK='x', WORLD_SIZE='1'), 2),
        )
    ):
        done = as_program(
            'nanomoe.train', 'tiny', '--device=cpu', '--max_iters=1', f'--out_dir={tmp_path}/{i}', **left
        )
        assert done.returncode == code and b'Traceback' not in done.stderr, done.stderr
        assert code == 0 or b'RANK and WORLD_SIZE must be set to numbers' in done.stderr


def test_a_prompt_of_a_million_blanks_is_read(small_run, tmp_path):
    (tmp_path / 'prompt.txt').write_text(' ' * 1_100_000)
    done = as_program(
        'nanomoe.sample',
        small_run,
        f'--start_file={tmp_path}/prompt.txt',
        '--max_new_tokens=2',
        '--temperature=1e-40',
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json', 'log.jsonl', 'samples.jsonl'])
def test_what_another_program_keeps_is_left_as_it_is(name, tmp_path, capsys):
    "Its files are no run of ours, whatever they are called; nor does a run remove its other files."
    (tmp_path / name).write_text('{"step": 1, "loss": 0.5}\n')
    code, message = said(train, ['tiny', '--device=cpu', '--max_iters=1', f'--out_dir={tmp_path}'], capsys)
    assert code == 2 and f'holds the {name} of another program' in message
    assert [path.name for path in tmp_path.iterdir()] == [name] and (
        tmp_path / name
    ).read_text() == '{"step": 1, "loss": 0.5}\n'
    (tmp_path / 'mine').mkdir()
    for other in ('.tmp-notes', '.tmp-3', 'keep.txt'):
        (tmp_path / 'mine' / other).write_text('mine')
    train.main(['tiny', '--device=cpu', '--max_iters=1', f'--out_dir={tmp_path}/mine'])
    assert all(
        (tmp_path / 'mine' / other).read_text() == 'mine' for other in ('.tmp-notes', '.tmp-3', 'keep.txt')
    )


def test_a_run_copied_without_dot_files_is_a_run(small_run, tmp_path):
    "By its settings; by its checkpoints' where even those are gone."
    for lost in ((), ('config.json',)):
        copy = shutil.copytree(
            small_run, tmp_path / f'copy{len(lost)}', ignore=shutil.ignore_patterns('.*', *lost)
        )
        assert checkpoint.is_run(copy)
        words = [
            'nanomoe.train',
            'tiny',
            f'--dataset={small_run.parent}/data',
            '--block_size=16',
            '--device=cpu',
            '--max_iters=3',
            '--warmup_iters=1',
            '--lr_decay_iters=2',
            '--eval_interval=3',
            '--checkpoint_interval=3',
            f'--out_dir={copy}',
        ]
        done = as_program(*words)
        assert done.returncode == 0 and checkpoint.load_latest(copy).step == 3, done.stderr


def test_options_may_come_before_words():
    assert parse(['--max_iters', '1', '--seed=-0', 'tiny', '--bias', 'True']) == parse(
        ['tiny', '--max_iters=1', '--seed=0', '--bias=True']
    )
    words, options = words_and_options(['--out', '-5', 'a', '--help', 'b'])
    assert (words, options) == (['a', 'b'], ['--out', '-5', '--help'])
    _, options = words_and_options(['--seed', '1', 'run', '--stop', 'a', 'b', '--top_k=2'])
    assert options == ['--seed', '1', '--stop', 'a', 'b', '--top_k=2']


def test_wandb_is_asked_for_before_training(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    code, message = said(train, ['tiny', '--tracker=wandb', f'--out_dir={tmp_path}/run'], capsys)
    assert (
        code == 2
        and 'tracker wandb requires the package wandb' in message
        and not (tmp_path / 'run').exists()
    )


@pytest.mark.parametrize('program', [train, sample, data, watch, bench], ids=lambda m: m.__name__)
def test_help_is_help(program, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(['--help'])
    assert stopped.value.code == 0 and 'usage: python -m nanomoe.' in capsys.readouterr().out


def test_a_folder_with_the_name_of_a_text_is_no_text(tmp_path):
    (tmp_path / 'texts' / 'chapter.txt').mkdir(parents=True)
    (tmp_path / 'texts' / 'chapter.txt' / 'one.md').write_text('# One')
    assert [d.text for d in file_documents(tmp_path / 'texts')] == ['# One']


def test_an_out_dir_from_an_unset_variable_is_refused():
    with pytest.raises(BadInput, match="out_dir must name a folder, got an empty one"):
        parse(["tiny", "--out_dir="])


def test_nanogpts_spelling_of_flags():
    model, run = parse(['tiny', '--compile=False', '--bias=True', '--capacity_factor=None', '--max-iters=7'])
    assert (run.compile, model.bias, model.capacity_factor, run.max_iters) == (False, True, None, 7)


@pytest.mark.parametrize(
    'suffix, text',
    [
        ('toml', 'preset = "tiny"\nmax_iters = 7\nbias = true\n'),
        ('json', '{"preset": "tiny", "max_iters": 7, "bias": true}'),
    ],
)
def test_files_of_options(tmp_path, suffix, text):
    path = tmp_path / f'run.{suffix}'
    path.write_text(text)
    model, run = parse([str(path), '--n_layer=1'])
    assert (run.max_iters, model.bias, model.n_layer, model.n_experts) == (7, True, 1, 4)
    path.write_text(text.replace('max_iters', 'max_iter'))
    with pytest.raises(BadInput, match='did you mean max_iters'):
        parse([str(path)])
    for text in ('[', '[' * 100_000, 'a = ' + '[' * 100_000):
        path.write_text(text)
        with pytest.raises(BadInput, match=f'is not valid {suffix}'):
            parse([str(path)])


def test_a_runs_own_config_is_a_configuration(tmp_path):
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(to_dict(*PRESETS['nano_moe'])))
    assert parse([str(path)]) == PRESETS['nano_moe'] == from_dict(json.loads(path.read_text()))


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_passes_its_own_checks(name):
    assert parse([name]) == PRESETS[name]


def test_a_dense_run_does_not_speak_of_experts(tmp_path, capsys):
    for n_experts in (1, 4):
        train.main(
            [
                'tiny',
                f'--n_experts={n_experts}',
                '--max_iters=1',
                '--device=cpu',
                f'--out_dir={tmp_path}/{n_experts}',
            ]
        )
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('step 1/1'))
        assert ('max load' in line) == ('dropped' in line) == (n_experts > 1), line


def test_a_start_says_what_it_does_and_what_it_continues(tmp_path, capsys):
    def said(*words) -> str:
        train.main(
            [
                'tiny',
                '--device=cpu',
                '--warmup_iters=1',
                '--log_interval=1',
                f'--out_dir={tmp_path}/run',
                *words,
            ]
        )
        return capsys.readouterr().out

    first = said('--max_iters=2')
    assert (
        first.index('model ') < first.index('1 process') < first.index('step 1/2') < first.index('next ')
        and 'continued' not in first
    )
    assert 'left' not in next(line for line in first.splitlines() if line.startswith('step 1/2'))
    assert 'at step 2 of 2 already; to train further, use a larger --max_iters' in said('--max_iters=2')
    assert 'resumed from step 2; changed: learning_rate 0.003 -> 0.001, max_iters 2 -> 3' in said(
        '--max_iters=3', '--learning_rate=1e-3'
    ).replace(
        'max_iters 2 -> 3, learning_rate 0.003 -> 0.001', 'learning_rate 0.003 -> 0.001, max_iters 2 -> 3'
    )
    for words in ([], ['--eval_only=True']):
        with pytest.raises(SystemExit) as stop:
            said('--max_iters=4', f'--init_from={tmp_path}/run', *words)
        assert stop.value.code == 2 and 'holds a run with init_from=scratch' in capsys.readouterr().err


# ---- what the command line says before it trains

NAMES_OF_OTHERS = dict(
    out='out_dir',
    lr='learning_rate',
    epochs='max_iters',
    steps='max_iters',
    bs='batch_size',
    batch='batch_size',
    wd='weight_decay',
    warmup='warmup_iters',
    grad_accum='gradient_accumulation_steps',
    layers='n_layer',
    heads='n_head',
    experts='n_experts',
    topk='top_k',
    ctx='block_size',
    seq_len='block_size',
    context_length='block_size',
    save_interval='checkpoint_interval',
    data='dataset',
    clip='grad_clip',
    n_embed='n_embd',
    learningrate='learning_rate',
)


@pytest.mark.parametrize('word, meant', NAMES_OF_OTHERS.items())
def test_names_of_other_trainers_get_a_suggestion(word, meant, capsys):
    assert said(train, ['tiny', f'--{word}=3'], capsys) == (
        2,
        f'there is no option --{word}; did you mean {meant}?',
    )


def test_a_forgotten_hyphen(capsys):
    for word in ('max_iters=5', '-max_iters=5', '—max_iters=5', '–max_iters=5'):
        assert said(train, ['tiny', word], capsys) == (2, 'an option starts with two hyphens: --max_iters=5')


@pytest.mark.parametrize('name', PRESETS)
def test_printed_settings_give_the_same_again(name, tmp_path, capsys):
    words = [name, '--max_iters=7', '--warmup_iters=3', '--dataset=a "b" ü\n', '--capacity_factor=None']
    with pytest.raises(SystemExit) as stopped:
        train.main([*words, '--print_config'])
    assert stopped.value.code in (0, None)
    (tmp_path / 'again.toml').write_text(capsys.readouterr().out)
    assert parse([str(tmp_path / 'again.toml')]) == parse(words)


def test_tables_and_flat_files(tmp_path, capsys):
    def read(text, ending='toml'):
        (tmp_path / f'my.{ending}').write_text(text)
        return [str(tmp_path / f'my.{ending}'), f'--out_dir={tmp_path}/run']

    flat = parse(read('preset = "tiny"\nn_layer = 3\nmax_iters = 5\nwarmup_iters = 1\n'))
    assert flat == parse(
        read('preset = "tiny"\n[model]\nn_layer = 3\n[train]\nmax_iters = 5\nwarmup_iters = 1\n')
    )
    assert flat == parse(
        read(
            '{"preset": "tiny", "model": {"n_layer": 3}, "train": {"max_iters": 5, "warmup_iters": 1}}',
            'json',
        )
    )
    for text, sentence in (
        ('[model]\nmax_iters = 5\n', 'max_iters belongs in [train], got it in [model]'),
        ('[modle]\nn_layer = 5\n', 'there is no table [modle]; did you mean model?'),
        ('n_layer = 2\n[model]\nn_layer = 5\n', 'n_layer is set twice'),
        ('[model]\nlayers = 5\n', 'there is no option layers in [model]; did you mean n_layer?'),
        ('[model]\ngates = "all"\n', 'there is no option gates in [model]; it is called norm_topk_prob now'),
        ('z_weight = 0.1\n', 'there is no option z_weight; it is called router_z_loss_weight now'),
        ('balance = "sequence"\n', 'it is called balance_over=sequence now'),
    ):
        code, message = said(train, read(text), capsys)
        assert code == 2 and 'my.toml' in message and sentence in message


def test_files_of_options_with_a_mistake(tmp_path, capsys):
    for name, text, sentence in (
        ('a.toml', 'top_k = = 2', 'a.toml is not valid toml: '),
        ('b.json', '[1, 2]', 'b.json must hold one table of options, got a list'),
        ('c.toml', 'preset = "tinny"', 'does not exist; did you mean tiny?'),
        ('d.toml', 'preset = ["tiny"]', 'd.toml names the preset ['),
        ('e.toml', '[train]\npreset = "tiny"', 'e.toml: preset must stand above all tables'),
        ('f.toml', '[optim]\nbeta1 = 0.9', 'f.toml: there is no table [optim] (tables: [model], [train])'),
    ):
        (tmp_path / name).write_text(text)
        code, message = said(train, [str(tmp_path / name), f'--out_dir={tmp_path}/run'], capsys)
        assert code == 2 and sentence in message


def test_the_example_files(tmp_path, small_run, capsys):
    "Each is read; each is trained for two steps where its data and weights are others."
    for path in sorted((Path(__file__).parents[1] / 'configs').iterdir()):
        own = [
            f'--dataset={small_run.parent}/data',
            f'--out_dir={tmp_path}/{path.stem}',
            '--device=cpu',
            '--max_iters=2',
            '--warmup_iters=1',
            '--block_size=16',
            '--n_embd=24',
            '--n_head=6',
            '--batch_size=1',
            '--mlp_width=8',
            '--expert_width=8',
            '--vocab_size=None',
            '--init_from=scratch',
            '--gradient_accumulation_steps=1',
            '--eval_iters=1',
            '--lr_decay_iters=2',
            '--min_lr=0',
            '--optimizer=adamw',
        ]
        train.main([str(path), *own])
        assert checkpoint.steps(tmp_path / path.stem)[-1].name == 'step-00000002'


def test_a_dry_run_leaves_no_trace(tmp_path, monkeypatch, capsys):
    before = sorted(path for path in tmp_path.rglob('*'))
    train.main(['tiny', '--device=cpu', '--dry_run', f'--out_dir={tmp_path}/run'])
    text = capsys.readouterr().out
    assert (
        'model       83,392 parameters, 50,624 active per token' in text
        and '512 tokens per step' in text
        and 'time        about ' in text
    )
    assert sorted(path for path in tmp_path.rglob('*')) == before
    assert said(train, ['tiny', '--dry_run', '--top_k=9'], capsys)[0] == 2


def test_a_dry_run_of_what_cannot_be_measured():
    "A dataset yet to be prepared needs a vocabulary; a step that would not fit is not timed."
    small = ModelConfig(block_size=32, vocab_size=60, n_layer=3, n_head=2, n_embd=16, n_experts=6)
    cfg, line = sizing.expected_data(small, 'not-prepared', tokens=1000)
    with pytest.raises(BadInput) as e:
        sizing.expected_data(replace(small, vocab_size=None), 'not-prepared', tokens=1000)
    assert cfg == small and str(e.value) == line
    large, run = replace(small, n_embd=10**6), TrainConfig(batch_size=4)
    lines = sizing.needs(large, run, DistContext(), torch.float32, accumulated=2)
    assert lines[-1] == 'time        not measured: a step would not fit into memory'


def test_a_dry_run_times_updates_that_have_gradients(monkeypatch):
    "Muon takes them away: timed twice in a row, its update would cost nothing."
    seen, make = [], make_optimizer

    def recorded(model, cfg):
        optimizer = make(model, cfg)
        step = optimizer.step
        monkeypatch.setattr(
            optimizer,
            'step',
            lambda: (seen.append(all(p.grad is not None for p in model.parameters())), step()),
        )
        return optimizer

    monkeypatch.setattr(sizing, 'make_optimizer', recorded)
    model, run = parse(['tiny', '--optimizer=muon', '--vocab_size=257'])
    *seconds, n = sizing.timed(model, run, torch.device('cpu'), torch.float32)
    assert seen == [True, True] and min(seconds) > 0 and n == 8 * 32


def test_a_dry_run_extends_short_passes_by_a_line(monkeypatch):
    "A pass of n tokens that takes 3 + n/100 seconds, 5 of them or not: the micro-batch has 2,048."
    clock = iter([])

    def tick():
        return next(clock)

    monkeypatch.setattr(sizing.time, 'perf_counter', tick)
    model, run = parse(['tiny', '--vocab_size=257', '--batch_size=64'])
    # the pass of 512 is the first above two seconds
    lengths = [1.5 + n / 1000 for n in (32, 64, 128, 256, 512)]
    clock = iter(
        [t for took in [took for took in lengths for _ in range(3)] + [0.5] * 2 for t in (0.0, took)]
    )
    micro, update, n = sizing.timed(model, run, torch.device('cpu'), torch.float32)
    assert (round(micro, 6), update, n) == (1.5 + 2048 / 1000, 0.5, 512)


def test_a_dry_run_of_an_evaluation_and_beside_other_processes(small_run, tmp_path, capsys):
    train.main(['eval_gpt2', '--dry_run', '--device=cpu', f'--out_dir={tmp_path}/run'])
    assert 'evaluates once and trains nothing' in (text := capsys.readouterr().out) and 'time ' not in text
    words = [
        'tiny',
        '--dry_run',
        f'--dataset={small_run.parent}/data',
        '--block_size=16',
        '--device=cpu',
        f'--out_dir={small_run}',
    ]
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            '-m',
            'nanomoe.train',
            *words,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert (
        done.returncode == 0
        and done.stdout.count('This was a dry run') == 1
        and 'on 2 processes, cpu, float32' in done.stdout
    )
    assert ' times in the run' in done.stdout and '(holds a run)' in done.stdout


def test_what_a_dense_model_does_not_use_is_named(tmp_path, capsys):
    train.main(
        [
            'tiny',
            '--device=cpu',
            '--n_experts=1',
            '--top_k=3',
            '--balance=none',
            '--max_iters=1',
            '--warmup_iters=0',
            f'--out_dir={tmp_path}/run',
        ]
    )
    assert 'no effect   top_k (n_experts=1), balance (n_experts=1)' in capsys.readouterr().out


def test_an_overview_and_versions(capsys):
    for words, parts in (
        ([], ('nanomoe.train', 'nanomoe.viz', 'nanomoe.data')),
        (['--version'], ('nanomoe 0.1.0, torch ',)),
    ):
        done = subprocess.run([sys.executable, '-m', 'nanomoe', *words], capture_output=True, text=True)
        assert done.returncode == 0 and all(part in done.stdout for part in parts)
    done = subprocess.run([sys.executable, '-m', 'nanomoe', 'sampel'], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('there is no program sampel; did you mean sample?')


def test_help_begins_with_presets_and_examples(capsys):
    with pytest.raises(SystemExit):
        train.main(['--help'])
    text = capsys.readouterr().out
    assert text.index('presets') < text.index('examples') < text.index('--block_size') and all(
        name in text for name in PRESETS
    )
    assert f'{"nano_moe":20} 55.1M 33.9M' in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    'what, options, sentence',
    [
        ('layer', dict(top_k=9), 'top_k must be between 1 and n_experts=8, got 9'),
        ('scale', dict(repeats=0), 'repeats must be at least 1, got 0'),
        ('layer', dict(n_experts=1), 'n_experts must be at least 2, got 1'),
        ('layer', dict(threads=-1), 'threads must be at least 0, got -1'),
        ('layer', dict(json='nowhere/x.json'), 'json must be a file in a folder that exists'),
        ('layer', dict(against='nowhere'), 'must be a folder with the model.py and manager.py'),
        ('step', dict(preset='nano_mo'), 'there is no preset nano_mo; did you mean nano_moe?'),
        ('step', dict(preset='gpt2'), 'preset must have experts, got gpt2'),
    ],
)
def test_what_cannot_be_timed_gets_one_sentence(what, options, sentence):
    with pytest.raises(BadInput, match=re.escape(sentence)):
        bench.check_bench(bench.Bench(**options), what)
    bench.check_bench(bench.Bench(n_tokens=1, top_k=8), 'layer')  # the edges are allowed


def test_nanomoes_layer_has_one_shape():
    b = bench.Bench(n_embd=64, expert_width=128, against='nowhere')
    with pytest.raises(BadInput, match='expert_width must be 4 \\* n_embd = 256 with --against, got 128'):
        bench.original_layer(b)
    for cfg in (replace(PRESETS['tiny'][0], expert_width=7), PRESETS['modern'][0]):
        with pytest.raises(BadInput, match='has parts that nanoMoE has not'):
            bench.original_model(bench.Bench(preset='tiny'), cfg)
    assert bench.heading('step', bench.Bench(batch_size=3)) == 'whole step of nano_moe, 3 rows'
    assert 'N 64' in bench.heading('layer', bench.Bench(n_tokens=64))
    assert 'N ' not in bench.heading('scale', bench.Bench())
