# A Mamba-3 of 50M parameters for a card of 8 GB: 24 layers of width 512.
#   at rest      50M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 0.8 GB
#   activations  17 KB a token and layer in bf16: 8 x 1024 tokens x 24 layers = 3.4 GB
#   at the peak  4.8 GB without gradient checkpointing, for a vocabulary of 16,384,
#                of some 6.7 GB that such a card has free
#                (all counted by mambino/train/memory.py, not measured)
#   a step       128 sequences x 1024 tokens = 131,072 tokens
#   the run      8,000 steps x 131,072 tokens = 1.0 billion, 20 a parameter (Hoffmann et al. 2022)
# --mimo_rank=4 makes it a MIMO of 20 layers: as many parameters, each token writes four inputs
out_dir = 'out-mamba3-8gb'

model = 'mamba'
version = 3
size = '50m'
block_size = 1024

vram = '8'              # GB: as many sequences at once as fit
tokens_per_step = 128 * 1024
optimizer = 'adamw'
schedule = 'cosine'
learning_rate = 1e-3
max_iters = 8000
warmup_iters = 200
eval_interval = 500
eval_iters = 400        # sequences
