"""What a run would be: its parameters, its steps, and the memory it takes, before it takes it.

    python -m mambino.serve.planning config/quick.py --dataset=mine     # a line of JSON, as the last one
    plan = plan_of(['config/quick.py', '--dataset=mine'])               # {…}, from a process of its own

    train.py's settings ─► what it begins from, its data, the unset sizes (train/begin.py)
        ─► the model on the meta device, without its weights ─► memory.estimate ─► JSON

It runs in a process of its own, since it takes some seconds, and since train.py's own code, which is
asked here, ends a program in a line where something does not fit: the page shows that line.
"""
import json
import threading
import time

from mambino.configurator import configure, settings_of
from mambino.plain import parse_json
from mambino.serve import launch

SIGN = 'plan: '
SECONDS = 60            # that a plan holds: what is free, and what is in data/, changes
KEPT = 50               # plans
planning = threading.Lock()
plans = {}              # arguments → (when it was made, the plan)


def plan_of(arguments, is_wanted=lambda: True):
    """What train.py would make of these arguments, as `main` prints it; Refused with what it says against
    them. One at a time is made, since each takes a core; the last ones are remembered for a while.

    is_wanted: asked when it is its turn, whether somebody still waits for it; else it is None."""
    key = tuple(arguments)
    with planning:
        if not is_wanted():
            return None
        made, plan = plans.get(key, (-SECONDS, None))
        if time.monotonic() - made < SECONDS:
            return plan
        plan = new_plan(arguments)
        if len(plans) >= KEPT:
            plans.clear()
        plans[key] = time.monotonic(), plan
        return plan


def new_plan(arguments):
    """See plan_of."""
    status, text = launch.answer_of(('-m', 'mambino.serve.planning'), arguments)
    lines = text.strip().split('\n')
    if status == 0 and lines[-1].startswith(SIGN):
        return parse_json(lines[-1].removeprefix(SIGN))
    errors = [line for line in lines if line.startswith('error: ')] or lines[-1:]
    raise launch.Refused(errors[-1].removeprefix('error: '))


def main():
    """Prints the plan of the arguments of this process."""
    path = launch.script_path('train.py')
    namespace = {'__file__': path} | {setting.name: setting.default for setting in settings_of(path)}
    explicit = configure(namespace)
    settings = {name: value for name, value in namespace.items() if not name.startswith('__')}

    import torch

    from mambino import machine
    from mambino.train import begin, building, carried, memory
    from mambino.weights import checkpoint
    from mambino.weights.fitting import model_of_shapes

    settings['device'] = machine.choose_device(settings['device'])
    begin.refuse_dataset(settings['out_dir'])
    origin = begin.find_origin(settings, explicit)
    begin.check_settings(settings, origin)
    data = begin.open_data(settings, explicit, origin)
    begin.fill_unset(settings, explicit, origin, data)
    carried.check(settings, data)
    settings['dtype'] = machine.choose_dtype(settings['dtype'], settings['device'])     # of a CPU: to be measured
    kind = settings['model']
    adapter = None
    if origin.model:
        net, adapter = begin.build_model(settings, explicit, origin, data)
    else:
        config = building.model_config(settings, explicit, origin, data)
        building.require_room(kind, config)
        net = model_of_shapes(kind, config)
    T, tokens, device = settings['block_size'], settings['tokens_per_step'], settings['device']
    batch, line = memory.choose_micro_batch(settings, net, adapter)
    free, _ = memory.budget_of(settings['vram'], device)
    try:
        parts = memory.estimate(
            kind, checkpoint.config_of(net), batch, T, device.partition(':')[0], settings['dtype'],
            settings['optimizer'], settings['gradient_checkpointing'], batch < tokens // T, adapter=adapter)
    except Exception:                           # as in train.py: a run that may well fit is not stopped by it
        parts = {}
    try:                                        # of one text that is being written
        _, state = net.step(torch.zeros(1, 1, dtype=torch.long, device=next(net.parameters()).device))
        state_bytes = sum(part.nbytes for part in state.values() if isinstance(part, torch.Tensor))
    except (RuntimeError, NotImplementedError):
        state_bytes = 0
    print(SIGN + json.dumps(dict(
        model=kind, parameters=net.num_params(), n_layer=net.config.n_layer, n_embd=net.config.n_embd, block_size=T,
        batch=batch, checkpointing=settings['gradient_checkpointing'], tokens_per_step=tokens,
        max_iters=settings['max_iters'], train_tokens=data.tokens['train'], dataset=data.name, device=device,
        dtype=settings['dtype'], flops=net.flops_per_token(T), state=state_bytes, memory=parts, free=free,
        line=line)))


if __name__ == '__main__':
    main()
