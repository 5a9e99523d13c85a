"""The states between a run's windows, where these follow one another (`carry_state`): back-propagation through time
that is cut at their ends (Williams & Peng 1990), so that a state of all that came before is what training knows.

    carried = Carried(net, data, block_size, sequences, device)     # net's forward pass begins with them from here on
    carried.begin(step_start)           # zeros where a stream begins; the same step again: from where it began
    net(idx, targets)                   # micro-batch after micro-batch, in order
    contents['carried'] = carried.saved();  carried.restore(ckpt['carried'])

Each sequence of a step is of a stream of its own, see order.starts: with n streams number s of a run is of stream
s mod n. So a row of a step has the stream that it had in the step before, also where a step has numbers of two
windows, since a run went on with another tokens_per_step.
"""
import torch
import torch.distributed as dist

from mambino.configurator import fail
from mambino.train import identity, processes
from mambino.weights import checkpoint


def check(settings, data):
    """Ends the program in a line where states are to be carried and cannot be."""
    if not settings['carry_state'] or settings['eval_only']:
        return
    obstacles = {
        f'a {settings["model"]}': settings['model'] != 'mamba',
        f'objective={settings["objective"]}': settings['objective'] != 'next',
        f'adapter={settings["adapter"]}': settings['adapter'] == 'prefix',
        'gradient_checkpointing': settings['gradient_checkpointing'] is True,
        'compile': settings['compile'] is True,
        'a mixture of datasets': len(data.parts) > 1}
    for name in [name for name, stands in obstacles.items() if stands]:
        fail(f'carry_state=True goes with one dataset and a Mamba that learns the next token, not with {name}: leave '
             'one of the two out')
    streams = settings['tokens_per_step'] // settings['block_size']
    T = settings['block_size']
    windows = data.windows(T) // streams
    if windows < 2:
        fail(f'carry_state=True reads {streams} texts side by side, and dataset {data.name} has {windows} '
             f'window{"s" * (windows != 1)} of {T} tokens for each, so that none follows another: lower '
             '--tokens_per_step, or take more text')
    settings['gradient_checkpointing'] = settings['compile'] = False
    data.streams = streams


def lines(settings, data):
    """A line on how far the states of a run go, if it carries any."""
    streams = data.parts[0].streams
    if streams:
        T = settings['block_size']
        windows = data.windows(T) // streams
        yield (f'carry_state: {streams} texts side by side, in which a state goes on for {windows} windows, '
               f'{windows * T:,} tokens')


def state_bytes(config):
    """The bytes of one text's state in fp32, of a Mamba of this config: of one layer they are counted."""
    with torch.random.fork_rng(devices=[]):
        net = checkpoint.build('mamba', config | dict(n_layer=1, vocab_size=16)).eval()
    _, state = net.step(torch.zeros(1, 1, dtype=torch.long))
    return config['n_layer'] * sum(value.nbytes for value in state.values())


def prepare(net, data, settings, sequences, ckpt):
    """Gives a model that is to be trained so the states of its run. ckpt: of a run that goes on."""
    if data.parts[0].streams:
        carried = Carried(net, data, settings['block_size'], sequences, settings['device'])
        carried.restore(fitting_states(data, settings, ckpt) if ckpt else {})


def fitting_states(data, settings, ckpt):
    """Those of a run that goes on; {}, and a line that says so, where they are of other text than the next step's."""
    saved, parts = ckpt.get('carried') or {}, identity.known_parts(ckpt)
    streams, was = data.parts[0].streams, len(saved['pos']) if saved else 0
    reasons = {
        f'the run had {was} texts side by side, and has {streams} now': saved and was != streams,
        'the checkpoint has no states': not saved and ckpt['counters']['step'],
        'the seed is another': ckpt['settings'].get('seed') != settings['seed'],
        'the text is another': parts and parts[0]['train'] != data.identity[0]['train']}
    for reason in [reason for reason, stands in reasons.items() if stands][:1]:
        processes.say(f'note: {reason}: the texts of carry_state begin with no state')
        return {}
    return saved


class Carried:
    def __init__(self, net, data, block_size, sequences, device):
        """sequences: of a step, this process's."""
        self.streams, self.sequences, self.device = data.streams, sequences, device
        self.windows = data.windows(block_size) // self.streams     # of a stream in an epoch
        self.states = None                      # {name: (sequences, …)} before a step; None: zeros
        self.begun = None                       # the number of the step's first sequence
        self.read = 0                           # sequences of the step so far
        self.after = None                       # {name: (sequences, …)}: of those that are read, their states
        net.carried = self

    def begin(self, step_start):
        """A step whose first sequence has this number; the one before is made, unless it is the same."""
        if step_start != self.begun:
            self.end()
        self.begun = step_start
        self.read, self.after = 0, None
        first = step_start + processes.RANK * self.sequences
        numbers = torch.arange(first, first + self.sequences)
        anew = numbers // self.streams % self.windows == 0          # (sequences,)
        if anew.all():
            self.states = None
        elif anew.any() and self.states is not None:
            self.states = {name: without(value, anew) for name, value in self.states.items()}

    def again(self, step_start):
        """The step whose first sequence has this number is to be made again, however much of it there is."""
        if step_start == self.begun:
            self.read, self.after = 0, None

    def take(self, B):
        """The state (B, …) before the next B sequences."""
        rows = slice(self.read, self.read + B)
        self.read += B
        if self.states is None:
            return {'pos': torch.zeros(B, dtype=torch.long)}
        return {name: value[rows] for name, value in self.states.items()}

    def put(self, state):
        """… and after them."""
        if self.after is None:
            self.after = {name: value.new_empty(self.sequences, *value.shape[1:]) for name, value in state.items()}
        for name, value in state.items():
            self.after[name][self.read - len(value):self.read] = value.detach()

    def end(self):
        """What the step left, if it is whole, is what the next one begins with."""
        if self.after and self.read == self.sequences:
            self.states = self.after
        self.after = None

    def saved(self):
        """{name: (streams, …)} on the CPU, of all processes, after a step; {} for zeros. RuntimeError in all
        processes if one has no memory for it."""
        self.end()
        own, saved = {}, {}

        def make_room():
            for name, value in (self.states or {}).items():
                own[name] = saved[name] = value.cpu().contiguous()
                if processes.WORLD > 1:
                    saved[name] = torch.empty(self.streams, *value.shape[1:], dtype=value.dtype)
        processes.agreed(make_room)
        for name, value in own.items() if processes.WORLD > 1 else ():
            dist.all_gather(list(saved[name].chunk(processes.WORLD)), value)
        return saved

    def restore(self, saved):
        first = processes.RANK * self.sequences
        own = {name: value[first:first + self.sequences] for name, value in saved.items()}
        self.states = {name: value if name == 'pos' else value.to(self.device) for name, value in own.items()} or None


def without(value, rows):
    """value (sequences, …) with zeros in these rows, a mask (sequences,)."""
    rows = rows.to(value.device).view(-1, *[1] * (value.ndim - 1))
    return value.masked_fill(rows, 0)
