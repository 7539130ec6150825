"""CTGAN's training (Xu et al. 2019, arXiv:1907.00503): a critic's step in four passes, then one of the generator's."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..critic_step import CriticStep, CriticStepResult
from ..points import PenaltyConfig
from ..training.checkpoint import Tree, load_optimizer, optimizer_state
from ..training.models import PackedCritic
from ..training.randomness import random_state, set_random_state
from .networks import Conditions, Rows, TableGenerator


class StepResult(NamedTuple):
    """What one step measured: detached 0-dim tensors."""

    critic: CriticStepResult
    generator_loss: Tensor


class Training:
    """Trains a pair of networks on the rows of a table, step by step. Draws from PyTorch's default generators.

    Args:
        generator: Makes rows.
        critic: Rates groups of rows beside their conditions.
        conditions: Draws conditions.
        rows: Of the table.
        batch_size: Rows in a batch, whole groups, at most all.
        options: Of both Adams.
        penalty_weight: Of the gradient penalty.
        precision: Of the critic's step.

    Attributes:
        step: Steps taken.
        steps_per_epoch: Batches in as many rows as the table has.
        history: The losses of the critic and the generator, the last ones of every epoch.
    """

    history: list[dict[str, float]]

    def __init__(
        self,
        generator: TableGenerator,
        critic: PackedCritic,
        conditions: Conditions,
        rows: Rows,
        *,
        batch_size: int,
        options: dict[str, Any],
        penalty_weight: float,
        precision: str,
    ) -> None:
        self.generator, self.critic, self.conditions, self.rows = generator, critic, conditions, rows
        self.batch_size, self.steps_per_epoch = batch_size, max(1, len(rows) // batch_size)
        self.step, self.history = 0, []
        penalty = PenaltyConfig(weight=penalty_weight, group_size=critic.group_size)
        self._critic_step = CriticStep(critic, penalty=penalty, precision=precision)  # type: ignore[arg-type]
        self._of_critic = torch.optim.Adam(critic.parameters(), **options, fused=True)
        self._of_generator = torch.optim.Adam(generator.parameters(), **options, fused=True)
        generator.train(), critic.train()

    def __call__(self) -> StepResult:
        """Take one step of both networks."""
        N = self.batch_size
        columns, categories = self.conditions.draw(N)
        with torch.no_grad():
            condition = self.conditions.encoded(columns, categories)
            fake = torch.cat([self.generator.make(condition)[1], condition], dim=1)
        shuffled = torch.randperm(N, device=fake.device)
        result = self._critic_step(self._real(columns[shuffled], categories[shuffled]), fake)
        self._of_critic.step()

        columns, categories = self.conditions.draw(N)
        condition = self.conditions.encoded(columns, categories)
        raw, fake = self.generator.make(condition)
        loss = -self.critic(torch.cat([fake, condition], dim=1)).mean()
        loss = loss + self.conditions.loss(raw, columns, categories)
        self._of_generator.zero_grad()
        loss.backward(inputs=list(self.generator.parameters()))
        self._of_generator.step()
        self.step += 1
        if self.step % self.steps_per_epoch == 0:
            self.history.append({"critic": result.loss.item(), "generator": loss.item()})
        return StepResult(result, loss.detach())

    def state(self) -> Tree:
        """Return what training needs besides the networks to go on bit for bit."""
        return {
            "step": self.step,
            "of_critic": optimizer_state(self._of_critic),
            "of_generator": optimizer_state(self._of_generator),
            "random": random_state(self.rows.values.device),
        }

    def load_state(self, state: Tree) -> None:
        """Go on from what ``state`` returned."""
        self.step = state["step"]
        load_optimizer(self._of_critic, state["of_critic"])
        load_optimizer(self._of_generator, state["of_generator"])
        set_random_state(state["random"], self.rows.values.device)

    def _real(self, columns: Tensor, categories: Tensor) -> Tensor:
        drawn = self.conditions.rows_of(columns, categories)
        return torch.cat([self.rows.take(drawn), self.conditions.encoded(columns, categories)], dim=1)
