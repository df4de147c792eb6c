"""Train a small class-conditional rectified flow in the SD3 architecture on photographs.

It starts from the weights of the textures model, which knows what photographs look like close by,
and learns other classes: crops that show most of a photograph. Stop it at any time and go on with
--resume; the checkpoint holds weights, averages, optimizers, random state and progress.

    python examples/training/train_photos.py --minutes 10 32 --work /tmp/photos-run
    python examples/training/train_photos.py --minutes 10 92 --work /tmp/photos-run --resume
"""

from pathlib import Path

from crops import Classes, CropStage, CropTraining
from photos.data import photographs
from safetensors.torch import load_file
from training import parser, train

from specdiff.models.photos import CLASSES, GUIDANCE_SCALE, class_codes
from specdiff.models.textures import SIDE

STAGES = (
    CropStage(side=3 * SIDE // 4, batch=16, rate=1.0, ema_decay=0.98),
    CropStage(side=SIDE, batch=8, rate=1.0, ema_decay=0.98),
)
"""A crop of 48 pixels costs 40 % of one of 64: attention grows with the square of the tokens."""
PHOTOS = Classes("photos", CLASSES, class_codes, GUIDANCE_SCALE)
START = Path(__file__).parent / "textures" / "textures.safetensors"


def main() -> None:
    """Parse the command line and train."""
    options = parser(__doc__.splitlines()[0], (10.0, 32.0), "photos-run")
    options.add_argument("--start", type=Path, default=START, help="weights to start from")
    options.add_argument("--cache", type=Path, default=Path("photos-cache"))
    arguments = options.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    training = CropTraining(PHOTOS, photographs(arguments.cache), STAGES, arguments)
    weights = load_file(arguments.start)
    training.model.load_state_dict(weights)
    training.average.load_state_dict(weights)
    train(training, arguments)


if __name__ == "__main__":
    main()
