"""The main job, ``python -m fastbconv train``: a Bayesian CNN from data to report.

Everything it needs of the library is public: it trains with ``fastbconv.BayesConv2d``,
``fastbconv.BayesLinear``, ``fastbconv.collect_kl`` and ``fastbconv.fixed_sample`` alone.
"""

import importlib.util


def _check_extra() -> None:
    """Says what is missing before an hour of training, not after it."""
    for name in ("sklearn", "torchmetrics", "tqdm", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


_check_extra()
