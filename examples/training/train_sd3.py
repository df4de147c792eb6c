"""Train a small class-conditional rectified flow in the SD3 architecture on busy textures.

The model works on pixels: a token is a 2x2 patch of a 64x64 picture. The weights in
examples/training/textures took 2.3 minutes on one H100, without the first stage; a CPU takes a day.

    python examples/training/train_sd3.py --minutes 0 2.3 --work /tmp/textures
"""

from crops import Classes, CropStage, CropTraining
from textures.data import photographs
from training import parser, train

from specdiff.models.textures import CLASSES, GUIDANCE_SCALE, SIDE, class_codes

STAGES = (
    CropStage(side=SIDE // 2, batch=256, rate=1.0, ema_decay=0.998),
    CropStage(side=SIDE, batch=128, rate=1.0, ema_decay=0.998),
)
"""Texture is local: small crops teach most of it at a quarter of the cost."""
TEXTURES = Classes(
    "textures", CLASSES, class_codes, GUIDANCE_SCALE, mirrored=lambda name: name != "page"
)


def main() -> None:
    """Parse the command line and train."""
    arguments = parser(__doc__.splitlines()[0], (60.0, 30.0), "textures-run").parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    pictures = [photographs(name) for name in CLASSES]
    train(CropTraining(TEXTURES, pictures, STAGES, arguments), arguments)


if __name__ == "__main__":
    main()
