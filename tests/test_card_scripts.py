"""train.py, sample.py and a server's thread on a pretended card: they end well, wait for the card where they log and
nowhere else, and give what they give on a CPU."""
import contextlib
import copy

import pytest
from helpers.card import pretended
from helpers.card_process import on_card
from helpers.card_scripts import MODELS, TRAIN, begin, prepare, run
from helpers.runs import metrics


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    """A folder with a prepared text."""
    return prepare(tmp_path_factory.mktemp('text'))


@on_card
@pytest.mark.parametrize('name, dtype', [*((name, 'bfloat16') for name in MODELS), ('gpt', 'float32')])
def test_training_waits_for_nothing_between_the_lines_of_the_log(text, tmp_path, name, dtype):
    """As many waits in ten steps as in five."""
    begin(text, tmp_path)
    waits = []
    for steps in (5, 10):
        with pretended() as card:
            said = run('train.py', TRAIN, MODELS[name], f'--dtype={dtype} --out_dir=out{steps} --max_iters={steps}',
                       '--log_interval=1000 --eval_interval=1000')
            assert f'cuda:0, {dtype}' in said
            waits.append(card.waits)
    more = waits[1] - waits[0]          # the first has what is tried once
    assert not more, f'five steps more wait so often more: {more}'


@on_card
@pytest.mark.parametrize('name', MODELS)
def test_a_run_and_what_it_writes(text, tmp_path, name):
    """In fp32, so that a CPU says the same: losses, samples, the greedy text."""
    begin(text, tmp_path)
    several = f'{MODELS[name]} --dtype=float32 --eval_interval=3 --log_interval=1 --sample_interval=3'
    greedy = '--temperature=0 --max_new_tokens=8 --start=a --dtype=float32'
    losses, greedy_texts = [], []
    for device in ('cpu', 'cuda'):
        out = f'--out_dir=out-{device}'
        with contextlib.ExitStack() as stack:
            if device == 'cuda':
                stack.enter_context(pretended())
            run('train.py', TRAIN, several, out, '--max_iters=3')
            said = run('train.py', TRAIN, several, out, '--max_iters=6')     # goes on
            assert 'going on from' in said and '--- sample at step 6' in said and device in said
            losses.append({**metrics(f'out-{device}', 'val_loss'), **metrics(f'out-{device}', 'loss')})
            greedy_texts.append(run('sample.py', out, greedy))
    assert losses[0].keys() == losses[1].keys() == {1, 2, 3, 4, 5, 6}
    for step, loss in losses[0].items():
        assert abs(loss - losses[1][step]) < 1e-5 * loss
    assert greedy_texts[0] == greedy_texts[1]


WAYS = {
    'several': '--num_samples=3 --batch_size=2 --top_p=0.9 --min_p=0.01 --repetition_penalty=1.2',
    'logprobs': '--logprobs=2',
    'beams': '--beams=3 --num_samples=2',
    'session': '--session=tale',
    'int8': '--quantize=int8',
    'int4': '--quantize=int4',
    'bfloat16': '--quantize=bfloat16 --state_dtype=bfloat16',
    'float32': '--dtype=float32',
    'float16': '--dtype=float16',
    'endless': '--max_new_tokens=40',                   # beyond the window, and beyond what a cache had room for
}


@on_card
@pytest.mark.parametrize('name', ['gpt', 'hybrid'])             # which have all that a model can keep of a text
def test_all_ways_to_sample(text, tmp_path, name):
    begin(text, tmp_path)
    with pretended():
        run('train.py', TRAIN, MODELS[name], '--max_iters=2 --eval_interval=2')
        for flags in WAYS.values():
            run('sample.py', '--max_new_tokens=5 --start=a', flags)
        run('sample.py', '--max_new_tokens=5 --session=tale')
        assert 'perplexity' in run('sample.py', f'--score={text}/tiny.txt')
    run('sample.py', '--max_new_tokens=5 --session=tale --device=cpu')      # begun on the card


@on_card
@pytest.mark.parametrize('name', ['gpt', 'window', 'mamba2', 'hybrid'])
def test_a_server_answers_as_on_a_cpu(name):
    from helpers.jobs import Result, Scheduler, small_net, small_tok

    from mambino.serve.work import Job, Room

    def answers(device):
        net = copy.deepcopy(small_net(name)).to(device)
        scheduler = Scheduler(net, small_tok(), Room(4, 1000, 0.0))
        ids = small_tok().encode('the model reads ')
        results = [Result(scheduler, Job(ids[:n], max_tokens=8, temperature=0.7, seed=n)) for n in (3, 5, 6)]
        answered = [result.wait().ids for result in results]
        scheduler.close()
        return answered
    expected = answers('cpu')
    with pretended():
        assert answers('cuda') == expected
