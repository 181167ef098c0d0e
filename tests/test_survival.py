"""What happens to a run when something outside it goes wrong: real processes, real signals, real full disks.

`pytest tests/test_survival.py --soak -s` breaks things a hundred times and says what came of it.
"""

import errno
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanomoe import checkpoint, config, data, train
from nanomoe.corpora import numbers_documents
from nanomoe.dataset import TokenDataset, n_sequences, sequence_starts
from nanomoe.files import with_checksum, sha256
from nanomoe.metrics import read_log
from nanomoe.presets import PRESETS

TINY = [
    'tiny',
    '--max_iters=60',
    '--eval_interval=30',
    '--checkpoint_interval=30',
    '--log_interval=1',
    '--device=cpu',
]
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
forks = multiprocessing.get_context('forkserver')  # a process that has imported torch starts in milliseconds
forks.set_forkserver_preload(['nanomoe.train'])


def lines_with(words: str, said: str) -> int:
    "How often a process said so; torchrun repeats it in its report."
    return sum(words in line and 'traceback :' not in line for line in said.splitlines())


def life(words: list[str], diary: Path):
    "A process of `nanomoe.train` that notes which samples it reads, until it ends or is killed."
    torch.set_num_threads(1)
    real = train.training_batch

    def noted(dataset, first, batch_size, *rest):
        with open(diary, 'a') as f:
            f.write(f'{first} {batch_size}\n')
        return real(dataset, first, batch_size, *rest)

    train.training_batch = noted
    with open(diary.with_suffix('.said'), 'a') as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    train.main(words)


def start(words: list[str], diary: Path, target=life, *more) -> multiprocessing.Process:
    process = forks.Process(target=target, args=(words, diary, *more))
    process.start()
    return process


def wait_for_line(process, folder: Path, count: int):
    "Until the log has so many lines, or the process has ended."
    path = folder / 'log.jsonl'
    while process.exitcode is None and not (path.exists() and path.read_bytes().count(b'\n') >= count):
        time.sleep(0.004)


def untimed(folder: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k not in ('tok_per_s', 'mfu')}
        for row in read_log(folder / 'log.jsonl')
    ]


def assert_equal_runs(one: Path, other: Path):
    "The same log lines and samples, and bit by bit the same weights and moments at the end."
    assert untimed(one) == untimed(other)
    assert (one / 'samples.jsonl').read_text() == (other / 'samples.jsonl').read_text()
    a, b = (checkpoint.load_latest(folder) for folder in (one, other))
    assert a.step == b.step
    for group in ('model', 'optim'):
        assert a.tensors[group].keys() == b.tensors[group].keys()
        assert all(torch.equal(t, b.tensors[group][name]) for name, t in a.tensors[group].items())


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> Path:
    "A dataset so small that `tiny` reads it almost three times."
    folder = tmp_path_factory.mktemp('data') / 'small'
    data.write_dataset(numbers_documents(12_000, lines=20), folder, 'bytes')
    return folder


@pytest.fixture(scope='module')
def words(small) -> list[str]:
    return [*TINY, f'--dataset={small}', '--checkpoint_interval=5']


@pytest.fixture(scope='module')
def whole(words, tmp_path_factory) -> Path:
    "The run that nothing happened to, on one process."
    folder = tmp_path_factory.mktemp('whole')
    process = start([*words, f'--out_dir={folder}/run'], folder / 'diary')
    process.join()
    assert process.exitcode == 0, (folder / 'diary.said').read_text()
    return folder


def alone(*words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-m', 'nanomoe.train', *words], env=ENVIRONMENT, capture_output=True, text=True
    )


def samples_of(diary: Path, steps_kept: list[int]) -> list[int]:
    "The samples behind the final weights: of each life, given its diary, what the next one did not do again."
    samples = []
    for first, count in (map(int, line.split()) for line in diary.read_text().splitlines()):
        if first < len(samples):
            assert first % 80 == 0 and first in steps_kept  # gone back to a checkpoint
        samples = samples[:first]
        assert first == len(samples)  # none is left out
        samples += range(first, first + count)
    return samples


def test_killed_at_random_moments(words, small, whole, tmp_path, seed, soak):
    """SIGKILL during start-up, steps, saves and evaluations.

    What comes out is the run that nothing happened to.
    """
    dice, kills, finished, in_saves, redone = random.Random(seed), 0, 0, 0, 0
    while kills < (100 if soak else 12) or finished == 0:
        folder, diary = tmp_path / f'run-{finished}', tmp_path / f'diary-{finished}'
        process = start([*words, f'--out_dir={folder}'], diary)
        if dice.random() < 0.15:
            time.sleep(dice.random())  # before the first step
        else:
            target = len(read_log(folder / 'log.jsonl')) + dice.randint(1, 12)
            wait_for_line(process, folder, target)
            time.sleep(dice.random() * 0.06)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            in_saves += bool(list(folder.glob('.tmp-*')))
            found = checkpoint.load_latest(folder)  # says on stderr what cannot be read
            redone += len(read_log(folder / 'log.jsonl')) - (found.step if found else 0)
            continue
        said = diary.with_suffix('.said').read_text()
        assert process.exitcode == 0 and 'Traceback' not in said and 'not what was written' not in said, said
        assert_equal_runs(folder, whole / 'run')
        samples = samples_of(diary, range(0, 960, 80))
        assert samples == samples_of(whole / 'diary', [])
        train_split = TokenDataset(small, 'train')
        n = n_sequences(train_split, 32)
        starts = sequence_starts(np.array(samples), n, 32, 1337)
        for epoch in range(len(samples) // n):  # each window once per epoch, over kills and the epochs' edges
            assert len(set(starts[epoch * n : (epoch + 1) * n])) == n
        assert len(samples) > 2 * n
        finished += 1
    print(
        f'\n{kills} kills ({in_saves} while a checkpoint was being written), {finished} runs finished, '
        'all equal to the '
        f'run without a kill; {redone} steps done again; seed {seed}'
    )


def test_two_runs_do_not_write_one_folder(words, tmp_path):
    "As when torchrun was killed, its processes were not, and the command is given again."
    command = [*words, '--max_iters=100000', f'--out_dir={tmp_path}/run']
    first = start(command, tmp_path / 'first')
    wait_for_line(first, tmp_path / 'run', 3)
    second = start(command, tmp_path / 'second')
    second.join()
    said = (tmp_path / 'second.said').read_text()
    assert second.exitcode == 2 and said.strip().splitlines()[-1].startswith(
        'another process is writing the run in'
    )
    assert first.is_alive()
    first.kill()
    first.join()


def stop_in_the_last_step(words: list[str], diary: Path):
    real = train.Trainer.train_step

    def update(run):
        if run.step == 59:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run)

    train.Trainer.train_step = update
    life(words, diary)


def test_a_stop_in_the_last_step_is_a_stop(words, whole, tmp_path):
    "Its evaluation is still to be made, so the exit code says that it has not finished."
    command = [*words, f'--out_dir={tmp_path}/run']
    process = start(command, tmp_path / 'diary', stop_in_the_last_step)
    process.join()
    assert process.exitcode == 130 and 'stopped after step 60' in (tmp_path / 'diary.said').read_text()
    process = start(command, tmp_path / 'diary')
    process.join()
    assert process.exitcode == 0
    assert_equal_runs(tmp_path / 'run', whole / 'run')


def test_a_config_that_a_kill_took_does_not_lock_the_run_out(words, whole, tmp_path):
    shutil.copytree(whole / 'run', tmp_path / 'run')
    (tmp_path / 'run' / 'config.json').write_text('')
    (tmp_path / 'run' / 'tokenizer.json').unlink()
    process = start([*words, f'--out_dir={tmp_path}/run'], tmp_path / 'diary')
    process.join()
    assert process.exitcode == 0 and (tmp_path / 'run' / 'config.json').read_text() == (
        whole / 'run' / 'config.json'
    ).read_text().replace(str(whole / 'run'), str(tmp_path / 'run'))


def test_a_slow_disk_is_no_hang(words, tmp_path):
    "Saves take longer than `hang_timeout`: in mid-run one is left out, at the end they are waited for."
    program = tmp_path / 'program.py'
    program.write_text(
        'import sys, time\nfrom nanomoe import checkpoint, train\nreal = checkpoint.save\n'
        'def slow(*args):\n    time.sleep(8)\n    return real(*args)\n'
        'checkpoint.save = slow\ntrain.main(sys.argv[1:])'
    )
    done = torchrun(program, *words, '--hang_timeout=6', '--max_iters=12', f'--out_dir={tmp_path}/run')
    assert done.returncode == 0, done.stderr
    assert 'step 10: the checkpoint before is still being written, so this one is skipped' in done.stderr
    assert [path.name for path in checkpoint.steps(tmp_path / 'run')] == ['step-00000005', 'step-00000012']


def test_a_process_that_alone_meets_bad_data_says_so(words, tmp_path):
    "In mid-run, while the other waits for it."
    program = tmp_path / 'program.py'
    program.write_text(
        'import os, sys\nfrom nanomoe import train\nfrom nanomoe.config import BadInput\n'
        'real = train.training_batch\n'
        'def batch(data, first, *rest):\n'
        '    if os.environ["RANK"] == "1" and first >= 5 * 16: raise BadInput("shard 7 holds token id 999")\n'
        '    return real(data, first, *rest)\n'
        'train.training_batch = batch\ntrain.main(sys.argv[1:])'
    )
    done = torchrun(program, *words, f'--out_dir={tmp_path}/run')
    assert done.returncode == 1 and lines_with('shard 7 holds token id 999', done.stderr) == 1


def test_what_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    """No checkpoint in a streak of skipped updates, though one is due each step.

    None of weights that a huge rate made infinite.
    """
    model_cfg, cfg = PRESETS['tiny']
    cfg = replace(
        cfg,
        out_dir=str(tmp_path / 'streak'),
        max_iters=8,
        checkpoint_interval=1,
        keep_checkpoints=9,
        eval_interval=8,
        device='cpu',
    )
    real = train.Trainer.micro_batch

    def poisoned(run, number, last):
        hook = run.model.wte.weight.register_hook(lambda g: g * math.nan) if run.step in (3, 4) else None
        try:
            return real(run, number, last)
        finally:
            hook and hook.remove()

    monkeypatch.setattr(train.Trainer, 'micro_batch', poisoned)
    last = [*train.train(model_cfg, cfg)][-1]
    assert last.skipped == 2 and [int(path.name[5:]) for path in checkpoint.steps(tmp_path / 'streak')] == [
        1,
        2,
        3,
        6,
        7,
        8,
    ]
    huge = replace(
        cfg,
        out_dir=str(tmp_path / 'huge'),
        learning_rate=1e38,
        min_lr=0.0,
        warmup_iters=0,
        decay_lr=False,
        grad_clip=0.0,
    )
    with pytest.raises(
        RuntimeError, match='the weights are not finite after step 1; is learning_rate=1e[+]38 too large'
    ):
        list(train.train(model_cfg, huge))
    assert checkpoint.steps(tmp_path / 'huge') == []


def test_an_error_is_shown_though_the_group_cannot_end(words, tmp_path):
    "Ending NCCL's group waits for the other processes; so one that fails says why and leaves without that."
    program = tmp_path / 'program.py'
    program.write_text(
        'import os, sys, time\nfrom nanomoe import train\nfrom nanomoe.parallel import dist\n'
        'real = train.Trainer.train_step\n'
        'def update(run):\n'
        '    if os.environ["RANK"] == "0" and run.step == 3: raise OSError("the card fell out")\n'
        '    return real(run)\n'
        'train.Trainer.train_step, dist.destroy_process_group = update, lambda: time.sleep(600)\n'
        'train.main(sys.argv[1:])'
    )
    begun = time.monotonic()
    done = torchrun(program, *words, f'--out_dir={tmp_path}/run')
    assert done.returncode == 1 and time.monotonic() - begun < 100
    assert 'OSError: the card fell out' in done.stderr and 'Traceback' in done.stderr


def die_before_the_line(words: list[str], diary: Path):
    "A life that ends when step 30 is saved and its samples are written, but not its line in the log."
    real = train.routed_text

    def routed_text(run):
        yield from real(run)
        if run.step == 30:
            run.saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    train.routed_text = routed_text
    life(words, diary)


def test_a_line_that_a_kill_took_is_written_by_the_next_start(words, whole, tmp_path):
    command = [*words, f'--out_dir={tmp_path}/run']
    process = start(command, tmp_path / 'diary', die_before_the_line)
    process.join()
    assert process.exitcode == -signal.SIGKILL and checkpoint.load_latest(tmp_path / 'run').step == 30
    assert (
        untimed(tmp_path / 'run')[-1]['step'] == 29
        and '"step": 30' in (tmp_path / 'run' / 'samples.jsonl').read_text()
    )
    process = start(command, tmp_path / 'diary')
    process.join()
    assert process.exitcode == 0
    assert_equal_runs(tmp_path / 'run', whole / 'run')


def keep_saving(root: Path, step: int):
    "Save without pause, through the thread that training uses, until killed."
    torch.set_num_threads(1)
    saver, weight = checkpoint.Saver(), torch.zeros(200_000)
    while True:
        step += 1
        saver.save(root, step, {'model': {'w': weight.fill_(step)}, 'optim': {'m': weight + 1}}, {})


def test_killed_in_a_hundred_saves(tmp_path, seed):
    dice, newest, in_saves = random.Random(seed), 0, 0
    checkpoint.save(tmp_path, 0, {'model': {'w': torch.zeros(1)}, 'optim': {'m': torch.ones(1)}}, {})
    for _ in range(100):
        process = forks.Process(target=keep_saving, args=(tmp_path, newest))
        process.start()
        while process.is_alive() and checkpoint.steps(tmp_path)[-1].name <= f'step-{newest:08d}':
            time.sleep(0.001)
        time.sleep(dice.random() * 0.02)
        process.kill()
        process.join()
        in_saves += bool(list(tmp_path.glob('.tmp-*')))
        found = checkpoint.load(checkpoint.steps(tmp_path)[-1])  # the newest of all: none is unreadable
        assert found.step > newest
        assert (found.tensors['model']['w'] == found.step).all() and (
            found.tensors['optim']['m'] == found.step + 1
        ).all()
        newest = found.step
        checkpoint.sweep(tmp_path)
    print(
        f'\n100 kills, {in_saves} in the middle of a save, {newest} saves in all, 0 unreadable; seed {seed}'
    )
    assert in_saves > 30


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 8 MiB; the test is left out where mounting is not allowed."
    (tmp_path / 'disk').mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'nanomoe-test', tmp_path / 'disk'], capture_output=True
    ).returncode:
        pytest.skip(
            'mounting is not allowed here; test_a_file_that_must_not_grow tries the same with a size limit'
        )
    yield tmp_path / 'disk'
    subprocess.run(['umount', '-l', tmp_path / 'disk'], check=True)


def fill(disk: Path):
    "To the last byte."
    with open(disk / 'ballast', 'wb', buffering=0) as f:
        for size in (65536, 1):
            try:
                while True:
                    f.write(bytes(size))
            except OSError:
                pass


def fill_disk(words: list[str], diary: Path, disk: Path):
    "A life in which the disk is filled to the last byte before step 12 and emptied before step 28."
    real = train.Trainer.train_step

    def update(run):
        if run.step in (12, 28):
            run.wait_for_checkpoint()
        if run.step == 12:
            fill(disk)
        if run.step == 28:
            (disk / 'ballast').unlink()
        return real(run)

    train.Trainer.train_step = update
    life(words, diary)


def test_a_full_disk(words, whole, small_disk, tmp_path):
    process = start([*words, f'--out_dir={small_disk}/run'], tmp_path / 'diary', fill_disk, small_disk)
    process.join()
    said = (tmp_path / 'diary.said').read_text()
    assert process.exitcode == 0 and 'Traceback' not in said, said
    assert said.count('a checkpoint could not be written') == 3  # of steps 15, 20 and 25
    assert 'MiB are free' in said and said.count('log.jsonl cannot be written') == 1
    assert_equal_runs(small_disk / 'run', whole / 'run')  # no line is missing, none is there twice
    print('\n' + next(line for line in said.splitlines() if 'could not be written' in line))


def test_a_disk_that_stays_full(words, small_disk, whole, tmp_path):
    "The run ends by saying so, the older checkpoint is there, and with room again the same command resumes."
    (small_disk / 'ballast').write_bytes(bytes(5 * 2**20))  # room for the first checkpoint, not for a third
    command = [*words, f'--out_dir={small_disk}/run']
    process = start(command, tmp_path / 'diary')
    process.join()
    said = (tmp_path / 'diary.said').read_text()
    assert process.exitcode == 1 and 'the end of the run could not be written; make room on the disk' in said
    assert checkpoint.load_latest(small_disk / 'run').step in (5, 10)
    (small_disk / 'ballast').unlink()
    process = start(command, tmp_path / 'diary')
    process.join()
    assert process.exitcode == 0
    assert_equal_runs(small_disk / 'run', whole / 'run')


def test_a_terminal_on_a_full_disk(words, whole, tmp_path):
    "Nobody can read that it goes on; it goes on."
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [sys.executable, '-m', 'nanomoe.train', *words, f'--out_dir={tmp_path}/run'],
            env=ENVIRONMENT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert 'Traceback' not in done.stderr
    assert_equal_runs(tmp_path / 'run', whole / 'run')


def fill_for_samples(words: list[str], diary: Path, disk: Path):
    "A life whose disk is full while step 30 writes its samples, and which is told to stop soon after."
    real_text, real_update = train.routed_text, train.Trainer.train_step

    def routed_text(run):
        if run.step == 30:
            fill(disk)
        yield from real_text(run)

    def update(run):
        if run.step == 30:
            (disk / 'ballast').unlink()
        if run.step == 32:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_update(run)

    train.routed_text, train.Trainer.train_step = routed_text, update
    life(words, diary)


def test_samples_that_wait_are_saved_by_a_stop(words, whole, small_disk, tmp_path):
    command = [*words, f'--out_dir={small_disk}/run']
    process = start(command, tmp_path / 'diary', fill_for_samples, small_disk)
    process.join()
    said = (tmp_path / 'diary.said').read_text()
    assert process.exitcode == 130 and 'its lines wait' in said and 'Traceback' not in said, said
    process = start(command, tmp_path / 'diary')
    process.join()
    assert process.exitcode == 0
    assert_equal_runs(small_disk / 'run', whole / 'run')


def limited(words: list[str], diary: Path, limit: int):
    "A life in which no file may grow beyond `limit` bytes between steps 12 and 28."
    real, hard = train.Trainer.train_step, resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def update(run):
        if run.step in (12, 28):
            run.wait_for_checkpoint()
        if run.step == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        if run.step == 28:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return real(run)

    train.Trainer.train_step = update
    life(words, diary)


def test_a_file_that_must_not_grow(words, whole, tmp_path):
    "There is room, and writing fails half-way all the same."
    process = start([*words, f'--out_dir={tmp_path}/run'], tmp_path / 'diary', limited, 50_000)
    process.join()
    said = (tmp_path / 'diary.said').read_text()
    assert process.exitcode == 0 and 'Traceback' not in said and 'File too large' in said, said
    assert said.count('a checkpoint could not be written') == 3
    assert_equal_runs(tmp_path / 'run', whole / 'run')


def torchrun(
    program, *words, options=('--standalone', '--nproc_per_node=2'), **kwargs
) -> subprocess.CompletedProcess:
    "The program on two processes."
    command = [sys.executable, '-m', 'torch.distributed.run', *options, str(program)]
    return subprocess.run(
        [*command, *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True, timeout=200, **kwargs
    )


class Two(NamedTuple):
    "The words of a run on two processes, and its folder when nothing happened to it"

    words: list[str]
    folder: Path


WAYS = {'data parallel': '--shard=False', 'experts spread': '--expert_parallel=2', 'sharded': '--shard=True'}


@pytest.fixture(scope='module', params=WAYS.values(), ids=WAYS)
def two(words, tmp_path_factory, request) -> Two:
    """The run that nothing happened to, on two processes.

    What averages has gone before the group it uses, or they may hang.
    """
    folder, words = tmp_path_factory.mktemp('two'), [*words, request.param]
    (folder / 'program.py').write_text(
        'import gc, sys, torch.distributed as dist\nfrom nanomoe import train\n'
        'from torch.nn.parallel import DistributedDataParallel\nreal = dist.destroy_process_group\n'
        'def destroy():\n'
        '    assert not any(isinstance(o, DistributedDataParallel) for o in gc.get_objects())\n'
        '    real()\n'
        'dist.destroy_process_group = destroy\ntrain.main(sys.argv[1:])'
    )
    done = torchrun(folder / 'program.py', *words, f'--out_dir={folder}/run')
    assert done.returncode == 0, done.stderr
    return Two(words, folder / 'run')


def test_a_crashed_process_heals_itself(two, tmp_path):
    """`torchrun --max-restarts`: SIGKILL hits one process, then the other, and the run ends as if nothing had
    been.
    """
    program = tmp_path / 'program.py'
    program.write_text(
        'import os, signal, sys\nfrom nanomoe import train\n'
        'real, life = train.Trainer.train_step, int(os.environ["TORCHELASTIC_RESTART_COUNT"])\n'
        'def update(run):\n'
        '    with open(f"{sys.argv[1]}.{run.world.rank}", "a") as f: f.write(f"{run.step}\\n")\n'
        '    if (life, run.world.rank, run.step) in [(0, 1, 13), (1, 0, 37)]: os.kill(os.getpid(), '
        'signal.SIGKILL)\n'
        '    return real(run)\n'
        'train.Trainer.train_step = update\n'
        'train.main(sys.argv[2:])'
    )
    done = torchrun(
        program,
        tmp_path / 'steps',
        *two.words,
        f'--out_dir={tmp_path}/run',
        options=('--standalone', '--nproc_per_node=2', '--max-restarts=3'),
    )
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path / 'run', two.folder)
    for rank in (0, 1):
        steps = [int(line) for line in (tmp_path / f'steps.{rank}').read_text().splitlines()]
        assert set(steps) == set(range(60)) and len(steps) - 60 <= 2 * 5 + 2  # at most an interval, twice


@pytest.mark.parametrize('how', ['SIGTERM to torchrun', 'Ctrl-C', 'SIGHUP under nohup'])
def test_preemption(two, tmp_path, how):
    "Both processes stop after the same step, which is saved, and go on bit for bit."
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        '-m',
        'nanomoe.train',
        *two.words,
        '--checkpoint_interval=100',
        f'--out_dir={tmp_path}/run',
    ]
    if how == 'SIGHUP under nohup':
        command = ['nohup', *command]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and len(read_log(tmp_path / 'run' / 'log.jsonl')) < 7:
        time.sleep(0.005)
    at = read_log(tmp_path / 'run' / 'log.jsonl')[-1]['step']
    if how == 'Ctrl-C':
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    else:
        process.send_signal(signal.SIGHUP if 'SIGHUP' in how else signal.SIGTERM)
    process.communicate(timeout=90)
    saved = checkpoint.load_latest(tmp_path / 'run').step
    assert at <= saved <= at + 2 and saved < 60
    done = torchrun('-m', 'nanomoe.train', *two.words, f'--out_dir={tmp_path}/run')
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path / 'run', two.folder)


def test_another_number_of_processes_in_mid_run(words, whole, tmp_path):
    "One process, then two, then one again."
    command = [*words, '--lr_decay_iters=60', f'--out_dir={tmp_path}/run']
    for last in (20, 40, 60):
        if last == 40:
            assert torchrun('-m', 'nanomoe.train', *command, '--max_iters=40').returncode == 0
        else:
            process = start([*command, f'--max_iters={last}'], tmp_path / 'diary')
            process.join()
            assert process.exitcode == 0
    one, mixed = ([row['ce'] for row in untimed(folder / 'run')] for folder in (whole, tmp_path))
    difference = max(abs(a - b) / a for a, b in zip(one, mixed, strict=True))
    print(f'\nlargest relative difference in ce over 60 steps: {difference:.1e}')
    assert difference <= 1e-6


def test_a_machine_that_goes_away(words, whole, tmp_path):
    "`--nnodes=1:2`: two agents train together, one is killed with its process, the other finishes alone."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]

    def agent(host: bool) -> subprocess.Popen:
        options = [
            '--nnodes=1:2',
            '--nproc_per_node=1',
            '--max-restarts=3',
            '--rdzv_backend=c10d',
            '--rdzv_id=elastic',
            f'--rdzv_endpoint=127.0.0.1:{port}',
            '--local_addr=127.0.0.1',
            f'--rdzv_conf=is_host={host},last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3',
        ]
        return subprocess.Popen(
            [
                sys.executable,
                '-m',
                'torch.distributed.run',
                *options,
                str(tmp_path / 'program.py'),
                str(tmp_path / 'sizes'),
                *words,
                f'--out_dir={tmp_path}/run',
            ],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    (tmp_path / 'program.py').write_text(
        'import sys, time\nfrom nanomoe import train\nreal = train.Trainer.train_step\n'
        'def update(run):\n'
        '    with open(sys.argv[1], "a") as f: f.write(f"{run.step} {run.world.size}\\n")\n'
        '    if run.world.size == 2: time.sleep(0.2)\n'
        '    return real(run)\n'
        'train.Trainer.train_step = update\ntrain.main(sys.argv[2:])'
    )
    agents = [agent(True), agent(False)]
    while len(read_log(tmp_path / 'run' / 'log.jsonl')) < 12 and agents[0].poll() is None:
        time.sleep(0.05)
    worker = subprocess.run(
        ['pgrep', '-P', str(agents[1].pid)], capture_output=True, text=True, check=True
    ).stdout
    for pid in (agents[1].pid, int(worker)):
        os.kill(pid, signal.SIGKILL)
    said = agents[0].communicate(timeout=200)[0]
    assert agents[0].returncode == 0, said
    sizes = [tuple(map(int, line.split())) for line in (tmp_path / 'sizes').read_text().splitlines()]
    assert (10, 2) in sizes and (59, 1) in sizes
    one, elastic = ([row['ce'] for row in untimed(folder)] for folder in (whole / 'run', tmp_path / 'run'))
    assert max(abs(a - b) / a for a, b in zip(one, elastic, strict=True)) <= 1e-6


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
def test_a_process_that_stands_still_is_named(tmp_path, way):
    program = tmp_path / 'program.py'
    program.write_text(
        'import os, sys, time\nfrom nanomoe import train\n'
        'real = train.training_batch\n'
        'def stuck(data, first, *rest):\n'
        '    if os.environ["RANK"] == "1" and first >= 5 * 16: time.sleep(600)\n'
        '    return real(data, first, *rest)\n'
        'train.training_batch = stuck\n'
        'train.main(sys.argv[1:])'
    )
    begun = time.monotonic()
    done = torchrun(
        program, *TINY, way, '--hang_timeout=5', '--checkpoint_interval=2', f'--out_dir={tmp_path}/run'
    )
    assert done.returncode == 1 and time.monotonic() - begun < 120
    assert lines_with('made no progress for 5 seconds', done.stderr) == 1 and 'process 1 (pid ' in done.stderr
    assert checkpoint.load_latest(tmp_path / 'run').step == 4


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
def test_nan_on_one_process_and_an_expert_that_it_never_uses(tmp_path, way):
    """An update that is not finite on one process is skipped by both, also where that process sends no token
    to some expert.
    """
    program = tmp_path / 'program.py'
    program.write_text(
        'import math, os, sys, torch\nfrom nanomoe import train\nfrom nanomoe.sharding import whole\n'
        'real_batch, real_update, bad = train.Trainer.micro_batch, train.Trainer.train_step, [int(s) '
        'for s in '
        'sys.argv[1].split(",")]\n'
        'second = os.environ["RANK"] == "1"\n'
        'def shun(module, inputs, logits): return logits.index_fill(-1, torch.tensor([0]), -1e9)\n'
        'def poisoned(run, number, last):\n'
        '    hook = None\n'
        '    if second and run.step in bad:\n'
        '        spoil = lambda module, x, y: y.register_hook(lambda g: g * math.nan) and None\n'
        '        hook = run.model.ln_f.register_forward_hook(spoil)\n'
        '    try: return real_batch(run, number, last)\n'
        '    finally: hook and hook.remove()\n'
        'def update(run):\n'
        '    if second and run.step == 0:\n'
        '        for block in run.model.h: block.mlp.router.score.register_forward_hook(shun)\n'
        '    out = real_update(run)\n'
        '    shared = [p for n, p in run.model.named_parameters() if n not in run.experts.names]\n'
        '    weights = torch.cat([whole(p.detach()).flatten() for p in shared])\n'
        '    torch.save(weights, f"{sys.argv[2]}.{run.world.rank}")\n'
        '    return out\n'
        'train.Trainer.micro_batch, train.Trainer.train_step = poisoned, update\n'
        'train.main(sys.argv[3:])'
    )
    words = [*TINY, '--max_iters=12', '--checkpoint_interval=5', '--balance=none']
    words.append(way)
    done = torchrun(program, '3,7', tmp_path / 'weights', *words, f'--out_dir={tmp_path}/two')
    assert done.returncode == 0, done.stderr
    rows = read_log(tmp_path / 'two' / 'log.jsonl')
    assert [row['skipped'] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert all(math.isfinite(row['ce']) for row in rows)
    first, second = (torch.load(f'{tmp_path}/weights.{rank}') for rank in (0, 1))
    assert torch.equal(first, second) and first.isfinite().all()
    done = torchrun(program, '7,8,9', tmp_path / 'weights', *words, f'--out_dir={tmp_path}/three')
    assert done.returncode == 1 and 'was not finite in 3 updates in a row, up to step 10' in done.stderr
    assert checkpoint.load_latest(tmp_path / 'three').step == 5


SLOW = (
    'import sys, time\nfrom nanomoe import train\n'
    'real = train.Trainer.micro_batch\n'
    'def slow(run, number, last):\n'
    '    if run.step >= {step}: time.sleep({pause})\n'
    '    return real(run, number, last)\n'
    'train.Trainer.micro_batch = slow\ntrain.main(sys.argv[1:])'
)


@pytest.mark.parametrize('step', [0, 3])
def test_a_stop_in_a_step_without_end_saves_the_step_before(whole, words, tmp_path, step):
    """On two processes that are killed half a minute later, as torchrun and clusters do.

    The first step has its beginning saved.
    """
    (tmp_path / 'slow.py').write_text(SLOW.format(step=step, pause=600))
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        '--shutdown-timeout=12',
        tmp_path / 'slow.py',
        *words,
        '--checkpoint_interval=100',
        f'--out_dir={tmp_path}/run',
    ]
    going = subprocess.Popen(
        list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / 'run' / '.lock').exists() or len(read_log(tmp_path / 'run' / 'log.jsonl')) < step:
        time.sleep(0.1)
    time.sleep(1)
    going.terminate()
    going.communicate(timeout=60)
    assert [path.name for path in checkpoint.steps(tmp_path / 'run')] == [f'step-{step:08d}']
    assert alone(*words, f'--out_dir={tmp_path}/run').returncode == 0
    assert untimed(tmp_path / 'run') == untimed(whole / 'run')


def test_two_suspended_processes_go_on(words, tmp_path):
    "Longer than `hang_timeout`, as on a laptop that sleeps or with Ctrl-Z."
    (tmp_path / 'slow.py').write_text(SLOW.format(step=0, pause=0.1))
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        tmp_path / 'slow.py',
        *words,
        '--hang_timeout=4',
        f'--out_dir={tmp_path}/run',
    ]
    going = subprocess.Popen(
        list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while len(read_log(tmp_path / 'run' / 'log.jsonl')) < 3:
        time.sleep(0.1)
    all_of_it = [
        going.pid,
        *map(
            int,
            subprocess.run(['pgrep', '-P', str(going.pid)], capture_output=True, text=True).stdout.split(),
        ),
    ]
    assert len(all_of_it) >= 3
    for pid in all_of_it:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(9)
    for pid in all_of_it:
        os.kill(pid, signal.SIGCONT)
    _, said = going.communicate(timeout=120)
    assert going.returncode == 0, said


def test_after_a_divergence_the_same_command_goes_on_from_a_sound_checkpoint(words, tmp_path):
    """The newest checkpoint has finite weights of 1e30 that give no finite loss: it makes way for the one
    before.
    """
    folder = tmp_path / 'run'
    alone(*words, '--max_iters=10', f'--out_dir={folder}')
    newest = folder / 'step-00000010'
    tensors = {name: t * 1e30 for name, t in load_file(newest / 'model.safetensors').items()}
    save_file(tensors, newest / 'model.safetensors')
    meta = json.loads((newest / 'meta.json').read_text())
    meta['sha256']['model.safetensors'] = sha256(newest / 'model.safetensors')
    (newest / 'meta.json').write_text(
        json.dumps(with_checksum({k: v for k, v in meta.items() if k != 'seal'}))
    )
    bad = alone(*words, '--max_iters=16', f'--out_dir={folder}')
    assert (
        bad.returncode == 1
        and 'the same command resumes from ' in bad.stderr
        and 'step-00000005' in bad.stderr
    )
    assert (folder / 'step-00000010-diverged').exists()
    assert alone(*words, '--max_iters=16', f'--out_dir={folder}').returncode == 0
    assert checkpoint.load_latest(folder).step == 16 and all(
        row['ce'] < 6 for row in read_log(folder / 'log.jsonl')
    )


def test_one_process_does_not_write_one_folder_twice(small, tmp_path):
    model_cfg, cfg = PRESETS['tiny']
    cfg = replace(cfg, dataset=str(small), out_dir=str(tmp_path / 'run'), log_interval=1, device='cpu')
    first = train.train(model_cfg, cfg)
    next(first)
    with pytest.raises(
        config.BadInput, match='another process is writing the run in .*, or this one already'
    ):
        next(train.train(model_cfg, cfg))
    assert next(first).step == 2  # and goes on
    first.close()
    assert next(train.train(model_cfg, cfg)).step == 1


def test_a_file_system_without_locks(small, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(checkpoint.fcntl, 'flock', refuse)
    model_cfg, cfg = PRESETS['tiny']
    cfg = replace(
        cfg, dataset=str(small), out_dir=str(tmp_path / 'run'), max_iters=2, warmup_iters=1, device='cpu'
    )
    assert [*train.train(model_cfg, cfg)][
        -1
    ].step == 2 and 'cannot be locked (No locks available)' in capsys.readouterr().err
