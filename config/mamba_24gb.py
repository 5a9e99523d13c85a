# A Mamba-2 of 389M parameters for a card of 24 GB: 36 layers of width 1280.
#   at rest      389M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 5.8 GB
#   activations  6 KB a token and layer in bf16: 32 x 1024 tokens x 36 layers = 6.6 GB
#   at the peak  18.2 GB with gradient checkpointing, for a vocabulary of 16,384,
#                of some 22.2 GB that such a card has free
#                (all counted by mambino/train/memory.py, not measured)
#   a step       512 sequences x 1024 tokens = 524,288 tokens
#   the run      15,000 steps x 524,288 tokens = 7.9 billion, 20 a parameter (Hoffmann et al. 2022)
out_dir = 'out-mamba-24gb'

model = 'mamba'
size = '400m'
block_size = 1024

vram = '24'             # GB: as many sequences at once as fit
tokens_per_step = 512 * 1024
optimizer = 'adamw'
schedule = 'cosine'
learning_rate = 3e-4
max_iters = 15000
warmup_iters = 200
eval_interval = 500
eval_iters = 3200       # sequences
