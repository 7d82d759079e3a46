"""The generation engine: KV-cached, prefix-sharing, continuously batching.

types       what a request is, and the engine's frozen configuration            no torch
kv_cache    where a request's keys and values lie in the preallocated arena      no torch
scheduler   which requests are admitted, prefilled and stepped next              no torch
lane        the tensors of one request while it is computed
runner      prefill, one step for many rows, sliding windows
decoding    tokens → candles, in shares
attention   the cache of one request: a shared history and each path's own bars
stack       the blocks of a network over any positions
step        the arithmetic of one decode step: the seam for what computes it
packing     linear layers in the form that is fastest on the device
compiled    the step through torch.compile's back end, for the CPU
graphs      a step of fixed shapes, for CUDA graphs
sampler     tokens for rows of different settings
engine      schedule → run → update, and the errors of single requests
"""
