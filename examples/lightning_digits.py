"""A Bayesian convolutional network in PyTorch Lightning, on scikit-learn's digits.

    pip install pytorch-lightning scikit-learn
    python examples/lightning_digits.py --epochs 20

Nothing is special about a Bayesian layer here: the loss of a step is the mean NLL of the batch plus
KL / number of training examples, whichever strategy the trainer uses. With several devices the KL
is in every process's loss, gradients are averaged, and so it counts once; weight noise differs
between processes.
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fastbconv as fb


class BayesianClassifier(pl.LightningModule):
    """A classifier of 8x8 images.

    Args:
        n_data: number of training examples, which the KL is divided by.
        lr: learning rate of Adam.
        beta: weight of the KL; 1 is the evidence lower bound.
    """

    def __init__(self, n_data: int, lr: float = 2e-3, beta: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(
            fb.BayesConv2d(1, 32, 3, padding=1, activation="relu", prior=(0.0, 0.25)),
            fb.BayesConv2d(32, 64, 3, stride=2, padding=1, activation="relu", prior=(0.0, 0.25)),
            nn.Flatten(),
            fb.BayesLinear(64 * 16, 10, prior=(0.0, 0.25)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits under one draw of the weights."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Mean NLL + beta * KL / n_data; the KL comes out of the forward pass."""
        images, labels = batch
        with fb.collect_kl(self.model) as kl:
            nll = F.cross_entropy(self(images), labels)
        self.log_dict({"nll": nll, "kl": kl.sum()})
        return nll + self.hparams.beta * kl.sum() / self.hparams.n_data

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Accuracy of the mean probability under 8 functions, the same for every batch."""
        images, labels = batch
        probability = torch.zeros(len(labels), 10, device=self.device)
        for sample in range(8):
            with fb.fixed_sample(self.model, sample):
                probability += self(images).softmax(dim=1) / 8
        self.log("accuracy", (probability.argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam; posterior parameters are never decayed."""
        return torch.optim.Adam(fb.param_groups(self.model, self.hparams.lr))


def main() -> None:
    """Trains, and prints the accuracy on held-out digits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs
    pl.seed_everything(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    data = TensorDataset(images, torch.from_numpy(digits.target))
    train, validation = random_split(data, [0.8, 0.2])
    trainer = pl.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(
        BayesianClassifier(n_data=len(train)),
        DataLoader(train, batch_size=64, shuffle=True),
        DataLoader(validation, batch_size=256),
    )
    print(f"accuracy {trainer.callback_metrics['accuracy']:.4f}")


if __name__ == "__main__":
    main()
