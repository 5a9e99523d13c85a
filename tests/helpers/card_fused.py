"""What is one kernel on a card and has none on a CPU, in CPU tensors: by torch.ops.aten's names and
arguments.

So that a program on a pretended card keeps for its backward pass what it keeps on a real one, and
as many kernels start. Letters of the shapes: B batch, H heads, T queries, S keys, P head size; of
experts: E experts, n rows.
"""
import math

import torch
import torch.nn.functional as F

# --- attention ------------------------------------------------------------------------------------


def weights_of(q, k, bias, is_causal, scale):
    """softmax(q k^T scale + bias) (B, H, T, S) and the logarithm of its sums (B, H, T), in fp32."""
    scores = (q.float() @ k.float().mT) * (scale or q.shape[-1] ** -0.5)
    if is_causal:
        T, S = scores.shape[-2:]
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1), scores.logsumexp(-1)


def kept_by_dropout(weights, p):
    """1 / (1 - p) where dropout keeps a weight, else 0: what F.dropout of a CPU draws."""
    return F.dropout(torch.ones_like(weights), p)


def attend(q, k, v, bias, p, is_causal, scale):
    """→ y (B, H, T, P), log-sum-exp (B, H, T), and the state of the generator before dropout."""
    state = torch.get_rng_state() if p else torch.zeros(2, dtype=torch.int64)
    weights, sums = weights_of(q, k, bias, is_causal, scale)
    if p:
        weights = weights * kept_by_dropout(weights, p)
    return (weights.to(v.dtype).float() @ v.float()).to(q.dtype), sums, state.to(q.device)


def attend_backward(grad, q, k, v, bias, p, is_causal, scale, state):
    """The gradients of q, k, v and of the scores."""
    weights, _ = weights_of(q, k, bias, is_causal, scale)
    grad, q_, k_, v_ = (u.float() for u in (grad, q, k, v))
    kept = 1.0
    if p:
        with torch.random.fork_rng(devices=[]):
            if state.device.type == 'cpu':
                torch.set_rng_state(state)
            kept = kept_by_dropout(weights, p)
    grad_v = (weights * kept).mT @ grad
    grad_weights = (grad @ v_.mT) * kept
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
    scaled = grad_scores * (scale or q.shape[-1] ** -0.5)
    return (scaled @ k_).to(q.dtype), (scaled.mT @ q_).to(k.dtype), grad_v.to(v.dtype), grad_scores


def flash_attention(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    check_dtypes('flash attention', q, k, v)
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError('FlashAttention only support fp16 and bf16 data type')
    y, sums, state = attend(q, k, v, None, dropout_p, is_causal, scale)
    nothing = q.new_empty(0)
    return y, sums, None, None, q.shape[2], k.shape[2], state, nothing, nothing


def flash_attention_backward(grad, q, k, v, out, sums, cum_q, cum_k, max_q, max_k, dropout_p, is_causal,
                             state, unused, *, scale=None):
    return attend_backward(grad, q, k, v, None, dropout_p, is_causal, scale, state)[:3]


def efficient_attention(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    check_dtypes('efficient attention', *filter(lambda u: u is not None, (q, k, v, bias)))
    y, sums, state = attend(q, k, v, bias, dropout_p, is_causal, scale)
    return y, sums if compute_log_sumexp else sums.new_empty(0), state, state.new_empty(())


def efficient_attention_backward(grad, q, k, v, bias, out, sums, state, offset, dropout_p, mask, is_causal=False,
                                 *, scale=None):
    *grads, grad_scores = attend_backward(grad, q, k, v, bias, dropout_p, is_causal, scale, state)
    grads.append(grad_scores.sum_to_size(bias.shape).to(bias.dtype) if mask[3] else None)
    return tuple(grad if wanted else None for grad, wanted in zip(grads, mask))


def check_dtypes(name, *tensors):
    if len({u.dtype for u in tensors}) > 1:
        raise RuntimeError(f'{name}: expected all inputs to have the same dtype, got '
                           + ', '.join(str(u.dtype) for u in tensors))


# --- norm -----------------------------------------------------------------------------------------

def rms_norm(x, shape, weight, eps):
    """→ x / rms(x) weight, in x's dtype, and 1 / rms, in fp32. The norm is over the last len(shape) dimensions."""
    dims = tuple(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    rstd = torch.rsqrt(x.float().square().mean(dims, keepdim=True) + eps)
    y = x.float() * rstd
    return (y if weight is None else y * weight).to(x.dtype), rstd


def rms_norm_backward(grad, x, shape, rstd, weight, mask):
    dims = tuple(range(-len(shape), 0))
    normed = x.float() * rstd
    grad_normed = grad.float() * (1 if weight is None else weight)
    grad_x = rstd * (grad_normed - normed * (grad_normed * normed).mean(dims, keepdim=True))
    grad_weight = None
    if weight is not None and mask[1]:
        grad_weight = (grad.float() * normed).flatten(0, -1 - len(shape)).sum(0).to(weight.dtype)
    return grad_x.to(x.dtype), grad_weight


# --- experts --------------------------------------------------------------------------------------

def grouped_mm(a, b, offs=None, bias=None, out_dtype=None):
    """a (n, D) by rows, b (E, D, M): rows up to offs[e] by b[e] → (n, M); a (D, n), b (n, M): the
    columns of each group by its rows → (E, D, M). As CUDA's kernel it takes bf16, and strides of 16
    bytes."""
    if not a.dtype == b.dtype == torch.bfloat16:
        raise RuntimeError(f'Expected bfloat16 for grouped_mm, got {a.dtype} and {b.dtype}')
    if offs.dtype != torch.int32:
        raise RuntimeError('Offsets have to be int32')
    for u in (a, b):                                            # as torch's GroupedMMUtils.h
        (rows, columns), (row_stride, column_stride) = u.shape[-2:], u.stride()[-2:]
        if row_stride == 1 and column_stride >= max(1, rows):
            stride = column_stride
        elif column_stride == 1 and row_stride >= max(1, columns):
            stride = row_stride
        else:
            raise RuntimeError(f'Invalid strides/sizes, got {u.stride()} for strides and {tuple(u.shape)} for sizes')
        if stride * u.element_size() % 16 or u.storage_offset() * u.element_size() % 16:
            raise RuntimeError('strides should be multiple of 16 bytes')
    if a.device.type == 'meta':
        rows = a.shape[:1] if b.dim() == 3 else (len(offs), a.shape[0])
        return a.new_empty(*rows, b.shape[-1])
    starts = [0, *offs.tolist()]
    spans = list(zip(starts, starts[1:]))
    if b.dim() == 3:
        out = a.new_zeros(a.shape[0], b.shape[-1])
        for (start, end), b_e in zip(spans, b):
            out[start:end] = a[start:end] @ b_e
        return out
    return torch.stack([a[:, start:end] @ b[start:end] for start, end in spans])


FUSED = {
    '_scaled_dot_product_flash_attention': flash_attention,
    '_scaled_dot_product_flash_attention_backward': flash_attention_backward,
    '_scaled_dot_product_efficient_attention': efficient_attention,
    '_scaled_dot_product_efficient_attention_backward': efficient_attention_backward,
    '_fused_rms_norm': rms_norm,
    '_fused_rms_norm_backward': rms_norm_backward,
    '_grouped_mm': grouped_mm,
}
