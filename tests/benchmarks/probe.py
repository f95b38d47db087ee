"""The defaults with rho 0 against a linear probe on frozen features: python -m tests.benchmarks.probe FOLDER...

For each data set: the features of the pretrained body at the same image size, scikit-learn's logistic regression on
them, and a run of `samtune run --rho 0` with default options. Both learn from the same training rows and are scored on
the same test images. The probe is given twice: with scikit-learn's default strength (C = 1), and with the C of
{0.01, 0.1, 1, 10} that is best on the run's validation rows. The last column is the train loss after one epoch of a
one-epoch run, over ln(classes): what is above 1 has collapsed.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from samtune.config import loading
from samtune.data import source
from samtune.data.cache import Images
from samtune.data.loader import eval_batches
from samtune.data.splits import train_and_validation
from samtune.data.transforms import EvalTransform, normalize
from samtune.models.build import build_model
from samtune.report.run_report import score_line
from samtune.train import loop
from samtune.train.eval_checkpoint import evaluate_checkpoint

MODEL = "tf_efficientnet_lite0"


@torch.inference_mode()
def features(model, split, rows, data_config):
    """(n, features) of the frozen body and (n,) labels."""
    batches = eval_batches(Images(split), rows, EvalTransform(data_config), batch_size=64, workers=0, pin_memory=False)
    pairs = [
        (model.forward_head(model.forward_features(normalize(x, data_config)), pre_logits=True), y) for x, y in batches
    ]
    return torch.cat([x for x, _ in pairs]).numpy(), torch.cat([y for _, y in pairs]).numpy()


def probe_errors(data, settings, img_size):
    """Test error in percent of a logistic regression with C = 1, and with C chosen on validation, and that C."""
    model, info = build_model(MODEL, classes=None, img_size=img_size)
    model.eval()
    fraction, seed = settings.val_fraction, settings.split_seed
    train_split, train_rows, val_split, val_rows = train_and_validation(data, fraction, seed)
    test_split = data.splits["test"]
    x, y = features(model, train_split, train_rows, info.data_config)
    x_val, y_val = features(model, val_split, val_rows, info.data_config)
    x_test, y_test = features(model, test_split, np.arange(len(test_split)), info.data_config)
    fitted = {c: LogisticRegression(C=c, max_iter=3000).fit(x, y) for c in (0.01, 0.1, 1.0, 10.0)}
    best = max(fitted, key=lambda c: fitted[c].score(x_val, y_val))
    error = {c: 100 * (fit.predict(x_test) != y_test).mean() for c, fit in fitted.items()}
    return error[1.0], error[best], best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help="names or folders, as --dataset takes them")
    parser.add_argument("--img-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    results = []
    for dataset in options.datasets:
        data = source.open_source(dataset)
        flags = {"model": MODEL, "dataset": dataset, "img_size": options.img_size, "rho": 0.0}
        with tempfile.TemporaryDirectory() as folder:
            settings = loading.load(None, flags | {"epochs": options.epochs, "output": Path(folder) / "long"})
            probe, tuned_probe, c = probe_errors(data, settings, options.img_size)
            report = loop.run(settings)
            loop.run(loading.load(None, flags | {"epochs": 1, "test": False, "output": Path(folder) / "one"}))
            first, _ = evaluate_checkpoint(
                Path(folder) / "one", name=None, split="train", dataset=None, progress=lambda *_: None
            )
        results.append(
            {
                "dataset": data.name,
                "train": report["dataset"]["train"],
                "probe_error": probe,
                "tuned_probe_error": tuned_probe,
                "tuned_probe_c": c,
                "test": report["test"],
                "train_seconds": report["train_seconds"],
                "loss_after_epoch_1": first.summary()["loss"] / math.log(len(data.class_names)),
            }
        )
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print("| data set | train | probe, C = 1 | probe, C on val | fine-tuned, rho 0 | seconds | epoch 1 loss / ln C |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        probes = f"{r['probe_error']:.1f} % | {r['tuned_probe_error']:.1f} % (C {r['tuned_probe_c']:g})"
        ours = f"{score_line(r['test'])} | {r['train_seconds']:.0f} | {r['loss_after_epoch_1']:.2f}"
        print(f"| {r['dataset']} | {r['train']} | {probes} | {ours} |")


if __name__ == "__main__":
    main()
