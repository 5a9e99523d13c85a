"""Models of transformers' families as it saves them, and ours of their folders."""
import torch

from mambino.weights import checkpoint
from mambino.weights import from_hf as hf


def written_once(tmp_path_factory, save):
    """folder(name) → (a folder, what save(name, folder) returned): written at the first question."""
    made = {}

    def folder(name):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            made[name] = path, save(name, path)
        return made[name]
    return folder


def loaded(folder, **changes):
    """Our model of a folder; changes: of its config."""
    kind, config, weights, _ = hf.load_hf(folder)
    net = checkpoint.build(kind, config | changes).eval()
    net.load_state_dict(weights)
    return net
