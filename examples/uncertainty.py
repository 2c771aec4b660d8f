# %% [markdown]
# # Knowing what one does not know
#
# A Bayesian convolutional network on handwritten digits. It is trained without the digits 8 and 9,
# and then asked about all ten: is it as sure as it is right, and does it notice what it has never
# seen? Runs in well under a minute on a CPU. The cells are those of a notebook (VS Code, Spyder, or
# `jupytext --to ipynb examples/uncertainty.py`).
#
# Needs scikit-learn, torchmetrics and matplotlib: `pip install 'fastbconv[train]'`.

# %%
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

import fastbconv as fb

matplotlib.use("Agg")  # draws into files; remove this line in a notebook
import matplotlib.pyplot as plt

torch.manual_seed(0)
torch.set_num_threads(1)  # images of 8 x 8 pixels are too small to share

# %% [markdown]
# ## Data
# 1797 images of 8 x 8 pixels. A quarter is kept for the test.

# %%
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16.0, dtype=torch.float32)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
test, rest = order[: len(order) // 4], order[len(order) // 4 :]
train = rest[labels[rest] < 8]
known, unknown = test[labels[test] < 8], test[labels[test] >= 8]
print(
    f"{len(train)} training images of 0 to 7; test: {len(known)} of 0 to 7, {len(unknown)} of 8, 9"
)

# %% [markdown]
# ## Training
# The loss is the mean negative log likelihood of a batch plus a share of the KL divergence from the
# prior. With a KL weight of 1 it is the negative evidence lower bound; here it is 0.1, which fits
# small data sets better and is called what it is.

# %%
KL_WEIGHT = 0.1
model = nn.Sequential(
    fb.BayesConv2d(1, 16, 3, padding=1, activation="relu"),
    nn.MaxPool2d(2),
    fb.BayesConv2d(16, 32, 3, padding=1, activation="relu"),
    nn.MaxPool2d(2),
    nn.Flatten(),
    fb.BayesLinear(128, 8),
)
optimizer = torch.optim.Adam(fb.param_groups(model, lr=3e-3, rho_lr=1e-2))
EPOCHS, BATCH = 30, 64
for epoch in range(EPOCHS):
    for batch in train[torch.randperm(len(train))].split(BATCH):
        with fb.collect_kl(model) as kl:
            logits = model(images[batch])
        loss = F.cross_entropy(logits, labels[batch]) + KL_WEIGHT * kl.sum() / len(train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 10 == 9:
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, KL {kl.sum().item():.0f} nats")

# %% [markdown]
# ## Prediction
# 64 functions are drawn from the posterior, the same ones for all images, and their *probabilities*
# are averaged. `entropy` is the whole uncertainty, `expected_entropy` what would remain if the
# weights were known, `mutual_information` their difference: what more data could teach.

# %%
prediction = fb.predict(model, images[known], num_samples=64, seed=0)
strange = fb.predict(model, images[unknown], num_samples=64, seed=0)
right = prediction.mean.argmax(1) == labels[known]
nll = F.nll_loss(prediction.mean.log(), labels[known])
print(f"known digits: accuracy {right.double().mean():.1%}, NLL {nll:.3f}")
for name, found in (("known", prediction), ("unseen", strange)):
    print(
        f"{name:>6}: entropy {found.entropy.mean():.3f} nats, of which the weights "
        f"{found.mutual_information.mean():.3f}"
    )

# %% [markdown]
# ## Reliability
# Of the images that the network is 80 % sure of, 80 % should be right. Noise on the images makes
# the question harder.

# %%
noisy = images[known] + 0.4 * torch.randn(images[known].shape)
blurred = fb.predict(model, noisy, num_samples=64, seed=0)
figure, panels = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
edges = torch.linspace(0, 1, 11)
for name, found in (("clean", prediction), ("noise 0.4", blurred)):
    confidence, predicted = found.mean.max(1)
    correct = (predicted == labels[known]).double()
    error = multiclass_calibration_error(found.mean, labels[known], num_classes=8, n_bins=10)
    bins = torch.bucketize(confidence.float(), edges[1:-1])
    filled = [b for b in range(10) if bool((bins == b).any())]
    points = [(confidence[bins == b].mean(), correct[bins == b].mean()) for b in filled]
    panels[0].plot(*zip(*points, strict=True), marker="o", label=f"{name}, error {error:.3f}")
    print(f"{name}: expected calibration error {error:.3f}")
panels[0].plot([0, 1], [0, 1], color="grey", ls="--", lw=1)
panels[0].set(title="reliability", xlabel="confidence", ylabel="accuracy")
panels[0].legend()

# %% [markdown]
# ## What was never seen
# The network has no answer for an 8 or a 9: its entropy should be higher there.

# %%
scores = torch.cat([prediction.entropy, strange.entropy]) / np.log(8)
target = torch.cat([torch.zeros(len(known)), torch.ones(len(unknown))]).long()
auroc = binary_auroc(scores, target).item()
print(f"telling 8 and 9 from the known digits by entropy: AUROC {auroc:.3f}")
bins = np.linspace(0, np.log(8), 25)
for name, found in (("digits 0 to 7", prediction), ("digits 8 and 9", strange)):
    panels[1].hist(found.entropy.numpy(), bins=bins, alpha=0.6, density=True, label=name)
panels[1].set(title=f"entropy, AUROC {auroc:.3f}", xlabel="nats")
panels[1].legend()

# %% [markdown]
# ## Handing over what is uncertain
# If the least certain images go to a person, how good are the answers to the others? Every 8 and 9
# counts as a wrong answer.

# %%
answers = torch.cat([right, torch.zeros(len(unknown), dtype=torch.bool)]).double()
most_certain_first = torch.cat([prediction.entropy, strange.entropy]).argsort()
kept = answers[most_certain_first].cumsum(0) / torch.arange(1, len(answers) + 1)
rejected = 1 - torch.arange(1, len(answers) + 1) / len(answers)
panels[2].plot(rejected, kept)
panels[2].set(title="rejection", xlabel="share handed over", ylabel="accuracy of the rest")
third = kept[int(len(kept) * 2 / 3) - 1].item()
print(f"accuracy on all ten digits {kept[-1]:.1%}; after handing over a third {third:.1%}")

# %%
path = Path("uncertainty.png")
figure.savefig(path)
print(f"saved {path}")
