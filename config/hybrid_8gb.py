# A hybrid of 52M parameters for a card of 8 GB: 9 layers of width 512.
#   at rest      52M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 0.8 GB
#   activations  99 KB a token and layer in bf16: 4 x 1024 tokens x 9 layers = 3.4 GB
#   at the peak  4.5 GB without gradient checkpointing, for a vocabulary of 16,384,
#                of some 6.7 GB that such a card has free
#                (all counted by mambino/train/memory.py, not measured)
#   a step       128 sequences x 1024 tokens = 131,072 tokens
#   the run      8,000 steps x 131,072 tokens = 1.0 billion, 20 a parameter (Hoffmann et al. 2022)
out_dir = 'out-hybrid-8gb'

model = 'hybrid'
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
