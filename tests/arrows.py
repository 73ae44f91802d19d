"""Who may import whom: the table that tests/test_house.py holds every import against."""

# Who may import whom. A unit is a folder of the package, a folder in optim/, or a file in optim/;
# the longest name that fits wins. geon.errors and the unit itself are always allowed.
PARTS = "adamw baselines builder costs declare entries families foreign groups health hybrid linalg"
PARTS += " last_layers matrices place readings roles rounding router routing row_adam rule"
PARTS += " state step storage tree finishes manifolds modular norms polar shard solvers views words"
PARTS = " ".join(f"optim.{part}" for part in PARTS.split())
ARROWS = {
    "geon": "",
    "geon.errors": "",
    **dict.fromkeys(("optim.costs", "optim.entries", "optim.views"), ""),
    "optim.health": "optim.shard",
    "optim.linalg": "",
    "optim.polar": "optim.costs optim.linalg",
    "optim.norms": "optim.costs optim.linalg optim.polar",
    "optim.manifolds": "optim.costs optim.linalg optim.polar",
    "optim.finishes": "optim.costs optim.linalg optim.norms optim.manifolds",
    "optim.solvers": "optim.costs optim.linalg optim.norms optim.manifolds optim.polar",
    "optim.rule": "optim.costs optim.norms optim.manifolds optim.finishes optim.solvers",
    "optim.modular": "optim.manifolds optim.norms optim.polar optim.roles optim.solvers optim.tree",
    "optim.shard": "optim.costs optim.norms optim.views",
    "optim.roles": "optim.views",
    "optim.router": "optim.roles",
    "optim.declare": "optim.roles",
    "optim.tree": "",
    "optim.place": "optim.tree",
    "optim.families": "optim.declare optim.place optim.roles optim.tree",
    "optim.last_layers": "optim.place optim.tree",
    "optim.foreign": "optim.declare optim.families optim.last_layers optim.place optim.roles"
    " optim.tree",
    "optim.words": "configs.choices configs.recipes optim.adamw optim.baselines optim.entries"
    " optim.finishes optim.linalg optim.manifolds optim.norms optim.polar optim.row_adam"
    " optim.rule optim.solvers",
    "optim.routing": "configs.choices configs.recipes optim.entries optim.groups optim.matrices"
    " optim.modular optim.roles optim.router optim.rule optim.words",
    "optim.builder": "configs.choices configs.recipes optim.foreign optim.groups optim.hybrid"
    " optim.modular optim.roles optim.routing optim.shard optim.tree",
    **dict.fromkeys(("optim.adamw", "optim.row_adam"), "optim.entries optim.norms optim.step"),
    "optim.baselines": "optim.entries",
    "optim.readings": "optim.rule optim.solvers",
    "optim.rounding": "optim.shard optim.tree",
    "optim.step": "optim.entries optim.health optim.readings optim.rounding optim.rule"
    " optim.shard optim.views",
    "optim.storage": "optim.shard optim.step",
    "optim.state": "optim.entries optim.roles optim.rounding optim.rule optim.step optim.storage",
    "optim.matrices": "optim.costs optim.entries optim.norms optim.roles optim.rule optim.shard",
    "optim.groups": "optim.entries optim.matrices optim.norms optim.roles optim.rule optim.shard"
    " optim.step optim.storage",
    "optim.hybrid": "optim.entries optim.groups optim.health optim.linalg optim.matrices"
    " optim.readings optim.roles optim.rule optim.shard optim.state optim.step optim.storage",
    "optim": PARTS,
    "models": "optim.modular optim.roles",
    "data": "",
    "configs": "",
    "engine": f"geon optim {PARTS} models data configs.changes configs.choices configs.recipes"
    " configs.schema launch.env launch.signals",
    "launch": "",
    "geon.train": "configs configs.schema engine launch launch.env launch.signals",
    "geon.__main__": "launch",
    "train.py": "train",
}
ALONE = {f"configs.{name}" for name in ("changes", "choices", "recipes", "schema")}
ALONE |= {"launch.env", "launch.signals"}
LAZY_ARROWS = {"launch": "configs configs.changes configs.schema", "configs": "models"}
ONLY_NAMES = {("optim.shard", "optim.norms"): {"Reach"}}

OTHERS = {  # other packages at the top of a file; inside of functions LAZY_OTHERS too
    "optim": "torch",
    "models": "torch",
    "data": "torch numpy",
    "configs": "hydra omegaconf yaml",
    "engine": "torch numpy omegaconf tqdm",
}
OTHERS_BY_FILE = {"data/bpe.py": "tokenizers", "engine/plots.py": "matplotlib"}
LAZY_OTHERS = {
    "optim": "pytorch_optimizer",
    "models": "transformers safetensors",
    "configs": "torch",
    "data": "datasets huggingface_hub matplotlib pyarrow tiktoken zstandard",
    "engine": "wandb deepspeed matplotlib transformers safetensors",
    "launch": "hydra omegaconf",
    "geon": "hydra",
}
HEAVY = "wandb deepspeed matplotlib tokenizers datasets pytorch_optimizer torch.utils.tensorboard"
