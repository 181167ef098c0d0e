"""The cache changes nothing but the time, a row nothing in the others, and a stop ends a text anywhere."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomoe import sample
from nanomoe.tokenizer import load_tokenizer, make_tokenizer
from nanomoe.config import BadInput, ModelConfig
from nanomoe.presets import PRESETS
from nanomoe.data import prepare
from nanomoe.model import GPT
from nanomoe.router import topk_route
from nanomoe.sample import (
    Sampling,
    Step,
    generate,
    prompt,
    batch_dependent,
    generate_texts,
    unescaped,
    until_stop,
)
from nanomoe.train import train

T = 16
BASE = ModelConfig(block_size=T, vocab_size=50, n_layer=2, n_head=4, n_embd=32, mlp_width=24, n_experts=1)
SPARSE = dict(n_experts=6, top_k=2, moe_every=1)
SHAPES = {
    'dense': {},
    'GPT-2': dict(bias=True, activation='gelu_tanh'),
    'rotary': dict(positions='rotary'),
    'shared keys': dict(n_kv_head=2),
    'rotary, shared keys, norms': dict(
        positions='rotary', n_kv_head=1, qk_norm=True, norm='rmsnorm', activation='swiglu'
    ),
    'MoE': SPARSE,
    'MoE every second layer': SPARSE | dict(moe_every=2, norm_topk_prob=True, bias=True),
    'modern MoE': SPARSE
    | dict(
        positions='rotary', qk_norm=True, norm='rmsnorm', activation='swiglu', n_kv_head=2, n_shared_experts=1
    ),
    'sigmoid': SPARSE | dict(router='sigmoid', balance='bias'),
    'hash': SPARSE | dict(router='hash'),
}


def made(**options) -> GPT:
    "A model whose every weight counts: a wrong position or a forgotten bias must show."
    torch.manual_seed(0)
    model = GPT(replace(BASE, **options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def written(monkeypatch, model: GPT, idx: torch.Tensor, n: int, **options):
    "The ids (B, n), the logits (n, B, V) that they were drawn from, and how many positions each step read."
    logits, read = [], []
    with monkeypatch.context() as patch:
        drawn = sample.next_token_probs
        patch.setattr(
            sample, 'next_token_probs', lambda row, *args: logits.append(row.clone()) or drawn(row, *args)
        )
        hook = model.wte.register_forward_hook(lambda module, args, out: read.append(args[0].size(1)))
        torch.manual_seed(1)
        ids = torch.stack([step.ids for step in generate(model, idx, n, **options)], 1)
        hook.remove()
    return ids, torch.stack(logits), read


def random_rows(B: int, n: int) -> torch.Tensor:
    return torch.randint(50, (B, n), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize('name', SHAPES)
def test_the_cache_changes_nothing(monkeypatch, name):
    model, idx = made(**SHAPES[name]), random_rows(3, 5)
    ids, logits, read = written(monkeypatch, model, idx, 20)
    anew, expected, all_read = written(monkeypatch, model, idx, 20, use_cache=False)
    # past block_size too
    assert read == [5] + [1] * (T - 5) + [T] * 8 and all_read == [*range(5, T)] + [T] * 9
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(ids, anew)
    whole = torch.cat([idx, ids], 1)
    by_model = torch.stack([model(whole[:, max(0, t - T) : t]).logits[:, -1] for t in range(5, 25)])
    torch.testing.assert_close(logits, by_model, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name', SHAPES)
def test_rows_of_a_batch_are_what_they_are_alone(monkeypatch, name):
    model, idx = made(**SHAPES[name]), random_rows(4, 5)
    assert not batch_dependent(model.cfg)
    ids, logits, _ = written(monkeypatch, model, idx, 20, temperature=0)
    for b in range(4):
        alone, expected, _ = written(monkeypatch, model, idx[b : b + 1], 20, temperature=0)
        torch.testing.assert_close(logits[:, b : b + 1], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(ids[b : b + 1], alone)


@pytest.mark.parametrize(
    'options, compete',
    [
        (dict(eval_capacity_factor=0.5), True),
        (dict(eval_capacity_factor=0.5, capacity_over='sequence'), False),
        (dict(router='expert_choice', capacity_factor=1.0, eval_capacity_factor=1.0), True),
        (dict(router='expert_choice', eval_capacity_factor=1.0, capacity_over='sequence'), True),
        (dict(capacity_factor=0.5), False),
        (dict(n_experts=1, eval_capacity_factor=0.5), False),
    ],
)
def test_rows_that_compete_are_known(options, compete):
    model = made(**SPARSE | dict(min_capacity=1) | options)
    x = random_rows(4, T)
    with torch.no_grad():
        moved = (model(x).logits[:1] - model(x[:1]).logits).abs().max()
    assert batch_dependent(model.cfg) == compete == bool(moved > 1e-3)


def test_a_long_prompt_counts_with_its_last_block(monkeypatch):
    model, idx = made(), random_rows(2, 3 * T)
    ids, logits, read = written(monkeypatch, model, idx, 4)
    last, expected, _ = written(monkeypatch, model, idx[:, -T:], 4)
    assert torch.equal(ids, last) and torch.equal(logits, expected) and read == [T] * 4


def test_limits_of_the_options(monkeypatch):
    model, idx = made(), random_rows(2, 5)
    cases = {}, dict(top_k=50), dict(top_k=10**9), dict(top_k=1), dict(temperature=0), dict(top_p=1e-9)
    plain, all_there, more, one, cold, least = (
        written(monkeypatch, model, idx, 12, **case)[0] for case in cases
    )
    assert torch.equal(plain, all_there) and torch.equal(plain, more) and not torch.equal(plain, cold)
    assert torch.equal(one, cold) and torch.equal(least, cold)
    assert written(monkeypatch, model, idx, 12, temperature=2.0, top_k=99, n_vocab=7)[0].max() < 7


def test_edges_of_the_distribution():
    rows = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) * 2
    greedy = sample.next_token_probs(rows, temperature=0)
    torch.testing.assert_close(sample.next_token_probs(rows, 1e-2), greedy, atol=1e-2, rtol=0)
    assert (
        sample.next_token_probs(torch.zeros(1, 4), top_k=2) == 0.25
    ).all()  # a tie at the edge stays whole


def test_generation_leaves_the_mode_of_the_model():
    model = made().train()
    assert len(list(generate(model, random_rows(2, 5), 3, n_vocab=7))) == 3 and model.training
    next(steps := generate(model, random_rows(2, 5), 3))
    steps.close()  # the caller stopped early
    assert model.training


def test_a_step_holds_copies_of_its_routing():
    routing = topk_route(torch.randn(3, 4), top_k=2)
    (copy,), before = sample.copied((routing,)), routing.gates.clone()
    routing.gates.zero_()  # as the next replay of a CUDA graph would
    assert torch.equal(copy.gates, before) and before.all()
    assert torch.equal(copy.expert_ids, routing.expert_ids)


# ---- stop strings


def cut_before(text: str, stops: list[str]) -> str:
    """The oracle: read one character more at a time.

    The first time that the text ends with a stop, cut that off.
    """
    for n in range(len(text) + 1):
        if ends := [stop for stop in stops if text[:n].endswith(stop)]:
            return text[: n - max(map(len, ends))]
    return text


letters = st.text('abc\n', max_size=40)
some_stops = st.lists(st.text('abc\n', min_size=1, max_size=5), max_size=3)


@st.composite
def cut_text(draw) -> list[str]:
    text = draw(letters)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


@settings(max_examples=300, deadline=None, database=None)
@given(cut_text(), st.text('abc\n', min_size=1, max_size=5))
def test_one_stop_is_a_split(pieces, stop):
    assert ''.join(until_stop(pieces, [stop])) == ''.join(pieces).split(stop)[0]


@settings(max_examples=300, deadline=None, database=None)
@given(cut_text(), some_stops)
def test_stops_do_not_depend_on_the_cuts(pieces, stops):
    assert ''.join(until_stop(pieces, stops)) == cut_before(''.join(pieces), stops)


@settings(max_examples=300, deadline=None, database=None)
@given(letters, some_stops)
def test_only_what_may_begin_a_stop_waits(text, stops):
    "After every character: what is printed is right for good, and what is not begins a stop."
    whole, printed = cut_before(text, stops), ''
    for n, piece in enumerate(until_stop(text, stops), 1):
        printed += piece
        held = text[len(printed) : n]
        assert whole.startswith(printed)
        assert not held or printed == whole or any(stop.startswith(held) and stop != held for stop in stops)
    assert printed == whole


def test_escapes():
    assert unescaped(r'\n\n') == '\n\n' and unescaped('\n') == '\n' and unescaped(r'a\tb') == 'a\tb'
    assert unescaped(r'\\n') == r'\n' and unescaped(r'\d \x41 ü') == r'\d \x41 ü' and unescaped('\\') == '\\'


# ---- the command


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp('sampling')
    prepare('numbers', folder / 'numbers', tokenizer='bytes')
    mc, tc = PRESETS['tiny']
    tc = replace(
        tc,
        dataset=str(folder / 'numbers'),
        out_dir=str(folder / 'run'),
        device='cpu',
        max_iters=2,
        warmup_iters=1,
        eval_interval=2,
        checkpoint_interval=2,
    )
    for _ in train(mc, tc):
        pass
    return str(folder / 'run')


@pytest.fixture
def say(run, capsys):
    "What the command prints for the run, given more words."

    def said(*words: str) -> str:
        sample.main([run, '--device=cpu', '--max_new_tokens=24', *words])
        return capsys.readouterr().out

    return said


def test_a_seed_gives_the_same_texts(say):
    for count in ('1', '3'):
        same = [say('--start=7 + ', '--num_samples', count, '--seed=5') for _ in range(2)]
        assert same[0] == same[1] != say('--start=7 + ', '--num_samples', count, '--seed=6')
        parts = same[0].split('\n' + '-' * 40 + '\n')
        assert len(parts) == int(count) == len(set(parts)) and all(part.startswith('7 + ') for part in parts)
    assert len({say('--temperature=0', '--seed', seed) for seed in '12'}) == 1


def test_files_and_limits(say, tmp_path):
    (tmp_path / 'start.txt').write_text('1 + 1 = ' * 20)  # longer than block_size=32
    assert say('--start_file', str(tmp_path / 'start.txt')) == say('--start', '1 + 1 = ' * 20)
    assert say('--top_k=100000') == say('--top_k=None') != say('--top_k=1') == say('--temperature=0')


def test_every_broken_rule_is_reported_at_once(tmp_path):
    with pytest.raises(BadInput) as refused:
        sample.check_sampling(Sampling(temperature=-1.0, top_p=0.0, start='FILE:x'))
    sentences = str(refused.value).split('\n')
    assert [line.split()[0] for line in sentences] == ['temperature', 'top_p', 'start']
    with pytest.raises(BadInput, match='holds no checkpoint'):
        sample.load(tmp_path)


def test_one_text_per_domain(run, capsys, tmp_path):
    "Each continues the beginning that the run wrote down last, under the domain's name."
    shutil.copytree(run, tmp_path / 'run')
    last = json.loads((tmp_path / 'run' / 'samples.jsonl').read_text().splitlines()[-1])
    rows = [dict(last, step=1, domain='old'), last, dict(last, domain='digits', ids=last['ids'][3:])]
    (tmp_path / 'run' / 'samples.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    sample.main([str(tmp_path / 'run'), '--device=cpu', '--max_new_tokens=4', '--domains=True'])
    said, begun = capsys.readouterr().out, load_tokenizer(run).decode(last['ids'][1:25])
    assert said.startswith('-- numbers '.ljust(40, '-') + '\n' + begun) and 'old' not in said
    assert '-- digits '.ljust(40, '-') + '\n' + begun[2:] in said
    for words in (['--domains=True', '--start=7'], ['--start_file=x', '--start=7']):
        with pytest.raises(SystemExit):
            sample.main([run, *words])
        assert capsys.readouterr().err == 'only one of start, start_file and domains can be given\n'


def test_stop_twice_is_refused(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main([run, '--stop', 'a', '--stop=b'])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == 'stop takes all its texts at once, --stop A B, got --stop twice\n'


def dictated(monkeypatch, rows: list[list[int]]) -> tuple[list[int], list[int]]:
    """Let `generate` yield these ids: the rows it was asked for each time, and a list that grows with each
    step.
    """
    batches, steps = [], []

    def stub(model, idx, n, *args):
        batches.append(len(idx))
        for ids in zip(*rows[sum(batches) - len(idx) : sum(batches)]):
            steps.append(len(steps))
            yield Step(torch.tensor(ids), ())

    monkeypatch.setattr(sample, 'generate', stub)
    return batches, steps


@pytest.fixture(scope='module')
def loaded(run):
    return sample.load(run, 'cpu')


def all_texts(loaded, **options) -> list[str]:
    model, tokenizer = loaded
    return [
        ''.join(pieces)
        for pieces in generate_texts(model, tokenizer, prompt(tokenizer, ''), Sampling(**options))
    ]


def test_rows_are_read_one_after_the_other_and_no_further_than_needed(monkeypatch, loaded):
    batches, steps = dictated(monkeypatch, [list(b'ab.def.'), list(b'abcd.f.'), list(b'.bcdef.')])
    model, tokenizer = loaded
    reader = generate_texts(model, tokenizer, prompt(tokenizer, ''), Sampling(num_samples=3, stop=('.',)))
    first = next(reader)
    assert next(first) == 'a' and len(steps) == 1  # seen as it is written
    assert ''.join(first) == 'b' and len(steps) == 3
    assert ''.join(next(reader)) == 'abcd' and len(steps) == 5  # three were there already
    assert ''.join(next(reader)) == '' and len(steps) == 5 and next(reader, None) is None
    assert batches == [3]
    dictated(monkeypatch, [list(b'ab'), list(b'cd'), list(b'ef')])
    reader = generate_texts(model, tokenizer, prompt(tokenizer, ''), Sampling(num_samples=3))
    # whenever they are read
    assert [''.join(pieces) for pieces in reversed(list(reader))] == ['ef', 'cd', 'ab']


def test_rows_that_compete_go_one_at_a_time(monkeypatch, loaded):
    batches, _ = dictated(monkeypatch, [list(b'ab'), list(b'cd'), list(b'ef')])
    monkeypatch.setattr(loaded[0], 'cfg', replace(loaded[0].cfg, eval_capacity_factor=2.0))
    assert all_texts(loaded, num_samples=3) == ['ab', 'cd', 'ef'] and batches == [1, 1, 1]


def test_the_end_of_a_document(monkeypatch, loaded):
    end = loaded[1].eot_token
    rows = [[*b'ab', end, *b'cd'], list('é→'.encode())]
    dictated(monkeypatch, rows[:1])
    assert all_texts(loaded) == ['ab\ncd']
    for stop, text in ((r'\n', 'ab'), ('<|endoftext|>', 'ab'), ('d', 'ab\nc')):
        dictated(monkeypatch, rows[:1])
        assert all_texts(loaded, stop=(stop,)) == [text]
    dictated(monkeypatch, [list('spelt <|endoftext|> out'.encode())])
    assert all_texts(loaded, stop=('<|endoftext|>',)) == ['spelt ']
    dictated(monkeypatch, rows[1:])
    assert all_texts(loaded, stop=('→',)) == ['é']  # of three tokens


def test_the_command_stops(say):
    def both(*words: str):
        return say('--seed=5', '--num_samples=2', *words).split('\n' + '-' * 40 + '\n')

    first, _ = both()
    stop = first[8:10].replace('\\', r'\\')
    assert both('--stop', stop, 'never said')[0] == first.split(first[8:10])[0]


def test_bytes_of_two_documents_are_never_joined():
    tokenizer = make_tokenizer('bytes', [], 0)
    end = tokenizer.eot_token
    assert ''.join(sample.decode_stream(tokenizer, [*b'ab\xe2\x82', end, *b'\xacxy'])) == 'ab\ufffd\n\ufffdxy'


def test_a_character_that_is_cut_off_becomes_a_replacement():
    tokenizer = make_tokenizer('bytes', [], 0)
    ids = tokenizer.encode_ordinary('→')
    assert ''.join(sample.decode_stream(tokenizer, ids)) == '→'
    assert list(sample.decode_stream(tokenizer, ids[:-1]))[-1] == '\ufffd'


def test_a_prompt_follows_the_end_of_a_document():
    tokenizer = make_tokenizer('bytes', [], 0)
    assert prompt(tokenizer, '7 + 8').tolist() == [[tokenizer.eot_token, *b'7 + 8']]


def test_the_best_token_stays_however_small_top_p_is():
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    assert sample.next_token_probs(logits, top_p=1e-300).tolist() == [[0, 0, 1, 0]]


def test_a_loss_without_targets_is_zero_on_both_ways_through_the_head():
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8, n_experts=1))
    x, none = torch.randint(11, (2, 8)), torch.full((2, 8), -1)
    assert model(x, none).losses.ce == 0 == model(x, none, keep_logits=False).losses.ce
