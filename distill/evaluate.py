"""How good is it?  `python distill/evaluate.py pred=runs/chairs truth=views/chairs out=evaluation`.

pred, truth: a mesh, a folder of one object, or a folder of objects of the same names; views, meshes, or both.
Writes evaluation.json and evaluation.html.  preset=syncdreamer_gso or eschernet_gso measures as those papers do.
Every key: distill/evaluation/config.py.
"""

from conf.cli import run
from distill.evaluation.config import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    # Imported here, so that --help and a wrong configuration do not wait for torchmetrics.
    from distill.evaluation.evaluation import evaluate

    evaluate(config)


if __name__ == "__main__":
    run(EvaluateConfig, "distill/evaluate", main)
