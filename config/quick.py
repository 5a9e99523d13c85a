# A first model in a few minutes on a laptop's CPU: Mamba-2 on Python's own sources. ./run.sh uses it.
#   16 sequences x 256 tokens = 4,096 tokens a step; 3.0M tokens in the train split = 740 steps an epoch
out_dir = 'out-quick'
dataset = 'stdlib'

model = 'mamba'
n_layer = 4
n_embd = 256
state_size = 64
block_size = 256

batch_size = 16
tokens_per_step = 4096
learning_rate = 3e-3
max_iters = 500
eval_interval = 250
eval_iters = 20
