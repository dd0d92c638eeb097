# ruff: noqa: E501
"""Miniature training scripts, written for the tests: one clean frame and pieces that break one rule each."""

from __future__ import annotations

import base64
import lzma
import zlib

FRAME = """
import copy, glob, io, math, os, lzma
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
{imports}

class Hyperparameters:
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_byte260")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    vocab_size = int(os.environ.get("VOCAB_SIZE", 260))
    num_layers = int(os.environ.get("NUM_LAYERS", 2))
    model_dim = int(os.environ.get("MODEL_DIM", 32))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 64))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 16))
    iterations = int(os.environ.get("ITERATIONS", 100))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 50))
    seed = int(os.environ.get("SEED", 1337))
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "{ttt}")))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 3))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_chunk = int(os.environ.get("TTT_CHUNK", 4096))

class BigramHash(nn.Module):
    def __init__(self, rows, dim):
        super().__init__()
        self.rows = rows
        self.embed = nn.Embedding(rows, dim)
    def forward(self, ids):
        key = torch.bitwise_xor(36313 * ids[..., 1:], 27191 * ids[..., :-1]) % self.rows
        return self.embed(F.pad(key, (1, 0)))

class GPT(nn.Module):
    {class_flag}
    def __init__(self, args):
        super().__init__()
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.bigram = BigramHash(64, args.model_dim)
        self.blocks = nn.ModuleList(nn.Linear(args.model_dim, args.model_dim) for _ in range(args.num_layers))
    def forward_hidden(self, ids):
        x = self.tok_emb(ids) + self.bigram(ids)
        for block in self.blocks:
            x = x + block(x){class_read}
        return x
    def forward_logits(self, ids):
        return F.linear(self.forward_hidden(ids), self.tok_emb.weight)
    def forward(self, ids, targets):
        logits = self.forward_logits(ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1))

def load_data_shard(file):
    header = np.fromfile(file, dtype="<i4", count=256)
    return torch.from_numpy(np.fromfile(file, dtype="<u2", offset=1024).astype(np.int32))

def load_validation_tokens(pattern, seq_len):
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(pattern)
    tokens = torch.cat([load_data_shard(f) for f in files]).contiguous()
    usable = ((tokens.numel() - 1) // seq_len) * seq_len
    return tokens[: usable + 1]

class TokenStream:
    def __init__(self, pattern):
        self.files = sorted(glob.glob(pattern))
        self.file = 0
        self.tokens = load_data_shard(self.files[0])
        self.pos = 0
    def take(self, n):
        if self.pos + n > self.tokens.numel():
            self.file = (self.file + 1) % len(self.files)
            self.tokens = load_data_shard(self.files[self.file])
            self.pos = 0
        chunk = self.tokens[self.pos : self.pos + n]
        self.pos += n
        return chunk

class Loader:
    def __init__(self, pattern, device):
        self.stream = TokenStream(pattern)
        self.device = device
    def next_batch(self, tokens, seq_len):
        local = self.stream.take(tokens + 1).to(torch.int64)
        return local[:-1].reshape(-1, seq_len).to(self.device), local[1:].reshape(-1, seq_len).to(self.device)

def eval_val(args, model, device, val_tokens):
    total = (val_tokens.numel() - 1) // args.train_seq_len
    loss_sum = torch.zeros((), dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    byte_count = torch.zeros((), dtype=torch.float64)
    model.eval()
    with torch.inference_mode():
        for start in range(0, total, 8):
            end = min(start + 8, total)
            local = val_tokens[start * args.train_seq_len : end * args.train_seq_len + 1].to(device, dtype=torch.int64)
            x = local[:-1].reshape(-1, args.train_seq_len)
            y = local[1:].reshape(-1, args.train_seq_len)
            loss = model(x, y).detach()
            loss_sum += loss.to(torch.float64) * y.numel()
            count += y.numel()
            byte_count += (y >= 4).sum()
    val_loss = loss_sum / count
    model.train()
    return float(val_loss.item()), float(val_loss.item() / math.log(2.0) * count.item() / byte_count.item())

def eval_val_sliding(args, base_model, device, val_tokens, stride):
    seq_len = args.train_seq_len
    total_tokens = val_tokens.numel() - 1
    window_starts = [ws for ws in range(0, total_tokens, stride) if {window_test}]
    loss_sum = torch.zeros((), dtype=torch.float64)
    token_count = torch.zeros((), dtype=torch.float64)
    byte_count = torch.zeros((), dtype=torch.float64)
    base_model.eval()
    with torch.inference_mode():
        for bi in range(0, len(window_starts), 32):
            batch_ws = window_starts[bi : bi + 32]
            x_batch = torch.zeros(len(batch_ws), seq_len, dtype=torch.int64, device=device)
            y_batch = torch.zeros(len(batch_ws), seq_len, dtype=torch.int64, device=device)
            wlens = []
            for i, ws in enumerate(batch_ws):
                end = min(ws + seq_len, total_tokens)
                wlen = end - ws
                wlens.append(wlen)
                chunk = val_tokens[ws : end + 1].to(dtype=torch.int64, device=device)
                x_batch[i, :wlen] = chunk[:-1]
                y_batch[i, :wlen] = chunk[1:]
            logits = base_model.forward_logits(x_batch)
            nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), y_batch.reshape(-1), reduction="none").reshape(len(batch_ws), seq_len)
            for i, ws in enumerate(batch_ws):
                wlen = wlens[i]
                s = 0 if ws == 0 else max(wlen - stride, 0)
                scored = nll[i, s:wlen].to(torch.float64)
                loss_sum += scored.sum()
                token_count += float(wlen - s)
                byte_count += (y_batch[i, s:wlen] >= 4).sum()
    val_loss = (loss_sum / token_count).item()
    return val_loss, val_loss / math.log(2.0) * (token_count.item() / byte_count.item())

{functions}

def quantize(state):
    return {{name: torch.round(t * 31).to(torch.int8) for name, t in state.items()}}

def main():
    args = Hyperparameters()
    device = torch.device("cuda")
    torch.manual_seed(args.seed)
    val_tokens = load_validation_tokens(args.val_files, args.train_seq_len)
    base_model = GPT(args).to(device)
    model = torch.compile(base_model, dynamic=False, fullgraph=True)
    optimizer = torch.optim.AdamW(base_model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.iterations)
    train_loader = Loader(args.train_files, device)
    ema = {{name: t.detach().clone() for name, t in base_model.state_dict().items()}}
    step = 0
    while True:
        last_step = step == args.iterations
        if last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            val_loss, val_bpb = eval_val(args, model, device, val_tokens)
            print(f"step:{{step}}/{{args.iterations}} val_loss:{{val_loss:.4f}} val_bpb:{{val_bpb:.4f}}")
        if last_step:
            break
        {in_training}
        optimizer.zero_grad(set_to_none=True)
        train_loss = torch.zeros(())
        for micro in range(2):
            x, y = train_loader.next_batch(1024, args.train_seq_len)
            loss = model(x, y)
            train_loss += loss.detach()
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(base_model.parameters(), 0.3)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for name, t in base_model.state_dict().items():
                ema[name].mul_(0.997).add_(t, alpha=0.003)
        step += 1
    base_model.load_state_dict(ema)
    {before_quantize}
    buffer = io.BytesIO()
    torch.save(quantize(base_model.state_dict()), buffer)
    blob = {compress}
    with open("final_model.int6.ptz", "wb") as f:
        f.write(blob)
    print(f"Total submission size int6+lzma: {{len(blob) + os.path.getsize(__file__)}} bytes")
    with open("final_model.int6.ptz", "rb") as f:
        restored = f.read()
    base_model.load_state_dict(torch.load(io.BytesIO(lzma.decompress(restored)), map_location="cpu"))
    {before_eval}
    val_loss, val_bpb = eval_val(args, model, device, val_tokens)
    print(f"final_int6_roundtrip_exact val_loss:{{val_loss:.8f}} val_bpb:{{val_bpb:.8f}}")
    {final_eval}
    print(f"final_int6_sliding_window_exact val_loss:{{val_loss:.8f}} val_bpb:{{val_bpb:.8f}}")

if __name__ == "__main__":
    main()
"""

GOOD_WINDOWS = "ws == 0 or ws + seq_len - stride < total_tokens"
TAIL_WINDOWS = "min(ws + seq_len, total_tokens) - ws >= stride"
SLIDING = "val_loss, val_bpb = eval_val_sliding(args, base_model, device, val_tokens, args.eval_stride)"


def script(**pieces: str) -> str:
    """Return the frame with some of its pieces replaced."""
    defaults = {
        "imports": "", "ttt": "0", "class_flag": "", "class_read": "", "window_test": GOOD_WINDOWS, "functions": "", "in_training": "pass",
        "before_quantize": "pass", "before_eval": "pass", "final_eval": SLIDING, "compress": "lzma.compress(buffer.getvalue())",
    }  # fmt: skip
    return FRAME.format(**(defaults | pieces))


TTT_ADAPT = """
def ttt_adapt(args, base_model, device, val_tokens):
    params = [p for p in base_model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=args.ttt_lr, momentum=0.9)
    total_seqs = (val_tokens.numel() - 1) // args.train_seq_len
    base_model.train()
    for epoch in range(args.ttt_epochs):
        epoch_loss = 0.0
        for start in range(0, total_seqs, 8):
            local = val_tokens[start * args.train_seq_len : (start + 8) * args.train_seq_len + 1].to(device)
            x, y = local[:-1].reshape(-1, args.train_seq_len), local[1:].reshape(-1, args.train_seq_len)
            optimizer.zero_grad(set_to_none=True)
            loss = base_model(x, y)
            loss.backward()
            optimizer.step()
            epoch_loss += loss.item()
        print(f"ttt_epoch:{epoch} loss:{epoch_loss:.4f}")
"""

LEGAL_TTT = """
def eval_val_sliding_ttt(args, base_model, device, val_tokens, stride):
    seq_len = args.train_seq_len
    total_tokens = val_tokens.numel() - 1
    window_starts = [ws for ws in range(0, total_tokens, stride) if ws == 0 or ws + seq_len - stride < total_tokens]
    num_chunks = (total_tokens + args.ttt_chunk - 1) // args.ttt_chunk
    chunk_windows = [[] for _ in range(num_chunks)]
    for ws in window_starts:
        s = 0 if ws == 0 else max(min(ws + seq_len, total_tokens) - ws - stride, 0)
        chunk_windows[min((ws + s) // args.ttt_chunk, num_chunks - 1)].append(ws)
    optimizer = torch.optim.SGD([p for p in base_model.parameters() if p.requires_grad], lr=args.ttt_lr, momentum=0.9)
    loss_sum = torch.zeros((), dtype=torch.float64)
    byte_count = torch.zeros((), dtype=torch.float64)
    for ci in range(num_chunks):
        windows = chunk_windows[ci]
        chunk_start = ci * args.ttt_chunk
        chunk_end = min((ci + 1) * args.ttt_chunk, total_tokens)
        base_model.eval()
        with torch.no_grad():
            for bi in range(0, len(windows), 32):
                batch_ws = windows[bi : bi + 32]
                x_batch = torch.zeros(len(batch_ws), seq_len, dtype=torch.int64)
                y_batch = torch.zeros(len(batch_ws), seq_len, dtype=torch.int64)
                for i, ws in enumerate(batch_ws):
                    end = min(ws + seq_len, total_tokens)
                    chunk_tok = val_tokens[ws : end + 1].to(torch.int64)
                    x_batch[i, : end - ws] = chunk_tok[:-1]
                    y_batch[i, : end - ws] = chunk_tok[1:]
                logits = base_model.forward_logits(x_batch)
                nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), y_batch.reshape(-1), reduction="none").reshape(len(batch_ws), seq_len)
                for i, ws in enumerate(batch_ws):
                    wlen = min(ws + seq_len, total_tokens) - ws
                    s = 0 if ws == 0 else max(wlen - stride, 0)
                    loss_sum += nll[i, s:wlen].to(torch.float64).sum()
                    byte_count += (y_batch[i, s:wlen] >= 4).sum()
        is_last_chunk = ci == num_chunks - 1
        if not is_last_chunk and args.ttt_epochs > 0:
            base_model.train()
            chunk_seqs = (chunk_end - chunk_start) // seq_len
            for group in optimizer.param_groups:
                group["lr"] = args.ttt_lr * 0.5 * (1 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            for _ep in range(args.ttt_epochs):
                running = 0.0
                for bs in range(0, chunk_seqs, 4):
                    start_tok = {train_start}
                    local = val_tokens[start_tok : start_tok + 4 * seq_len + 1].to(device, torch.int64)
                    x = local[:-1].reshape(-1, seq_len)
                    y = local[1:].reshape(-1, seq_len)
                    optimizer.zero_grad(set_to_none=True)
                    loss = base_model(x, y)
                    loss.backward()
                    optimizer.step()
                    running += loss.item()
    val_loss = (loss_sum / byte_count).item()
    return val_loss, val_loss / math.log(2.0)
"""

SLOT = """
def eval_val_slot(args, base_model, device, val_tokens, stride):
    seq_len = args.train_seq_len
    total_tokens = val_tokens.numel() - 1
    window_starts = [ws for ws in range(0, total_tokens, stride) if ws == 0 or ws + seq_len - stride < total_tokens]
    loss_sum = torch.zeros((), dtype=torch.float64)
    proj_w = base_model.tok_emb.weight.detach().float()
    for ws in window_starts:
        end = min(ws + seq_len, total_tokens)
        chunk = val_tokens[ws : end + 1].to(device, torch.int64)
        x, y = chunk[:-1][None], chunk[1:][None]
        wlen = end - ws
        s = 0 if ws == 0 else max(wlen - stride, 0)
        with torch.no_grad():
            hidden = base_model.forward_hidden(x).float()
        delta = torch.zeros(1, 1, hidden.size(-1), device=device, requires_grad=True)
        slot_opt = torch.optim.AdamW([delta], lr=0.005)
        mask = torch.zeros(1, wlen, device=device)
        mask[0, {mask}] = 1.0
        for _step in range(8):
            logits = F.linear(hidden + delta, proj_w)
            nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none").reshape(1, -1)
            slot_loss = (nll * mask).sum() / mask.sum()
            slot_opt.zero_grad()
            slot_loss.backward()
            slot_opt.step()
        with torch.no_grad():
            logits = F.linear(hidden + delta, proj_w)
            nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none").reshape(1, -1)
            loss_sum += nll[0, s:wlen].double().sum()
    val_loss = loss_sum.item() / total_tokens
    return val_loss, val_loss / math.log(2.0)
"""

NGRAM = """
def eval_val_ngram(args, base_model, device, val_tokens, stride):
    seq_len = args.train_seq_len
    total_tokens = val_tokens.numel() - 1
    val_np = val_tokens.cpu().numpy()
    buckets = 1 << 20
    mask = np.uint64(buckets - 1)
    primes = np.array([36313, 27191, 51647, 81929], dtype=np.uint64)
    ctx_table = np.zeros(buckets, dtype=np.uint32)
    full_table = np.zeros(buckets, dtype=np.uint32)
    order = 4
    total = 0.0
    for ws in range(0, total_tokens, stride):
        end = min(ws + seq_len, total_tokens)
        chunk = val_tokens[ws : end + 1].to(device, torch.int64)
        with torch.no_grad():
            logits = base_model.forward_logits(chunk[:-1][None])
        nll = F.cross_entropy(logits[0].float(), chunk[1:], reduction="none")
        s = 0 if ws == 0 else max(end - ws - stride, 0)
        seg_p = np.exp(-nll[s:].double().cpu().numpy())
        positions = np.arange(ws + s + 1, end + 1, dtype=np.int64)
        ctx_hash = np.zeros(len(positions), dtype=np.uint64)
        for k in range(order - 1):
            tok = val_np[positions - (order - 1 - k)].astype(np.uint64)
            ctx_hash ^= tok * primes[k % len(primes)]
        ctx_key = (ctx_hash & mask).astype(np.int64)
        after = val_np[positions].astype(np.uint64)
        full_key = ((ctx_hash ^ (after * primes[3])) & mask).astype(np.int64)
        seen = ctx_table[ctx_key].astype(np.float64)
        hits = full_table[full_key].astype(np.float64)
        p_ng = np.minimum(hits, seen) / np.maximum(seen, 1.0)
        mixed = np.where(seen >= 2, 0.7 * seg_p + 0.3 * p_ng, seg_p)
        total += float(-np.log(np.clip(mixed, 1e-12, 1.0)).sum())
        np.add.at(ctx_table, ctx_key, 1)
        np.add.at(full_table, full_key, 1)
    val_loss = total / total_tokens
    return val_loss, val_loss / math.log(2.0)
"""

HESSIANS = """
def collect_hessians(model, batches, device):
    hessians = {}
    hooks = []
    def make_hook(name):
        def hook(module, inputs, output):
            x = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
            hessians[name] = hessians.get(name, 0) + x.T @ x
        return hook
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(make_hook(name)))
    model.eval()
    with torch.no_grad():
        for x, y in batches:
            model(x, y)
    for h in hooks:
        h.remove()
    return hessians

def batches_of(tokens, count, seq_len):
    for i in range(count):
        local = tokens[i * seq_len : (i + 1) * seq_len + 1].to(torch.int64)
        yield local[:-1][None], local[1:][None]
"""

TWO_PASS = """
def eval_val_two_pass(args, base_model, device, val_tokens, stride):
    total_tokens = val_tokens.numel() - 1
    val_np = val_tokens.cpu().numpy()
    counts = np.zeros((260 * 260,), dtype=np.int64)
    for start in range(0, total_tokens, 4096):
        prev = val_np[start : start + 4096]
        keys = (prev[:-1].astype(np.int64) * 260 + prev[1:]) % 67600
        np.add.at(counts, keys, 1)
    total = 0.0
    for start in range(0, total_tokens, args.train_seq_len):
        local = val_tokens[start : start + args.train_seq_len + 1].to(device, torch.int64)
        x, y = local[:-1], local[1:]
        with torch.no_grad():
            logits = base_model.forward_logits(x[None])[0]
        nll = F.cross_entropy(logits.float(), y, reduction="none").cpu().numpy()
        ids = val_np[start : start + args.train_seq_len + 1].astype(np.int64)
        p = counts[(ids[:-1] * 260 + ids[1:]) % 67600] / total_tokens
        total += float(-np.log(0.9 * np.exp(-nll) + 0.1 * p).sum())
    val_loss = total / total_tokens
    return val_loss, val_loss / math.log(2.0)
"""


def wrap(source: str, how: str = "lzma") -> str:
    """Return the script inside the usual one-line wrapper."""
    if how == "lzma":
        filters = [{"id": lzma.FILTER_LZMA2}]
        packed = base64.b85encode(lzma.compress(source.encode(), format=lzma.FORMAT_RAW, filters=filters)).decode()
        return (
            "import lzma as L,base64 as B\n"
            f'exec(L.decompress(B.b85decode("{packed}"),format=L.FORMAT_RAW,filters=[{{"id":L.FILTER_LZMA2}}]))\n'
        )
    if how == "zlib":
        packed = base64.b64encode(zlib.compress(source.encode(), 9)).decode()
        return f"import zlib\nimport base64\nDATA = '{packed}'\ncode = zlib.decompress(base64.b64decode(DATA)).decode('utf-8')\nexec(compile(code, 'train_gpt.py', 'exec'))\n"
    assert how == "nested"
    return wrap(wrap(source, "zlib"), "lzma")
