"""What steps a param group entry by entry, or by another package: the other kind of rule."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from geon.errors import UsageError

State = dict[str, Any]
"""State of one parameter."""


class EntryRule(ABC):
    """Steps the parameters of a group by itself, where they lie, from their gradients."""

    cuts: bool = True
    """Whether it may step pieces of parameters (FSDP2, tensor parallelism, DeepSpeed)."""
    whole_rows: bool = False
    """Whether such pieces must be whole rows of a matrix."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the rule: state can be carried over between rules of one name."""

    @property
    def hyper(self) -> dict[str, Any]:
        """Numbers that a param group holds, and that take effect when they are changed there."""
        return {}

    def check(self, numbers: Mapping[str, Any]) -> None:
        """Refuse numbers that a param group holds, before anything is stepped.

        Raises:
            UsageError: a number out of range.
        """
        return

    def begin(self, group: str, params: Sequence[Tensor], lr: float) -> None:
        """An optimizer takes a group of this rule: the moment to refuse what could not be stepped.

        Raises:
            UsageError: says what is missing or wrong.
        """
        return

    @abstractmethod
    def new_state(self, param: Tensor) -> State:
        """State of a parameter before its first step; a DTensor's is made of DTensors."""

    @abstractmethod
    def step(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
    ) -> None:
        """Update parameters and states in place; numbers of its own may be kept in the group.

        params: those of the group that have a gradient. grads: this rank's pieces of them.
        """

    @abstractmethod
    def describe(self) -> str:
        """Describe the rule in one line, for tables."""


def check_averages(rule: str, numbers: Mapping[str, Any]) -> None:
    """Refuse betas outside [0, 1), and eps or weight_decay below 0 or infinite.

    Raises:
        UsageError: names the rule and the number.
    """
    for beta in numbers["betas"]:
        if not 0.0 <= beta < 1.0:
            raise UsageError(f"{rule} betas {numbers['betas']}: each must be in [0, 1)")
    for key in ("eps", "weight_decay"):
        if not 0.0 <= numbers.get(key, 0.0) < float("inf"):
            raise UsageError(f"{rule} {key} {numbers[key]} must be 0 or more")
