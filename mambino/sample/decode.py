"""The next token of a few sequences, sooner: calls of native.cpp, planned once, in place of Python.

    logits, state = decode.step(net, idx, state)    # what net.step returns

One token of each sequence on a CPU takes a plan, on an NVIDIA card a graph (graphs.py), all else
net.step. A token of 50M parameters is 5 ms of reading weights, and its layers in Python are 2 ms more. So
a finished model's modules are walked once, as the GGUF export does; each yields the calls that compute
it, and one call replays them all:

    net ──► Recipe: (function, arguments) of all layers; weights are addresses, what a state has, names
    Recipe, state ──► Plan: names become addresses, room for x ──► replay ──► logits, a state written to

A recipe is good as long as the model's modules and weights are what and where they were and nothing
hangs on them; a plan as long as the state's tensors lie where they lay. What no table here knows —
another class, a hook, a dtype, a size that the kernels do not take — is `Unknown`: net.step computes it.

Letters of the shapes: B rows, D model width, S cache slots; others as in the models' files.
"""
import ctypes
import struct
import sys
import threading

import torch
import torch.nn as nn

from mambino.cache import is_rounded
from mambino.kernels import cpu, native, pages
from mambino.sample import graphs
from mambino.sample.parts import EMBEDDINGS, Slots, State, Unknown, address, calls, matrix, require
from mambino.sample.watched import Plans, Watched

FUNCTIONS = (           # by the numbers that `replay` of native.cpp knows them by
    'norm_forward', 'add_step', 'mlp_step', 'attention_step', 'mamba1_step', 'mamba2_step', 'mix_step',
    'rope_step', 'linear_step', 'mamba3_step', 'delta_step')
ROWS = 32               # at most; with more, PyTorch's matrix products are quicker
LARGE = 4 << 20         # bytes of a tensor of the state from which large pages pay
PLANS = 4               # that are kept of a model: conversations by turns; a model's `plans` says otherwise


# --- recipes and plans ------------------------------------------------------------------------------

def bits(number):
    """A float as the integer that has its bits as fp32."""
    return int.from_bytes(struct.pack('=f', number), sys.byteorder)


def is_cache(state):
    """Whether a State has slots."""
    return None in state.shape


class Recipe(Watched):
    """The calls that compute a model's layers for one token of each row; Unknown if it has none.

    words: of each call the function's number and the arguments, 64 bits each, all in one list.
    blanks: [(index of words, argument)], which a plan fills in.
    pieces: [(calls, end in words, module or None, its x and y)]: calls, then a module to call."""

    def __init__(self, net):
        self.words, self.blanks, self.pieces = [], [], []
        self.states = {}                                                    # {name: State}
        self.kept = []                                                      # words point to them
        self.plans = {}                                                     # {key: Plan}, the one used last at the end
        self.width = net.config.n_embd
        self.watch(net)
        require(not self.disturbed(), 'hook or dropout')
        require(net.config.objective == 'next', 'objective')
        require(all(p.dtype == torch.float32 for p in net.parameters()), 'dtype')
        require(type(net.embedding()) in EMBEDDINGS, type(net.embedding()))
        self.vocab_size = matrix(net.lm_head).rows
        self.head_dim = getattr(net.config, 'head_dim', 0)
        count = 0
        for function, *arguments in calls(net, 0, 'x', 'x'):
            if function == 'width':
                require(arguments == [self.width], 'width')
                continue
            if isinstance(function, nn.Module):
                self.pieces.append((count, len(self.words), function, *arguments))
                count = 0
                continue
            self.words.append(FUNCTIONS.index(function))
            for argument in arguments:
                self.words.append(self.word(argument))
            count += 1
        self.pieces.append((count, len(self.words), None, 'x', 'x'))
        pages.gather(self.tensors)

    def word(self, argument):
        """The next argument as a word; 0 if it is a plan's."""
        if isinstance(argument, torch.Tensor):
            self.kept.append(argument)
            return address(argument)
        if isinstance(argument, float):
            return bits(argument)
        if isinstance(argument, native.Matrix):
            self.kept.append(argument)
            return ctypes.addressof(argument)
        if isinstance(argument, State):
            self.states[argument.name] = argument
        if isinstance(argument, (str, State, Slots)):
            self.blanks.append((len(self.words), argument))
            return 0
        return argument or 0


class Plan:
    """A recipe on the memory of one state, of B rows; Unknown if the state does not fit.

    It keeps the state's addresses, and none of its memory alive."""

    def __init__(self, recipe, state, B):
        values = dict(threads=torch.get_num_threads(), rows=B, elements=B * recipe.width)
        slots, precisions = set(), set()
        for name, expected in recipe.states.items():
            tensor = state[name]
            if is_rounded(name):
                precisions.add(tensor.dtype)
            require(tensor.ndim == 1 + len(expected.shape) and len(tensor) == B, name)
            for size, wanted in zip(tensor.shape[1:], expected.shape):
                require(wanted in (None, size), name)
            values[expected] = address(tensor, tensor.dtype if is_rounded(name) else expected.dtype)
            if is_cache(expected):
                values[Slots(name)] = tensor.shape[2]
                slots.add(tensor.shape[2])
        require(len(slots) < 2 and 0 not in slots, 'caches of several lengths')
        require(len(precisions) < 2 and precisions <= {torch.float32, torch.bfloat16}, 'precision of the state')
        precision, = precisions or {torch.float32}
        values['precision'] = native.FORMATS[precision]
        self.slots = max(slots, default=0)                                  # 0: there are no caches
        # not caches: those have slots that may never be used, and take no memory so far
        whole = [state[name] for name, expected in recipe.states.items() if not is_cache(expected)]
        pages.gather([tensor for tensor in whole if tensor.nbytes >= LARGE])

        self.room = {name: torch.empty(B, 1, recipe.width) for name in 'xhabc'}
        self.room |= dict(rstd=torch.empty(B), pos=torch.empty(B, dtype=torch.int64))
        self.room |= {name: torch.empty(B, recipe.head_dim // 2) for name in ('cos', 'sin')}
        values |= {name: tensor.data_ptr() for name, tensor in self.room.items()}
        values['logits'] = 0                                                # new ones each time
        self.shape = B, 1, recipe.vocab_size

        words, begin = recipe.words.copy(), 0
        for index, argument in recipe.blanks:
            words[index] = values[argument]
        self.kept, self.pieces = recipe.kept, []
        for count, end, module, x, y in recipe.pieces:
            piece = (ctypes.c_int64 * (end - begin))(*words[begin:end])
            self.pieces.append((ctypes.c_int64(count), piece, module, self.room[x], self.room[y]))
            begin = end

    def replay(self, x, pos):
        """Embeddings x (B, 1, D) of tokens at positions pos (B,) → logits (B, 1, V)."""
        self.room['x'].copy_(x)
        self.room['pos'].copy_(pos)
        logits = torch.empty(self.shape)
        self.pieces[-1][1][-1] = logits.data_ptr()                          # the last argument of the last call
        for count, words, module, source, target in self.pieces:
            native.library().replay(count, words)
            if module is not None:
                target.copy_(module(source)[0])
        return logits


# --- a step -----------------------------------------------------------------------------------------

recipes = Plans(Recipe)
lock = threading.Lock()                                                     # of writing to a recipe's plans


def plan_of(recipe, state, B, most=PLANS):
    """A recipe's plan for this state, made now if there is none; Unknown if there can be none. most: plans
    that are kept, those that were used last."""
    require(all(state.get(name) is not None for name in recipe.states), 'no state yet')
    tensors = [state[name] for name in recipe.states]
    memory = [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
    key = torch.get_num_threads(), B, *memory
    plan = recipe.plans.get(key) or Plan(recipe, state, B)
    with lock:
        recipe.plans.pop(key, None)
        while len(recipe.plans) >= most:
            recipe.plans.pop(next(iter(recipe.plans)))
        recipe.plans[key] = plan
    return plan


def one_token(net, idx, state):
    """Whether this is one token of each of a few sequences that a finished model computes on a CPU."""
    return (state is not None and idx.shape[1] == 1 and 0 < len(idx) <= ROWS and cpu.applies(idx)
            and not net.training and not torch.is_autocast_enabled('cpu'))


def ready(net, idx, state, window):
    """The plan for this step; None if it is net.step's."""
    if not one_token(net, idx, state):
        return None
    pos = state['pos']
    try:
        require(pos.shape == (len(idx),) and pos.dtype == torch.int64 and pos.device.type == 'cpu', 'positions')
        positions = pos.tolist()
        require(min(positions) >= 0, 'positions')
        plan = plan_of(recipes.of(net), state, len(idx), getattr(net, 'plans', PLANS))
    except Unknown:
        return None
    window = getattr(net.config, 'window', 0) or window
    if not plan.slots:
        return plan
    fits = plan.slots == window if window else max(positions) < plan.slots  # a ring, or there is room
    return plan if fits else None


def card_of(idx, state):
    """The card on which this is one token of each row, after others; None if it is none's."""
    if state is None or idx.shape[1] != 1:
        return None
    device = next((tensor.device for name, tensor in state.items() if name != 'pos'), idx.device)
    return device if device.type == 'cuda' else None


@torch.no_grad()
def step(net, idx, state=None, last=False, window=0, out=None):
    """net.step(idx, state, last, window), by a plan, on a card by a graph, if there can be one.

    idx (B, t) int64 and the state after the tokens before it → logits (B, t, V), state. On a card a
    token's idx may lie on the CPU, and out (B, V) get the logits, of which a view (B, 1, V) is returned."""
    card = card_of(idx, state)
    if card is not None:
        stepped = graphs.step(net, idx, state, window, out)
        if stepped is not None:
            return stepped
        logits, state = net.step(idx.to(card, non_blocking=True), state, last, window)
        return (logits if out is None else out.copy_(logits[:, 0])[:, None]), state
    plan = ready(net, idx, state, window)
    if plan is None:
        return net.step(idx, state, last, window)
    pos = state['pos']
    return plan.replay(net.embedding()(idx), pos), {**state, 'pos': pos + 1}
