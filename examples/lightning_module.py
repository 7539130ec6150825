"""WGAN-GP in Lightning, with manual optimisation.

pip install 'wgan_fast[train,integrations]'
python examples/lightning_module.py
"""

import lightning
import torch
from plain_loop import LATENT, WEIGHT, networks, report
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import wgan_fast
from wgan_fast.training.data import load_data


class WGAN(lightning.LightningModule):
    def __init__(self, n_critic: int = 5) -> None:
        super().__init__()
        self.automatic_optimization = False  # two optimizers, used at different rates
        self.generator, self.critic = networks()
        self.n_critic = n_critic

    def training_step(self, batch: tuple[Tensor], batch_index: int) -> None:
        generator_optimizer, critic_optimizer = self.optimizers()
        (real,) = batch
        noise = torch.randn(len(real), LATENT, device=self.device)
        fake = self.generator(noise).detach()
        loss = self.critic(fake).mean() - self.critic(real).mean()
        loss = loss + wgan_fast.gradient_penalty(self.critic, real, fake, weight=WEIGHT)
        critic_optimizer.zero_grad()
        self.manual_backward(loss)
        critic_optimizer.step()
        self.log("critic_loss", loss)
        if (batch_index + 1) % self.n_critic == 0:
            loss = -self.critic(self.generator(noise)).mean()
            generator_optimizer.zero_grad()
            self.manual_backward(loss)
            generator_optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.9))
                for network in (self.generator, self.critic)]  # fmt: skip


def fit(points: Tensor, steps: int) -> WGAN:
    loader = DataLoader(TensorDataset(points), batch_size=256, shuffle=True, drop_last=True)
    module = WGAN()
    trainer = lightning.Trainer(
        max_steps=6 * steps,  # Lightning counts the steps of every optimizer
        devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module


if __name__ == "__main__":
    lightning.seed_everything(0)
    data = load_data("8gaussians")
    module = fit(data.train.take(10_240), steps=1000)
    print(report(module.generator.cpu(), data))
