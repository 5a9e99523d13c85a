# A first model in a few minutes on a laptop's CPU: Mamba-2 on Python's own sources, for ./run.sh.
#   8 sequences x 256 tokens = 2,048 tokens a step; 500 steps see 1.0M of 2.4M tokens to train on
out_dir = 'out-quick'
dataset = 'stdlib'

model = 'mamba'
n_layer = 4
n_embd = 256
state_size = 64
block_size = 256

batch_size = 8
tokens_per_step = 2048
optimizer = 'muon'
learning_rate = 1e-2
max_iters = 500
eval_interval = 200
eval_iters = 320        # sequences
