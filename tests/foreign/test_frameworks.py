"""A run that is stopped and resumed in a framework is the run that was not, to the last bit."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from geon.optim import build
from tests.distributed.jobs import by_rank

# Frameworks are imported where they are used: the ranks of frameworks_job.py need one of them.

KINDS = ["adamw of torch", "hybrid", "muon"]
STEPS, STOP = 6, 3
every_kind = pytest.mark.parametrize("kind", KINDS)


def optimizer_of(kind, model):
    if kind == "adamw of torch":
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return build(model, kind, verbose=False)


def one_cycle(optimizer):
    """A scheduler that also moves the momenta, and AdamW's first beta."""
    return OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], STEPS + 1)


def gpt2(seed):
    """Conv1D, tied, with dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    tokens = {"vocab_size": 32, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, **tokens))


def llama(seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape, **heads))


def batches(count):
    """Tokens of each step, the same in every run."""
    return torch.randint(0, 32, (count, 4, 8), generator=torch.Generator().manual_seed(7))


def snap(model, optimizer):
    """Everything that the next step depends on: weights, state, rates and momenta."""
    found = {f"weight of {n}": p.detach().clone() for n, p in model.named_parameters()}
    said = optimizer.state_dict()
    for key, state in said["state"].items():
        found |= {f"{name} of {key}": value.clone() for name, value in state.items()}
    for key, group in enumerate(said["param_groups"]):
        numbers = {name: group[name] for name in ("lr", "momentum", "betas") if name in group}
        found |= {f"{n} of group {key}": torch.tensor(x).double() for n, x in numbers.items()}
    return found


def same(one, two):
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def moved(model, stopped):
    """Whether every weight that takes gradients was trained on after the stop."""
    pairs = zip(model.named_parameters(), stopped.parameters(), strict=True)
    return [name for (name, one), two in pairs if one.requires_grad and torch.equal(one, two)] == []


@every_kind
@pytest.mark.parametrize("given", ["optimizers", "optimizer_cls_and_kwargs"])
def test_trainer_of_transformers(kind, given, tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in batches(2 * STEPS).flatten(0, 1)]

    def trainer(seed):
        model = gpt2(seed)
        if given == "optimizers":
            how = {given: (optimizer_of(kind, model), None)}
        elif kind == "adamw of torch":
            how = {given: (torch.optim.AdamW, {"lr": 0.01})}
        else:
            how = {given: (build, {"recipe": kind, "verbose": False})}
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=STEPS,
            save_steps=STOP,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=data, **how)

    whole, resumed = trainer(0), trainer(1)
    whole.train()
    checkpoint = tmp_path / f"checkpoint-{STOP}"
    resumed.train(resume_from_checkpoint=checkpoint)
    same(snap(whole.model, whole.optimizer), snap(resumed.model, resumed.optimizer))
    assert moved(whole.model, type(whole.model).from_pretrained(checkpoint))


@every_kind
@pytest.mark.parametrize("name", ["polynomial", "cosine_with_min_lr"])
def test_schedules_that_ask_an_optimizer_for_its_rate(name, kind):
    from transformers import get_scheduler

    model = gpt2(0)
    optimizer = optimizer_of(kind, model)
    options = {"min_lr": 1e-4} if name == "cosine_with_min_lr" else {}
    scheduler = get_scheduler(name, optimizer, 0, STEPS, options)
    for tokens in batches(STOP):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        scheduler.step()
    shares = [group["lr"] / group["initial_lr"] for group in optimizer.param_groups]
    assert shares == pytest.approx([shares[0]] * len(shares))
    assert 0.3 < shares[0] < 0.7


@every_kind
def test_accelerate(kind, tmp_path):
    from accelerate import Accelerator

    def run(seed, resumed=False):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = gpt2(seed)
        optimizer = optimizer_of(kind, model)
        scheduler = one_cycle(optimizer)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        if resumed:
            accelerator.load_state(tmp_path)
        for micro, tokens in enumerate(batches(2 * STEPS)):
            if resumed and micro < 2 * STOP:
                continue
            if micro == 2 * STOP and not resumed:
                accelerator.save_state(tmp_path)
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        return snap(model, optimizer)

    same(run(0), run(1, resumed=True))


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2")
    return by_rank(2, "../foreign/frameworks_job.py", [str(folder)], timeout=240)


@pytest.mark.dist
@every_kind
def test_accelerate_with_fsdp2(kind, on_two_ranks):
    for rank in on_two_ranks:
        assert rank[kind]["differ"] == []
        assert rank[kind]["far"] < 1e-4  # from one process: rounding, which polar factors amplify


@pytest.mark.dist
@every_kind
def test_fsdp2_of_accelerate_frees_the_whole_weights(kind, on_two_ranks):
    """They may not fit on one device."""
    for rank in on_two_ranks:
        assert rank[kind]["kept"] == 0


@every_kind
def test_lightning(kind, tmp_path):
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self, seed):
            super().__init__()
            self.model = llama(seed)

        def training_step(self, batch, index):
            # Lightning begins its loader anew when it resumes, so that order is none of ours.
            tokens = batches(STEPS)[self.global_step]
            return self.model(input_ids=tokens, labels=tokens).loss

        def configure_optimizers(self):
            optimizer = optimizer_of(kind, self.model)
            scheduler = {"scheduler": one_cycle(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def run(seed, **resume):
        module = Module(seed)
        trainer = lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_steps=STEPS,
            gradient_clip_val=1.0,
            callbacks=[
                ModelCheckpoint(
                    tmp_path, "{step}", every_n_train_steps=STOP, save_top_k=-1, save_last=False
                )
            ],
        )
        trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(STEPS)), **resume)
        assert trainer.global_step == STEPS
        return snap(module.model, trainer.optimizers[0])

    resume = {"ckpt_path": tmp_path / f"step={STOP}.ckpt", "weights_only": True}
    same(run(0), run(1, **resume))


class LayerNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd = n_head, n_embd

    def forward(self, x):
        parts = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (p.unflatten(2, (self.n_head, -1)).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(n_embd), CausalSelfAttention(n_embd, n_head)
        self.ln_2, self.mlp = LayerNorm(n_embd), MLP(n_embd)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The module tree of nanoGPT."""

    def __init__(self, seed, n_layer=2, n_embd=16):
        super().__init__()
        torch.manual_seed(seed)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(32, n_embd),
                "wpe": nn.Embedding(8, n_embd),
                "h": nn.ModuleList([Block(n_embd, n_head=2) for _ in range(n_layer)]),
                "ln_f": LayerNorm(n_embd),
            }
        )
        self.lm_head = nn.Linear(n_embd, 32, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for name, param in self.named_parameters():
            if param.dim() == 2:
                deep = math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(param, std=0.02 / deep)

    def forward(self, tokens):
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("kind", [*KINDS, "manifold_muon"])
def test_loop_of_nanogpt(kind, tmp_path):
    """Weights are loaded before the optimizer is made, which leaves them alone."""
    torch._dynamo.reset()
    data = batches(2 * STEPS).view(STEPS, 2, 4, 8)

    def run(seed, of_compiled, resumed=False):
        raw, begin = GPT(seed), 0
        if resumed:
            checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
            begin = checkpoint["iter_num"]
            weights = checkpoint["model"].items()
            raw.load_state_dict({key.removeprefix("_orig_mod."): w for key, w in weights})
        model = torch.compile(raw, backend="aot_eager")
        optimizer = optimizer_of(kind, model if of_compiled else raw)
        rates = [group["lr"] for group in optimizer.param_groups]  # each rule has its own
        if resumed:
            optimizer.load_state_dict(checkpoint["optimizer"])
        for step in range(begin, STEPS):
            if step == STOP and not resumed:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "iter_num": step}, tmp_path / "ckpt.pt")
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / STEPS)
            for tokens in data[step]:
                (model(tokens) / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return snap(raw, optimizer)

    whole = run(0, of_compiled=True)
    same(whole, run(1, of_compiled=True, resumed=True))
    same(whole, run(2, of_compiled=False, resumed=True))


@every_kind
def test_lora_of_peft(kind, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    matrices = ["c_attn", "c_proj", "c_fc"]
    lora = LoraConfig(r=4, target_modules=matrices, lora_dropout=0.1, fan_in_fan_out=True)

    def run(model, begin):
        optimizer = optimizer_of(kind, model)
        if begin:
            optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        for step in range(begin, STEPS):
            if step == STOP and not begin:
                model.save_pretrained(tmp_path)
                torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
            torch.manual_seed(step)  # of the dropout
            tokens = batches(STEPS)[step]
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    model, optimizer = run(get_peft_model(gpt2(0), lora), 0)
    stopped = PeftModel.from_pretrained(gpt2(0), tmp_path, is_trainable=True)
    assert moved(model, stopped)
    frozen = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    assert all(torch.equal(param, stopped.get_parameter(name)) for name, param in frozen.items())
    assert all(param.grad is None and param not in optimizer.state for param in frozen.values())
    same(snap(model, optimizer), snap(*run(stopped.train(), STOP)))
