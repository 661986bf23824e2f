"""How likely a policy is to draw a good cell, exactly: the law of all 15,625 cells under its own sampler.

    python scripts/cells_law.py --config cells_dgpo --above 0.85 0.93 --guide 0 10 30 MODEL MODEL ...

--guide gives the law of samples that are guided by a predictor, a line for every scale. The predictor is fitted to 500
labelled cells (`rl.tasks.cells.CellPredictor`).
"""

import argparse

import numpy as np
import torch

from rl.config import load_config
from rl.modalities.base import open_modality
from rl.modalities.graph_engine import GraphTrajectory
from rl.modalities.graph_law import finished_law
from rl.modalities.graph_search import tilted
from rl.tasks.cells import CellPredictor, accuracy
from rl.tasks.load import load_task

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("models", nargs="+", metavar="MODEL", help="folder of a model")
parser.add_argument("--config", default="cells_dgpo")
parser.add_argument("--above", type=float, nargs="+", default=[0.85, 0.93])
parser.add_argument("--guide", type=float, nargs="+", default=[0.0])
args = parser.parse_args()

config = load_config(args.config)
steps = config.sampler.num_inference_steps
modality = open_modality(config, load_task(config.task.name, config.task.params))
predictor = CellPredictor()
print("mean: expected accuracy; cells: exp(entropy) of the law; >= L: probability of an accuracy of at least L")
print("\t".join(["model", "scale", "mean", "cells", *(f">= {level:g}" for level in args.above)]))
for path in args.models:
    model = modality.load_model(path)
    for scale in args.guide:

        def step(state: torch.Tensor, t: int, model=model, scale=scale) -> torch.Tensor:
            times = torch.full((len(state),), t)
            clean = model(state, times / steps, torch.zeros_like(times)).double().softmax(-1)
            if scale:
                with torch.enable_grad():
                    leaf = clean.requires_grad_(True)
                    (slope,) = torch.autograd.grad(predictor.on_graphs(leaf).sum(), leaf)
                clean = tilted(clean.detach(), slope, scale)
            return model.posterior(clean, state, times, steps)

        states, law = finished_law(model, steps, step)
        graphs = modality.completions([GraphTrajectory(state[None].numpy(), np.zeros(0), 0) for state in states])
        value, share = np.array(accuracy(graphs, config.task.params.get("metric", "baseline_accuracy"))), law.numpy()
        spread = np.exp(-(share * np.log(np.maximum(share, 1e-300))).sum())
        above = [share[value >= level].sum() for level in args.above]
        print("\t".join([path, f"{scale:g}", f"{share @ value:.4f}", f"{spread:.0f}", *(f"{s:.4f}" for s in above)]))
