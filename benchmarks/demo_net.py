"""The network of the demo, as a file of one's own: `lowbit train --model benchmarks/demo_net.py:ResNet18`."""

from lowbit.train.models.resnet import ResNet


class ResNet18(ResNet):
    """ResNet-18 that halves a picture in each of its four groups: 28 pixels become 14, 7, 4 and 2.

    Args:
        classes: outputs.
        shape: channels, height and width of one picture.
    """

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__(depths=(2, 2, 2, 2), width=64, classes=classes, channels=shape[0], strides=(2, 2, 2, 2))
