# ruff: noqa: E501
"""Shapes of real scripts that are legal and easily misread: adapters per document, evaluators passed as values, nested calls."""

from __future__ import annotations

import pytest

from bytejepa.review import Status, Word, review
from review.folders import Folder
from review.scripts import SLIDING, script

LORA = """
class Adapter(nn.Module):
    def __init__(self, batch, dim, rank):
        super().__init__()
        self.a = nn.Parameter(torch.empty(batch, rank, dim))
        self.b = nn.Parameter(torch.zeros(batch, dim, rank))
    def forward(self, x):
        return (x @ self.a.transpose(1, 2)) @ self.b.transpose(1, 2)
    def reset(self):
        with torch.no_grad():
            self.a.uniform_(-0.1, 0.1)
            self.b.zero_()

def find_docs(all_tokens):
    bos = (all_tokens == 1).nonzero(as_tuple=True)[0].numpy()
    docs = []
    for i in range(len(bos)):
        start = int(bos[i])
        end = int(bos[i + 1]) if i + 1 < len(bos) else all_tokens.numel()
        docs.append((start, end - start))
    return docs

def eval_val_ttt_lora(args, base_model, device, val_tokens):
    docs = find_docs(val_tokens)
    base_model.eval()
    for p in base_model.parameters():
        p.requires_grad_(False)
    adapter = Adapter(8, args.model_dim, 4)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)
    loss_sum = torch.zeros((), dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    for bi in range(0, len(docs), 8):
        batch = docs[bi : bi + 8]
        adapter.reset()
        num_chunks = [(length + 255) // 256 for _, length in batch]
        for ci in range(max(num_chunks)):
            x = torch.zeros(len(batch), 256, dtype=torch.int64)
            y = torch.zeros(len(batch), 256, dtype=torch.int64)
            for b, (start, length) in enumerate(batch):
                first = start + ci * 256
                chunk = val_tokens[first : min(first + 256, start + length) + 1]
                x[b, : chunk.numel() - 1] = chunk[:-1]
                y[b, : chunk.numel() - 1] = chunk[1:]
            needs_train = any(ci < n - 1 for n in num_chunks)
            if needs_train:
                per_token = base_model(x, y, lora=adapter)
            else:
                with torch.no_grad():
                    per_token = base_model(x, y, lora=adapter)
            with torch.no_grad():
                for b in range(len(batch)):
                    loss_sum += per_token[b].double().sum()
                    count += 256
            if needs_train:
                optimizer.zero_grad()
                per_token.mean(dim=-1).sum().backward()
                optimizer.step()
    val_loss = (loss_sum / count).item()
    return val_loss, val_loss / math.log(2.0)
"""
TIMED = """
class ValidationData:
    def __init__(self, h, device):
        self.val_tokens = load_validation_tokens(h.val_files, h.train_seq_len)

def timed_eval(label, fn, *args, **kwargs):
    val_loss, val_bpb = fn(*args, **kwargs)
    print(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    return val_loss, val_bpb
"""
STATEFUL = """
def eval_stream(args, model, loader):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    total = torch.zeros(())
    for _ in range(100):
        x, y = loader.next_batch(1024, args.train_seq_len)
        with torch.no_grad():
            total += model(x, y)
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()
    return total.item(), total.item() / math.log(2.0)
"""
LEGAL = {
    "adapters_per_document": script(functions=LORA, final_eval="val_loss, val_bpb = eval_val_ttt_lora(args, base_model, device, val_tokens)"),
    "timed": script(functions=TIMED, final_eval="data = ValidationData(args, device)\n    val_loss, val_bpb = timed_eval('sliding', eval_val_sliding, args, base_model, device, data.val_tokens, args.eval_stride)"),
    "stateful_loader": script(functions=STATEFUL, final_eval="val_loss, val_bpb = eval_stream(args, base_model, Loader(args.val_files, device))"),
    "bytes_of_ids": script(functions="def counts(lut, ids):\n    return lut[ids].sum()\n", final_eval="lut = torch.zeros(260)\n    print(counts(lut, val_tokens[1:]))\n    " + SLIDING),
    "wandb_off": script(imports="USE_WANDB = bool(int(os.environ.get('USE_WANDB', '0')))", before_eval="if USE_WANDB:\n        import wandb; wandb.init()"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_legal_shapes_look_clean(name: str, tmp_path) -> None:
    found = review(Folder(source=LEGAL[name]).write(tmp_path / "submission"))
    against = [(f.check, f.summary, [str(e) for e in f.evidence]) for f in found.findings if f.status is Status.FAIL]
    assert found.verdict.word is Word.CLEAN, against


def test_adapters_trained_before_their_document_is_scored_are_flagged(tmp_path) -> None:
    early = LORA.replace(
        "            with torch.no_grad():\n                for b in range(len(batch)):",
        "            if needs_train:\n                optimizer.zero_grad()\n                per_token.mean().backward()\n                optimizer.step()\n                per_token = base_model(x, y, lora=adapter)\n            with torch.no_grad():\n                for b in range(len(batch)):",
    )
    source = script(
        functions=early, final_eval="val_loss, val_bpb = eval_val_ttt_lora(args, base_model, device, val_tokens)"
    )
    found = review(Folder(source=source).write(tmp_path / "submission"))
    assert found.verdict.word is Word.FLAG
