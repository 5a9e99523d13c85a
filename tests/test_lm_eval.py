"""lm-evaluation-harness against the server, with the server's tokenizer, and against the exported model: the same
numbers."""
import json
import os
import random

import pytest
from helpers.runs import script
from helpers.served import serving

pytest.importorskip('fastapi')
pytest.importorskip('lm_eval')
pytestmark = [pytest.mark.tool, pytest.mark.slow, pytest.mark.usefixtures('one_thread')]
ITEMS = 200


@pytest.fixture(scope='module')
def task(runs, tmp_path_factory):
    """A multiple-choice task of short items in a local file, as lm-eval's settings of one."""
    folder = tmp_path_factory.mktemp('task')
    draw = random.Random(1)
    with open('text.txt', encoding='utf-8') as f:
        words = f.read().split(' ')
    with open(folder / 'items.jsonl', 'w', encoding='utf-8') as f:
        for _ in range(ITEMS):
            choices = [' ' + ' '.join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(3)]
            item = dict(question=' '.join(draw.choices(words, k=draw.randint(1, 6))), choices=choices,
                        answer=draw.randrange(3))
            f.write(json.dumps(item) + '\n')
    return dict(
        task='choices', dataset_path='json', test_split='test', output_type='multiple_choice',
        dataset_kwargs=dict(data_files=dict(test=str(folder / 'items.jsonl')), cache_dir=str(folder / 'cache')),
        doc_to_text='{{question}}', doc_to_choice='{{choices}}', doc_to_target='answer',
        metric_list=[dict(metric='acc'), dict(metric='acc_norm')],
    )


def evaluated(model, arguments, task):
    """→ (accuracies, [[(log-likelihood, whether it is the likeliest text) of a choice, …] of an item, …])."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    only_ours = TaskManager(include_defaults=False)     # it would read 14,000 files of settings
    results = lm_eval.simple_evaluate(model=model, model_args=arguments, tasks=[dict(task)], log_samples=True,
                                      bootstrap_iters=0, task_manager=only_ours)
    samples = sorted(results['samples']['choices'], key=lambda sample: sample['doc_id'])
    scores = {name: value for name, value in results['results']['choices'].items() if name.startswith('acc')}
    return scores, [sample['filtered_resps'] for sample in samples]


def test_multiple_choice_has_the_numbers_of_the_exported_model(runs, task, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
    monkeypatch.setenv('NO_PROXY', '*')
    assert script('export.py', '--out_dir=bpe --format=hf --to=bpe-hf --verify=False') == 0
    folder = os.path.abspath('bpe-hf')
    here = dict(pretrained=folder, device='cpu', dtype='float32', batch_size=16, max_length=512)
    expected, likely = evaluated('hf', here, task)
    with serving(runs, out_dir='bpe') as server:
        there = dict(model='bpe', base_url=f'{server.url}/v1/completions', batch_size=16, max_retries=1,
                     max_length=512)
        scores, found = evaluated('local-completions', there, task)
    assert len(found) == len(likely) == ITEMS and scores == expected
    for ours, theirs in zip(found, likely):
        for (logprob, is_greedy), (other, is_theirs) in zip(ours, theirs):
            assert logprob == pytest.approx(other, abs=1e-4) and is_greedy == is_theirs
