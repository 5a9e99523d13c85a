"""metrics.py: the table of parameters says where they are; lines fit the terminal; what is worth a
word is said, once."""
import re
import sys

import pytest
import torch

from mambino.train import metrics
from mambino.train.metrics import Report, StatusLine, parameter_lines, remedies
from mambino.train.progress import Progress
from mambino.weights import checkpoint

KINDS = {
    'mamba': {},
    'mamba-1': dict(version=1),
    'gpt': dict(n_head=4),
    'gpt-experts': dict(n_head=4, n_expert=4),
    'hybrid': dict(n_head=4),
    'hybrid-sequential': dict(n_head=4, layout='sequential'),
}


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('name', KINDS)
def test_parts_sum_to_the_model(name, tied):
    with torch.device('meta'):
        net = checkpoint.build(
            name.partition('-')[0],
            dict(vocab_size=5000, n_layer=3, n_embd=256, tie_embeddings=tied, **KINDS[name]),
        )
    rows = [
        re.fullmatch(r'  (\S.*?) +([\d.]+)M +([\d.]+)%', line).groups()
        for line in parameter_lines(net)
    ]
    sizes = {part: float(size) for part, size, _ in rows}
    assert len(sizes) == len(rows) and list(sizes.values()) == sorted(sizes.values(), reverse=True)
    # norms may be left out
    assert sum(sizes.values()) == pytest.approx(net.num_params() / 1e6, rel=0.005)
    assert sum(float(share) for _, _, share in rows) == pytest.approx(100, abs=0.5)
    assert [size for part, size in sizes.items() if 'embed' in part] == [1.28]
    assert ('lm_head' in sizes) == (not tied)
    per_layer = {}
    for part, p in net.get_submodule(
        next(n for n, _ in net.named_modules() if n.endswith('layers.1'))
    ).named_parameters():
        per_layer[part.split('.')[0]] = per_layer.get(part.split('.')[0], 0) + p.numel()
    for part, size in per_layer.items():
        if 3 * size > 0.001 * net.num_params():
            assert sizes[f'{part}, 3 layers'] == pytest.approx(3 * size / 1e6, abs=6e-4)


def test_a_row_for_all_but_the_small():
    with torch.device('meta'):
        net = checkpoint.build('gpt', dict(vocab_size=30, n_layer=1, n_head=1, n_embd=8))
    # of a tiny model norms are a part, too
    assert sum('layernorm' in line for line in parameter_lines(net)) == 2


# --- what is said while a run goes

@pytest.fixture
def report():
    """report(**arguments): of a run of a thousand steps."""
    made = []

    def report(max_iters=1000, flops=1e6, peak_flops=1e12, progress=None):
        made.append(Report(lambda step, **values: None, StatusLine(), progress or Progress(), max_iters,
                           tokens_per_step=4096, epoch_tokens=10**6, flops=flops, peak_flops=peak_flops, device='cpu',
                           remedies='--patience=3'))
        return made[-1]
    yield report
    for each in made:
        each.timer.cancel()


@pytest.mark.parametrize('columns', [200, 100, 80, 60, 40, 20])
def test_the_time_left_stays_in_the_line(report, monkeypatch, capsys, columns):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    monkeypatch.setenv('COLUMNS', str(columns))
    made = report(max_iters=400)
    made.progress.step, made.progress.seconds = 100, 100.0
    made.step(2.34567, 1e-3, 0.5, {})
    line = capsys.readouterr().out.rsplit('\r')[-1]
    assert len(line) == columns - 1                        # what was there before is written over
    assert '0:05:00' in line and '100' in line and '2.34' in line.replace('2.35', '2.34')


def test_a_step_that_takes_long_is_announced(report, monkeypatch, capsys):
    report()
    assert capsys.readouterr().out == ''
    report(peak_flops=1e8, max_iters=5000)                  # 4096e6 / 0.4e8 = 102 s
    said = capsys.readouterr().out
    assert 'about 102 seconds' in said and 'about 6 days' in said and 'config/quick.py' in said
    monkeypatch.setattr(metrics, 'SLOW_STEP', 0.01)
    waiting = report(flops=1)
    waiting.timer.join()
    assert 'not done after' in capsys.readouterr().out


def test_learning_by_heart_is_said_once(report, capsys):
    made = report()
    for step, (val, loss) in enumerate([(3, 3), (2, 2), (2.1, 1.5), (2.2, 1.2), (2.3, 1.1), (2.4, 1.0)], 1):
        made.losses = [loss]
        made.progress.step = step
        result = dict(val_loss=val)
        made.evaluation(result, made.progress.add_evaluation(result, 1e-3), {})
        assert ('by heart' in capsys.readouterr().out) == (step == 5)
    made.losses = [5.0]             # a rise of both is something else
    other = report(progress=Progress(best_loss=1.0, bad_evals=9))
    other.losses, other.loss_at_best = [5.0], 4.0
    other.evaluation(dict(val_loss=2.0), False, {})
    assert 'by heart' not in capsys.readouterr().out


def test_remedies_are_those_not_taken():
    said = remedies(dict(dropout=0, patience=0))
    assert '--dropout' in said and '--patience' in said
    assert not re.search('--(dropout|patience)', remedies(dict(dropout=0.1, patience=3)))


def test_what_is_read_often_is_said_to_who_does_nothing_about_it():
    settings = dict(dropout=0, patience=0)
    line, = metrics.epochs_lines(dict(code=3.0, docs=82.0), settings)
    assert 'docs is read 82 times' in line and '--patience=3' in line
    assert not list(metrics.epochs_lines(dict(code=3.0), settings))
    assert not list(metrics.epochs_lines(dict(code=82.0), dict(dropout=0.2, patience=8)))   # config/shakespeare_char.py
