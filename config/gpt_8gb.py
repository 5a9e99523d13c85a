# A GPT of 50M parameters for a card of 8 GB.
#   parameters   13 layers x (4 x 512 x 512 attention + 3 x 512 x 1408 SwiGLU) = 42M, embedding 512 x vocabulary (16,384: 8M)
#   at rest      50M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 0.8 GB
#   activations  about 30 KB a token and layer in bf16: 8 x 1024 tokens x 13 layers = 3.2 GB (counted, not measured);
#                --batch_size=4 makes the same steps with half of that
#   a step       8 sequences x 1024 tokens x 16 micro-batches = 131,072 tokens
out_dir = 'out-gpt-8gb'
model = 'gpt'
n_layer = 13
n_embd = 512
n_head = 8
qk_norm = True
block_size = 1024

batch_size = 8
tokens_per_step = 2**17
learning_rate = 1e-3
max_iters = 8000        # 1.05 billion tokens, 20 a parameter (Hoffmann et al. 2022)
warmup_iters = 200
eval_interval = 500
eval_iters = 100
