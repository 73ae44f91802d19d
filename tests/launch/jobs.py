"""The smallest real job, for tests that start one."""

SMALLEST = [
    "data=synthetic",
    "data.tokens=20000",
    "data.val_tokens=256",
    "data.batch_tokens=256",
    "model.n_layer=1",
    "model.d_model=32",
    "model.n_head=2",
    "model.context=32",
    "schedule.steps=2",
    "device=cpu",
]
