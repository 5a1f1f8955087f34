"""An export folder, as sampling and distilling take it, from any checkpoint of a run that may still be training.

python train/export.py run=runs/mine/stage1                       # the newest whole checkpoint
python train/export.py run=runs/mine/stage1 step=4000 out=early   # another
"""

from conf.cli import run
from train.exporting import ExportConfig, export_checkpoint

if __name__ == "__main__":
    run(ExportConfig, "train/export", export_checkpoint)
